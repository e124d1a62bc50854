"""The command line's arguments: what each command takes, and its help."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from . import __version__

Run = Mapping[str, Callable[[argparse.Namespace], int]]
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


_ALLOW_PICKLE = "also read .bin weights of pipelines and backbones, tensors only: --model.allow_pickle=true"


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vipo: error: {message}; see {self.prog} --help\n")


def parse(argv: list[str], run: Run) -> argparse.Namespace:
    """Read the command line: the options, `command` (what to run), `overrides` (--section.key=value) and `arguments`.

    Args:
        argv: without the program's name.
        run: the commands' functions by name; their docstrings are the help.
    """
    parser = _Parser(prog="vipo", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"vipo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo", help="GRPO against ViPO on the embedded pipeline", description=run["demo"].__doc__
    )
    demo.add_argument("--video", action="store_true", help="clips: the embedded text-to-video pipeline")
    demo.add_argument(
        "-o", "--output", type=Path, help="run directory (default: runs/demo, with --video runs/demo_video)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    demo.add_argument("--iterations", type=int, help="iterations per method (default: the recipe's)")
    demo.add_argument("--prompts", type=int, default=128, help="held-out prompts evaluated (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier run in the same directory")
    demo.set_defaults(command=run["demo"])

    keys = _keys() if {"-h", "--help"} & set(argv) and {"train", "check"} & set(argv) else None
    train = _with_config(commands, "train", "train a pipeline", run["train"], keys)
    begin = train.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="continue the newest checkpoint of the run directory")
    begin.add_argument("--overwrite", action="store_true", help="remove the run in the run directory and start again")
    train.add_argument("--allow-changes", action="store_true", help="with --resume: go on with a changed config")
    check = _with_config(commands, "check", "preflight of a training run", run["check"], keys)
    check.add_argument("--signal", action="store_true", help="instead: measure before training whether a map helps")
    check.add_argument("--memory", action="store_true", help="instead: reckon GPU memory per rank, without any weights")
    check.add_argument("--ranks", type=int, metavar="N", help="with --memory: GPUs (1)")
    check.add_argument(
        "--shard", action="store_true", help="with --memory: also sharded (FSDP2), see --parallel.shard_size"
    )
    check.add_argument("--groups", type=int, metavar="M", help="with --signal: groups sampled (24)")
    check.add_argument(
        "--maps", nargs="+", metavar="KEY=VALUE", help="with --signal: further maps, as changes of the map section"
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="with --signal: write the numbers")

    _add_maps(commands, run)
    _add_eval(commands, run)

    report = commands.add_parser(
        "report", help="write report.html of a run directory", description=run["report"].__doc__
    )
    report.add_argument("run", type=Path, help="directory written by vipo train, demo or eval")
    report.set_defaults(command=run["report"])

    _add_serve_reward(commands, run)

    overrides = [text for text in argv if re.match(r"--\w+\.", text)]  # argparse takes one with a blank for an input
    options, rest = parser.parse_known_args([text for text in argv if text not in overrides])
    rest = overrides + rest + (["--model.allow_pickle=true"] if getattr(options, "allow_pickle", False) else [])
    if rest and not hasattr(options, "config"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides, options.arguments = rest, argv
    return options


def _add_maps(commands: Any, run: Run) -> None:
    maps = commands.add_parser(
        "maps",
        help="see and measure the allocation maps of pictures and clips",
        usage="vipo maps INPUT... -o OUT [--map.KEY=VALUE ...] [options]",
        description=run["maps"].__doc__,
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
    maps.set_defaults(command=run["maps"])


def _add_eval(commands: Any, run: Run) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="base against trained on prompts and rewards",
        usage="vipo eval RUN | --model PIPELINE (--lora FOLDER | --trained PIPELINE) [--SECTION.KEY=VALUE ...] ...",
        description=inspect.cleandoc(run["eval"].__doc__ or ""),
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
    evaluate.add_argument("--allow-pickle", action="store_true", help=_ALLOW_PICKLE)
    evaluate.set_defaults(command=run["eval"], config=None)


def _add_serve_reward(commands: Any, run: Run) -> None:
    serve = commands.add_parser("serve-reward", help="serve a reward by HTTP", description=run["serve_reward"].__doc__)
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
    serve.set_defaults(command=run["serve_reward"])


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
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a recipe: " + ", ".join(recipes()))
    parser.add_argument("--allow-pickle", action="store_true", help=_ALLOW_PICKLE)
    parser.set_defaults(command=command)
    return parser


def _keys() -> str:
    """The table of config keys, from the docstrings of the config's fields."""
    from .config import fields

    rows = [f"  --{key}={default}\n      {text}" for key, default, text in fields()]
    return "keys, with their defaults (in YAML: section, then key):\n" + "\n".join(rows)


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    folder = resources.files("vipo") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
