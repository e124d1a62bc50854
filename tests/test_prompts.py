"""Prompt files and groups."""

import json

import numpy as np
import pytest
import torch

from vipo.media import write_image, write_video
from vipo.prompts import prompt_batch, read_prompts
from vipo.types import Prompt


def texts(path):
    return [prompt.text for prompt in read_prompts(str(path))]


def test_reads_lines_and_skips_blanks(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  ein Hünd \n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.txt")) == [Prompt("a cat"), Prompt("ein Hünd")]


def test_embedded_prompts_are_disjoint_from_the_held_out_ones():
    from vipo.nano import ASSETS

    train, held_out = texts("nano"), texts(ASSETS / "prompts_held_out.txt")
    assert len(train) == 768 and len(held_out) == 256
    assert not set(train) & set(held_out)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "is empty"), (b" \n\n", "is empty"), (b"a \xff cat", "is not UTF-8")],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"prompts.path: .*{message}"):
        read_prompts(str(path))


def test_groups_are_adjacent_seeded_and_differ_by_iteration():
    prompts = [Prompt(f"p{i}") for i in range(10)]
    options = {"per_iteration": 3, "group_size": 4, "seed": 5}
    batch = prompt_batch(prompts, 2, **options)
    assert batch == prompt_batch(prompts, 2, **options)
    assert [batch.prompts[i] for i in (0, 4, 8)] == [prompts[batch.indices[i]].text for i in (0, 4, 8)]
    assert batch.entries == [prompts[i] for i in batch.indices]
    assert all(len(set(batch.prompts[i : i + 4])) == 1 for i in (0, 4, 8))
    assert len(set(batch.seeds)) == 12
    assert [len(set(batch.initial_seeds[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    apart = prompt_batch(prompts, 2, **options, same_initial_noise=False)
    assert apart.initial_seeds == apart.seeds
    assert prompt_batch(prompts, 3, **options).seeds != batch.seeds
    assert prompt_batch(prompts, 2, **{**options, "seed": 6}).seeds != batch.seeds


def test_an_epoch_uses_every_prompt_once():
    prompts = [Prompt(f"p{i}") for i in range(6)]
    seen = [prompt_batch(prompts, i, per_iteration=2, group_size=2, seed=0).prompts[::2] for i in range(3)]
    assert sorted(sum(seen, [])) == [prompt.text for prompt in prompts]


def write_jsonl(folder, *entries):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return str(path)


def test_json_lines_carry_the_keywords_of_each_prompt(tmp_path):
    pictures = torch.stack([torch.full((3, 8, 12), value) for value in (0.0, 0.5, 1.0)])
    for i, picture in enumerate(pictures):
        write_image(tmp_path / f"{i}.png", picture)
    write_video(tmp_path / "clip.mp4", pictures, 8)
    path = write_jsonl(
        tmp_path,
        {"prompt": " a cat ", "negative_prompt": "a dog", "height": 32},
        {"prompt": "b", "image": "0.png", "mask_image": "2.png"},
        {"prompt": "c", "images": ["1.png", "2.png"]},
        {"prompt": "d", "video": "clip.mp4"},
        {"prompt": "e", "height": 32, "negative_prompt": "a dog"},
    )
    cat, masked, several, clip, same = read_prompts(path)
    assert (cat.text, cat.call) == ("a cat", {"negative_prompt": "a dog", "height": 32})
    assert cat.key == same.key != masked.key  # the order of the keys does not matter
    assert np.asarray(masked.call["image"]).max() == 0 and np.asarray(masked.call["mask_image"]).min() == 255
    assert [np.asarray(image).mean() for image in several.call["image"]] == [128, 255] and "images" not in several.call
    assert len(clip.call["video"]) == 3 and clip.call["video"][0].size == (12, 8)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nonsense", "line 2 is not JSON"),
        ({"text": "a"}, 'expected {"prompt"'),
        ({"prompt": " "}, 'expected {"prompt"'),
        ({"prompt": "a", "image": "gone.png"}, "line 2: image: .*gone.png: no such file"),
        ({"prompt": "a", "image": 3}, "image: expected a file name or a list"),
        ({"prompt": "a", "num_inference_steps": 4}, "line 2: num_inference_steps is set by the run"),
        ({"prompt": "a", "images": []}, "images: expected a file name or a list"),
        ({"prompt": "a", "image": "a.png", "images": ["a.png"]}, "the same keyword"),
    ],
)
def test_bad_json_lines(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write_jsonl(tmp_path, {"prompt": "fine"}, entry))
