"""When the rewards of a rollout are computed: after it, or beside it in one thread. The same calls, so the same bits.

A rollout asks for the scores of each micro-batch as it is decoded. `afterwards` computes them when they are wanted,
`Background` at once, in the order of asking, while the next micro-batch is sampled; and then its maps, where the
rollout says how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..offload import Offload, visiting
from . import Scores
from .mixture import RewardMixture


class Scored(NamedTuple):
    """Scores of neighbouring samples, and their maps (..., n, T, H, W) where these were made along with them."""

    scores: Scores
    maps: Tensor | None = None


Answer = Callable[[], Scored]
"""Waits for the scores of one micro-batch."""
MakeMaps = Callable[[Tensor | None], Tensor]
"""Makes the maps (..., n, T, H, W) of one micro-batch, given the credit that came with its scores."""


class Scoring:
    """The scores that one rollout has asked for.

    Args:
        begin: (frames (n, F, 3, Y, X), n prompts, how to make their maps) -> their answer.
    """

    def __init__(self, begin: Callable[[Tensor, Sequence[str], MakeMaps | None], Answer]) -> None:
        self.begin = begin
        self.answers: list[Answer] = []

    def ask(self, frames: Tensor, prompts: Sequence[str], maps: MakeMaps | None = None) -> None:
        """Ask for the scores of a micro-batch: frames (n, F, 3, Y, X) in [0, 1], n prompts; and for its maps."""
        self.answers.append(self.begin(frames, prompts, maps))

    def scores(self, counts: Sequence[int]) -> list[Scored]:
        """Wait for all scores, joined into those of buckets.

        Args:
            counts: samples per bucket, each of whole micro-batches.

        Raises:
            ValueError: within a bucket, credit maps of several shapes, or with some micro-batches only.
        """
        pieces = iter([answer() for answer in self.answers])
        buckets = []
        for count in counts:
            found: list[Scored] = []
            while sum(piece.scores.rewards.shape[-1] for piece in found) < count:
                found.append(next(pieces))
            credits = [piece.scores.credit for piece in found if piece.scores.credit is not None]
            shapes = sorted({tuple(credit.shape[1:]) for credit in credits})
            if len(shapes) > 1 or len(credits) not in (0, len(found)):
                raise ValueError(
                    "reward: expected credit maps (F, h, w) of one shape with all micro-batches or with none, got "
                    f"{' and '.join(map(str, shapes))} with {len(credits)} of {len(found)}"
                )
            scores = Scores(
                torch.cat([piece.scores.rewards for piece in found], -1), torch.cat(credits) if credits else None
            )
            maps = [piece.maps for piece in found if piece.maps is not None]
            buckets.append(Scored(scores, torch.cat(maps, -4) if maps else None))
        return buckets


@contextmanager
def afterwards(reward: RewardMixture) -> Iterator[Scoring]:
    """Score in the caller's thread, when the scores are wanted; maps are left to the caller."""
    yield Scoring(lambda frames, prompts, maps: lambda: Scored(reward(frames, prompts)))


class Background:
    """Score in one thread of its own, on CUDA in one stream of its own; see `afterwards` for the same without.

    What a reward or a map raises is raised by the next question, or with the scores. Whatever ends the block, the
    thread ends with it: micro-batches that were not begun are not begun any more.

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
        begun: list[Future[Scored]] = []

        def begin(frames: Tensor, prompts: Sequence[str], maps: MakeMaps | None) -> Answer:
            for earlier in begun:
                if earlier.done():
                    earlier.result()  # a failure stops the rollout now

            def call() -> Scored:
                scores = reward(frames, prompts)
                if maps is None or not bool(torch.isfinite(scores.rewards).all()):  # a reward's NaN is named as such
                    return Scored(scores)
                return Scored(scores, maps(scores.credit))

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

        def score() -> Scored:
            with torch.cuda.stream(stream):
                stream.wait_event(sampled)
                frames.record_stream(stream)
                found = call()
                for tensor in (*found.scores, found.maps):
                    if tensor is not None:
                        tensor.record_stream(sampling)
            stream.synchronize()
            return found

        return score
