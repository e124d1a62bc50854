"""The report page: what it shows is in the files, nothing leaves the page, and broken runs are named or survived."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vipo.report import render_report, wording
from vipo.report.charts import Size, TickFormatter, forest_chart, moving_mean, smoothing_window, thin
from vipo.report.images import embed
from vipo.report.reading import Estimate, Metric
from vipo.report.wording import classify, compact, decimals_for, demo_verdict, fixed, train_verdict

EVIL = "<script>alert('x')</script> a \"red\" & blue $circle$"
REWARD = Metric("reward", "Preference score", True, True, "")
ERROR = Metric("colour_error", "Colour error", False, False, "")
OTHER = Metric("odd", "Odd", None, None, "")
NUMBERS = {  # mean and half-width of the reward, then of the colour error
    "base": (0.4123, 0.0211, 0.1834, 0.0113),
    "grpo": (0.5431, 0.0222, 0.1733, 0.0114),
    "vipo": (0.6267, 0.0233, 0.2151, 0.0115),
    "grpo-base": (0.1308, 0.0244, -0.0101, 0.0116),
    "vipo-base": (0.2144, 0.0255, 0.0317, 0.0117),
    "vipo-grpo": (0.0836, 0.0266, 0.0418, 0.0118),
}


class Page(HTMLParser):
    """Collect what the tests ask about a page: tags, links, ids, and the numbers of the evaluation table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.table_numbers: list[tuple[str, float, str]] = []  # (column, exact value, text shown)
        self.loose_cell_text = self._cell = self._value = ""
        self._in_table = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._in_table = self._in_table or (tag == "table" and attributes.get("id") == "evaluation")
        if self._in_table and tag == "td":
            self._cell = attributes["data-label"] or ""
        if tag == "data":
            self._value = attributes["value"] or ""

    def handle_endtag(self, tag: str) -> None:
        self._in_table = self._in_table and tag != "table"
        self._cell = "" if tag == "td" else self._cell
        self._value = "" if tag == "data" else self._value

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell and self._value:
            self.table_numbers.append((self._cell, float(self._value), data))
        elif self._cell:
            self.loose_cell_text += data

    def values(self, *names: str) -> list[str]:
        """Return every value of the named attributes."""
        return [attributes[name] or "" for _, attributes in self.tags for name in names if name in attributes]


def write_image(path: Path, size: int = 64, seed: int = 0) -> None:
    """Write a square PNG of noise, the worst case for its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def write_train(run_dir: Path, iterations: int = 12, sheets: tuple[int, ...] = (0, 12)) -> Path:
    """Write the directory of a small training run."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(f"seed: 0\nnote: {EVIL}\n", encoding="utf-8")
    always = {"clip_fraction": 0.05, "map_entropy": None, "seconds_rollout": 1.0, "seconds_map": 0.05, "seconds": 1.5}
    records = [
        {"iteration": i, "reward_mean": 0.1 * i, "kl": 1e-6 * i, "constant_groups": i % 2, "my_extra": 1 / i} | always
        for i in range(1, iterations + 1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    for iteration in sheets:
        for folder in ("samples", "maps"):
            write_image(run_dir / folder / f"iteration_{iteration:06d}.png", seed=iteration)
    return run_dir


def estimates(name: str) -> dict[str, dict[str, float]]:
    """Return the JSON estimates of one arm or pair, with symmetric intervals."""
    mean, half, error, error_half = NUMBERS[name]
    return {
        "reward": {"mean": mean, "low": mean - half, "high": mean + half, "win_rate": 0.75},
        "colour_error": {"mean": error, "low": error - error_half, "high": error + error_half},
    }


def summary_of_demo() -> dict[str, object]:
    """Return the summary of a small demo: the reward improved, the colour error worsened, one metric is unknown."""
    return {
        "kind": "demo",
        "seed": 3,
        "threads": 2,
        "versions": {"python": "3.11.7", "torch": EVIL},
        "times": {"train_grpo": 61.25, "train_vipo": 64.5, "evaluate": 9.75, "total": 141.0},
        "metrics": [
            {"name": "reward", "label": "Preference score", "higher_is_better": True, "in_domain": True},
            {"name": "colour_error", "label": EVIL, "higher_is_better": False, "in_domain": False, "description": "d"},
        ],
        "evaluation": {
            "prompts": 16,
            "base": estimates("base") | {"odd": {"mean": 7.125, "low": 6.125, "high": 8.125}},
            **{arm: estimates(arm) for arm in ("grpo", "vipo")},
        },
        "differences": {pair: estimates(pair) for pair in ("grpo-base", "vipo-base", "vipo-grpo")},
        "curves": {k: {"iteration": [1, 2, 3], "reward_mean": [0.1, None, 0.3]} for k in ("grpo", "vipo")},
        "signal": {"grpo": 0.0016, "vipo": {"mean": 0.0074, "low": 0.005, "high": 0.009}},
        "samples": [
            {key: f"images/sample_000_{key}.png" for key in ("base", "grpo", "vipo", "map")}
            | {"prompt": EVIL, "reward": {"base": 0.31, "grpo": 0.42, "vipo": None}}
        ],
        "notes": [f"A note with {EVIL}"],
    }


def write_demo(run_dir: Path, summary: dict[str, object] | None = None) -> Path:
    """Write the directory of a small demo."""
    run_dir.mkdir(parents=True)
    for name in ("grpo", "vipo"):
        write_train(run_dir / name)
    for key in ("base", "grpo", "vipo", "map"):
        write_image(run_dir / "images" / f"sample_000_{key}.png")
    (run_dir / "config.yaml").write_text(f"note: {EVIL}\n", encoding="utf-8")
    (run_dir / "summary.json").write_text(json.dumps(summary or summary_of_demo()), encoding="utf-8")
    return run_dir


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a rendered demo directory, to be read only."""
    return render_report(write_demo(tmp_path_factory.mktemp("demo") / "run")).parent


@pytest.fixture(scope="module")
def train_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a rendered training directory, to be read only."""
    return render_report(write_train(tmp_path_factory.mktemp("train") / "run")).parent


def rendered(run_dir: Path) -> str:
    """Render a run and return its page."""
    return render_report(run_dir).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["demo_dir", "train_dir"])
def test_page_is_self_contained_and_escaped(kind: str, request: pytest.FixtureRequest) -> None:
    text = (request.getfixturevalue(kind) / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    links = page.values("src", "href", "xlink:href")
    assert len(links) > 20 and all(link.startswith(("data:image/", "#")) for link in links)
    assert "http://" not in text and "https://" not in text and "url(http" not in text and len(text) < 4_000_000
    ids = page.values("id")
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(re.findall(r"--([\w-]+):", text))
    assert not re.search(r"#0a00[01]", text), "a placeholder colour was not replaced"
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "&lt;script&gt;alert(" in text and "<script>alert(" not in text


def test_charts_and_tables_are_accessible_and_show_the_unknown(demo_dir: Path) -> None:
    text = (demo_dir / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all("alt" in attributes for tag, attributes in page.tags if tag == "img")
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    charts = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("class") == "chart"]
    assert len(charts) > 8 and all(attributes.get("aria-label") for attributes in charts)
    assert "<h3>my_extra</h3>" in text and "direction not recorded" in text


def test_every_number_of_the_evaluation_table_is_in_the_summary(demo_dir: Path) -> None:
    summary = json.loads((demo_dir / "summary.json").read_text(encoding="utf-8"))
    columns = {label: summary["evaluation"][arm] for arm, label in wording.ARM_LABELS.items() if arm != "run"}
    columns |= {label: summary["differences"][pair] for pair, label in wording.PAIR_LABELS.items()}
    recorded = [(c, entry[k]) for c in columns for entry in columns[c].values() for k in ("mean", "low", "high")]
    page = Page((demo_dir / "report.html").read_text(encoding="utf-8"))
    assert sorted((column, value) for column, value, _ in page.table_numbers) == sorted(recorded)
    for _, value, shown in page.table_numbers:
        decimals = len(shown.partition(".")[2])
        assert shown.lstrip("+").replace("\u2212", "-") == f"{value:.{decimals}f}"
    assert not re.search(r"\d", page.loose_cell_text)


def test_verdicts_of_the_table_follow_the_intervals(demo_dir: Path) -> None:
    page = Page((demo_dir / "report.html").read_text(encoding="utf-8"))
    classes = [a["class"] for tag, a in page.tags if tag == "td" and (a.get("class") or "").startswith("difference")]
    better, worse, unclear, missing = (f"difference {word}" for word in ("better", "worse", "unclear", "missing"))
    assert classes == [better, better, better, worse, unclear, worse, missing, missing, missing]


@pytest.mark.parametrize(
    ("metric", "low", "high", "verdict"),
    [
        (REWARD, 0.1, 0.2, "better"),
        (REWARD, -0.2, -0.1, "worse"),
        (REWARD, -0.1, 0.2, "unclear"),
        (REWARD, 0.0, 0.2, "unclear"),
        (REWARD, None, 0.2, "missing"),
        (ERROR, 0.1, 0.2, "worse"),
        (ERROR, -0.2, -0.1, "better"),
        (OTHER, 0.1, 0.2, "changed"),
    ],
)
def test_classify(metric: Metric, low: float | None, high: float, verdict: str) -> None:
    assert classify(metric, Estimate(0.15, low, high)) == verdict


def test_demo_verdict_names_better_and_worse_alike() -> None:
    up, down, flat = Estimate(0.2, 0.1, 0.3), Estimate(-0.2, -0.3, -0.1), Estimate(0.0, -0.1, 0.1)
    differences = {
        "vipo-base": {"reward": up, "colour_error": up},
        "grpo-base": {"reward": flat, "colour_error": flat},
        "vipo-grpo": {"reward": down, "colour_error": down, "odd": up},
    }
    assert demo_verdict([REWARD, ERROR, OTHER], differences, 128) == (
        "Against the base model on 128 held-out prompts, ViPO improved preference score but worsened colour error, "
        "while GRPO moved no metric beyond its interval; against GRPO, ViPO improved colour error, worsened preference "
        "score and changed odd."
    )
    assert demo_verdict([REWARD], {}, 128).startswith("No paired comparison was recorded")
    head_to_head = demo_verdict([REWARD], {"vipo-grpo": {"reward": up}}, 1)
    assert head_to_head == "Against GRPO on 1 held-out prompt, ViPO improved preference score."


def test_number_formats() -> None:
    assert fixed(-0.0589, 3, signed=True) == "\u22120.059" and fixed(0.2, 2, signed=True) == "+0.20"
    assert compact(300.0) == "300" and compact(0.012345) == "0.0123" and compact(None) == "not recorded"
    seconds = (0.045, 2.4, 238.6, 7260.0, None)
    assert [*map(wording.duration, seconds)] == ["45 ms", "2.4 s", "3 min 59 s", "2 h 01 min", "not recorded"]
    assert decimals_for([Estimate(0.5, 0.45, 0.55), Estimate(0.5, 0.4, 0.6), None]) == 3
    assert decimals_for([Estimate(70.0, 50.0, 90.0)]) == 0 and decimals_for([Estimate(1.0)]) == 3
    assert [*map(wording.in_sentence, ("Colour error", "HPS score"))] == ["colour error", "HPS score"]
    assert train_verdict(1, 0.5, 0.5, 1, "") == "The run recorded 1 iteration: mean reward 0.5."
    assert "fell from 2 (first 3 iterations) to 1 (last 3" in train_verdict(30, 2.0, 1.0, 3, "finished")


def test_ticks_are_told_apart() -> None:
    ticks = TickFormatter()
    assert ticks.format_ticks([0.0, 0.05, 0.1]) == ["0.00", "0.05", "0.10"]
    assert ticks.format_ticks([0.9995, 0.9996]) == ["0.9995", "0.9996"]
    assert ticks.format_ticks([-100.0, 0.0, 100.0]) == ["\u2212100", "0", "100"]
    assert ticks.format_ticks([0.0, 1e-6, 2e-6]) == ["0", "1e\u221206", "2e\u221206"]


def test_moving_mean_matches_a_plain_loop() -> None:
    values = np.array([1.0, math.nan, 3.0, 10.0, math.nan, math.nan, math.nan, 4.0])
    expected = [np.nanmean(values[max(0, i - 1) : i + 2]) if i != 5 else math.nan for i in range(len(values))]
    np.testing.assert_allclose(moving_mean(values, 3), expected, rtol=1e-12)
    np.testing.assert_array_equal(moving_mean(values, 1), values)
    assert [smoothing_window(n) for n in (1, 9, 10, 60, 300)] == [1, 1, 1, 7, 31]
    assert thin(1000, 7)[[0, -1]].tolist() == [0, 999] and len(thin(1000, 7)) == 7 and thin(3, 7).tolist() == [0, 1, 2]


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_better_is_to_the_right_in_the_forest_plot(higher_is_better: bool) -> None:
    mean = 0.5 if higher_is_better else -0.5
    row = ("vipo-base", "ViPO", Estimate(mean, mean - 0.1, mean + 0.1), "better")
    svg = forest_chart("f", [row], Size(320, 90), higher_is_better=higher_is_better, alt="a")
    (zero,) = re.findall(r'd="M ([\d.]+)[^"]*"[^>]*stroke: var\(--muted\)', svg)
    (mark,) = re.findall(r'<use [^>]*x="([\d.]+)"[^>]*fill: var\(--better\)', svg)
    assert float(mark) > float(zero)


@pytest.mark.parametrize(
    "path", ["../a.png", "/etc/hostname", "images/../images/sample_000_base.png", "images\\..\\a.png", "{run}/a.png"]
)
def test_paths_that_leave_the_run_are_refused(tmp_path: Path, path: str) -> None:
    summary = summary_of_demo()
    summary["samples"] = [{"prompt": "p", "base": path.replace("{run}", str(tmp_path / "run"))}]
    with pytest.raises(ValueError, match="leaves the run directory"):
        render_report(write_demo(tmp_path / "run", summary))
    run_dir = write_train(tmp_path / "linked")
    (run_dir / "samples" / "iteration_000003.png").symlink_to(tmp_path / "run" / "images" / "sample_000_base.png")
    with pytest.raises(ValueError, match="leaves the run directory"):
        render_report(run_dir)


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '{"reward_mean": 1.0}', '{"iteration": 1.5}', "\u00ff"])
def test_a_corrupt_line_is_named_and_the_old_page_stays(tmp_path: Path, line: str) -> None:
    run_dir = write_train(tmp_path / "run")
    (run_dir / "report.html").write_text("old", encoding="utf-8")
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (run_dir / "metrics.jsonl").write_bytes("\n".join([lines[0], line, *lines[1:], ""]).encode("latin-1"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*Delete or repair that line"):
        render_report(run_dir)
    assert (run_dir / "report.html").read_text(encoding="utf-8") == "old"


def test_truncated_and_repeated_lines_are_noted(tmp_path: Path) -> None:
    file = write_train(tmp_path / "run", iterations=1) / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8") + '{"iteration": 1, "reward_mean": 0.875}\n{"iteration": 2, "rew'
    file.write_text(lines, encoding="utf-8")
    text = rendered(file.parent)
    assert "repeat an earlier iteration" in text and "1 iteration: mean reward 0.875." in text
    assert "(line 3) is cut off" in text
    file.write_text(lines + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3"):
        render_report(file.parent)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", ""),
        ("metrics.jsonl", '{"iteration": 1, "reward_mean": null, "kl": NaN, "odd": "text"}\n'),
        ("summary.json", '{"kind": "demo"}'),
        ("summary.json", '{"kind": "demo", "samples": [{}], "metrics": [{"name": "x"}], "signal": {"a": null}}'),
    ],
)
def test_a_run_with_nothing_in_it_says_not_recorded(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    text = Page(rendered(tmp_path)).text
    for phrase in ("The reward was not recorded", "config.yaml: not recorded", "Sample and map sheets: not recorded"):
        assert phrase in text
    assert "nan" not in text.lower().split()


def test_null_estimates_are_not_recorded(tmp_path: Path) -> None:
    nothing = {"mean": float("inf"), "low": None, "high": float("nan")}
    summary = summary_of_demo() | {"evaluation": {"prompts": None, "base": {"reward": nothing}}}
    summary["differences"] = {"vipo-base": {"reward": {**nothing, "mean": 0.25}}}
    page = Page(rendered(write_demo(tmp_path / "run", summary)))
    assert page.table_numbers == [("ViPO \u2212 base", 0.25, "+0.250")]
    assert "no interval" in page.text and "No paired comparison was recorded" in page.text


def test_the_same_files_give_the_same_bytes_and_no_other_file(tmp_path: Path, demo_dir: Path) -> None:
    shutil.copytree(demo_dir, tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    assert render_report(tmp_path / "run").read_bytes() == (demo_dir / "report.html").read_bytes()
    page.unlink()
    page.mkdir()
    with pytest.raises(IsADirectoryError):
        render_report(tmp_path / "run")
    assert sorted(p.name for p in page.parent.iterdir()) == sorted(p.name for p in demo_dir.iterdir())


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither metrics\.jsonl .*give the folder of a run"):
        render_report(tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        render_report(tmp_path / "absent")
    (tmp_path / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"summary\.json: not valid JSON"):
        render_report(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("evaluation", [1], "'evaluation' must be a mapping, got list"),
        ("samples", {"a": 1}, "'samples' must be a list, got dict"),
        ("metrics", ["reward"], r"'metrics\[0\]' must be a mapping, got str"),
        ("curves", {"vipo": {"iteration": [1, 2], "reward_mean": [0.5]}}, "curves.vipo has 2 iterations and 1 reward"),
    ],
)
def test_a_summary_of_the_wrong_kind_is_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"kind": "demo", key: value}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        render_report(tmp_path)


def test_images_fit_their_budget(tmp_path: Path) -> None:
    write_image(tmp_path / "large.png", size=256)
    kept, shrunk = embed(tmp_path / "large.png", 10**6), embed(tmp_path / "large.png", 20_000)
    assert kept.uri.startswith("data:image/png;base64,") and not kept.recompressed
    assert shrunk.uri.startswith("data:image/webp;base64,") and shrunk.recompressed and shrunk.width == 256
    assert len(shrunk.uri) < 20_000 * 4 / 3 + 40
    (tmp_path / "broken.png").write_bytes((tmp_path / "large.png").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"broken\.png: not a readable image"):
        embed(tmp_path / "broken.png", 10**6)


def test_a_long_run_with_many_large_sheets_stays_small(tmp_path: Path) -> None:
    run_dir = write_train(tmp_path / "run", iterations=2000, sheets=())
    for iteration in range(0, 2001, 100):
        write_image(run_dir / "samples" / f"iteration_{iteration:06d}.png", size=400, seed=iteration)
    text = rendered(run_dir)
    assert len(text) < 4_000_000
    steps = [int(a["data-iteration"] or 0) for _, a in Page(text).tags if "data-iteration" in a]
    assert len(steps) == 12 and steps[0] == 0 and steps[-1] == 2000
    assert "9 more iterations with sheets" in text and "240 of 2,000 iterations are drawn" in text
