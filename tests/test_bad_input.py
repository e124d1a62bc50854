"""Bad input through the command line: one line that names cause and fix, exit code 2, nothing written or removed.

Each row is a command line, the files it finds, what the error says is wrong, and what it says to do about it.
"""

import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vipo.cli import main
from vipo.manifest import seal
from vipo.nano import ASSETS

SMALL = "--prompts.per_iteration=1 --prompts.group_size=2 --sampling.num_inference_steps=2"
CODE = "raise SystemExit('custom code was executed')\n"


class Bad(NamedTuple):
    """A command line in a folder with `files`: text, bytes, None for a folder, or a function that makes the path."""

    argv: str
    cause: str
    fix: str
    files: dict = {}


def config(text, cause, fix, *overrides):
    """A row of `vipo train run.yaml` with a wrong config."""
    return Bad(shlex.join(["train", "run.yaml", "--run.iterations=1", *overrides]), cause, fix, {"run.yaml": text})


def train(text, cause, fix, files={}):  # noqa: B006
    """A row of `vipo train run.yaml` with anything else wrong."""
    return Bad(f"train run.yaml {SMALL}", cause, fix, {"run.yaml": text, **files})


def prompts(content, cause, fix, name="p.jsonl", files={}):  # noqa: B006
    """A row of `vipo train` with a wrong prompt file."""
    return train(f"prompts: {{path: {name}}}", cause, fix, {name: content, **files})


def model(make, cause, fix):
    """A row of `vipo train` with a wrong model folder."""
    return train("model: {path: m}", cause, fix, {"m": make})


def picture(path):
    Image.new("RGB", (16, 16), "red").save(path)


def copy_of(part, *, drop=(), index=None, **changes):
    """Copy an embedded model; `changes` are of its model_index.json or config.json, which `index` replaces."""

    def make(path):
        shutil.copytree(ASSETS / part, path)
        for name in drop:
            (path / name).unlink()
        file = next(path / name for name in ("model_index.json", "config.json") if (path / name).is_file())
        file.write_text(index or json.dumps({**json.loads(file.read_text()), **changes}))

    return make


def truncated(part, name):
    """Copy an embedded model whose weights end in the middle."""

    def make(path):
        copy_of(part)(path)
        (path / name).write_bytes((path / name).read_bytes()[:5000])

    return make


def incomplete(part, name):
    """Copy an embedded model whose file of weights lacks the first of them."""

    def make(path):
        copy_of(part)(path)
        weights = load_file(path / name)
        del weights[min(weights)]
        save_file(weights, path / name, metadata={"format": "pt"})

    return make


PICKLED_CALL = pickle.dumps(print)
"""What torch.load would call a function for, and with weights_only refuses."""


def pickled(part, name, other):
    """Copy an embedded model that has a part's weights in PyTorch's own format only."""

    def make(path):
        copy_of(part, drop=[name])(path)
        torch.save({}, path / other)

    return make


def link(target):
    return lambda path: path.symlink_to(target)


def lora_of_another_model(path):
    path.mkdir()
    names = ("A", (4, 8)), ("B", (8, 4))
    save_file(
        {f"transformer.blocks.0.attn.to_q.lora_{k}.weight": torch.ones(s) for k, s in names},
        path / "pytorch_lora_weights.safetensors",
    )


def user_reward(body, cause, fix, name="mine:score"):
    """A row of `vipo train` with a user's reward that does wrong."""
    code = f"import torch\n\n\ndef score(frames, prompts):\n    {body}\n\n\nnumber = 3\n"
    return train(f"reward: {{name: '{name}'}}", cause, fix, {"mine.py": code})


def run_directory(**changes):
    """Files of a run directory as `vipo train` leaves it, in out/, with some of them otherwise."""
    whole = {
        "config.yaml": "model: {path: nano}\n",
        "metrics.jsonl": '{"iteration": 1, "reward_mean": 1.0}\n',
        "checkpoints/step_000001/state.json": '{"iteration": 1, "optimizer_steps": {}}',
        "checkpoints/step_000001/weights/a.safetensors": b"",
        "checkpoints/step_000001/state.safetensors": b"",
        "checkpoints/step_000001/manifest.json": lambda path: seal(path.parent),
    }
    later = {f"out/./{name}": content for name, content in changes.items()}  # after the manifest
    return {f"out/{name}": content for name, content in whole.items()} | later


MASKS = "map: {source: masks, path: m.jsonl}\nprompts: {path: p.txt}"
RESUME = f"train run.yaml {SMALL} --run.output=out --resume"
LORA = "eval --model nano --rewards redness --prompts p.txt --lora l"

ROWS = {
    # the config
    "config: no such file": Bad("train none.yaml", "no such file: none.yaml", "config:"),
    "config: a folder": Bad("train conf", "conf is a folder", "expected a YAML file", {"conf": None}),
    "config: binary": config(b"model: \xff\xfe", "is not UTF-8: invalid start byte", "at byte 7"),
    "config: control characters": config(b"model: {path: \x00}", "not YAML: .*special characters", "position 14"),
    "config: not YAML": config("model: [", "is not YAML: .*expected the node content", "line 1, column 9"),
    "config: a list": config("- model\n", "got list", r"expected sections \(model:, prompts:, "),
    "config: plain words": config("plain words", "got str", r"expected sections \(model:, prompts:, "),
    "config: section twice": config("run: {seed: 1}\nrun: {seed: 2}\n", "'run' is there twice", "line 2.*keep one"),
    "config: key twice": config("run:\n  seed: 1\n  seed: 2\n", "'seed' is there twice", "line 3.*keep one"),
    "config: aliases": config("run: &a {seed: 1}\nmodel: *a\n", "line 2: alias", "write the value out"),
    "config: too deep": config("a: " + "[" * 5000, "nested too deep", "config: run.yaml"),
    "config: a date that is none": config("run: {output: 2026-13-45}", "month must be in 1", "config: run.yaml"),
    "config: unknown section": config("modle: {path: nano}", "modle: unknown key", "did you mean model?"),
    "config: unknown key": config(
        "prompts: {groupsize: 4}", "groupsize: unknown key", "did you mean prompts.group_size?"
    ),
    "config: key outside its section": config("group_size: 4", "unknown key", "did you mean prompts.group_size?"),
    "config: section that is a number": config("model: 3", "model: .*got 3", "expected a valid dictionary"),
    "config: key that is no text": config("3: {}", "got 3", "keys should be strings"),
    "config: text for a number": config("prompts: {group_size: eight}", "got 'eight'", "expected a valid integer"),
    "config: number too small": config("prompts: {group_size: 1}", "got 1", "expected greater than or equal to 2"),
    "config: NaN": config("optimizer: {learning_rate: .nan}", "learning_rate: .*got nan", "expected a finite number"),
    "config: infinite": config("sampling: {eta: .inf}", "sampling.eta: .*got inf", "expected a finite number"),
    "config: unknown choice": config("sampling: {kernel: euler}", "got 'euler'", "expected 'flow_grpo'"),
    "config: clip range upside down": config("loss: {clip_range: [2, 1]}", "got", "expected 0 < low < 1 and high > 0"),
    "config: null for a number": config("prompts: {group_size: null}", "got None", "expected a valid integer"),
    "config: more updates than steps": config("optimizer: {updates_per_rollout: 9}", "9 updates need", "step_fraction"),
    "config: window that does not fit": config(
        "sampling: {window: 99}", "99 stochastic steps do not fit", "change window"
    ),
    "config: masks without a file": config("map: {source: masks}", "map.path", "expected a .jsonl file"),
    "config: settings that exclude each other": config(
        "map: {normalisation: minmax, floor: .5}", "map.floor and map.temp", "need map.normalisation=mean"
    ),
    "config: float16 without autocast": config(
        "model: {train: full, dtype: float16}", "needs", "model.autocast=float16"
    ),
    "config: three problems, three lines": config(
        "loss: {levle: a}\nrun: {seed: -1}\nmap: {layer: x}", "did you mean loss.level", "expected a valid integer"
    ),
    "override: no value": config("", "--loss.level: expected", "e.g. --prompts.group_size=4", "--loss.level"),
    "override: no section": config("", "--frobnicate", "expected --section.key=value", "--frobnicate"),
    "override: below a value": config(
        "model: {path: nano}", "path is not a section", "model.path.x", "--model.path.x=1"
    ),
    "override: not YAML": config("", "not a YAML value", "run.seed", "--run.seed={"),
    "override: misspelt": config("", "loss.levle: unknown key", "did you mean loss.level", "--loss.levle=sample"),
    "override: section of scalars": config("model: 3", "model is not a section", "model.path", "--model.path=nano"),
    # prompts
    "prompts: no such file": config("prompts: {path: none.txt}", "no such file: none.txt", "prompts.path"),
    "prompts: a folder": prompts(None, "is a folder", "expected a text file with one prompt per line"),
    "prompts: empty": prompts("", "p.txt is empty", "expected one prompt per line", "p.txt"),
    "prompts: blank lines": prompts(" \n\n", "p.txt is empty", "expected one prompt per line", "p.txt"),
    "prompts: not UTF-8": prompts(b"a \xff cat", "not UTF-8", "save it as UTF-8", "p.txt"),
    "prompts: not JSON": prompts('{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON", "Expecting ':' delimiter"),
    "prompts: JSON too deep": prompts("[" * 100000, "line 1 is not JSON", "nested too deep"),
    "prompts: no prompt key": prompts('{"text": "a cat"}', "got .*text", 'expected {"prompt": "..."'),
    "prompts: prompt is a number": prompts('{"prompt": 3}', 'got {"prompt": 3}', 'expected {"prompt": "..."'),
    "prompts: half a character": prompts(r'{"prompt": "\ud800 cat"}', "prompt 1 holds half a character", "mend it"),
    "prompts: a huge line": prompts("cat " * 50000, "prompt 1 has 199999 characters", "at most", "p.txt"),
    "prompts: the run's keyword": prompts(
        '{"prompt": "a", "generator": 1}', "generator is set by the run", "leave it out"
    ),
    "prompts: no such picture": prompts('{"prompt": "a", "image": "b.png"}', "image: .*b.png: no such file", "line 1"),
    "prompts: picture that is none": prompts(
        '{"prompt": "a", "image": "b.png"}', "b.png: not readable", "is the file complete", files={"b.png": b"abc"}
    ),
    "prompts: picture by ..": prompts(
        '{"prompt": "a", "image": "../b.png"}',
        "'../b.png' leads out of",
        "put the file into the folder",
        "sub/p.jsonl",
        {"b.png": picture},
    ),
    "prompts: picture by absolute path": prompts(
        '{"prompt": "a", "image": "/etc/b.png"}', "'/etc/b.png' leads out of", "put the file into the folder"
    ),
    "prompts: picture by a link": prompts(
        '{"prompt": "a", "image": "b.png"}',
        "'b.png' leads out of",
        "put the file into the folder",
        "sub/p.jsonl",
        {"b.png": picture, "sub/b.png": link("../b.png")},
    ),
    "prompts: playlist that is called a clip": prompts(
        '{"prompt": "a", "video": "b.mp4"}',
        "video: b.mp4: not readable",
        "is the file complete",
        files={"b.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n"},
    ),
    "prompts: unknown keyword": prompts('{"prompt": "a", "foo": 1}', "takes no keyword 'foo'", "see its __call__"),
    "prompts: table without its column": prompts(
        "colour,size\nred,1\n", "none of the prompt sets known", "drawbench", "p.csv"
    ),
    "prompts: JSON that is no set": prompts("{}", "none of the prompt sets known", "hpdv2", "p.json"),
    # models
    "model: no such folder": config("model: {path: ./nowhere}", "no such folder: ./nowhere", "give a folder, a hub id"),
    "model: nano misspelt": config("model: {path: nanno}", "no such folder: nanno", "nano or nano_video"),
    "model: a folder of something else": train(
        "model: {path: .}", "no model_index.json in", "written by save_pretrained"
    ),
    "model: broken index": model(copy_of("t2i", index="{"), "model_index.json is not JSON", "is the folder complete"),
    "model: index that is a list": model(
        copy_of("t2i", index="[]"), "model_index.json: expected a mapping", "got list"
    ),
    "model: broken call file": train(
        "model: {path: m}", "vipo.json", "expected a mapping, got list", {"m": copy_of("t2i"), "m/vipo.json": "[1]"}
    ),
    "model: weights missing": model(
        copy_of("t2i", drop=["vae/diffusion_pytorch_model.safetensors"]),
        "cannot load m: .*vae",
        "is the folder complete",
    ),
    "model: a weight missing": model(
        incomplete("t2i", "transformer/diffusion_pytorch_model.safetensors"),
        "cannot load m: weights of SD3Transformer2DModel are missing .*context_embedder.bias",
        "is the folder complete",
    ),
    "model: a weight of the VAE missing": model(
        incomplete("t2i", "vae/diffusion_pytorch_model.safetensors"),
        "cannot load m: weights of AutoencoderKL are missing",
        "is the folder complete",
    ),
    "model: weights cut short": model(
        truncated("t2i", "transformer/diffusion_pytorch_model.safetensors"), "cannot load m: ", "is the folder complete"
    ),
    "model: pickled weights": model(
        pickled("t2i", "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"),
        "m/vae has weights as .*bin only, which could run code",
        "tools/to_safetensors.py",
    ),
    "model: pickled text encoder": model(
        pickled("t2i", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
        "m/text_encoder has weights as .*bin only, which could run code",
        "tools/to_safetensors.py",
    ),
    "model: pickle of a function call, allowed": train(
        "model: {path: m, allow_pickle: true}",
        "cannot load m: ",
        "is the folder complete",
        {
            "m": copy_of("t2i", drop=["vae/diffusion_pytorch_model.safetensors"]),
            "m/vae/diffusion_pytorch_model.bin": PICKLED_CALL,
        },
    ),
    "model: allow_pickle that is no switch": train(
        "model: {allow_pickle: weights}", "model.allow_pickle: .*weights", "expected|true or false|boolean"
    ),
    "model: class that diffusers lacks": model(
        copy_of("t2i", _class_name="Nonesuch"), "cannot load m: .*Nonesuch", "is the folder complete"
    ),
    "model: code of its own": train(
        "model: {path: m}",
        "cannot load m: .*trust_remote_code|m brings code of its own",
        "never run|class of diffusers",
        {"m": copy_of("t2i", _class_name=["pipeline", "Mine"]), "m/pipeline.py": CODE},
    ),
    "model: component with code of its own": train(
        "model: {path: m}",
        "m brings code of its own",
        "never run",
        {"m": copy_of("t2i", transformer=["mine", "Mine"]), "m/transformer/mine.py": CODE},
    ),
    "model: no denoiser": model(
        copy_of("t2i", transformer=[None, None]), "has no transformer or unet", "cannot drive it"
    ),
    "model: no VAE": model(copy_of("t2i", vae=[None, None]), "or no vae", "cannot drive it"),
    "model: kernel of another family": train(
        "sampling: {kernel: ddim}", "is a flow scheduler", "expected one of flow_grpo"
    ),
    "model: no such denoiser": train("model: {denoisers: [unet]}", "unet", "transformer"),
    "model: no such layers": train(
        "model: {lora_targets: [to_nothing]}", "to_nothing.* not found", "model.lora_targets: .*check the target"
    ),
    "model: size that does not fit": train("sampling: {height: 63}", "divisible by 8 but are 63", "divisible by 8"),
    "model: unknown keyword of the call": train(
        "sampling: {call: {foo: 1}}", "takes no keyword 'foo'", "see its __call__"
    ),
    # rewards
    "reward: unknown": train("reward: {name: pickscor}", "unknown reward 'pickscor'", "did you mean 'pickscore'?"),
    "reward: no weights at all": config("reward: {name: {}}", "reward.name", "expected at least one reward"),
    "reward: weight 0": config("reward: {name: {nano: 0}}", "reward.name", "weights other than 0"),
    "reward: path of another": config("reward: {paths: {hps: x}}", "'hps' is not in reward.name", "reward.paths"),
    "reward: no such module": train("reward: {name: 'nowhere:f'}", "cannot import 'nowhere'", "is it on PYTHONPATH?"),
    "reward: module that fails": train(
        "reward: {name: 'broken:f'}",
        "import of 'broken' for 'broken:f' raised ZeroDivisionError",
        r"\(broken.py line 1\); mend it there",
        {"broken.py": "1 / 0"},
    ),
    "reward: no such function": user_reward(
        "pass", "module 'mine' has no 'scor'", "did you mean 'score'?", "mine:scor"
    ),
    "reward: not callable": user_reward("pass", "'mine:number' is not callable", "expected a function", "mine:number"),
    "reward: raises": user_reward("return {}['x']", "reward 'mine:score' raised", "mine.py line 5"),
    "reward: wrong shape": user_reward("return torch.ones(2, 3)", r"got \(2, 3\)", "expected one number per sample"),
    "reward: wrong length": user_reward("return [1.0]", r"got \(1,\)", "expected one number per sample"),
    "reward: texts": user_reward("return ['good', 'bad']", "reward: .*list", "expected one number per sample"),
    "reward: nothing": user_reward("return None", "reward: .*None", "expected one number per sample"),
    "reward: complex": user_reward("return torch.ones(2) * 1j", "complex64", "expected one number per sample"),
    "reward: NaN": user_reward("return torch.full((2,), float('nan'))", "returned nan for sample 0", "on_failure=drop"),
    "reward: credit of no shape": user_reward(
        "return torch.ones(2), torch.ones(2)", "credit map", r"N F h w|\(N, F, h, w\)"
    ),
    "reward: unknown option": train(
        "reward: {name: pickscore, options: {pickscore: {dtyp: float16}}}", "no option 'dtyp'", "did you mean 'dtype'?"
    ),
    "reward: option of no such value": train(
        "reward: {name: nano, options: {nano: {dtype: int8}}}", "dtype: .*got 'int8'", "expected one of float32"
    ),
    "reward: path of a rule": train("reward: {name: redness, paths: {redness: x}}", "redness takes no path", "got 'x'"),
    "reward: no weights in the folder": train(
        "reward: {name: pickscore, paths: {pickscore: w}}",
        "got none",
        "expected .safetensors weights in w",
        {"w": None},
    ),
    "reward: pickled weights": train(
        "reward: {name: aesthetic, paths: {aesthetic: w.pth}, options: {aesthetic: {clip: nano}}}",
        "only w.pth, which could run code",
        "tools/to_safetensors.py",
        {"w.pth": b"x"},
    ),
    "reward: pickled CLIP model": train(
        "reward: {name: pickscore, paths: {pickscore: w}}",
        "w has weights as .*bin only, which could run code",
        "tools/to_safetensors.py",
        {"w": pickled("scorer", "model.safetensors", "pytorch_model.bin")},
    ),
    "reward: weights cut short": train(
        "reward: {name: pickscore, paths: {pickscore: w}}",
        "cannot load a CLIP model from w",
        "is the folder complete",
        {"w": truncated("scorer", "model.safetensors")},
    ),
    "reward: server without address": train(
        "reward: {name: remote}", "needs an address", "set reward.paths, as http://"
    ),
    "reward: address with a password": train(
        "reward: {name: remote, paths: {remote: 'http://me:hunter2@host/'}}", "expected no @", "token_env"
    ),
    "reward: address with a key": train(
        "reward: {name: remote, paths: {remote: 'http://host/score?api_key=hunter2'}}", "'api_key'", "token_env"
    ),
    "reward: no such token": train(
        "reward: {name: remote, paths: {remote: 'http://host/'}, options: {remote: {token_env: VIPO_NO_TOKEN}}}",
        "VIPO_NO_TOKEN is not set or empty",
        "token_env: .*export VIPO_NO_TOKEN",
    ),
    "reward: the token itself": train(
        "reward: {name: remote, paths: {remote: 'http://host/'}, options: {remote: {token_env: hunter2-s3cret}}}",
        "token_env: .*not shown",
        "expected the name of an environment variable",
    ),
    "reward: server that is not there": train(
        "reward: {name: remote, paths: {remote: 'http://127.0.0.1:9/'}, options: {remote: {retries: 0}}}",
        "127.0.0.1:9/: no answer in 1 attempts; the last: .*refused",
        "is the server running there",
    ),
    # maps
    "map: unknown source": config("map: {source: mask}", "map.source: .*got 'mask'", "expected psm, masks, reward or"),
    "map: no such function": train("map: {source: 'nowhere:f'}", "map.source: cannot import", "is it on PYTHONPATH?"),
    "map: no such backbone": train(
        "map: {backbone: ./nowhere}", "'./nowhere'", "give a folder written by save_pretrained"
    ),
    "map: backbone of words": train(
        "map: {backbone: b}",
        "model type of backbone 'b'",
        "expected one of .*dinov2",
        {"b/config.json": '{"model_type": "bert"}'},
    ),
    "map: pickled backbone": train(
        "map: {backbone: b}",
        "b has weights as .*bin only, which could run code",
        "tools/to_safetensors.py",
        {"b": pickled("backbone", "model.safetensors", "pytorch_model.bin")},
    ),
    "map: pickle of a function call, allowed": train(
        "map: {backbone: b}\nmodel: {allow_pickle: true}",
        "backbone 'b': weights not loadable",
        "give a folder",
        {"b": copy_of("backbone", drop=["model.safetensors"]), "b/pytorch_model.bin": PICKLED_CALL},
    ),
    "map: backbone with code of its own": train(
        "map: {backbone: b}",
        "'b': .*code",
        "never run",
        {"b/config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}', "b/mine.py": CODE},
    ),
    "map: no such layer": train("map: {layer: 99}", "layer: .*got 99", "expected -1"),
    "masks: no such file": train(MASKS, "cannot read m.jsonl", "expected a .jsonl file", {"p.txt": "a"}),
    "masks: not JSON": train(
        MASKS, "m.jsonl line 1 is not JSON", "Expecting property name", {"p.txt": "a", "m.jsonl": "{"}
    ),
    "masks: neither": train(
        MASKS, "line 1", "expected .*mask.* or .*boxes", {"p.txt": "a", "m.jsonl": '{"prompt": "a"}'}
    ),
    "masks: boxes in pixels": train(
        MASKS,
        "got .*64",
        "in fractions of the frame",
        {"p.txt": "a", "m.jsonl": '{"prompt": "a", "boxes": [[0, 0, 64, 64]]}'},
    ),
    "masks: no entry": train(
        MASKS,
        "no entry for 1 prompts, first 'b'",
        "map.path",
        {"p.txt": "b", "m.jsonl": '{"prompt": "a", "mask": "a.png"}'},
    ),
    "masks: no such picture": train(
        MASKS, "a.png: no such file", "map.path", {"p.txt": "a", "m.jsonl": '{"prompt": "a", "mask": "a.png"}'}
    ),
    "masks: all white": train(
        MASKS,
        "says nothing",
        "white is the subject",
        {"p.txt": "a", "m.jsonl": '{"prompt": "a", "mask": "a.png"}', "a.png": picture},
    ),
    "masks: picture by ..": train(
        MASKS.replace("m.jsonl", "sub/m.jsonl"),
        "'../a.png' leads out of sub",
        "put the file into the folder",
        {"p.txt": "a", "sub/m.jsonl": '{"prompt": "a", "mask": "../a.png"}', "a.png": picture},
    ),
    # checkpoints and run directories
    "resume: no run": Bad(RESUME, "out holds no run", "--resume", {"run.yaml": ""}),
    "resume: state that is not JSON": Bad(
        RESUME,
        "step_000001: state.json has 1 bytes",
        "start again with --overwrite",
        {"run.yaml": "", **run_directory(**{"checkpoints/step_000001/state.json": "{"})},
    ),
    "resume: tensors that are none": Bad(
        RESUME,
        "step_000001: state.safetensors has 1 bytes",
        "start again with --overwrite",
        {"run.yaml": "", **run_directory(**{"checkpoints/step_000001/state.safetensors": b"x"})},
    ),
    "output: a run already": Bad(
        f"train run.yaml {SMALL} --run.output=out",
        "already holds a run",
        "give --resume, --overwrite",
        {"run.yaml": "", **run_directory()},
    ),
    "output: something else": Bad(
        "train run.yaml --run.output=out --overwrite",
        "not empty and holds no run",
        "another --run.output",
        {"run.yaml": "", "out/thesis.txt": "precious"},
    ),
    "output: a file": Bad(
        "train run.yaml --run.output=out", "out is a file", "expected a folder", {"run.yaml": "", "out": "x"}
    ),
    "output: below a file": Bad(
        "train run.yaml --run.output=f/out",
        "f is a file|f/out",
        "expected a folder|another --run.output",
        {"run.yaml": "", "f": "x"},
    ),
    "output: resume and overwrite": Bad(
        "train run.yaml --resume --overwrite", "not allowed with", "vipo train --help", {"run.yaml": ""}
    ),
    # devices
    "device: unknown": train("model: {device: gpu}", "model.device|device: .*'gpu'", "expected one of cpu"),
    "device: not there": train("model: {device: 'cuda:99'}", "'cuda:99'", "expected one of cpu"),
    "device: one without values": train("model: {device: meta}", "'meta'", "expected one of cpu"),
    "device: of rewards": train("reward: {device: 'cuda:99'}", "reward.device: 'cuda:99'", "expected one of cpu"),
    "device: of the backbone": train("map: {device: gpu}", "map.device: 'gpu'", "expected one of cpu"),
    "device: of one reward's map": config(
        "reward: {maps: {nano: {device: cpu}}}", "reward.maps: device is one for all maps", "set map.device"
    ),
    "device: no threads": config("run: {threads: 0}", "run.threads: .*got 0", "expected greater than or equal to 1"),
    "device: of maps": Bad(
        "maps a.png -o out --device cuda:99", "'cuda:99'", "expected one of cpu", {"a.png": picture}
    ),
    "device: of a served reward": Bad("serve-reward redness --device gpu", "device: .*'gpu'", "expected one of cpu"),
    # the other commands
    "command: unknown": Bad("trian", "invalid choice: 'trian'", "vipo --help"),
    "command: none": Bad("", "required: COMMAND", "vipo --help"),
    "demo: unknown option": Bad("demo --foo", "unrecognized arguments: --foo", "vipo --help"),
    "demo: number that is none": Bad("demo --seed x", "--seed: invalid int value: 'x'", "vipo demo --help"),
    "demo: no iterations": Bad("demo --iterations 0", "--iterations: .*got 0", "expected at least 1"),
    "demo: one prompt": Bad("demo --prompts 1", "--prompts", "expected at least 2"),
    "demo: folder of something else": Bad(
        "demo -o out --overwrite", "not empty and holds no run", "give another", {"out/thesis.txt": "precious"}
    ),
    "check: option of --signal": Bad(
        "check run.yaml --groups 3", "--groups", "goes with --signal only", {"run.yaml": ""}
    ),
    "check: a folder for the numbers": Bad(
        "check run.yaml --signal --json out",
        "--json: out is a folder",
        "expected a file",
        {"run.yaml": "", "out": None},
    ),
    "check: too few groups": Bad(
        "check run.yaml --signal --groups 0", "groups: .*got 0", "expected at least", {"run.yaml": ""}
    ),
    "maps: no inputs": Bad("maps nothing -o out", "no such file or folder", "nothing"),
    "maps: no output": Bad("maps a.png", "arguments are required: -o", "vipo maps --help", {"a.png": picture}),
    "maps: nothing that is a picture": Bad(
        "maps in -o out", "no picture or video", "expected files ending in .*.png", {"in/a.txt": ""}
    ),
    "maps: key of another section": Bad(
        "maps a.png -o out --loss.level=sample", "--loss.level", "takes --map.KEY", {"a.png": picture}
    ),
    "maps: orientation misspelt": Bad(
        "maps a.png -o out --orientation bordr", "'bordr'", "did you mean 'border'", {"a.png": picture}
    ),
    "maps: no masks": Bad(
        "maps a.png -o out --ground-truth gone", "no such file or folder: gone", "ground_truth", {"a.png": picture}
    ),
    "maps: compression 0": Bad(
        "maps a.png -o out --spatial-compression 0", "got 0", "expected at least 1", {"a.png": picture}
    ),
    "maps: folder of something else": Bad(
        "maps a.png -o out --overwrite", "holds no maps.json", "out", {"a.png": picture, "out/thesis.txt": "precious"}
    ),
    "eval: nothing to evaluate": Bad("eval", "run directory or --model", "expected a"),
    "eval: not a run": Bad("eval out", "out holds no run of vipo train", "give --model instead", {"out": None}),
    "eval: run without a checkpoint": Bad(
        "eval out", "no checkpoint yet", "expected out/checkpoints/step_000001", {"out/config.yaml": ""}
    ),
    "eval: no such checkpoint": Bad(
        "eval out --checkpoint 7", "no checkpoint of iteration 7", "there are 1", run_directory()
    ),
    "eval: two models and a run": Bad(
        "eval out --model nano", "run directory or --model", "one of them", run_directory()
    ),
    "eval: no trained side": Bad(
        "eval --model nano --rewards redness", "--model: expected the trained side", "--lora FOLDER"
    ),
    "eval: no rewards": Bad(
        "eval --model nano --lora l", "--rewards: expected at least one", "not known with --model", {"l": None}
    ),
    "eval: empty adapter": Bad(
        LORA, "lora: no .safetensors in l", "written by save_lora_weights", {"p.txt": "a\nb", "l": None}
    ),
    "eval: adapter that is none": Bad(
        LORA,
        "lora: l/a.safetensors does not fit",
        "header|is it of another model",
        {"p.txt": "a\nb", "l/a.safetensors": b"x"},
    ),
    "eval: another model's adapter": Bad(
        LORA, "lora: ", "is it of another model", {"p.txt": "a\nb", "l": lora_of_another_model}
    ),
    "eval: no such prompts": Bad(
        "eval out --prompts gone.txt", "no such file: gone.txt", "prompts.path", run_directory()
    ),
    "eval: no samples": Bad("eval out --seeds 0", "--seeds", "expected .*at least 1", run_directory()),
    "eval: output that is a run": Bad(
        "eval out -o out", "out is a run directory", "give another folder", run_directory()
    ),
    "report: not a run": Bad("report out", "out is not a run directory", "give the folder of a run", {"out": None}),
    "report: broken metrics": Bad(
        "report out", "metrics.jsonl", "line 1|expected", run_directory(**{"metrics.jsonl": "{\n{}\n"})
    ),
    "serve-reward: unknown": Bad("serve-reward rednes", "unknown reward 'rednes'", "did you mean 'redness'?"),
    "serve-reward: no such port": Bad(
        "serve-reward redness --port 70000", "--port: .*got 70000", "expected 0 to 65535"
    ),
    "serve-reward: no such host": Bad("serve-reward redness --host 192.0.2.1 --port 0", "192.0.2.1", "--host"),
    "serve-reward: host that is none": Bad("serve-reward redness --host no.such.invalid", "no.such.invalid", "--host"),
    "serve-reward: no token": Bad(
        "serve-reward redness --token-env VIPO_NO_TOKEN", "VIPO_NO_TOKEN is not set", "token_env"
    ),
    "serve-reward: no pixels": Bad("serve-reward redness --max-batch-pixels 0", "got 0", "expected at least 1"),
}


def make_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        elif callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def listing(folder):
    """Every path below a folder, with the hash of what it holds; a lock file means nothing."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.name != ".lock"):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (path.is_symlink(), hashlib.sha256(content).hexdigest())
    return found


def complaint(name, row, error):
    """Check the lines of an error: each begins alike, and they name cause and fix."""
    lines = error.splitlines()
    expected = 3 if "three lines" in name else 1
    assert len(lines) == expected and all(line.startswith("vipo: error: ") for line in lines), error
    assert max(map(len, lines)) < 1500, "a line that nobody reads"
    assert re.search(row.cause, error), f"cause {row.cause!r} not in: {error}"
    assert re.search(row.fix, error), f"fix {row.fix!r} not in: {error}"
    assert "hunter2" not in error


def error_of(row, folder, monkeypatch, capfd):
    """Run `main` in a folder and return what it printed as errors; it must exit with 2."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for module in ("mine", "broken"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(row.argv))
    assert caught.value.code == 2
    return capfd.readouterr().err


@pytest.mark.parametrize("name", ROWS)
def test_one_line_exit_code_2_and_nothing_written(tmp_path, monkeypatch, capfd, name):
    row = ROWS[name]
    make_files(tmp_path, row.files)
    before = listing(tmp_path)
    complaint(name, row, error_of(row, tmp_path, monkeypatch, capfd))
    after = {path: found for path, found in listing(tmp_path).items() if not path.startswith("runs")}
    assert after == before
    left = [path for path in listing(tmp_path) if path.startswith("runs") and "/debug" not in path]
    assert not left or (name == "reward: NaN" and left == ["runs", "runs/vipo"])  # a debug bundle, nothing else


SUBPROCESSES = ["config: three problems, three lines", "command: unknown", "reward: raises", "model: pickled weights"]


def test_a_process_says_the_same(tmp_path, monkeypatch, capfd):
    for number, name in enumerate(SUBPROCESSES):
        row, folder = ROWS[name], tmp_path / str(number)
        make_files(folder, {**row.files, ".": None})
        before = listing(folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "vipo", *shlex.split(row.argv)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        complaint(name, row, done.stderr)
        assert done.returncode == 2 and "error" not in done.stdout and listing(folder) == before
        assert done.stderr == error_of(row, folder, monkeypatch, capfd)


def test_the_table_is_large():
    assert len(ROWS) >= 60
    assert len({row.argv + str(row.files) for row in ROWS.values()}) == len(ROWS)
