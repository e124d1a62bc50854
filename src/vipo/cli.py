"""Command line: vipo demo | train | check | maps | eval | report | serve-reward."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from .arguments import parse, recipes
from .console import how_to_go_on, progress_bars, reporter, typed_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; user errors print one line and exit with 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' loading bars; ours are rich's
    options = parse(sys.argv[1:] if argv is None else list(argv), _COMMANDS)
    try:
        code = options.command(options)
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        if type(error) is RuntimeError:  # not one of ours: a programming error, whose trace is wanted
            raise
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"vipo: error: {line}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("vipo: interrupted; what was finished is on the disk (vipo train goes on with --resume)", file=sys.stderr)
        code = 130
    sys.exit(code)


def _load(options: argparse.Namespace) -> Any:
    from .config import Config

    path = Path(options.config)
    if not path.exists() and options.config in recipes():
        path = Path(str(resources.files("vipo") / "recipes" / f"{options.config}.yaml"))
    return Config.from_yaml(path, options.overrides)


def _demo(options: argparse.Namespace) -> int:
    """Post-train the embedded text-to-image pipeline, or with --video the text-to-video one, by scalar GRPO and by ViPO
    from the same weights, prompts, seeds and budget; evaluate base, GRPO and ViPO on held-out prompts; write
    report.html and summary.json."""
    if options.iterations is not None and options.iterations < 1:
        raise ValueError(f"--iterations: expected at least 1, got {options.iterations}")
    if options.prompts < 2 or options.seed < 0:
        raise ValueError("--prompts: expected at least 2; --seed: expected at least 0")
    from rich.console import Console

    from .demo import comparison_table, run_demo
    from .demo_kinds import CLIPS, IMAGES

    console, output = Console(), options.output or Path("runs/demo_video" if options.video else "runs/demo")
    with progress_bars(console) as bars:
        summary = run_demo(
            output,
            CLIPS if options.video else IMAGES,
            seed=options.seed,
            iterations=options.iterations,
            prompts=options.prompts,
            overwrite=options.overwrite,
            progress=reporter(bars),
        )
    console.print(comparison_table(summary))
    console.print(f"{summary['times']['total']:.0f} s; open {output / 'report.html'}", highlight=False)
    return 0


def _maps(options: argparse.Namespace) -> int:
    """Make the allocation maps of your own pictures and clips, as training would: per input map.npy, overlay,
    components, and a sheet that compares orientations and backbones; maps.json with the numbers of all. With masks,
    the map is measured against them, and against a blob at the centre and other controls. Exit code 1 if any input
    failed."""
    foreign = [override for override in options.overrides if not override.startswith("--map.")]
    if foreign:
        raise ValueError(f"{foreign[0]}: vipo maps takes --map.KEY=VALUE and the options of vipo maps --help")
    config = _load(options).map
    from rich.console import Console

    from .inspection import InspectOptions, inspect_maps
    from .inspection.record import tables
    from .psm import ORIENTATIONS

    first, *others = options.backbone or [config.backbone]
    console = Console()
    with progress_bars(console) as bars:
        outcome = inspect_maps(
            options.inputs,
            options.output,
            config.model_copy(update={"backbone": first}),
            InspectOptions(
                backbones=others,
                orientations=options.orientation or ORIENTATIONS,
                spatial_compression=options.spatial_compression,
                temporal_compression=options.temporal_compression,
                first_frame_alone=not options.no_first_frame_alone,
                ground_truth=options.ground_truth,
                max_frames=options.max_frames,
                fps=options.fps,
                device=options.device,
                seed=options.seed,
            ),
            overwrite=options.overwrite,
            progress=reporter(bars),
        )
    for table in tables(outcome.results, outcome.overall):
        console.print(table)
    for path, reason in outcome.failures:
        print(f"vipo: error: {path}: {reason}", file=sys.stderr)
    console.print(f"{len(outcome.results)} inputs, {len(outcome.failures)} failures; {options.output}", highlight=False)
    return 1 if outcome.failures else 0


def _eval(options: argparse.Namespace) -> int:
    """Sample the model before and after training with the same prompts and seeds, and compare: rewards that were
    trained on and held-out ones apart, with paired differences, 95 % intervals over prompts, win rates and sign tests;
    diversity within prompts; change inside and outside the allocation map. Writes eval.json and report.html. Samples
    are kept in OUTPUT/samples: an interrupted evaluation goes on where it was.

    Sampling is that of RUN's config, with --model the pipeline's own; --sampling.KEY=VALUE, --model.KEY=VALUE and
    --map.KEY=VALUE override it as in vipo train; --reward.paths, .options and .device go with the named rewards."""
    sections = ("--model.", "--sampling.", "--map.", "--reward.")
    foreign = [text for text in options.overrides if not text.startswith(sections)]
    if foreign:
        raise ValueError(f"{foreign[0]}: vipo eval takes {'KEY, '.join(sections)}KEY and vipo eval --help")
    if (options.run is None) == (options.model is None):
        raise ValueError("expected a run directory or --model PIPELINE, one of them")
    if options.run is not None and (options.lora is not None or options.trained is not None):
        raise ValueError("--lora and --trained go with --model; of a run --checkpoint chooses")
    if options.model is not None and options.checkpoint is not None:
        raise ValueError("--checkpoint goes with a run directory")
    from rich.console import Console

    from .comparison import compare
    from .comparison.record import EvalOptions, tables
    from .comparison.sides import contest_of_models, contest_of_run

    if options.run is not None:
        contest = contest_of_run(options.run, options.checkpoint, options.rewards, options.overrides)
    else:
        contest = contest_of_models(options.model, options.lora, options.trained, options.rewards, options.overrides)
    output = options.output or (Path("runs/eval") if options.run is None else options.run / "eval")
    wanted = EvalOptions(options.prompts, options.seeds, options.seed, options.limit, typed_command(options.arguments))
    console = Console()
    with progress_bars(console) as bars:
        record = compare(contest, wanted, output, progress=reporter(bars))
    for table in tables(record):
        console.print(table)
    console.print(f"open {output / 'report.html'}", highlight=False)
    return 0


def _train(options: argparse.Namespace) -> int:
    """Train the pipeline that CONFIG names and write a run directory: config, metrics, TensorBoard events, pictures,
    checkpoints whose weights/ folder `diffusers` loads, and report.html. Ctrl-C and SIGTERM finish the iteration, save,
    and exit with 0; a second Ctrl-C exits at once. docs/running.md has more."""
    if options.allow_changes and not options.resume:
        raise ValueError("--allow-changes: goes with --resume only")
    config = _load(options)
    from .lock import require_unlocked
    from .runlog import check_output

    mode: Literal["no", "resume", "overwrite"] = "no"
    if options.resume or options.overwrite:
        mode = "resume" if options.resume else "overwrite"
    check_output(config.run.output, resume=options.resume, overwrite=options.overwrite)
    require_unlocked(config.run.output)
    from rich.console import Console

    from .distributed import leave
    from .interrupt import stop_on_signals
    from .report import render_report
    from .trainer import Trainer

    trainer = Trainer(config)
    console = Console(quiet=not trainer.ranks.main)
    if config.sampling.micro_batch == "auto":
        console.print(f"sampling.micro_batch: {trainer.micro_batch}", highlight=False)
    with progress_bars(console) as bars, stop_on_signals() as stop:
        task = bars.add_task("train", total=config.run.iterations, remark="")

        def on_iteration(iteration: int, metrics: dict[str, Any]) -> None:
            remark = f"reward {metrics['reward_mean']:.3f}  clipped {metrics['clip_fraction']:.0%}"
            bars.update(task, completed=iteration, remark=remark)

        with trainer.ranks.guard():
            trainer.run(mode=mode, allow_changes=options.allow_changes, stop=stop, on_iteration=on_iteration)
    leave()
    if trainer.iteration < config.run.iterations and not trainer.watch.stops:
        who = stop.reason or "another rank"
        console.print(
            f"stopped by {who}; iteration {trainer.iteration} is saved; {how_to_go_on(options.arguments)}",
            highlight=False,
            soft_wrap=True,
        )
    elif trainer.ranks.main:
        console.print(f"weights: {config.run.output / 'checkpoints'}", highlight=False)
        console.print(f"report:  {render_report(config.run.output)}", highlight=False)
    return 0


def _check(options: argparse.Namespace) -> int:
    """Load everything that CONFIG names and try it on one group of two: output directory, prompts, policy, rollout,
    exact replay, reward, map and its reach into the gradient, one whole step. Nothing is written. Exit code 2 if
    anything is wrong.

    With --signal instead: the gradient signal fraction ||E g||^2 / E||g||^2 of the configured map, of ones (scalar
    GRPO), of the shuffled, inverted and centre controls and of further maps, on the same rollouts (docs/maps.md).

    With --memory instead: weights, gradients, optimizer, activations and their peak on each rank, and what ranks send,
    from config.json files alone (docs/scaling.md)."""
    if not options.memory and (options.ranks is not None or options.shard):
        raise ValueError("--ranks, --shard: go with --memory only")
    if options.signal and options.memory:
        raise ValueError("--signal and --memory: give one of them")
    if options.signal:
        return _signal(options)
    for name in ("groups", "maps", "json"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: goes with --signal only")
    config = _load(options)
    from rich.console import Console
    from rich.table import Table

    if options.memory:
        from .memory import report

        Console().print(report(config, 1 if options.ranks is None else options.ranks, shard=options.shard))
        return 0
    from .preflight import preflight

    findings = preflight(config)
    table = Table("part", "", "finding")
    for finding in findings:
        table.add_row(finding.name, "[green]ok[/]" if finding.ok else "[red]FAILED[/]", finding.detail)
    Console().print(table)
    failed = [finding.name for finding in findings if not finding.ok]
    print("go" if not failed else f"no-go: {', '.join(failed)}")
    print(*(f"  {finding.name}: {finding.detail}\n" for finding in findings if not finding.ok), sep="", end="")
    return 2 if failed else 0


def _signal(options: argparse.Namespace) -> int:
    config = _load(options)
    if options.json and options.json.is_dir():
        raise ValueError(f"--json: {options.json} is a folder, expected a file")
    from rich.console import Console

    from .files import write_atomically
    from .signal import measure_signal, signal_table

    console = Console()
    groups = 24 if options.groups is None else options.groups
    with progress_bars(console) as bars:
        report = measure_signal(config, groups, options.maps or (), progress=reporter(bars))
    console.print(signal_table(report))
    print(report.recommendation)
    if options.json:
        write_atomically(options.json, json.dumps(report.record(), indent=1, allow_nan=False) + "\n")
    return 0


def _report(options: argparse.Namespace) -> int:
    """Read a run directory and write its report.html: one self-contained page that opens offline."""
    from .report import render_report

    print(render_report(options.run))
    return 0


def _serve_reward(options: argparse.Namespace) -> int:
    """Answer POST /score with the scores of a reward, until interrupted. docs/rewards.md has the format. Without
    --token-env, anybody who reaches the address may ask."""
    if options.max_batch_pixels < 1:
        raise ValueError(f"--max-batch-pixels: expected at least 1, got {options.max_batch_pixels}")
    try:
        from .rewards.serve import Limits, listen, make_app, run
    except ModuleNotFoundError as error:
        raise ValueError(f"vipo serve-reward needs {error.name}: pip install 'vipo[serve]'") from error
    from .rewards import load_reward
    from .rewards.endpoint import read_token
    from .types import find_device

    device = find_device(options.device)
    token = None if options.token_env is None else read_token(options.token_env)
    reward = load_reward(options.name, device)
    app = make_app(
        reward, options.name, device=device, token=token, limits=Limits(batch_pixels=options.max_batch_pixels)
    )
    with listen(options.host, options.port) as bound:
        host, port = bound.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"{options.name} on {device}: http://{address}/score", flush=True)
        try:
            run(app, bound)
        except KeyboardInterrupt:
            print("stopped")
    return 0


_COMMANDS = {
    "demo": _demo,
    "train": _train,
    "check": _check,
    "maps": _maps,
    "eval": _eval,
    "report": _report,
    "serve_reward": _serve_reward,
}
