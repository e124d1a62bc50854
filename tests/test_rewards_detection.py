"""GenEval-style checks: the rule on made-up boxes, the detector against transformers' own post-processing."""

import json

import pytest
import torch
from tiny_pipelines import clip_tokenizer
from tiny_rewards import clip_folder, pixels, rewards_of, shaken
from transformers import (
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    OwlViTConfig,
    OwlViTForObjectDetection,
)

from vipo.rewards import load_reward
from vipo.rewards.detection import GenEval, _distinct, read_scenes, relations

SCENES = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {
        "tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}],
        "prompt": "a photo of two dogs",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red cat and a blue dog",
    },
    {
        "tag": "position",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a dog left of a cat",
    },
]  # fmt: skip
PROMPTS = [str(scene["prompt"]) for scene in SCENES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny OWLv2, a tiny OWL-ViT, a tiny CLIP and a metadata file."""
    root = tmp_path_factory.mktemp("geneval")
    tokenizer = clip_tokenizer()
    text = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    for name, kind, config in (
        ("owlv2", Owlv2ForObjectDetection, Owlv2Config), ("owlvit", OwlViTForObjectDetection, OwlViTConfig),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = shaken(kind(config(text_config=text, vision_config=vision, projection_dim=16)))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    clip_folder(root / "clip")
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(scene) for scene in SCENES) + "\n")
    return root


def load(root, detector="owlv2", **options):
    options = {"detector": str(root / detector), "clip": str(root / "clip"), **options}
    return load_reward("geneval", path=root / "metadata.jsonl", options=options)


@pytest.mark.parametrize("name", ["owlv2", "owlvit"])
@pytest.mark.parametrize("size", [(32, 32), (32, 24)])
def test_boxes_are_those_of_transformers(folders, name, size):
    reward = load(folders, name, threshold=0.0, overlap=1.1)
    kind = Owlv2ForObjectDetection if name == "owlv2" else OwlViTForObjectDetection
    model = kind.from_pretrained(folders / name)
    picture = pixels(3, *size)
    if name == "owlv2":  # on a picture that needs padding but no scaling
        square = torch.nn.functional.pad(picture, (0, 32 - size[1], 0, 0))
    else:
        square = torch.nn.functional.interpolate(picture[None], (32, 32), mode="bilinear", antialias=True)[0]
    tokens = clip_tokenizer()(
        ["a photo of a cat", "a photo of a dog"], padding="max_length", max_length=16, truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        output = model(pixel_values=square[None], **tokens)
    processor = Owlv2ImageProcessorPil()
    scale = torch.tensor([size[1], size[0], size[1], size[0]])
    if name == "owlv2":
        theirs = processor.post_process_object_detection(output, 0.0, target_sizes=[size])[0]
    else:
        theirs = processor.post_process_object_detection(output, 0.0)[0]
        theirs["boxes"] = theirs["boxes"] * scale
    found = reward.detect(picture)
    assert sum(map(len, found.values())) == 16
    for index, label in enumerate(("cat", "dog")):
        kept = theirs["labels"] == index
        boxes = theirs["boxes"][kept][theirs["scores"][kept].argsort(descending=True)]
        torch.testing.assert_close(found[label], torch.minimum(boxes.clamp_min(0), scale), rtol=1e-4, atol=1e-4)


def test_order_batch_frames_and_range(folders):
    reward = load(folders, threshold=0.4)
    frames = pixels(4, 2, 3, 40, 48)
    scores = rewards_of(reward, frames, PROMPTS)
    assert ((scores >= 0) & (scores <= 1)).all()
    torch.testing.assert_close(rewards_of(reward, frames.flip(0), PROMPTS[::-1]), scores.flip(0))
    torch.testing.assert_close(rewards_of(reward, frames[2:3], PROMPTS[2:3]), scores[2:3])
    apart = [rewards_of(reward, frames[:, i : i + 1], PROMPTS) for i in range(2)]
    torch.testing.assert_close(scores, torch.stack(apart).mean(0))


class Seen(GenEval):
    """The checks alone: boxes and colours are given."""

    def __init__(self, reward, found, colours, strict):
        torch.nn.Module.__init__(self)
        self.scenes, self.strict, self.mean = reward.scenes, strict, torch.zeros(1)
        self.found, self.told = found, colours

    def detect(self, picture):
        return {name: torch.tensor(boxes).float().view(-1, 4) for name, boxes in self.found.items()}

    def colours(self, picture, boxes, name):
        return [self.told[name]] * len(boxes)


LEFT, RIGHT, BELOW = [0, 0, 10, 10], [40, 0, 50, 10], [0, 40, 10, 50]


@pytest.mark.parametrize(
    ("prompt", "found", "colours", "share"),
    [
        (0, {"cat": [LEFT], "dog": []}, {}, 1),
        (0, {"cat": [], "dog": [LEFT]}, {}, 0),
        (1, {"cat": [], "dog": [LEFT, RIGHT]}, {}, 1),
        (1, {"cat": [], "dog": [LEFT]}, {}, 1 / 2),  # too few, but not too many
        (1, {"cat": [], "dog": [LEFT, RIGHT, BELOW]}, {}, 1 / 2),
        (2, {"cat": [LEFT], "dog": [RIGHT]}, {"cat": "red", "dog": "blue"}, 1),
        (2, {"cat": [LEFT], "dog": [RIGHT]}, {"cat": "blue", "dog": "blue"}, 3 / 4),
        (2, {"cat": [], "dog": [RIGHT]}, {"cat": "red", "dog": "blue"}, 2 / 4),
        (3, {"cat": [RIGHT], "dog": [LEFT]}, {}, 1),
        (3, {"cat": [LEFT], "dog": [RIGHT]}, {}, 2 / 3),
        (3, {"cat": [], "dog": [LEFT]}, {}, 1 / 3),
    ],
)
def test_requirements_are_counted(folders, prompt, found, colours, share):
    reward = load(folders)
    frames = torch.zeros(1, 1, 3, 60, 60)
    for strict in (False, True):
        score = rewards_of(Seen(reward, found, colours, strict), frames, [PROMPTS[prompt]])
        assert score.item() == pytest.approx(float(share == 1) if strict else share)


def test_colours_are_the_nearest_of_clips_words(folders):
    reward = load(folders)
    picture = pixels(3, 40, 40)
    told = reward.colours(picture, torch.tensor([[4.0, 4, 36, 36], [50.0, 50, 60, 60]]), "cat")
    words = {
        colour: reward.clip.embed_prompts(
            [f"a photo of a {colour} cat", f"a photo of a {colour}-colored cat", f"a photo of a {colour} object"]
        ).mean(0)
        for colour in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    }
    _, vector = reward.clip.tokens_and_embeddings(picture[None, :, 4:36, 4:36])
    assert told[0] == max(words, key=lambda colour: float(words[colour] @ vector[0] / words[colour].norm()))
    assert len(told) == 2, "a box outside the picture is not fatal"


def test_relations_and_overlaps():
    boxes = {name: torch.tensor(box).float() for name, box in (("l", LEFT), ("r", RIGHT), ("b", BELOW))}
    assert relations(boxes["l"], boxes["r"]) == {"left of"}
    assert relations(boxes["r"], boxes["l"]) == {"right of"}
    assert relations(boxes["l"], boxes["b"]) == {"above"} and relations(boxes["b"], boxes["l"]) == {"below"}
    assert relations(boxes["b"], boxes["r"]) == {"left of", "below"}
    assert relations(boxes["l"], boxes["l"] + 1) == set(), "too near"
    same = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [5, 0, 15, 10]])  # IoU .9 and 1/3
    kept = _distinct(same, torch.tensor([0.1, 0.9, 0.5]), 0.5)
    assert kept.tolist() == [[0, 0, 10, 9], [5, 0, 15, 10]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"}', "line 1: KeyError"),
        ("{", "line 1: JSONDecodeError"),
        ('{"prompt": "x", "include": [{"class": "cat", "count": 0}]}', "count: expected at least 1"),
        ('{"prompt": "x", "include": [{"class": "cat", "count": 1, "color": "redd"}]}', "did you mean 'red'"),
        ('{"prompt": "x", "include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}', "before this one"),
        ("", "has no prompt"),
    ],
)
def test_metadata_errors_name_the_line(tmp_path, line, message):
    (tmp_path / "m.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_scenes(tmp_path / "m.jsonl")


def test_other_errors(folders, tmp_path):
    with pytest.raises(ValueError, match="the metadata file has no prompt 'a bird'"):
        load(folders)(pixels(1, 1, 3, 8, 8), ["a bird"])
    with pytest.raises(ValueError, match="geneval: expected a path"):
        load_reward("geneval")
    with pytest.raises(ValueError, match="model type of the detector"):
        load(folders, "clip")
    with pytest.raises(ValueError, match="cannot load a detector from"):
        load(folders, "nowhere")
