"""Out of memory: say what would help, and find the micro-batch that fits by trying (docs/scaling.md)."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .config import Config
from .memory.live import Live
from .types import Trajectory

log = logging.getLogger(__name__)
T = TypeVar("T")
USABLE = 0.9
"""Share of the free memory that a micro-batch may need: the rest is for fragmentation and kernels' workspaces."""


class OutOfMemory(RuntimeError):
    """Memory that is not there; the message is one line that says what would help."""


@dataclass(frozen=True)
class Fit:
    """The micro-batch that fits.

    Attributes:
        micro_batch: samples, 0 if not even one fits.
        needs: bytes by size, of every size tried; infinite where memory ran out.
        limit: bytes that may be used.
    """

    micro_batch: int
    needs: dict[int, float]
    limit: float

    def need(self, size: int) -> float:
        """Bytes of a size on the line through the last two sizes tried that fitted or were measured: base + slope n."""
        measured = {n: need for n, need in self.needs.items() if math.isfinite(need)}
        if size in measured or not measured:
            return measured.get(size, math.inf)
        (a, low), (b, high) = (list(measured.items()) * 2)[-2:]
        return high + (size - b) * ((high - low) / (b - a) if a != b else high)

    def __str__(self) -> str:
        tried = ", ".join(f"{n}: {_mib(need)}" for n, need in sorted(self.needs.items()))
        return f"needed by size: {tried}; limit {_mib(self.limit)}, {USABLE:.0%} of what is free"


def ran_out(error: BaseException) -> bool:
    """Whether an error, or what caused it, is memory that was not there."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if isinstance(cause, torch.OutOfMemoryError | MemoryError):
            return True
        if "could not create a primitive" in text:  # oneDNN's word for memory that its kernels did not get
            return True
        if "DefaultCPUAllocator" in text and ("allocate memory" in text or "not enough memory" in text):
            return True
        cause = cause.__cause__
    return False


def within_memory(work: Callable[[], T], advise: Callable[[], str]) -> T:
    """Run something.

    Args:
        work: what to run.
        advise: what to say if memory runs out; called when everything that `work` held is free again.

    Raises:
        OutOfMemory: memory has run out.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not ran_out(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    _free()  # the error's frames are gone by now, and with them the graph that they held
    raise OutOfMemory(f"out of memory ({reason.split('. GPU')[0]}); {advise()}")


def free_memory(device: torch.device) -> int:
    """Bytes that could still be used: of a GPU, or the least of the machine's, the limits' and the control group's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    bounds = []
    if (meminfo := Path("/proc/meminfo")).is_file():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        bounds.append(int(lines["MemAvailable"].split()[0]) * 2**10)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        bounds.append(limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    group = Path("/sys/fs/cgroup")
    if (most := group / "memory.max").is_file() and (text := most.read_text().strip()) != "max":
        bounds.append(int(text) - int((group / "memory.current").read_text()))
    if not bounds:
        raise ValueError("sampling.micro_batch: auto needs /proc/meminfo or a GPU; give a number")
    return max(0, min(bounds))


def find_micro_batch(
    trial: Callable[[int], float],
    samples: int,
    device: torch.device,
    *,
    later: int,
    most: int | None = None,
    limit: float | None = None,
    agree: Callable[[float], float] = float,
    once: bool = False,
) -> Fit:
    """Find the largest micro-batch that fits, by trying 1, 2, 4, ... samples.

        need(n) = peak(n) + (N - n) waiting + later <= limit

    A size is tried only if the line through the last two needs says that it fits; the line also says what to try
    between a size and its double. After a size that did not fit, halves of the gap are tried. The result is lowered
    to the smallest size that makes as few micro-batches.

    Args:
        trial: does the work of n samples and forgets it; returns the bytes per sample that would wait for the update.
        samples: N, of an iteration.
        device: whose memory counts.
        later: bytes that come after the trial: the optimizer's moments, and gradients during a rollout.
        most: largest size that is tried; default N.
        limit: bytes; default `USABLE` of what is free.
        agree: a number -> the largest of it on any rank, so that all ranks try and find the same.
        once: memory must not run out a single time: of sharded weights, where other ranks then wait for this one in the
            middle of a call. 2 is tried where twice the need of 1 fits, which is enough whatever the line's base.

    Raises:
        OutOfMemory: memory ran out with `once`, at more than one sample.
    """
    limit = -agree(-(USABLE * free_memory(device) if limit is None else limit))
    needs: dict[int, float] = {}
    good, size, most = 0, 1, most or samples
    while size > good:
        need = _need(trial, size, samples, device) + later
        if once and math.isinf(need):  # nobody is there to agree
            if good == 0:
                return Fit(0, {size: need}, limit)
            raise OutOfMemory(
                f"sampling.micro_batch=auto: memory ran out at {size} samples, and with parallel.shard or "
                "parallel.context the search cannot go on, for other ranks wait where this one has left; set "
                f"sampling.micro_batch={good}, which fitted"
            )
        needs[size] = agree(need)
        if needs[size] <= limit:
            good = size
            size = min(most, 2 * good, _reach(needs, limit, sure=once))
        else:
            most = size - 1
            size = (good + most + 1) // 2
    return Fit(math.ceil(samples / math.ceil(samples / good)) if good else 0, needs, limit)


def _need(trial: Callable[[int], float], size: int, samples: int, device: torch.device) -> float:
    """Bytes that the whole iteration needs at most; infinite if the trial runs out of memory."""
    waiting = 0.0
    with _peak_of(device) as peak:
        try:
            waiting = trial(size)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            waiting = math.inf
    _free()
    return math.inf if math.isinf(waiting) else peak[0] + (samples - size) * waiting


def _reach(needs: dict[int, float], limit: float, *, sure: bool = False) -> int:
    """The largest size whose need is below the limit on the line through the last two.

    Before there are two it is 2; if it must be `sure`, what fits on the line through 0.
    """
    if len(needs) < 2:
        return int(limit / needs[1]) if sure and needs[1] > 0 else 2
    (a, low), (b, high) = list(needs.items())[-2:]
    slope = (high - low) / (b - a)
    return int(b + (limit - high) / slope) if slope > 0 and math.isfinite(slope) else 2 * b


@contextlib.contextmanager
def _peak_of(device: torch.device) -> Iterator[list[int]]:
    """Bytes that a block has allocated at once: by the allocator of a GPU, by counting live tensors on a CPU."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
    else:
        with Live() as live:
            yield peak
        peak[0] = live.peak


def waiting_bytes(traj: Trajectory, frames: Tensor, *, on_device: bool) -> float:
    """Bytes per sample that wait for the update: recorded steps, unless on the CPU; frames, of two iterations."""
    tensors = [t for r in traj.steps.values() for t in (r.latents, r.next_latents, r.log_probs) if t is not None]
    return (2 * frames.nbytes + (sum(t.nbytes for t in tensors) if on_device else 0)) / len(traj)


def advice(config: Config, device: torch.device, fit: Callable[[int], Fit] | None, used: int) -> str:
    """Say what to set after memory has run out.

    Args:
        config: of the run.
        device: where it ran out.
        fit: the largest micro-batch up to a size that fits, by trying; None where nothing can be tried.
        used: samples of the micro-batch that did not fit.
    """
    found = fit(used - 1) if used > 1 and fit else None
    if found is None:
        begun = "sampling.micro_batch is 1 already" if used == 1 else f"sampling.micro_batch={used} did not fit"
    elif found.micro_batch:
        begun = f"sampling.micro_batch={found.micro_batch} instead of {used} would fit ({found})"
    else:
        begun = f"no smaller sampling.micro_batch than {used} fits either ({found})"
    return f"{begun}; what else saves memory, largest first: {larger_knobs(config, device)}"


def larger_knobs(config: Config, device: torch.device) -> str:
    """The settings that would save memory and are not set, the largest first."""
    model, sampling, gpu = config.model, config.sampling, device.type != "cpu"
    knobs = [
        (sampling.micro_batch not in (1, "auto"), "sampling.micro_batch (smaller, or auto)"),
        (not model.gradient_checkpointing, "model.gradient_checkpointing=true"),
        (model.train == "full", "model.train=lora"),
        (model.dtype == "float32" and gpu, "model.dtype=bfloat16"),
        (not model.vae_tiling, "model.vae_tiling=true"),
        (not model.vae_slicing, "model.vae_slicing=true"),
        (model.offload == "none" and gpu, "model.offload=idle"),
        (not sampling.store_on_cpu and gpu, "sampling.store_on_cpu=true"),
        (config.map.chunk != 1 and config.map.control is None, "map.chunk=1"),
        (True, "sampling.height and width"),
        (True, "prompts.group_size"),
    ]
    return ", ".join(text for helps, text in knobs if helps)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _mib(number: float) -> str:
    return "more than there is" if math.isinf(number) else f"{number / 2**20:,.0f} MiB"
