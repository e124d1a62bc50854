"""What comes from somebody else: files named in data files, weights, and code in model folders."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

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
    from safetensors.torch import load_file

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
        assert "trust_remote_code=True" not in text and "allow_pickle" not in text, path
        for match in re.finditer(r"\bAuto[A-Z]\w*\.from_pretrained\(", text):
            found += 1
            assert "trust_remote_code=False" in text[match.start() :].split("\n    except")[0], f"{path}: {match[0]}"
    assert found >= 5
