"""Command line: vipo demo | train | check | maps | eval | report | serve-reward."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from . import __version__
from .console import progress_bars, reporter, typed_command

DESCRIPTION = """\
Post-train image and video generators with pixel-level advantages (ViPO, arXiv 2511.18719).

  vipo demo [--video]              post-train an embedded pipeline by GRPO and by ViPO, and compare (minutes, no GPU)
  vipo check CONFIG.yaml           try every part of a run in seconds, before the run
  vipo check CONFIG.yaml --signal  measure before the run whether its map helps (minutes)
  vipo maps INPUT... -o OUT        see and measure the allocation maps of your own pictures and clips
  vipo train CONFIG.yaml           train any diffusers pipeline, images or video
  vipo eval RUN                    base against trained: rewards, held-out rewards, diversity, drift, with intervals
  vipo report RUN                  write a run directory's report.html again
  vipo serve-reward NAME           let other machines ask a reward over HTTP
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; user errors print one line and exit with 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' loading bars; ours are rich's
    options = _parse(sys.argv[1:] if argv is None else list(argv))
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


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vipo", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"vipo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="GRPO against ViPO on the embedded pipeline", description=_demo.__doc__)
    demo.add_argument("--video", action="store_true", help="clips: the embedded text-to-video pipeline")
    demo.add_argument(
        "-o", "--output", type=Path, help="run directory (default: runs/demo, with --video runs/demo_video)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    demo.add_argument("--iterations", type=int, help="iterations per method (default: the recipe's)")
    demo.add_argument("--prompts", type=int, default=128, help="held-out prompts evaluated (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier run in the same directory")
    demo.set_defaults(command=_demo)

    keys = _keys() if {"-h", "--help"} & set(argv) and {"train", "check"} & set(argv) else None
    train = _with_config(commands, "train", "train a pipeline", _train, keys)
    begin = train.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="continue the newest checkpoint of the run directory")
    begin.add_argument("--overwrite", action="store_true", help="remove the run in the run directory and start again")
    check = _with_config(commands, "check", "preflight of a training run", _check, keys)
    check.add_argument("--signal", action="store_true", help="instead: measure before training whether a map helps")
    check.add_argument("--memory", action="store_true", help="instead: reckon GPU memory per rank, without any weights")
    check.add_argument("--ranks", type=int, metavar="N", help="with --memory: GPUs (1)")
    check.add_argument("--shard", action="store_true", help="with --memory: also sharded by FSDP2")
    check.add_argument("--groups", type=int, metavar="M", help="with --signal: groups sampled (24)")
    check.add_argument(
        "--maps", nargs="+", metavar="KEY=VALUE", help="with --signal: further maps, as changes of the map section"
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="with --signal: write the numbers")

    _add_maps(commands)
    _add_eval(commands)

    report = commands.add_parser("report", help="write report.html of a run directory", description=_report.__doc__)
    report.add_argument("run", type=Path, help="directory written by vipo train, demo or eval")
    report.set_defaults(command=_report)

    _add_serve_reward(commands)

    overrides = [text for text in argv if re.match(r"--\w+\.", text)]  # argparse takes one with a blank for an input
    options, rest = parser.parse_known_args([text for text in argv if text not in overrides])
    rest = overrides + rest
    if rest and not hasattr(options, "config"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides, options.arguments = rest, argv
    return options


def _add_maps(commands: Any) -> None:
    maps = commands.add_parser(
        "maps",
        help="see and measure the allocation maps of pictures and clips",
        usage="vipo maps INPUT... -o OUT [--map.KEY=VALUE ...] [options]",
        description=_maps.__doc__,
        allow_abbrev=False,
    )
    maps.add_argument("inputs", metavar="INPUT", type=Path, nargs="+", help="picture, clip, or folder of them")
    maps.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    maps.add_argument("--overwrite", action="store_true", help="replace earlier maps in the same folder")
    maps.add_argument("--config", default="nano_vipo", help="YAML or recipe whose map section is used (%(default)s)")
    maps.add_argument("--backbone", action="append", default=[], help="instead of the config's; again to compare more")
    maps.add_argument("--orientation", action="append", default=[], help="of the sheet; again for more (default: all)")
    maps.add_argument(
        "--ground-truth", type=Path, metavar="MASKS", help="mask file, or folder of masks named as inputs"
    )
    maps.add_argument("--spatial-compression", type=int, default=8, help="pixels per latent position (%(default)s)")
    maps.add_argument("--temporal-compression", type=int, default=1, help="frames per latent frame (%(default)s)")
    maps.add_argument("--no-first-frame-alone", action="store_true", help="frame 0 shares its latent frame")
    maps.add_argument("--max-frames", type=int, help="read no more of a clip")
    maps.add_argument("--fps", type=float, help="of the written clips (default: the input's)")
    maps.add_argument("--device", help="torch device (default: cuda where there is one)")
    maps.add_argument("--seed", type=int, default=0, help="of the random controls (%(default)s)")
    maps.set_defaults(command=_maps)


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="base against trained on prompts and rewards",
        usage="vipo eval RUN | --model PIPELINE (--lora FOLDER | --trained PIPELINE) [--SECTION.KEY=VALUE ...] ...",
        description=inspect.cleandoc(_eval.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    evaluate.add_argument("run", metavar="RUN", nargs="?", type=Path, help="directory written by vipo train")
    evaluate.add_argument("--checkpoint", type=int, metavar="N", help="of RUN: iteration (default: the newest)")
    evaluate.add_argument("--model", metavar="PIPELINE", help="instead of RUN: folder, hub id, nano or nano_video")
    evaluate.add_argument("--lora", type=Path, metavar="FOLDER", help="trained side of --model: an adapter")
    evaluate.add_argument("--trained", metavar="PIPELINE", help="trained side of --model: another pipeline")
    evaluate.add_argument("--prompts", metavar="FILE", help="prompt file or name (default: what RUN was trained on)")
    evaluate.add_argument("--rewards", metavar="NAME", nargs="+", default=[], help="(default: what RUN was trained on)")
    evaluate.add_argument("--seeds", type=int, default=2, help="samples per prompt and side (default: %(default)s)")
    evaluate.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    evaluate.add_argument("--limit", type=int, help="evaluate so many prompts, evenly spread over the file")
    evaluate.add_argument("-o", "--output", type=Path, help="folder (default: RUN/eval, with --model runs/eval)")
    evaluate.set_defaults(command=_eval, config=None)


def _add_serve_reward(commands: Any) -> None:
    serve = commands.add_parser("serve-reward", help="serve a reward over HTTP", description=_serve_reward.__doc__)
    serve.add_argument("name", metavar="NAME", help="as reward.name: a built-in reward, or package.module:function")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    serve.add_argument("--port", type=int, default=8000, help="TCP port, 0 for any free one (%(default)s)")
    serve.add_argument("--device", help="torch device (default: cuda where there is one)")
    serve.add_argument(
        "--token-env", metavar="VAR", help="environment variable with the token that requests must bring"
    )
    serve.add_argument(
        "--max-batch-pixels", type=int, default=2**24, help="frames x pixels scored at once (%(default)s)"
    )
    serve.set_defaults(command=_serve_reward)


def _with_config(commands: Any, name: str, summary: str, command: Any, keys: str | None) -> argparse.ArgumentParser:
    """Add a command that takes CONFIG and overrides; the keys are listed below its help."""

    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        usage=f"vipo {name} CONFIG [--SECTION.KEY=VALUE ...] [options]",
        description=inspect.cleandoc(command.__doc__),
        epilog=keys and keys.replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a recipe: " + ", ".join(_recipes()))
    parser.set_defaults(command=command)
    return parser


def _keys() -> str:
    """The table of config keys, from the docstrings of the config's fields."""
    from .config import fields

    rows = [f"  --{key}={default}\n      {text}" for key, default, text in fields()]
    return "keys, with their defaults (in YAML: section, then key):\n" + "\n".join(rows)


def _recipes() -> list[str]:
    folder = resources.files("vipo") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _load(options: argparse.Namespace) -> Any:
    from .config import Config

    path = Path(options.config)
    if not path.exists() and options.config in _recipes():
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
    --map.KEY=VALUE override it as in vipo train; --reward.paths and --reward.options go with the named rewards."""
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
    checkpoints whose weights/ folder `diffusers` loads, and report.html."""
    config = _load(options)
    from .runlog import check_output

    mode: Literal["no", "resume", "overwrite"] = "no"
    if options.resume or options.overwrite:
        mode = "resume" if options.resume else "overwrite"
    check_output(config.run.output, resume=options.resume, overwrite=options.overwrite)
    from rich.console import Console

    from .report import render_report
    from .trainer import Trainer

    console, trainer = Console(), Trainer(config)
    if config.sampling.micro_batch == "auto":
        console.print(f"sampling.micro_batch: {trainer.micro_batch}", highlight=False)
    with progress_bars(console) as bars:
        task = bars.add_task("train", total=config.run.iterations, remark="")

        def on_iteration(iteration: int, metrics: dict[str, Any]) -> None:
            remark = f"reward {metrics['reward_mean']:.3f}  clipped {metrics['clip_fraction']:.0%}"
            bars.update(task, completed=iteration, remark=remark)

        trainer.run(mode=mode, on_iteration=on_iteration)
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
    if options.signal and not options.memory:
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
    import torch

    from .rewards import load_reward
    from .rewards.endpoint import read_token

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
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
