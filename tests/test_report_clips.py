"""The report of clips: what moves in the run directory moves on the page, and the words fit."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from vipo.media import write_animation, write_image
from vipo.report import render_report
from vipo.report.images import Picture, embed, embed_clips
from vipo.runlog import RunLog

KEYS = ("base", "grpo", "vipo", "map")
PROMPT = "a small red circle moving up on a navy background"


class Shown(NamedTuple):
    """One <img> of a page: its alternative text and data URI, and that of the <source> for reduced motion."""

    alt: str
    uri: str
    still: str | None


class Images(HTMLParser):
    """Collect the images of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[Shown] = []
        self._still: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if tag == "source":
            assert attributes["media"] == "(prefers-reduced-motion: reduce)"
            self._still = attributes["srcset"]
        elif tag == "img" and "src" in attributes:
            self.found.append(Shown(attributes["alt"], attributes["src"], self._still))

    def handle_endtag(self, tag: str) -> None:
        self._still = None if tag == "picture" else self._still


def decoded(uri: str) -> tuple[tuple[int, int], list[int]]:
    """Size and the times of all frames in milliseconds, 0 for a picture."""
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return image.size, [frame.copy().info.get("duration", 0) for frame in ImageSequence.Iterator(image)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """The worst case for its size."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def write_train(run: Path, frames: int = 5, side: int = 16) -> Path:
    """Write the directory of a training run of clips, or of stills where frames is 1."""
    with RunLog(run, "seed: 0\n", tensorboard=False) as log:
        for iteration in (1, 2):
            log.metrics(iteration, {"reward_mean": 0.1 * iteration})
            log.pictures(iteration, noise(4, frames, 3, side, side), noise(4, -(-frames // 4), 4, 4))
    return run


def write_demo(run: Path, modality: str | None) -> Path:
    """Write the directory of a demo: of clips for "video", of stills for "image" and where it is not said."""
    clips = modality == "video"
    for name in ("grpo", "vipo"):
        write_train(run / name, frames=5 if clips else 1)
    suffix = "webp" if clips else "png"
    for seed, key in enumerate(KEYS):
        frames = noise(5, 3, 64, 64, seed=seed)
        if clips:
            write_animation(run / "images" / f"sample_000_{key}.webp", frames, fps=8)
        else:
            write_image(run / "images" / f"sample_000_{key}.png", frames[0])
    estimate = {name: {"mean": 0.2, "low": 0.1, "high": 0.3} for name in ("reward", "reward_mq", "flicker")}
    metrics = [("reward", "Preference score"), ("reward_mq", "Motion quality"), ("flicker", "Flicker")]
    summary: dict[str, object] = {
        "kind": "demo",
        "seed": 0,
        "metrics": [
            {"name": name, "label": label, "higher_is_better": name != "flicker", "in_domain": name != "flicker"}
            for name, label in metrics
        ],
        "evaluation": {"prompts": 8, "base": estimate, "grpo": estimate, "vipo": estimate},
        "differences": {"vipo-base": estimate, "grpo-base": estimate, "vipo-grpo": estimate},
        "samples": [{"prompt": PROMPT} | {key: f"images/sample_000_{key}.{suffix}" for key in KEYS}],
    }
    if modality is not None:
        summary["modality"] = modality
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return run


def rendered(run: Path) -> tuple[str, list[Shown]]:
    text = render_report(run).read_text(encoding="utf-8")
    return text, Images(text).found


def test_a_demo_of_clips_plays(tmp_path: Path) -> None:
    text, shown = rendered(write_demo(tmp_path / "run", "video"))
    gallery = [image for image in shown if image.alt.endswith(f": {PROMPT}") and "sample for" not in image.alt]
    assert [image.alt.partition(":")[0] for image in gallery] == ["Base model", "GRPO", "ViPO", "ViPO\u2019s map"]
    example = [image for image in shown if "ViPO sample for" in image.alt or "The same sample with" in image.alt]
    assert [image.uri for image in example] == [image.uri for image in gallery[2:]]
    for image in gallery:
        assert decoded(image.uri) == ((64, 64), [125] * 5)
        assert image.still is not None and decoded(image.still) == ((64, 64), [0])
    sheets = [image for image in shown if ", iteration " in image.alt]
    assert len(sheets) == 6 and {image.alt for image in sheets} >= {"GRPO samples, iteration 1"}
    for image in sheets:
        assert decoded(image.uri) == ((4 * 18, 18), [125] * 5)
        assert image.still is not None and decoded(image.still) == ((5 * 18, 4 * 18), [0])  # the film strip
    assert len(shown) == 12 and len(text) < 4_000_000


@pytest.mark.parametrize("modality", [None, "image", "video"])
def test_the_words_fit_what_is_shown(tmp_path: Path, modality: str | None) -> None:
    text, shown = rendered(write_demo(tmp_path / "run", modality))
    clips = modality == "video"
    phrases = {
        "not that the clips got better": "not that the images got better",
        "the last clip lays": "the last image lays",
        "the reward of that very clip": "the reward of that very image",
        "every pixel of every frame": "every pixel of the sample",
        "every patch of every frame": "every patch of the sample",
        "Clips the two trainings drew": "Contact sheets the two trainings drew",
        "<title>ViPO video demo, seed 0": "<title>ViPO demo, seed 0",
        "<span>ViPO video demo": "<span>ViPO demo",
        "<code>vipo demo --video --seed 0<": "<code>vipo demo --seed 0<",
        'aria-label="Enlarged clip"': 'aria-label="Enlarged image"',
    }
    for moving, still in phrases.items():
        assert (moving in text, still in text) == (clips, not clips), (moving, still)
    assert ("as film strips" in text) == clips and any(image.still for image in shown) == clips
    assert text.count('<span class="tag seen">trained on') == 2


def test_a_command_that_was_recorded_is_shown(tmp_path: Path) -> None:
    run = write_demo(tmp_path / "run", "video")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8")) | {"command": "vipo demo --video --seed 7"}
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert "<code>vipo demo --video --seed 7<" in rendered(run)[0]


def test_a_training_of_clips_plays(tmp_path: Path) -> None:
    text, shown = rendered(write_train(tmp_path / "clips"))
    assert [image.alt for image in shown] == [
        f"{kind}, iteration {iteration}" for iteration in (1, 2) for kind in ("Samples", "Allocation maps")
    ]
    assert all(decoded(image.uri)[1] == [125] * 5 for image in shown)
    assert all(image.still is not None and decoded(image.still)[1] == [0] for image in shown)
    assert "Clips drawn as training went on" in text and "not that the clips got better" in text
    text, shown = rendered(write_train(tmp_path / "stills", frames=1))
    assert len(shown) == 4 and not any(image.still for image in shown)
    assert "Contact sheets drawn as training went on" in text and "not that the images got better" in text


def test_an_animation_that_leaves_the_run_is_refused(tmp_path: Path) -> None:
    run, other = write_train(tmp_path / "run"), write_train(tmp_path / "other")
    animation = run / "samples" / "iteration_000001.webp"
    animation.unlink()
    animation.symlink_to(other / "samples" / "iteration_000001.webp")
    with pytest.raises(ValueError, match="leaves the run directory"):
        render_report(run)


def test_an_animation_fits_its_budget_with_all_its_frames(tmp_path: Path) -> None:
    clip = noise(6, 3, 128, 128)
    write_animation(tmp_path / "clip.webp", clip[[0, 1, 1, 2, 3, 4, 5]], fps=10)
    times = [100, 200, 100, 100, 100, 100]
    kept = embed(tmp_path / "clip.webp", 10**6)
    assert kept.uri == f"data:image/webp;base64,{base64.b64encode((tmp_path / 'clip.webp').read_bytes()).decode()}"
    assert not kept.recompressed and decoded(kept.uri) == ((128, 128), times)
    sizes = []
    for budget in (60_000, 20_000):
        shrunk = embed(tmp_path / "clip.webp", budget)
        assert shrunk.recompressed and (shrunk.width, shrunk.height) == (128, 128)
        assert len(shrunk.uri) <= budget * 4 / 3 + 40
        size, shown = decoded(shrunk.uri)
        assert shown == times
        sizes.append(size[0])
    assert sizes[0] == 128 > sizes[1]
    least = embed(tmp_path / "clip.webp", 100)  # nothing fits: small, but moving
    assert decoded(least.uri)[1] == times and max(decoded(least.uri)[0]) <= 64
    frames = [Image.new("RGB", (20, 20), (40 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=[50, 60, 70])
    gif = embed(tmp_path / "clip.gif", 10**6)
    assert gif.uri.startswith("data:image/webp") and decoded(gif.uri) == ((20, 20), [50, 60, 70])
    (tmp_path / "broken.webp").write_bytes((tmp_path / "clip.webp").read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"broken\.webp: not a readable image"):
        embed(tmp_path / "broken.webp", 10**6)


def test_clips_and_their_strip_share_a_budget(tmp_path: Path) -> None:
    write_animation(tmp_path / "clips.webp", noise(3, 3, 96, 96), fps=8)
    write_image(tmp_path / "clips.png", noise(3, 96, 288))

    def bytes_of(picture: Picture) -> int:
        return (len(picture.uri) + len(picture.still or "")) * 3 // 4

    whole = embed_clips(tmp_path / "clips.webp", tmp_path / "clips.png", 10**6)
    assert not whole.recompressed and whole.still is not None and whole.still.startswith("data:image/png")
    small = embed_clips(tmp_path / "clips.webp", tmp_path / "clips.png", 30_000)
    assert small.recompressed and bytes_of(small) <= 30_000 + 60 < bytes_of(whole)
