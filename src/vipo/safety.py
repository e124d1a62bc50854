"""Non-finite tensors: a bundle that shows the first bad one, and iterations that are skipped for it.

RUN/debug/iteration_000003/
    bundle.json           the tensor, its first bad element, the step, prompts and seeds of the iteration, versions
    tensors.safetensors   the tensor, and what it was made from, as far as they fit into LARGEST_BUNDLE bytes
    config.yaml           of the run
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import Config
from .distributed import NotFiniteElsewhere, local
from .runlog import BUNDLES, read_metrics
from .types import Experience, NonFiniteError, PromptBatch, StepRecord, Trajectory, require_finite
from .versions import versions

log = logging.getLogger(__name__)
LARGEST_BUNDLE = 256 * 2**20
"""Bytes of a bundle's tensors; a bad tensor above it is cut to its first bad sample."""


@contextlib.contextmanager
def evidence(**found: Any) -> Iterator[None]:
    """Add what is being worked on to a NonFiniteError that ends the block; what inner blocks have added stays."""
    try:
        yield
    except NonFiniteError as error:
        error.evidence = {**found, **error.evidence}
        raise


@contextlib.contextmanager
def undone_if_not_finite(
    optimizer: torch.optim.Optimizer, enabled: bool, average: Sequence[Tensor] = ()
) -> Iterator[None]:
    """Put weights, their average and optimizer state back, bit for bit, where a NonFiniteError ends the block.

    The copy waits on the CPU: three times the trained weights for AdamW, four with an average; of sharded ones this
    rank's part.
    """
    if not enabled:
        yield
        return
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [value for p in trained for value in optimizer.state.get(p, {}).values() if isinstance(value, Tensor)]
    known = {p: dict(optimizer.state[p]) for p in trained if p in optimizer.state}
    tensors = [local(tensor.detach()) for tensor in (*trained, *average, *moments)]
    kept = [tensor.to("cpu", copy=True) for tensor in tensors]
    try:
        yield
    except NonFiniteError:
        for tensor, value in zip(tensors, kept, strict=True):  # in place, as the optimizer changed them
            tensor.copy_(value)
        for p in trained:
            if p in known:  # the same tensors, and what is none: bitsandbytes counts in an int
                optimizer.state[p].update(known[p])
            else:  # those of a first iteration
                optimizer.state.pop(p, None)
        raise


def require_finite_gradients(parameters: Mapping[str, nn.Parameter], norm: Tensor) -> None:
    """Raise NonFiniteError naming the first parameter with a bad gradient, if the norm of all is not finite.

    Args:
        parameters: by name, with their gradients; of sharded ones this rank's part is looked at.
        norm: of all gradients together, 0-dim.
    """
    if bool(torch.isfinite(norm)):
        return
    gradients = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    shown = {name: gradients[name] for name in bad[:1]} or gradients
    found = {"parameters": len(parameters), "bad": len(bad), **_largest_finite(shown)}
    with evidence(gradients=found, weight=local(parameters[bad[0]]) if bad else norm):
        for name in bad:
            require_finite(f"gradient of {name}", gradients[name])
        require_finite("gradient norm", norm)


def _largest_finite(gradients: Mapping[str, Tensor]) -> dict[str, Any]:
    """The largest finite gradient, and whose it is."""
    largest = {name: float(torch.nan_to_num(g, 0, 0, 0).abs().max()) for name, g in gradients.items() if g.numel()}
    name = max(largest, key=lambda key: largest[key])
    return {"parameter": name, "largest_finite": largest[name]}


class NonFiniteGuard:
    """Stops a run at a non-finite tensor, or skips its iteration, and leaves a bundle in either case.

    Args:
        config: of the run.
        batch_of: the prompts and seeds of an iteration (0-based).
        done: iterations that a resumed run has behind it; those of them that were skipped count.
        rank: of this process, which has a bundle of its own.
    """

    def __init__(self, config: Config, batch_of: Callable[[int], PromptBatch], *, done: int = 0, rank: int = 0) -> None:
        self.config, self.batch_of, self.rank = config, batch_of, rank
        self.limit = config.optimizer.skip_nonfinite
        past = [line for line in read_metrics(config.run.output) if line["iteration"] <= done]
        self.skipped = sum("skipped" in line for line in past)

    def attempt(self, step: Callable[[int], dict[str, Any]], iteration: int, *, again: bool = False) -> dict[str, Any]:
        """Run one iteration.

        Args:
            step: takes the 0-based iteration and returns its metrics.
            iteration: 0-based.
            again: an iteration that may be skipped will be attempted again: leave no trace of it.

        Returns:
            The metrics, of a skipped iteration `skipped` = 1 and the number skipped so far; {} for `again`.

        Raises:
            FloatingPointError: one line that names the tensor and the bundle.
        """
        try:
            metrics = step(iteration)
            return {**metrics, "skipped_iterations": self.skipped} if self.limit else metrics
        except NonFiniteError as error:
            if again and self.skipped < self.limit:
                return {}
            message = self._record(iteration, error)
            if self.skipped >= self.limit:
                spent = f" (optimizer.skip_nonfinite: {self.limit} iterations were skipped)" if self.limit else ""
                raise FloatingPointError(message + spent) from error
        self.skipped += 1
        log.warning("skipped %d of at most %d: %s", self.skipped, self.limit, message)
        return {"skipped": 1, "skipped_iterations": self.skipped}

    def check_state(
        self, iteration: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Refuse to save a weight or a moment that is not finite, which no skipping could mend.

        Args:
            iteration: 1-based.
            parameters: the trained weights by name.
            optimizer: theirs.
        """
        try:
            for name, parameter in parameters.items():
                require_finite(f"weight {name}", local(parameter))
                for key, value in optimizer.state.get(parameter, {}).items():
                    require_finite(f"{key} of {name}", local(torch.as_tensor(value)))  # bitsandbytes counts in an int
        except NonFiniteError as error:
            raise FloatingPointError(self._record(iteration - 1, error)) from error

    def _record(self, iteration: int, error: NonFiniteError) -> str:
        if isinstance(error, NotFiniteElsewhere):
            bundle = bundle_folder(self.config, iteration, error.rank)
        else:
            bundle = write_bundle(self.config, iteration, error, self.batch_of(iteration), self.rank)
        return f"iteration {iteration + 1}: {error}; debug bundle: {bundle}"


def bundle_folder(config: Config, iteration: int, rank: int) -> Path:
    """RUN/debug/iteration_NNNNNN of a 0-based iteration, of rank R > 0 iteration_NNNNNN_rankR."""
    return config.run.output / BUNDLES / (f"iteration_{iteration + 1:06d}" + f"_rank{rank}" * (rank > 0))


def write_bundle(config: Config, iteration: int, error: NonFiniteError, batch: PromptBatch, rank: int = 0) -> Path:
    """Write a bundle under a temporary name, and rename it.

    Args:
        config: of the run.
        iteration: 0-based.
        error: with its evidence.
        batch: prompts and seeds of the iteration.
        rank: of this process: several may meet the same tensor at the same time.

    Returns:
        The folder.
    """
    folder = bundle_folder(config, iteration, rank)
    partial = folder.with_name(folder.name.replace("iteration", "partial"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    found, bad = error.evidence, ~torch.isfinite(error.tensor)
    kept, left_out = _within_limit(_tensors(error))
    part = found.get("trajectory")
    prompts, seeds = (part.prompts, part.seeds) if part else (found.get("prompts"), found.get("seeds"))
    record = {
        "iteration": iteration + 1,
        "message": str(error),
        "tensor": error.name,
        "shape": list(error.tensor.shape),
        "dtype": str(error.tensor.dtype).removeprefix("torch."),
        "first_bad_index": bad.nonzero()[0].tolist() if bool(bad.any()) else None,
        "bad_elements": int(bad.sum()),
        "step": found.get("step"),
        "gradients": found.get("gradients"),
        "micro_batch": prompts and {"prompts": prompts, "seeds": seeds},
        "prompts": batch.prompts,
        "prompt_indices": batch.indices,
        "seeds": batch.seeds,
        "initial_seeds": batch.initial_seeds,
        "left_out": left_out,
        **versions(),
    }
    (partial / "bundle.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (partial / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    save_file(kept, partial / "tensors.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    return partial.rename(folder)


def _tensors(error: NonFiniteError) -> dict[str, Tensor]:
    """The bad tensor and the evidence by name, the most telling first."""
    found = dict(error.evidence)
    part, step, record, rollout = (found.get(key) for key in ("trajectory", "step", "record", "found"))
    tensors = {"bad": error.tensor}
    if isinstance(part, Trajectory) and step in part.steps:
        record = part.steps[step]
    if isinstance(record, StepRecord):
        given = {"latents": record.latents, "next_latents": record.next_latents, "old_log_probs": record.log_probs}
        tensors |= {name: tensor for name, tensor in given.items() if tensor is not None}
    if isinstance(rollout, Experience):
        found |= {"rewards": rollout.rewards, "group_advantages": rollout.advantages}
    found |= {f"maps.{i}": m for i, m in enumerate(found.pop("maps", []))}
    return tensors | {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _within_limit(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Copies on the CPU of what fits into LARGEST_BUNDLE, and the shapes of what does not."""
    kept: dict[str, Tensor] = {}
    left_out: dict[str, list[int]] = {}
    free = LARGEST_BUNDLE
    for name, tensor in tensors.items():
        if name == "bad" and tensor.nbytes > free and tensor.ndim > 0:
            row = int((~torch.isfinite(tensor)).nonzero()[0, 0]) if not bool(torch.isfinite(tensor).all()) else 0
            tensor = tensor[row : row + 1]
        if tensor.nbytes > free:
            left_out[name] = list(tensor.shape)
            continue
        kept[name] = tensor.detach().to("cpu", copy=True).contiguous()
        free -= tensor.nbytes
    return kept, left_out
