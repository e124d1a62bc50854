"""The evidence study: its arithmetic, its page, and one small run of it."""

import json
import subprocess
import sys

import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from PIL import Image

from vipo.advantages import group_advantages
from vipo.nano.study import arms, figure, page, runs, work
from vipo.nano.study.__main__ import main
from vipo.trainer import Trainer

TINY = arms.Budget({"image": 1, "video": 1}, 3, 2, 1, 4)


def metrics(score, **more):
    names = [m.name for m in page.IMAGES.metrics] + ["drift_inside", "drift_outside", "structure", "redness"]
    return {**dict.fromkeys(names, 0.5), "reward": score, **more}


def record(arm, seed, score, **more):
    return {"arm": arm, "seed": seed, "changes": {"optimizer.learning_rate": 1e-3}, "metrics": metrics(score), **more}


def test_differences_over_seeds_have_students_interval():
    new = {seed: {"x": value} for seed, value in enumerate([1.0, 1.5, 1.1, 1.9, 2.0])}
    old = {seed: {"x": value} for seed, value in enumerate([0.2, 0.4, 0.9, 0.1, 0.3])}
    found = page.difference(new, old, "x")
    pairs = [new[s]["x"] - old[s]["x"] for s in new]
    interval = scipy.stats.ttest_1samp(pairs, 0).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(interval.low, rel=1e-4)
    assert found.mean + found.half == pytest.approx(interval.high, rel=1e-4)
    assert page.difference(new, {0: {"x": 0.0}, 9: {"x": 5.0}}, "x").seeds == 1
    for df, value in page.T975.items():
        assert value == pytest.approx(scipy.stats.t.ppf(0.975, df), rel=1e-4)


def test_only_a_difference_beyond_its_interval_is_bold():
    assert str(page.Difference(0.2, 0.1, 5)) == "**+0.200 ± 0.100**"
    assert str(page.Difference(-0.2, 0.3, 5)) == "-0.200 ± 0.300"


def test_rank_correlation_is_spearmans():
    first, second = [0.3, 0.1, 0.9, 0.5], [2.0, 3.0, 9.0, 4.0]
    assert page.rank_correlation(first, second) == pytest.approx(scipy.stats.spearmanr(first, second).statistic)
    tied = [0.3, 0.3, 0.9, 0.3]  # ones have scalar GRPO's signal
    assert page.rank_correlation(tied, second) == pytest.approx(scipy.stats.spearmanr(tied, second).statistic)


def test_records_of_two_settings_are_not_mixed():
    twice = {f"arms/image/grpo/learning_rate={rate}/seed=0": record("grpo", 0, rate) for rate in (1e-4, 1e-3)}
    with pytest.raises(ValueError, match="learning_rate=0.001/seed=0: a second record of this arm and seed"):
        page.by_arm(twice, "image")


def test_a_quick_study_leaves_the_evidence_alone(tmp_path, monkeypatch):
    """A few iterations over the records of hours would be lost work, and a page of numbers that say nothing."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("vipo.nano.study.__main__.Study.all", lambda study, _: seen.append(study.output))
    for options in (["--quick"], [], ["--quick", "-o", "here"]):
        monkeypatch.setattr("sys.argv", ["study", "--workers=1", *options])
        monkeypatch.setattr("vipo.nano.study.__main__.write_page", lambda text, records: seen.append(text))
        main()
    assert list(map(str, seen)) == [
        *("runs/study_quick", "runs/study_quick.md", "docs/evidence", "docs/evidence.md", "here", "here.md")
    ]


def test_equal_redness_interpolates_where_it_is_first_reached():
    trace = [
        {"redness": 0.0, "structure": 1.0},
        {"redness": 0.4, "structure": 0.8},
        {"redness": 0.2, "structure": 0.1},
        {"redness": 0.8, "structure": 0.0},
    ]
    assert runs.equal_redness(trace, 0.3)["structure"] == pytest.approx(0.85)
    assert runs.equal_redness(trace, 0.6)["structure"] == pytest.approx(0.1 * 1 / 3)
    assert runs.equal_redness(trace, -1)["structure"] == 1.0
    with pytest.raises(ValueError, match="never reaches"):
        runs.equal_redness(trace, 0.9)


def test_every_job_is_its_own_and_its_config_is_valid():
    rates, clips = {"grpo": 1e-3, "vipo": 3e-3}, {"grpo": 1e-3, "vipo": 1e-2}
    jobs = [job for kind in ("image", "video") for job in arms.sweep_jobs(kind, arms.FULL)]
    jobs += [job for kind in ("image", "video") for job in arms.arm_jobs(kind, rates, arms.FULL)]
    jobs += [
        *arms.clip_jobs(rates, arms.FULL),
        *arms.again_jobs("image", rates, arms.FULL),
        *arms.again_jobs("video", rates, arms.FULL),
        *arms.epoch_jobs(rates, clips, arms.FULL),
        *arms.redness_jobs(rates, arms.FULL),
    ]
    assert len({job.key for job in jobs}) == len(jobs)
    for kind, rest in (("image", arms.REST), ("video", arms.VIDEO_REST)):
        for name in (arm.name for arm in arms.FIRST + rest):
            seeds = {job.seed for job in jobs if (job.table, job.modality, job.arm.name) == ("arms", kind, name)}
            assert seeds == {0, 1, 2, 3, 4} and not seeds & set(arms.TUNING_SEEDS[kind])
    fresh = {job.seed for job in jobs if job.table == "again"}
    assert fresh == {5, 6, 7, 8, 9} and not fresh & set(arms.TUNING_SEEDS["image"])
    for job in {job.arm.name: job for job in jobs}.values():
        config = runs.job_config(job, arms.FULL)
        rate = rates["grpo" if job.arm.name in ("grpo", "ones_position") else "vipo"]
        assert config.run.seed == job.seed and config.optimizer.learning_rate == rate


def test_the_best_setting_has_the_highest_mean():
    assert arms.best({0.1: [1.0, 3.0], 0.2: [2.5, 2.0]}) == 0.2


def test_the_oracle_sees_the_worlds_own_mask():
    scenes = runs.world.sample_scenes(3, torch.Generator().manual_seed(0))
    drawn = runs.world.render(scenes, torch.Generator().manual_seed(0))
    masks = runs.subject_mask(drawn.images[:, None], runs.world.describe(scenes))
    assert masks.shape == (3, 1, 64, 64)
    overlap = torch.minimum(masks[:, 0], drawn.masks).sum((1, 2)) / torch.maximum(masks[:, 0], drawn.masks).sum((1, 2))
    assert overlap.min() > 0.8


def test_a_map_on_the_reward_is_normalised_at_every_position():
    config = runs.job_config(arms.Job("arms", "image", arms.REST[2], 0, {}), arms.FULL)
    trainer = runs.MapOnReward.__new__(runs.MapOnReward)
    trainer.config = config
    trainer.reward = type("One", (), {"weights": torch.ones(1)})()
    generator = torch.Generator().manual_seed(0)
    maps, rewards = torch.rand(16, 1, 2, 3, generator=generator), torch.randn(1, 16, generator=generator)
    experience = type("Found", (), {"rewards": rewards})()
    (found,) = Trainer.pixel_advantages.__get__(trainer)(
        type("F", (), {"advantages": group_advantages(rewards[0], 8), "terms": None, "own": slice(None)})(), [maps]
    )
    (own,) = trainer.pixel_advantages(experience, [maps])
    for y in range(2):
        for x in range(3):
            torch.testing.assert_close(own[:, 0, y, x], group_advantages(rewards[0] * maps[:, 0, y, x], 8))
    assert not torch.allclose(own, found, atol=0.1)


def test_one_run_is_recorded_once(tmp_path):
    job = arms.Job("redness", "image", arms.FIRST[4], 3, {"optimizer.learning_rate": 1e-3, "reward.name": "redness"})
    file = tmp_path / "redness.json"
    study = work.Study(tmp_path, TINY, 1)
    assert not study.done(job)
    work.one_job(job, TINY, file)
    kept = json.loads(file.read_text())
    assert list(kept) == [job.key] and study.done(job) and [p.name for p in tmp_path.iterdir()] == ["redness.json"]
    base, after = kept[job.key]["trace"]
    assert base["structure"] == pytest.approx(1, abs=1e-5) and base["drift_inside"] == 0
    assert after["drift_inside"] > 0 and after["redness"] != base["redness"]
    longer = arms.Budget({"image": 2, "video": 1}, 3, 2, 1, 4)
    assert not work.Study(tmp_path, longer, 1).done(job)


def test_the_page_keeps_its_text_and_renews_its_tables(tmp_path):
    records = tmp_path / "evidence"
    records.mkdir()
    scores = {"grpo": [0.0, 0.1, 0.05], "vipo": [0.5, 0.62, 0.54], "shuffled": [0.02, 0.08, 0.2]}
    kept = {f"arms/image/{arm}/seed={s}": record(arm, s, v) for arm, row in scores.items() for s, v in enumerate(row)}
    kept["base/image"] = {"prompts": 3, "metrics": metrics(-1.0)}
    (records / "arms.json").write_text(json.dumps(kept))
    text = f"# Evidence\n\nbefore\n{page.BEGIN}\nold\n{page.END}\nafter\n"
    (tmp_path / "evidence.md").write_text(text)
    page.write_page(tmp_path / "evidence.md", records)
    written = (tmp_path / "evidence.md").read_text()
    assert "95 % interval, red where that leaves 0](evidence/differences.png)" in written
    with Image.open(records / "differences.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 100
    assert written.startswith("# Evidence\n\nbefore\n") and written.endswith(f"{page.END}\nafter\n")
    assert "\nold\n" not in written and "| **+0.503 ± 0.038** |" in written and "| +0.050 ± 0.221 |" in written


def test_the_picture_has_a_row_per_arm_and_writes_out_what_is_far_beyond(tmp_path):
    rows = [figure.Row(f"arm {i}", [0.1, 0.2, 0.3], 0.2, 0.25) for i in range(4)]
    rows += [figure.Row("gain", [0.2, 0.2, 0.2], 0.2, 0.01), figure.Row("collapse", [-7.0, -7.6, -7.3], -7.3, 0.75)]
    canvas = Figure()
    figure.draw_panel(canvas.subplots(), "Pictures", rows)
    (axes,) = canvas.axes
    assert [label.get_text() for label in axes.get_yticklabels()][-2:] == ["gain (3)", "collapse (3)"]
    assert [text.get_text() for text in axes.texts] == ["-7.3 ± 0.8"] and axes.get_xlim()[1] < 1
    colours = [line.get_color() for line in axes.lines if line.get_marker() == "D"]
    assert colours == [figure.WITHIN] * 4 + [figure.BEYOND]


def test_fresh_seeds_stand_alone_and_with_the_earlier_ones(tmp_path):
    scores = {"grpo": (0.0, 0.1, 0.2), "vipo": (0.4, 0.6, 0.5), "average": (0.3, 0.5, 0.4)}
    kept = {
        f"arms/image/{name}/seed={s}": record(name, s, v) for name, row in scores.items() for s, v in enumerate(row)
    }
    fresh = {
        f"again/image/{name}/seed={5 + s}": record(name, 5 + s, 0.3 if name == "average" else 0.0)
        for name in scores
        for s in range(3)
    }
    (tmp_path / "arms.json").write_text(json.dumps(kept))
    (tmp_path / "again.json").write_text(json.dumps(fresh))
    page.write_page(tmp_path / "page.md", tmp_path)
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines() if " | scalar GRPO | 3 |" in line]
    assert [row.split("|")[4].strip() for row in rows] == ["+0.0000 ± 0.0000", "**+0.300 ± 0.0000**"]
    both = (tmp_path / "page.md").read_text().count("| scalar GRPO | 6 | +0.200 ± ")
    assert both == 1 and "| ViPO, default map | scalar GRPO | 6 |" in (tmp_path / "page.md").read_text()


def test_the_signal_is_ranked_against_what_training_came_to(tmp_path):
    names, fractions = ("grpo", "vipo", "oracle"), (0.001, 0.002, 0.003)
    bounds = {name: {"value": value, "low": 0.0, "high": 0.1} for name, value in zip(names, fractions, strict=True)}
    kept = {f"signal/{reward}": {"groups": 5, "maps": bounds} for reward in ("nano", "redness")}
    scores = {
        f"arms/image/{name}/seed={seed}": record(name, seed, value)
        for seed in (0, 1)
        for name, value in zip(names, (-3.0, -2.0, -1.0), strict=True)
    }
    looks = {
        name: [metrics(0, iteration=i, redness=i * end) for i in (0, 1)]
        for name, end in zip(names, (0.3, 0.2, 0.1), strict=True)
    }
    traces = {f"redness/image/{name}/seed=0": {"arm": name, "seed": 0, "trace": looks[name]} for name in names}
    for table, found in (("signal", kept), ("arms", scores), ("redness", traces)):
        (tmp_path / f"{table}.json").write_text(json.dumps(found))
    page.write_page(tmp_path / "page.md", tmp_path)
    written = (tmp_path / "page.md").read_text()
    assert "reward nano, 5 groups; rank correlation with the reward after training 1.00 over 3 maps" in written
    assert "reward redness, 5 groups; rank correlation with the reward after training -1.00 over 3 maps" in written
    assert "| oracle mask | 0.0030 [0.0000, 0.1000] | 0.100 |" in written


def test_some_runs_of_every_table(tmp_path):
    command = [sys.executable, "-m", "vipo.nano.study", "--quick", "-o", str(tmp_path / "evidence")]
    subprocess.run(command, check=True, capture_output=True)
    written = (tmp_path / "evidence.md").read_text()
    for words in (
        "## Pictures",
        "## Clips",
        "no arm was chosen by",
        "equal redness",
        "Gradient signal fraction",
        "Two epochs, paired",
    ):
        assert words in written
    before = {file: file.read_bytes() for file in (tmp_path / "evidence").iterdir()}
    subprocess.run(command, check=True, capture_output=True)
    assert before == {file: file.read_bytes() for file in (tmp_path / "evidence").iterdir()}
