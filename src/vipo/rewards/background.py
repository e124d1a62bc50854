"""When the rewards of a rollout are computed: after it, or beside it in one thread. The same calls, so the same bits.

A rollout asks for the scores of each micro-batch as it is decoded. `afterwards` computes them when they are wanted,
`Background` at once, in the order of asking, while the next micro-batch is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..offload import Offload, visiting
from . import Scores
from .mixture import RewardMixture

Answer = Callable[[], Scores]
"""Waits for the scores of one micro-batch."""


class Scoring:
    """The scores that one rollout has asked for.

    Args:
        begin: (frames (n, F, 3, Y, X), n prompts) -> their answer.
    """

    def __init__(self, begin: Callable[[Tensor, Sequence[str]], Answer]) -> None:
        self.begin = begin
        self.answers: list[Answer] = []

    def ask(self, frames: Tensor, prompts: Sequence[str]) -> None:
        """Ask for the scores of a micro-batch: frames (n, F, 3, Y, X) in [0, 1], n prompts."""
        self.answers.append(self.begin(frames, prompts))

    def scores(self, counts: Sequence[int]) -> list[Scores]:
        """Wait for all scores, joined into those of buckets.

        Args:
            counts: samples per bucket, each of whole micro-batches.

        Raises:
            ValueError: within a bucket, credit maps of several shapes, or with some micro-batches only.
        """
        pieces = iter([answer() for answer in self.answers])
        buckets = []
        for count in counts:
            found: list[Scores] = []
            while sum(piece.rewards.shape[-1] for piece in found) < count:
                found.append(next(pieces))
            credits = [piece.credit for piece in found if piece.credit is not None]
            shapes = sorted({tuple(credit.shape[1:]) for credit in credits})
            if len(shapes) > 1 or len(credits) not in (0, len(found)):
                raise ValueError(
                    "reward: expected credit maps (F, h, w) of one shape with all micro-batches or with none, got "
                    f"{' and '.join(map(str, shapes))} with {len(credits)} of {len(found)}"
                )
            rewards = torch.cat([piece.rewards for piece in found], -1)
            buckets.append(Scores(rewards, torch.cat(credits) if credits else None))
        return buckets


@contextmanager
def afterwards(reward: RewardMixture) -> Iterator[Scoring]:
    """Score in the caller's thread, when the scores are wanted."""
    yield Scoring(lambda frames, prompts: partial(reward, frames, prompts))


class Background:
    """Score in one thread of its own, on CUDA in one stream of its own; see `afterwards` for the same without.

    What a reward raises is raised by the next question, or with the scores. Whatever ends the block, the thread ends
    with it: micro-batches that were not begun are not begun any more.

    Args:
        device: of the frames.
        offload: see `offload.visiting`; the rewards stay on the device for the length of the block.
    """

    def __init__(self, device: torch.device, offload: Offload = "none") -> None:
        self.device, self.offload = device, offload
        # one for all rollouts: the allocator keeps memory per stream
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self, reward: RewardMixture) -> Iterator[Scoring]:
        """Score with a reward for the length of a block."""
        begun: list[Future[Scores]] = []

        def begin(frames: Tensor, prompts: Sequence[str]) -> Answer:
            for earlier in begun:
                if earlier.done():
                    earlier.result()  # a failure stops the rollout now
            call = partial(reward, frames, prompts)
            begun.append(thread.submit(call if self.stream is None else self._in_stream(self.stream, frames, call)))
            return begun[-1].result

        with visiting(reward.rewards.values(), self.device, self.offload):
            thread = ThreadPoolExecutor(1, "reward")
            try:
                yield Scoring(begin)
            finally:
                thread.shutdown(cancel_futures=True)

    def _in_stream(self, stream: torch.cuda.Stream, frames: Tensor, call: Answer) -> Answer:
        """Make a call run in a stream once the frames, as they are now queued, are there; its results are ready."""
        sampling = torch.cuda.current_stream(self.device)
        sampled = sampling.record_event()

        def score() -> Scores:
            with torch.cuda.stream(stream):
                stream.wait_event(sampled)
                frames.record_stream(stream)
                found = call()
                for tensor in found:
                    if tensor is not None:
                        tensor.record_stream(sampling)
            stream.synchronize()
            return found

        return score
