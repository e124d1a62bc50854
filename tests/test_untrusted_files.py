"""What comes from somebody else: files named in data files, weights, and code in model folders."""

import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file, save_file

from vipo.cli import main
from vipo.comparison.sides import fingerprint
from vipo.files import path_below, require_safetensors
from vipo.loading import load_pipeline
from vipo.maps import MaskFile
from vipo.media import read_frames, write_video
from vipo.nano import ASSETS
from vipo.prompts import read_prompts
from vipo.psm import FrozenBackbone
from vipo.rewards.weights import load_tokenizer

SOURCE = Path(__file__).parents[1] / "src" / "vipo"


@pytest.fixture
def folder(tmp_path):
    """A folder with a.png, beside which lies one that is not its business."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for path in ("data/a.png", "outside.png"):
        Image.new("L", (8, 8), 255).save(tmp_path / path)
    return tmp_path / "data"


def test_names_that_stay_below_the_folder(folder):
    (folder / "link.png").symlink_to("a.png")
    (folder.parent / "alias").symlink_to(folder)
    for name in ("a.png", "./a.png", "sub/../a.png", "link.png", str(folder / "a.png"), "sub/new.png"):
        assert path_below(folder, name) == folder / name
    assert path_below(folder.parent / "alias", "a.png").is_file()  # a linked folder is a folder


@pytest.mark.parametrize(
    "name", ["../outside.png", "sub/../../outside.png", "/etc/passwd", "link.png", "sub/up/outside.png"]
)
def test_names_that_lead_out(folder, name):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "sub" / "up").symlink_to(folder.parent)
    with pytest.raises(ValueError, match="leads out of .*; put the file into the folder"):
        path_below(folder, name)
    for key in ("image", "mask_image", "images"):
        (folder / "p.jsonl").write_text(json.dumps({"prompt": "a", key: name}))
        with pytest.raises(ValueError, match=f"line 1: {key}: .*leads out of"):
            read_prompts(str(folder / "p.jsonl"))
    (folder / "m.jsonl").write_text(json.dumps({"prompt": "a", "mask": name}))
    masks = MaskFile(folder / "m.jsonl")
    with pytest.raises(ValueError, match="m.jsonl: .*leads out of"):
        masks.check(["a"])
    with pytest.raises(ValueError, match="leads out of"):
        masks(torch.zeros(1, 1, 3, 8, 8), ["a"])


@pytest.mark.parametrize("name", ["a\0.png", "x" * 5000])
def test_names_of_no_file(folder, name):
    with pytest.raises(ValueError):
        (folder / "p.jsonl").write_text(json.dumps({"prompt": "a", "image": name}))
        read_prompts(str(folder / "p.jsonl"))


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile a.mp4\n", "#EXTM3U\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n"])
def test_a_play_list_that_is_called_a_clip_opens_no_other_file(tmp_path, text):
    write_video(tmp_path / "a.mp4", torch.rand(2, 3, 16, 16), 8)
    assert read_frames(tmp_path / "a.mp4").shape == (2, 3, 16, 16)
    (tmp_path / "b.mp4").write_text(text)
    with pytest.raises(ValueError, match="b.mp4: not readable"):
        read_frames(tmp_path / "b.mp4")


def test_weights_that_could_run_code_are_named_with_the_tool_that_converts_them(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights as pytorch_model.bin only.*python tools/to_safetensors.py IN OUT"):
        require_safetensors("pipeline", tmp_path)
    (tmp_path / "model.safetensors").touch()
    require_safetensors("pipeline", tmp_path)


def test_a_converted_backbone_loads(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import to_safetensors

    for file in (ASSETS / "backbone").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(ASSETS / "backbone" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="to_safetensors"):
        FrozenBackbone.from_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-", str(tmp_path / "pytorch_model.bin"), str(tmp_path / "model.safetensors")])
    to_safetensors.main()
    frames = torch.rand(1, 1, 3, 32, 32)
    nano = FrozenBackbone.from_pretrained("nano")
    assert torch.equal(FrozenBackbone.from_pretrained(tmp_path)(frames), nano(frames))


class Evil:
    """Pickles to a call of os.system that leaves a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


PIPELINE_WEIGHTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def as_pickles(source, folder, parts, evil=None, zipped=True):
    """Copy a model with the weights of `parts` as .bin; that of the part `evil` runs code where it is unpickled."""
    shutil.copytree(source, folder)
    for part, name in parts.items():
        file = folder / part / f"{name}.safetensors"
        found = load_file(file)
        file.unlink()
        if part == evil:
            found["evil"] = Evil(folder.parent / "ran")
        other = file.with_name(f"{name.replace('model', 'pytorch_model') if name == 'model' else name}.bin")
        torch.save(found, other, _use_new_zipfile_serialization=zipped)
    return folder


def test_the_payload_would_run(tmp_path):
    """Else the two tests below show nothing."""
    folder = as_pickles(ASSETS / "backbone", tmp_path / "b", {".": "model"}, evil=".")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_allow_pickle_reads_the_tensors_of_a_pipeline(tmp_path):
    folder = as_pickles(ASSETS / "t2i", tmp_path / "m", PIPELINE_WEIGHTS)
    with pytest.raises(ValueError, match="has weights as .*bin only.*--allow-pickle"):
        load_pipeline(folder)
    pipeline, embedded = load_pipeline(folder, allow_pickle=True)[0], load_pipeline("nano")[0]
    for part in (*PIPELINE_WEIGHTS, "text_encoder_2"):
        ours, theirs = (getattr(p, part).state_dict() for p in (pipeline, embedded))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("evil", PIPELINE_WEIGHTS)
def test_code_in_a_pickle_does_not_run_even_where_pickles_are_allowed(tmp_path, evil, zipped):
    folder = as_pickles(ASSETS / "t2i", tmp_path / "m", {evil: PIPELINE_WEIGHTS[evil]}, evil, zipped)
    with pytest.raises(ValueError, match="cannot load .*m: "):
        load_pipeline(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_allow_pickle_for_backbones(tmp_path):
    frames = torch.rand(1, 1, 3, 32, 32)
    good = as_pickles(ASSETS / "backbone", tmp_path / "good", {".": "model"})
    found = FrozenBackbone.from_pretrained(good, allow_pickle=True)(frames)
    assert torch.equal(found, FrozenBackbone.from_pretrained("nano")(frames))
    for zipped in (True, False):
        bad = as_pickles(ASSETS / "backbone", tmp_path / f"bad{zipped}", {".": "model"}, ".", zipped)
        with pytest.raises(ValueError, match="weights not loadable"):
            FrozenBackbone.from_pretrained(bad, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", [1, 2], torch.ones(2), None])
def test_a_bin_that_is_no_weights_is_one_line(tmp_path, content):
    for part, name in (("backbone", "model"), ("t2i", "text_encoder/model")):
        shutil.copytree(ASSETS / part, tmp_path / part)
        (tmp_path / part / f"{name}.safetensors").unlink()
        file = (tmp_path / part / name).with_name("pytorch_model.bin")
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match="backbone .*: weights not loadable .*; give a folder"):
        FrozenBackbone.from_pretrained(tmp_path / "backbone", allow_pickle=True)
    with pytest.raises(ValueError, match="cannot load .*t2i: "):
        load_pipeline(tmp_path / "t2i", allow_pickle=True)


@pytest.mark.parametrize("index", ["no JSON", '{"weight_map": "../elsewhere"}', "[]"])
def test_an_index_of_shards_that_is_none_is_one_line(tmp_path, index):
    folder = as_pickles(ASSETS / "backbone", tmp_path / "b", {".": "model"})
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(ValueError, match="backbone .*: weights not loadable .*; give a folder"):
        FrozenBackbone.from_pretrained(folder, allow_pickle=True)


def in_two(folder, name):
    """Split a part's safetensors into two .bin files with an index."""
    found = load_file(folder / f"{name}.safetensors")
    (folder / f"{name}.safetensors").unlink()
    stem = name if name.startswith("diffusion") else "pytorch_model"
    shards = [f"{stem}-0000{i}-of-00002.bin" for i in (1, 2)]
    index = {key: shards[i % 2] for i, key in enumerate(found)}
    for shard in shards:
        torch.save({key: found[key] for key, where in index.items() if where == shard}, folder / shard)
    (folder / f"{stem}.bin.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))


def test_weights_in_several_bins_are_read_or_said_not_to_be(tmp_path):
    folder = shutil.copytree(ASSETS / "t2i", tmp_path / "m")
    in_two(folder / "text_encoder", "model")
    pipeline, embedded = load_pipeline(folder, allow_pickle=True)[0], load_pipeline("nano")[0]
    ours, theirs = (p.text_encoder.state_dict() for p in (pipeline, embedded))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    in_two(folder / "vae", "diffusion_pytorch_model")
    with pytest.raises(ValueError, match=r"m/vae has its weights in several .bin files.*AutoencoderKL.from_pretrained"):
        load_pipeline(folder, allow_pickle=True)
    AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=False).save_pretrained(folder / "vae")
    ours, theirs = (p.vae.state_dict() for p in (load_pipeline(folder, allow_pickle=True)[0], embedded))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("verbosity", [logging.WARNING, logging.CRITICAL])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_weights_that_are_missing_are_refused_whatever_is_shown(tmp_path, suffix, verbosity):
    folder = shutil.copytree(ASSETS / "t2i", tmp_path / "m")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    found = load_file(file)
    file.unlink()
    missing = found.popitem()[0]
    save = torch.save if suffix == "bin" else save_file
    save(found, file.with_suffix(f".{suffix}"))
    logger, level, shown = logging.getLogger("diffusers"), diffusers_logging.get_verbosity(), []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logger.addHandler(handler)
    diffusers_logging.set_verbosity(verbosity)
    before = [*logging.getLogger("diffusers.models.modeling_utils").filters]
    assert before, "diffusers filters by rank, after us"
    try:
        with pytest.raises(ValueError, match=f"weights of AutoencoderKL are missing and would be .*{missing}"):
            load_pipeline(folder, allow_pickle=True)
    finally:
        logger.removeHandler(handler)
        diffusers_logging.set_verbosity(level)
    assert len(shown) == (verbosity == logging.WARNING)
    assert logging.getLogger("diffusers.models.modeling_utils").filters == before


def test_allow_pickle_on_the_command_line(tmp_path, monkeypatch, capsys):
    """Pipeline and backbone of a run and of its evaluation; a changed byte of a .bin is another model."""
    monkeypatch.chdir(tmp_path)
    as_pickles(ASSETS / "t2i", tmp_path / "m", {"vae": "diffusion_pytorch_model"})
    as_pickles(ASSETS / "backbone", tmp_path / "b", {".": "model"})
    (tmp_path / "run.yaml").write_text(
        "model: {path: m}\nmap: {backbone: b}\nreward: {name: redness}\nprompts: {per_iteration: 1, group_size: 2}\n"
        "sampling: {num_inference_steps: 2}\nrun: {output: out, iterations: 1, tensorboard: false}\n"
    )

    def vipo(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return ended.value.code, capsys.readouterr()

    code, told = vipo("train", "run.yaml")
    assert code == 2 and "--allow-pickle" in told.err and not (tmp_path / "out").exists()
    code, told = vipo("check", "run.yaml", "--allow-pickle")
    assert code == 0, told.out
    code, told = vipo("train", "run.yaml", "--allow-pickle")
    assert code == 0, told.err
    assert "allow_pickle: true" in (tmp_path / "out" / "config.yaml").read_text()
    asked = "--rewards redness --prompts nano_held_out --limit 2 --seeds 1 --sampling.num_inference_steps=2 -o e"
    sides = "eval --model m --lora out/checkpoints/step_000001/weights --map.backbone=b"
    evaluate = f"{sides} {asked}".split()
    code, told = vipo(*evaluate)
    assert code == 2 and "--allow-pickle" in told.err
    code, told = vipo(*evaluate, "--allow-pickle")
    assert code == 0, told.err
    before = fingerprint(tmp_path / "m")
    torch.save({}, tmp_path / "m" / "vae" / "diffusion_pytorch_model.bin")
    assert fingerprint(tmp_path / "m") != before


def spy(folder):
    """Code that leaves a file when it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Mine:\n    pass\n")
    return folder


def test_code_in_a_model_folder_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "yes")  # transformers asks; nobody may
    backbone = spy(tmp_path / "backbone")
    (backbone / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    with pytest.raises(ValueError, match="code of its own, which is never run"):
        FrozenBackbone.from_pretrained(backbone)
    tokenizer = spy(tmp_path / "tokenizer")
    (tokenizer / "config.json").write_text('{"model_type": "mine"}')
    (tokenizer / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}')
    with pytest.raises(ValueError, match="no tokenizer in"):
        load_tokenizer(tokenizer, "nowhere/at_all")
    pipeline = spy(tmp_path / "pipeline" / "transformer").parent
    (pipeline / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["mine", "Mine"]}')
    with pytest.raises(
        ValueError, match="brings code of its own .transformer: .*which is never run; give a pipeline of"
    ):
        load_pipeline(pipeline)
    whole = spy(tmp_path / "whole")
    (whole / "model_index.json").write_text('{"_class_name": ["mine", "Mine"]}')
    with pytest.raises(ValueError, match="brings code of its own ._class_name: .*which is never run"):
        load_pipeline(whole)
    assert not list(tmp_path.rglob("ran"))


def test_no_loader_is_told_to_trust():
    found = 0
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        for trusting in (
            "trust_remote_code=True",
            "weights_only=False",
            "pickle.load",
            "Unpickler(",
        ):
            assert trusting not in text, f"{path}: {trusting}"
        assert not re.search(r"\b(np|numpy)\.[\w.]+\([^)]*allow_pickle=True", text), path
        for match in re.finditer(r"\bAuto[A-Z]\w*\.from_pretrained\(", text):
            found += 1
            assert "trust_remote_code=False" in text[match.start() :].split("\n    except")[0], f"{path}: {match[0]}"
    assert found >= 5
