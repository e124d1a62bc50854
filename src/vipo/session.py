"""One session of a run in its directory: the lock, going back to a checkpoint, the log, saving, the summary."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from .changes import check_changes
from .checkpoint import gather_state, go_back_to, latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from .config import Config
from .distributed import Ranks
from .ema import WeightAverage
from .lock import RunLock
from .named import read_yaml
from .policy import DiffusersPolicy
from .runlog import CONFIG, RunLog, check_output, mean_reward, write_summary
from .schedule import learning_rate
from .types import Prompt
from .versions import versions

log = logging.getLogger(__name__)
Resume = Literal["no", "resume", "overwrite"]


class Session:
    """What `Trainer.run` does besides training. Enter it, `resume` or not, `begin`, `save` as often as needed, `end`.

    Args:
        config: the run.
        mode: "no" needs a new directory; "resume" continues its newest checkpoint; "overwrite" starts again.
        prompts: all prompts.
        policy: whose weights are trained.
        optimizer: of them.
        ema: their average.
        ranks: all processes of the run; rank 0 alone writes.

    Raises:
        ValueError: the directory cannot be used so, or another process uses it.
    """

    def __init__(
        self,
        config: Config,
        mode: Resume,
        prompts: Sequence[Prompt],
        policy: DiffusersPolicy,
        optimizer: torch.optim.Optimizer,
        ema: WeightAverage | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.mode, self.ranks = config, mode, ranks or Ranks()
        self.policy, self.optimizer, self.ema = policy, optimizer, ema
        self.folder, self.checkpoints = config.run.output, config.run.output / "checkpoints"
        texts = json.dumps([(prompt.text, prompt.key) for prompt in prompts])
        self.prompts = {"count": len(prompts), "sha256": hashlib.sha256(texts.encode()).hexdigest()}
        self._check()
        self._lock = RunLock(self.folder)
        self._open = contextlib.ExitStack()
        self._files: RunLog | None = None
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        if self.ranks.main:
            self._open.enter_context(self._lock)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def _check(self) -> None:
        check_output(self.folder, resume=self.mode == "resume", overwrite=self.mode == "overwrite")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all sessions; what was done after a checkpoint and lost does not count."""
        return time.perf_counter() - self._started

    def resume(self, *, allow_changes: bool) -> int:
        """Go back to the newest undamaged checkpoint; return its iteration, or 0 where there is none yet.

        Raises:
            ValueError: all checkpoints are damaged, or the config differs in what may not differ.
        """
        path = latest_checkpoint(self.checkpoints)
        if path is None:
            log.warning("--resume: %s has no checkpoint yet; the run starts again", self.folder)
            return 0
        state = read_state(path)
        found = check_changes(read_yaml(path / CONFIG), self.config, allow=allow_changes)
        if state["prompts"] != self.prompts and not allow_changes:
            raise ValueError(
                f"--resume: {self.config.prompts.path}: its prompts are not those of the checkpoint; put them back, or "
                "give --allow-changes"
            )
        for name, value in versions().items():
            if state[name] != value:
                found.append(f"{name}: {state[name]} -> {value}; the last bits of the numbers may change")
        for change in found:
            log.warning("--resume: %s", change)
        load_checkpoint(path, self.policy, self.optimizer, self.ema)
        self._started -= state["seconds"]
        return int(state["iteration"])

    def begin(self, iteration: int) -> None:
        """Open the run directory for writing after so many finished iterations."""
        if not self.ranks.main:
            return
        self._lock.take()
        self._check()  # again: until now it may have been free to others
        config, tensorboard = self.config.to_yaml(), self.config.run.tensorboard
        self._files = self._open.enter_context(
            RunLog(self.folder, config, keep_until=iteration, tensorboard=tensorboard)
        )
        go_back_to(self.checkpoints, iteration, self.config.run)

    def metrics(self, iteration: int, values: dict[str, Any]) -> None:
        """Append one iteration's numbers."""
        if self._files:
            self._files.metrics(iteration, values)

    def pictures(self, iteration: int, frames: Tensor, maps: Tensor) -> None:
        """Save samples and maps as pictures: those of rank 0."""
        if self._files:
            self._files.pictures(iteration, frames, maps)

    def save(self, iteration: int) -> None:
        """Write a checkpoint; the mean reward of the iterations before it says how good it is."""
        config = self.config
        if not self.ranks.main:
            if config.parallel.shard:
                gather_state(self.policy, self.optimizer, self.ema)
            self.ranks.barrier()
            return
        facts = {
            "seconds": self.seconds,
            "score": mean_reward(self.folder, config.run.save_every),
            "prompts": self.prompts,
            "next": {  # follows from config and iteration; for whoever reads the file
                "prompt": iteration * config.prompts.per_iteration,
                "seed": config.run.seed,
                "learning_rate": learning_rate(config.optimizer, iteration, config.run.iterations),
                "tracker_step": iteration + 1,
            },
        }
        save_checkpoint(
            self.checkpoints, iteration, self.policy, self.optimizer, config=config, ema=self.ema, facts=facts
        )
        self.ranks.barrier()

    def end(self, iteration: int, *, stopped: bool, **facts: Any) -> None:
        """Write the summary, with further facts: the run has finished, or was stopped."""
        if not self.ranks.main:
            return
        found: dict[str, Any] = {"kind": "train", "state": "stopped" if stopped else "finished"}
        found |= {"iterations": iteration, "ranks": self.ranks.world, **facts}
        write_summary(self.folder, {**found, "seconds": round(self.seconds, 2), **versions()})
