"""What the Perceptual Structuring Module costs, and whether it computes what the released procedure computes.

    python bench/psm.py [--quick] [--json FILE] [--device cpu|cuda] [--dtype float32|bfloat16] [--threads 1]

"Ours" is `vipo.psm.PerceptualStructuring`, "released" the frame-by-frame procedure of released.py, on the same network:
a randomly initialised DINOv2 (base on the CPU, large on CUDA), since its cost does not depend on its weights.

"Forward" is the network alone, timed within the whole. "Beyond" is everything else, timed as the whole with the network
replaced by a `Replay` of its tokens: the difference of two totals of many seconds would be mostly their noise. Sides
take turns (A B A B ...), so that a slow minute of the machine slows both. Timings are medians with their range: CPU
seconds of the process where it has one CPU thread, wall-clock seconds elsewhere.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import scipy
import sklearn
import torch
import transformers
from released import released_frame_map, released_maps
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from workloads import WORKLOADS, Workload, make_frames, make_model

from vipo.files import write_atomically
from vipo.psm import FrozenBackbone, PerceptualStructuring

Result = TypeVar("Result")
Report = dict[str, Any]

RELEASED_RULES: Report = {"orientation": "library", "normalisation": "minmax", "pca_scope": "frame", "solver": "exact"}
SCALING_FRAMES = (7, 13, 27, 53)
SCALING_CHUNK = 32
TARGET_PERCENT = {"cpu": 1.0, "cuda": 2.0}


@dataclass
class Recorder:
    """What a network does from now on: its seconds, the frames of its largest batch, and on demand its tokens."""

    model: torch.nn.Module
    device: torch.device
    seconds: float = 0.0
    most_frames: int = 0
    keep_tokens: bool = False
    tokens: list[Tensor] = field(default_factory=list)
    _started: float = 0.0

    def __post_init__(self) -> None:
        """Hook the network."""
        self.model.register_forward_pre_hook(self._before)
        self.model.register_forward_hook(self._after)

    def reset(self, keep_tokens: bool = False) -> None:
        """Forget everything."""
        self.seconds, self.most_frames, self.keep_tokens, self.tokens = 0.0, 0, keep_tokens, []

    def _before(self, model: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self._started = now(self.device)

    def _after(self, model: torch.nn.Module, inputs: tuple[Any, ...], outputs: BaseModelOutput) -> None:
        self.seconds += now(self.device) - self._started
        tokens = cast(Tensor, outputs.last_hidden_state)
        self.most_frames = max(self.most_frames, len(tokens))
        if self.keep_tokens:
            self.tokens.append(tokens)


class Replay(torch.nn.Module):
    """Stands in for a network by returning its recorded tokens in order, round and round, at no cost."""

    def __init__(self, config: Any, tokens: Tensor) -> None:
        """Take the config of the network and its tokens (M, 1 + P, D)."""
        super().__init__()
        self.config, self.tokens, self.position = config, tokens, 0

    def forward(self, pixels: Tensor, output_hidden_states: bool = False, return_dict: bool = True) -> BaseModelOutput:
        """Return the tokens of as many frames as come in."""
        end = self.position + len(pixels)
        tokens = self.tokens[self.position : end]
        self.position = end % len(self.tokens)
        return BaseModelOutput(last_hidden_state=cast(Any, tokens))


@dataclass(frozen=True)
class Bench:
    """What every measurement needs.

    Attributes:
        device: of the network and the frames.
        dtype: of the autocast inside the network, on both sides; float32 = none.
        repetitions: timed repetitions of what includes a forward.
        beyond_repetitions: of what does not.
        workload: what to make maps for.
        chunk: frames per forward of our backbone; None = its own choice.
    """

    device: torch.device
    dtype: torch.dtype
    repetitions: int
    beyond_repetitions: int
    workload: Workload
    chunk: int | None = None

    def backbone(self, model: torch.nn.Module, dtype: torch.dtype | None = None) -> FrozenBackbone:
        """Wrap a network for our module."""
        dtype = dtype or self.dtype
        autocast = None if dtype == torch.float32 else dtype
        return FrozenBackbone(cast(PreTrainedModel, model), chunk=self.chunk, dtype=autocast).to(self.device)

    def psm(self, model: torch.nn.Module, dtype: torch.dtype | None = None, **options: Any) -> PerceptualStructuring:
        """Make our module, with its default options unless told otherwise."""
        return PerceptualStructuring(self.backbone(model, dtype), **options)

    def ours(self, psm: PerceptualStructuring, frames: Tensor) -> Callable[[], Tensor]:
        """Return the call that makes our maps."""
        return lambda: psm(frames, self.workload.latent_shape, self.workload.temporal_compression)

    def released(self, model: torch.nn.Module, frames: Tensor, solver: str = "auto") -> Callable[[], Tensor]:
        """Return the call that makes the released code's maps, on as many patches as ours."""
        grid = self.backbone(model).patch_grid(*self.workload.pixels)
        return lambda: released_maps(model, frames, self.workload.latent_shape, grid, self.dtype, solver)


def now(device: torch.device) -> float:
    """Return the clock, in seconds, once the device has finished.

    With one CPU thread it is the process's CPU time: the wall clock of an idle machine, also while others work.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def timed(call: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Return the seconds that a call takes, and its result."""
    start = now(device)
    result = call()
    return now(device) - start, result


def summary(seconds: Sequence[float]) -> Report:
    """Return the median and the range of some timings."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "repetitions": len(seconds)}


def take_turns(calls: dict[str, Callable[[], object]], repetitions: int, device: torch.device) -> dict[str, Report]:
    """Time calls A B A B ..., after one untimed round; return the summary of each by name."""
    for call in calls.values():
        call()
    rounds = [{name: timed(call, device)[0] for name, call in calls.items()} for _ in range(repetitions)]
    return {name: summary([seconds[name] for seconds in rounds]) for name in calls}


def peak_extra_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Return what a call allocates at its peak beyond what was there before; None on the CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def largest(difference: Tensor) -> float:
    """Return the largest absolute difference."""
    return difference.abs().max().item()


def time_whole(bench: Bench, recorder: Recorder, frames: Tensor) -> tuple[dict[str, Report], dict[str, Tensor]]:
    """Time both sides with the network, and the network within them; also return the tokens each side saw."""
    model = recorder.model
    sides = {"ours": bench.ours(bench.psm(model), frames), "released": bench.released(model, frames)}
    seconds: dict[str, list[float]] = {f"{side}_{part}": [] for part in ("whole", "forward") for side in sides}
    tokens: dict[str, Tensor] = {}
    if bench.device.type == "cuda":  # kernels are chosen and memory is reserved at the first call
        for call in sides.values():
            call()
    for repetition in range(bench.repetitions):
        for side, call in sides.items():
            recorder.reset(keep_tokens=repetition == 0)
            whole, _ = timed(call, bench.device)
            seconds[f"{side}_whole"].append(whole)
            seconds[f"{side}_forward"].append(recorder.seconds)
            if recorder.keep_tokens:
                tokens[side] = torch.cat(recorder.tokens)
    recorder.reset()
    return {name: summary(values) for name, values in seconds.items()}, tokens


def time_beyond(bench: Bench, model: torch.nn.Module, frames: Tensor, tokens: Tensor) -> dict[str, Report]:
    """Time both sides without the network, which replays its tokens, and our two halves apart."""
    replay = Replay(model.config, tokens)
    psm = bench.psm(replay)
    features = psm.features(frames)
    shape, compression = bench.workload.latent_shape, bench.workload.temporal_compression
    calls: dict[str, Callable[[], object]] = {
        "ours_beyond": bench.ours(psm, frames),
        "ours_beyond_prepare": lambda: psm.features(frames),
        "ours_beyond_allocate": lambda: psm.allocate(features, shape, compression),
        "released_beyond": bench.released(replay, frames),
        "released_full_beyond": bench.released(replay, frames, "full"),
    }
    return take_turns(calls, bench.beyond_repetitions, bench.device)


def compare(bench: Bench, recorder: Recorder) -> Report:
    """Measure one workload on both sides: seconds, ratios, memory, agreement of the maps."""
    model, frames = recorder.model, make_frames(bench.workload, bench.device)
    timings, tokens = time_whole(bench, recorder, frames)
    timings |= time_beyond(bench, model, frames, tokens["ours"])
    median = {name: timing["median"] for name, timing in timings.items()}
    report: Report = timings | {
        "ratio_whole": median["released_whole"] / median["ours_whole"],
        "ratio_beyond": median["released_beyond"] / median["ours_beyond"],
        "ratio_full_beyond": median["released_full_beyond"] / median["ours_beyond"],
        "ours_beyond_percent_of_forward": 100 * median["ours_beyond"] / median["ours_forward"],
        "target_percent": TARGET_PERCENT[bench.device.type],
        "released_beyond_percent_of_forward": 100 * median["released_beyond"] / median["released_forward"],
        "seconds_added_to_the_papers_step": bench.workload.paper_seconds,
        "ours_peak_extra_mib": peak_extra_mib(bench.ours(bench.psm(model), frames), bench.device),
        "released_peak_extra_mib": peak_extra_mib(bench.released(model, frames), bench.device),
    }
    return report | agreement(bench, model, frames, tokens)


def agreement(bench: Bench, model: torch.nn.Module, frames: Tensor, tokens: dict[str, Tensor]) -> Report:
    """Compare maps: the same features on the patch grid first, then frames to latent grid, each side its own way.

    From frames on, these remain: uint8 rounding and PIL's resize against float32 and torch's (both bicubic and
    antialiased), min-max before against after the resize, and for video min-max per frame and trilinear in time
    against the mean of each latent frame's own frames.
    """
    workload, rules = bench.workload, RELEASED_RULES
    replay = Replay(model.config, tokens["ours"])
    features = bench.psm(replay).features(frames)
    per_frame = features.flatten(0, 1)[:, None]
    grid = (1, *per_frame.shape[2:4])
    ours = bench.psm(replay, **rules).allocate(per_frame, grid)[:, 0].cpu()
    subspace = bench.psm(replay, **rules | {"solver": "subspace"}).allocate(per_frame, grid)[:, 0].cpu()
    theirs, first, second = (
        torch.from_numpy(np.stack([released_frame_map(f, solver, seed) for f in per_frame[:, 0].cpu().numpy()]))
        for solver, seed in (("full", 0), ("auto", 0), ("auto", 1))
    )
    defaults, defaults_exact = (
        bench.psm(replay, solver=solver).allocate(features, workload.latent_shape, workload.temporal_compression)
        for solver in ("subspace", "exact")
    )
    their_replay = Replay(model.config, tokens["released"])
    difference = bench.ours(bench.psm(replay, **rules), frames)() - bench.released(their_replay, frames, "full")()
    defaults_theirs = bench.ours(bench.psm(their_replay), frames)()
    return {
        "maps_same_features_max_abs": largest(ours - theirs),
        "maps_end_to_end_max_abs": largest(difference),
        "maps_end_to_end_median_of_each_samples_max": difference.abs().amax((1, 2, 3)).median().item(),
        "maps_end_to_end_mean_abs": difference.abs().mean().item(),
        "maps_our_defaults_on_their_tokens_max_abs": largest(defaults - defaults_theirs),
        "maps_two_default_sklearn_fits_max_abs": largest(first - second),
        "maps_default_sklearn_vs_full_max_abs": largest(first - theirs),
        "maps_subspace_vs_exact_max_abs": largest(subspace - ours),
        "maps_subspace_vs_exact_our_defaults_max_abs": largest(defaults - defaults_exact),
    }


def autocast_effect(bench: Bench, model: torch.nn.Module) -> Report:
    """Measure bfloat16 in the network on two images: time, and what it does to the maps of our default options."""
    bench = replace(bench, workload=replace(bench.workload, samples=2))
    frames = make_frames(bench.workload, bench.device)
    maps: dict[str, Tensor] = {}

    def keep(name: str, call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: maps.update({name: call()})

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    calls = {name: keep(name, bench.ours(bench.psm(model, dtype), frames)) for name, dtype in dtypes.items()}
    report: Report = take_turns(calls, max(1, bench.repetitions - 1), bench.device)
    full, half = maps["float32"], maps["bfloat16"]
    return report | {
        "ratio": report["float32"]["median"] / report["bfloat16"]["median"],
        "maps_max_abs": largest(full - half),
        "maps_mean_abs": (full - half).abs().mean().item(),
        "maps_correlation": torch.corrcoef(torch.stack([full.flatten(), half.flatten()]))[0, 1].item(),
    }


def scaling(bench: Bench, recorder: Recorder) -> Report:
    """Measure one clip of F frames for each of SCALING_FRAMES: time, its power of F, frames per forward, memory."""
    calls: dict[str, Callable[[], object]] = {}
    columns: dict[str, Report] = {}
    for frames in SCALING_FRAMES:
        shape = ((frames + 1) // 2, *bench.workload.latent_shape[1:])
        clip = replace(bench.workload, samples=1, frames=frames, latent_shape=shape, temporal_compression=2)
        own = replace(bench, workload=clip, chunk=SCALING_CHUNK)
        pixels = make_frames(clip, bench.device)
        calls[f"whole {frames}"] = own.ours(own.psm(recorder.model), pixels)
        extra = peak_extra_mib(calls[f"whole {frames}"], bench.device)
        recorder.reset(keep_tokens=True)
        calls[f"whole {frames}"]()
        replay = Replay(recorder.model.config, torch.cat(recorder.tokens))
        calls[f"beyond {frames}"] = own.ours(own.psm(replay), pixels)
        columns[str(frames)] = {"most_frames_per_forward": recorder.most_frames, "peak_extra_mib": extra}
        recorder.reset()
    timings = take_turns(calls, max(1, bench.repetitions - 1), bench.device)
    report: Report = {"chunk": SCALING_CHUNK}
    for part in ("whole", "beyond"):
        seconds = [timings[f"{part} {frames}"]["median"] for frames in SCALING_FRAMES]
        report[f"{part}_power_of_frames"] = float(np.polyfit(np.log(SCALING_FRAMES), np.log(seconds), 1)[0])
    return report | {
        "frames": {f: {part: timings[f"{part} {f}"] for part in ("whole", "beyond")} | columns[f] for f in columns}
    }


def show(value: Any) -> str:
    """Write a timing in milliseconds, any number to four digits, nothing as a dash."""
    if isinstance(value, dict):
        return f"{1e3 * value['median']:.1f} ({1e3 * value['min']:.1f}..{1e3 * value['max']:.1f}) ms"
    return "-" if value is None else f"{value:.4g}"


def print_columns(console: Console, title: str, columns: dict[str, Report]) -> None:
    """Print reports with the same names side by side."""
    table = Table(title, *columns)
    for name in next(iter(columns.values())):
        table.add_row(name.replace("_", " "), *(show(report[name]) for report in columns.values()))
    console.print(table)


def measure(bench: Bench, workloads: dict[str, Workload], size: str) -> Report:
    """Run every measurement on a network of one of BACKBONES."""
    recorder = Recorder(make_model(size, bench.device), bench.device)
    report: Report = {"workloads": {}}
    for name, workload in workloads.items():
        fewer = max(1, bench.repetitions - (name == "video"))  # a minute or more each
        report["workloads"][name] = compare(replace(bench, workload=workload, repetitions=fewer), recorder)
    report["autocast"] = autocast_effect(bench, recorder.model)
    shallow = Recorder(make_model("tiny" if size == "tiny" else "shallow", bench.device), bench.device)
    return report | {"scaling": scaling(replace(bench, workload=workloads["video"]), shallow)}


def main() -> None:
    """Read the command line, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny network and small frames, for the test")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="inside the network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3, help="of what includes a forward; video one fewer")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; use --device cpu")
    device, started = torch.device(options.device), time.perf_counter()
    size = "tiny" if options.quick else "large" if device.type == "cuda" else "base"
    workloads = WORKLOADS["quick" if options.quick else device.type]
    dtype = cast(torch.dtype, getattr(torch, options.dtype))
    bench = Bench(device, dtype, options.repetitions, 2 if options.quick else 9, workloads["image"])
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        report = measure(bench, workloads, size)
    report["options"] = vars(options) | {"json": str(options.json), "backbone": size}
    report["environment"] = {package.__name__: package.__version__ for package in (torch, transformers, sklearn, scipy)}
    report["environment"]["machine"] = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    report["seconds"] = time.perf_counter() - started
    console = Console(width=120)
    titles = {name: f"{w.samples} x {w.frames} frames {w.pixels[0]}x{w.pixels[1]}" for name, w in workloads.items()}
    columns = {f"{name}: {titles[name]}": report["workloads"][name] for name in workloads}
    print_columns(console, f"DINOv2 {size}, {options.device}, {options.dtype}", columns)
    print_columns(console, "bfloat16 in the network", {"2 images": report["autocast"]})
    growth = report["scaling"]
    print_columns(console, "one clip of F frames", growth["frames"])
    print_columns(console, "growth", {"": {name: value for name, value in growth.items() if name != "frames"}})
    if options.json:
        write_atomically(options.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
