"""The watch for reward hacking: its rules on made-up numbers, then runs that hack, stop, resume, or do not watch."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from test_trainer import CALL, brightness, make, numbers, weights

from vipo import Config, Trainer
from vipo.distributed import Ranks
from vipo.evaluation import bootstrap_mean
from vipo.held_out import Evaluation, turns
from vipo.report import render_report
from vipo.runlog import read_metrics
from vipo.watch import (
    constant_groups,
    diversity_fall,
    group_std_collapse,
    hacking,
    kl_at_evaluation,
    kl_growth,
    mean_kl,
)

PROMPTS = "".join(f"{number} cats\n" for number in range(9))
CALLS = []


def darkness(frames, prompts):
    CALLS.append(len(prompts))
    return -brightness(frames, prompts)


def noisy(frames, prompts):
    """Draws from the global generators, as a careless reward does."""
    noise = torch.from_numpy(np.random.randn(len(frames))) + random.random()
    return brightness(frames, prompts) + torch.randn(len(frames)) + noise.float()


def evaluation(diversity=(1.0, 1.0), **rewards):
    found = {name: np.array(values, dtype=float)[:, None] for name, values in rewards.items()}
    return Evaluation(8, found, np.array(diversity), np.zeros(2), 0.0)


ZERO = [0.0] * 16


@pytest.mark.parametrize(
    ("shown", "held", "weight", "fires"),
    [
        ([0.1] * 16, [-0.1] * 16, 1.0, True),
        ([0.1] * 16, ZERO, 1.0, False),  # an interval that touches 0 says nothing
        (ZERO, [-0.1] * 16, 1.0, False),
        ([0.1] * 16, [0.1] * 16, 1.0, False),
        ([-0.1] * 16, [-0.1] * 16, 1.0, False),
        ([-0.1] * 16, [-0.1] * 16, -1.0, True),  # what is trained on is wanted low
        ([0.1] * 16, [-0.1, 0.1] * 8, 1.0, False),
        ([0.1] * 16, [np.nan] * 16, 1.0, False),
        ([0.1] * 16, [np.nan] * 4 + [-0.1] * 12, 1.0, True),
    ],
)
def test_hacking_needs_a_rise_and_a_fall(shown, held, weight, fires):
    found = hacking(evaluation(shown=shown, held=held), evaluation(shown=ZERO, held=ZERO), {"shown": weight}, ["held"])
    assert [(w.kind, w.subject) for w in found] == ([("reward hacking", "held")] if fires else [])


def test_hacking_holds_both_to_99_per_cent():
    """A fall beyond its 95 % interval but within the 99 % one is no warning; neither is such a rise."""
    faint = np.random.default_rng(11).normal(-0.58, 1, 16)
    assert bootstrap_mean(faint)["high"] < 0 < bootstrap_mean(faint, tail=0.005)["high"]
    base = evaluation(shown=ZERO, held=ZERO)
    assert not hacking(evaluation(shown=[0.1] * 16, held=faint), base, {"shown": 1.0}, ["held"])
    assert not hacking(evaluation(shown=-faint, held=[-0.1] * 16), base, {"shown": 1.0}, ["held"])


def test_hacking_tells_its_numbers():
    base = evaluation(shown=[1.0] * 16, flat=[0.0] * 16, held=[0.5] * 16, good=[0.0] * 16)
    now = evaluation(shown=[1.25] * 16, flat=[0.0] * 16, held=[0.375] * 16, good=[0.5] * 16)
    (found,) = hacking(now, base, {"shown": 1.0, "flat": 1.0}, ["good", "held"])
    assert "held -0.125 [-0.125, -0.125] from 0.5" in found.sentence
    assert "shown +0.25 [+0.25, +0.25] from 1 (99 %" in found.sentence
    assert "flat" not in found.sentence and "good" not in found.sentence
    assert "train on held as well" in found.advice


@pytest.mark.parametrize(("now", "fires"), [((0.6, 0.4), False), ((0.6, 0.39), True), ((np.nan, np.nan), False)])
def test_diversity_below_half_of_the_base(now, fires):
    assert bool(diversity_fall(evaluation(now), evaluation((1.0, 1.0)), 0.5)) == fires


def lines(key, *parts, **others):
    return [{key: value, **others} for value, count in parts for _ in range(count)]


@pytest.mark.parametrize(
    ("parts", "fires"),
    [
        ([(1.0, 10), (0.25, 10)], False),
        ([(1.0, 10), (0.249, 10)], True),
        ([(1.0, 10), (0.1, 9)], False),  # the two windows would overlap
        ([(1.0, 10), (0.1, 30), (0.6, 10)], False),  # the last ten count
        ([(0.0, 20)], False),
    ],
)
def test_group_std_below_a_quarter_of_the_first(parts, fires):
    assert bool(group_std_collapse(lines("group_std", *parts), 0.25)) == fires


@pytest.mark.parametrize(
    ("parts", "dropped", "fires"),
    [
        ([(2, 10)], 0, False),  # 20 of 40
        ([(2, 9), (3, 1)], 0, True),
        ([(4, 9)], 0, False),
        ([(2, 10)], 1, True),  # 20 of 30
        ([(4, 10), (0, 10)], 0, False),
    ],
)
def test_more_than_half_of_the_groups_constant(parts, dropped, fires):
    assert bool(constant_groups(lines("constant_groups", *parts, dropped_groups=dropped), 0.5, 4)) == fires


@pytest.mark.parametrize(
    ("found", "fires"),
    [
        (lines("kl", (0.125, 10)), False),
        (lines("kl", (0.125, 9), (0.126, 1)), True),
        (lines("kl", (1.0, 9)), False),
        (lines("kl", (1.0, 10), (0.0, 10)), False),
        (lines("loss", (1.0, 10)), False),
    ],
)
def test_kl_above_its_bound(found, fires):
    assert bool(kl_growth(found, 0.125)) == fires


@pytest.mark.parametrize(
    ("metrics", "fires"),
    [({"eval/kl": 0.125}, False), ({"eval/kl": 0.126}, True), ({"eval/kl": float("nan")}, True), ({"kl": 1.0}, False)],
)
def test_kl_of_an_evaluation_above_its_bound(metrics, fires):
    assert bool(kl_at_evaluation(metrics, 0.125)) == fires


def test_mean_kl_is_the_expected_log_ratio_under_the_policy(tmp_path):
    """KL(p | q) = E_p[log p - log q]: an estimate from the samples themselves, against the exact Gaussian KL."""
    policy = watched(tmp_path, "run").policy
    texts, seeds = ["a red cat"] * 16, list(range(16))
    sampling = {"num_inference_steps": 4, "height": 32, "width": 32, **CALL}
    traj = policy.rollout(texts, seeds=seeds, **sampling)
    assert mean_kl(policy, [traj], [0, 1, 2]) == 0  # a fresh adapter is the reference
    with torch.no_grad():
        for name, p in policy.trainable_parameters().items():
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    traj = policy.rollout(texts, seeds=seeds, **sampling)
    found, ratios = mean_kl(policy, [traj], [0, 1, 2]), []
    policy.denoiser.disable_adapters()
    with torch.no_grad():
        policy.replay(traj, on_step=lambda k, reference, sampled: ratios.append(sampled - reference))
    policy.denoiser.enable_adapters()
    assert found > 0.01 and not found.requires_grad
    assert float(torch.stack(ratios).mean()) == pytest.approx(float(found), rel=0.15)  # of few thousand elements


def test_kl_is_watched_without_a_kl_term(tmp_path, caplog):
    watched(tmp_path, "run", {"kl": 1e-9}, iterations=3).run()
    evaluated = {line["iteration"]: line["eval/kl"] for line in read_metrics(tmp_path / "run") if "eval/kl" in line}
    assert list(evaluated) == [2, 3] and min(evaluated.values()) > 1e-9
    found = json.loads((tmp_path / "run" / "watch.json").read_text())
    assert "KL to the reference" in found["watched"]
    assert [(w["iteration"], w["clean"]) for w in found["warnings"] if w["kind"] == "kl"] == [(2, 0)]
    assert "warning at iteration 2, kl: the model has moved far from its reference: KL " in caplog.text
    page = render_report(tmp_path / "run").read_text()
    assert "Iteration 2: kl." in page and "KL to the reference per evaluation: from " in page
    termed = watched(tmp_path, "termed", {"every": 1}, iterations=1, loss={"kl_beta": 0.01})
    termed.run()
    (line,) = [line for line in read_metrics(tmp_path / "termed") if line["iteration"]]
    assert "kl" in line and "eval/kl" not in line  # computed once


def test_the_watched_kl_is_of_all_micro_batches(tmp_path):
    found = []
    for folder, sampling in (("one", {}), ("three", {"micro_batch": 2, "store_on_cpu": True})):
        watched(tmp_path, folder, {"every": 1}, iterations=1, sampling=sampling).run()
        found += [line["eval/kl"] for line in read_metrics(tmp_path / folder) if "eval/kl" in line]
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[0] > 0


def test_kl_of_full_weights_is_watched_by_a_copy_that_waits(tmp_path):
    alone = watched(tmp_path, "alone", {"every": None, "rewards": []}, iterations=2, train="full")
    start = weights(alone)
    alone.run()
    full = watched(tmp_path, "full", {"every": 1}, iterations=2, train="full")
    full.run()
    assert torch.equal(weights(full), weights(alone)) and not torch.equal(weights(full), start)
    assert torch.equal(torch.cat([p.flatten() for p in full.policy._reference]), start)
    first, second = (line["eval/kl"] for line in read_metrics(tmp_path / "full") if "eval/kl" in line)
    assert 0 < first < second and "KL to the reference" in full.watch.coverage()[0]
    assert not alone.policy._reference and "KL to the reference" not in alone.watch.coverage()[0]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"watch": {"rewards": ["redness"]}}, "watch.every: watch.rewards and watch.path need it"),
        ({"watch": {"every": 5, "stop": True}}, "watch.stop: expected at least one held-out reward"),
        ({"watch": {"every": 5, "rewards": ["nano"]}}, "watch.rewards: 'nano' is trained on (reward.name)"),
        ({"watch": {"evrey": 5}}, "watch.evrey: unknown key; did you mean watch.every?"),
    ],
)
def test_wrong_settings_are_told(mapping, message):
    with pytest.raises(ValueError) as caught:
        Config.from_mapping(mapping)
    assert str(caught.value).startswith(message)


def test_paths_and_options_hold_for_held_out_rewards():
    reward = {"paths": {"pickscore": "weights"}, "options": {"pickscore": {"dtype": "bfloat16"}}}
    config = Config.from_mapping({"reward": reward, "watch": {"every": 5, "rewards": ["pickscore"]}})
    assert config.reward.paths == {"pickscore": "weights"}
    with pytest.raises(ValueError, match="'pickscore' is not in reward.name or watch.rewards"):
        Config.from_mapping({"reward": reward})


def watched(tmp_path, folder, watch=None, iterations=4, reward=brightness, **sections):
    """A run on a tiny SD3 whose reward is brightness, and whose held-out reward is therefore hacked."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return make(
        tmp_path,
        reward=reward,
        watch={} if watch is None else {"every": 2, "rewards": ["test_watch:darkness"], **watch},
        optimizer={"learning_rate": 1.0},
        run={"output": str(tmp_path / folder), "iterations": iterations, "save_every": 1, "tensorboard": False},
        **sections,
    )


def without_evaluations(run):
    metrics = [numbers(line) for line in read_metrics(run)]
    return [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in metrics if line["iteration"]]


def test_watching_changes_no_number_of_the_training(tmp_path):
    """Not even where a trained and a held-out reward draw from the global generators."""
    plain = watched(tmp_path, "plain", reward=noisy)
    plain.run()
    watching = watched(tmp_path, "watching", {"every": 1, "rewards": ["test_watch:noisy"]}, reward=noisy)
    watching.run()
    assert without_evaluations(tmp_path / "plain") == without_evaluations(tmp_path / "watching")
    assert torch.equal(weights(plain), weights(watching))
    evaluated = [line for line in read_metrics(tmp_path / "watching") if "eval/nano" in line]
    assert [line["iteration"] for line in evaluated] == [0, 1, 2, 3, 4]
    assert all("eval/kl" in line for line in evaluated[1:])  # which is measured in between, and leaves no trace
    assert not any("eval/" in key for line in read_metrics(tmp_path / "plain") for key in line)
    assert not (tmp_path / "plain" / "evaluations").exists()
    assert json.loads((tmp_path / "plain" / "watch.json").read_text())["evaluations"] is None


def test_evaluations_pair_with_the_base(tmp_path):
    trainer = watched(tmp_path, "run", {}, iterations=3)
    first = trainer.watch.held_out.measure(0)
    torch.rand(1)
    assert np.array_equal(trainer.watch.held_out.measure(0).rewards["nano"], first.rewards["nano"])  # the same noise
    trainer.run()
    found = {
        path.stem: json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "evaluations").glob("*.json"))
    }
    assert list(found) == ["iteration_000000", "iteration_000002", "iteration_000003"]  # the last one always
    base, now = found["iteration_000000"], found["iteration_000003"]
    assert np.shape(base["rewards"]["nano"]) == (9, 2) and max(base["distance"]) < 1e-12
    assert min(now["distance"]) > 1e-9 and min(now["diversity"]) > 0
    assert base["rewards"]["nano"] == [[-value for value in row] for row in base["rewards"]["test_watch:darkness"]]
    lines = {line["iteration"]: line for line in read_metrics(tmp_path / "run")}
    assert lines[3]["eval/nano"] == pytest.approx(np.mean(now["rewards"]["nano"]))
    assert lines[3]["eval/diversity"] == pytest.approx(np.mean(now["diversity"]))
    assert "eval/nano" not in lines[1]


def test_a_resumed_run_gives_the_same_warnings_and_does_not_redo_the_base(tmp_path):
    often = {"every": 1, "kl": 100.0}  # the rate is wild: the KL would warn, too
    watched(tmp_path, "whole", often, iterations=3).run()
    expected = json.loads((tmp_path / "whole" / "watch.json").read_text())
    assert [(w["kind"], w["subject"]) for w in expected["warnings"]] == [("reward hacking", "test_watch:darkness")]
    began = expected["warnings"][0]["iteration"]
    assert expected["warnings"][0]["clean"] == began - 1

    run = tmp_path / "run"
    for kept in (began - 1, began):  # killed before the warning began, and after
        watched(tmp_path, "run", often, iterations=kept).run(mode="overwrite" if run.exists() else "no")
        lost = json.loads((run / "watch.json").read_text())
        lost["warnings"].append({**expected["warnings"][0], "kind": "lost", "iteration": kept + 1})
        (run / "watch.json").write_text(json.dumps(lost))
        (run / "evaluations" / "iteration_000099.json").write_text("{}")
        CALLS.clear()
        watched(tmp_path, "run", often, iterations=3).run(mode="resume")
        assert sum(CALLS) == (3 - kept) * 18  # the base's 18 samples are read, not made
        assert json.loads((run / "watch.json").read_text()) == expected
        assert not (run / "evaluations" / "iteration_000099.json").exists()
        ours, theirs = (
            [{k: v for k, v in numbers(line).items() if k != "eval/seconds"} for line in read_metrics(folder)]
            for folder in (run, tmp_path / "whole")
        )
        assert ours == theirs

    with pytest.raises(ValueError, match="the base in .* was evaluated with other seeds, so nothing can be held"):
        watched(tmp_path, "run", {**often, "seeds": 1}).run(mode="resume")
    other = watched(tmp_path, "run", often)
    options = {"test_watch:darkness": {"dtype": "bfloat16"}}
    other.watch.held_out.config = other.config.model_copy(
        update={"reward": other.config.reward.model_copy(update={"options": options})}
    )
    with pytest.raises(ValueError, match="evaluated with other reward paths or options"):
        other.watch.held_out.load_base(run)
    watched(tmp_path, "blind", iterations=1).run()
    with pytest.raises(ValueError, match="watch.every: .*blind has no evaluation of the base"):
        watched(tmp_path, "blind", {}, iterations=2).run(mode="resume")


def test_too_few_prompts_and_unknown_rewards_are_found_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="unknown reward 'rednes'; did you mean 'redness'"):
        watched(tmp_path, "run", {"rewards": ["rednes"]})
    few = tmp_path / "few.txt"
    few.write_text("a cat\n" * 20 + "a dog\n")
    with pytest.raises(ValueError, match="few.txt has 2 different prompts, expected at least 8"):
        watched(tmp_path, "run", {"path": str(few)})


def test_a_collapse_is_found_without_evaluations_and_told_once(tmp_path, caplog):
    small = {"sampling": {"num_inference_steps": 2}, "prompts": {"per_iteration": 1}}
    ones = {"reward": lambda f, p: torch.ones(len(f)), **small}
    watched(tmp_path, "run", iterations=11, **ones).run()
    told = [record.getMessage() for record in caplog.records if "warning at iteration" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("warning at iteration 10, constant groups: 10 of the 10 groups")
    found = json.loads((tmp_path / "run" / "watch.json").read_text())
    assert [(w["iteration"], w["clean"], w["kind"]) for w in found["warnings"]] == [(10, 0, "constant groups")]
    assert found["watched"] == ["groups of equal rewards"]
    assert "held-out rewards: watch.every is not set" in found["not_watched"]
    no_kl = "KL to the reference: loss.kl_beta is 0 and watch.every is not set, so no KL is computed"
    assert no_kl in found["not_watched"]
    watched(tmp_path, "parts", iterations=8, **ones).run()
    watched(tmp_path, "parts", iterations=11, **ones).run(mode="resume")
    assert json.loads((tmp_path / "parts" / "watch.json").read_text()) == found  # the window spans the gap


def test_skipped_iterations_do_not_move_the_last_clean_one(tmp_path):
    """Twelve clean iterations, then ten without a signal, with two skipped between: 10 + 2 before the last."""
    trainer = watched(tmp_path, "run", iterations=30)
    group = {"group_std": 1.0, "dropped_groups": 0}
    good, bad = {**group, "constant_groups": 0}, {**group, "constant_groups": 2}
    (tmp_path / "run").mkdir()
    for i, line in enumerate([*[good] * 12, *[bad] * 3, *[{"skipped": 1}] * 2, *[bad] * 7], 1):
        trainer.watch(tmp_path / "run", i, line)
    (warning,) = trainer.watch.warnings
    assert (warning.iteration, warning.clean) == (20, 8)  # the window is 9 to 20, less 16 and 17: six constant of ten


@pytest.mark.parametrize(
    ("sizes", "in_step", "expected"),
    [
        ("aaaaa", False, [[0, 2, 4], [1, 3]]),
        ("aaaaa", True, [[0, 2, 4], [1, 3, (4,)]]),
        ("a", False, [[0], []]),
        ("a", True, [[0], [(0,)]]),
        ("abaab", True, [[0, 2, 4], [1, 3, (4,)]]),
        ("aag", False, [[0, 2], [1]]),
        ("aag", True, [[0, (1,), 2], [(0,), 1, (2,)]]),
    ],
)
def test_ranks_share_the_batches_of_an_evaluation(sizes, in_step, expected):
    """In brackets what is sampled only to call the denoiser as often as the others do."""
    calls = {"a": {"height": 32}, "b": {"height": 64}, "g": {"height": 32, "guidance_scale": 4.0}}
    found = [list(turns([calls[s] for s in sizes], Ranks(rank, 2), in_step=in_step)) for rank in (0, 1)]
    assert [[i if own else (i,) for i, own in rank] for rank in found] == expected
    assert list(turns([calls[s] for s in sizes], Ranks(), in_step=in_step)) == [(i, True) for i in range(len(sizes))]


HACKED = {
    "reward": {"name": "redness"},
    "sampling": {"num_inference_steps": 4, "eta": 0.8},
    "prompts": {"per_iteration": 2, "group_size": 4},
    "map": {"control": "ones"},
    "loss": {"level": "sample", "clip_range": 1e-4},
    "optimizer": {"learning_rate": 5e-3},
    "watch": {"every": 1, "rewards": ["nano_shape_iou", "nano_colour"], "prompts": 8, "stop": True},
    "run": {"output": "out", "iterations": 8, "save_every": 1, "keep": 8, "tensorboard": False, "threads": 1},
}


def vipo(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vipo", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_redness_is_caught_hacking_and_stopped(tmp_path, monkeypatch, caplog):
    """Rewarded for redness, the embedded model paints the canvas red: the objects of its prompts go."""
    (tmp_path / "hack.yaml").write_text(yaml.safe_dump(HACKED))
    done = vipo(tmp_path, "train", "hack.yaml")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out"
    summary, found = (json.loads((run / name).read_text()) for name in ("summary.json", "watch.json"))
    stopped = summary["iterations"]
    assert summary["state"] == "stopped" and 1 < stopped < 8 and found["stopped"] is True
    caught = [w for w in found["warnings"] if w["kind"] == "reward hacking"]
    assert caught and {w["subject"] for w in caught} <= {"nano_shape_iou", "nano_colour"}
    assert [(w["iteration"], w["clean"]) for w in caught] == [(stopped, stopped - 1)] * len(caught)
    fallen = caught[0]["subject"]
    assert f"warning at iteration {stopped}, reward hacking: the held-out reward fell: {fallen} -" in done.stderr
    assert f"stopped at iteration {stopped} by watch.stop" in done.stderr
    assert f"checkpoints/step_{stopped - 1:06d}. --resume --watch.stop=false goes on" in done.stderr
    assert (run / "checkpoints" / f"step_{stopped:06d}").is_dir()
    lines = {line["iteration"]: line for line in read_metrics(run)}
    assert max(lines) == stopped
    assert lines[stopped]["eval/redness"] > lines[0]["eval/redness"]
    assert lines[stopped][f"eval/{fallen}"] < lines[0][f"eval/{fallen}"]
    page = (run / "report.html").read_text()
    first_screen = page[page.index("<header>") : page.index("</header>")]
    assert f"Iteration {stopped}: reward hacking." in first_screen
    assert f"{len(found['warnings'])} warning" in first_screen and "watch.stop ended the run" in first_screen
    assert "nano_shape_iou (held out)" in page and "redness (trained on)" in page
    monkeypatch.chdir(tmp_path)
    Trainer(Config.from_yaml("hack.yaml")).run(mode="resume")
    assert f"stopped at iteration {stopped} by watch.stop" in caplog.text
    assert json.loads((run / "summary.json").read_text())["iterations"] == stopped
    on = Config.from_yaml("hack.yaml", ["--watch.stop=false", f"--run.iterations={stopped + 1}"])  # as the message says
    Trainer(on).run(mode="resume")
    summary, found = (json.loads((run / name).read_text()) for name in ("summary.json", "watch.json"))
    assert summary["state"] == "finished" and summary["iterations"] == stopped + 1
    assert found["stopped"] is False and [w for w in found["warnings"] if w["iteration"] <= stopped]


def write_run(folder, watch):
    folder.mkdir()
    records = [{"iteration": 0, "eval/shown": 1.0}, {"iteration": 1, "reward_mean": 0.5}]
    records += [{"iteration": 2, "reward_mean": 0.75, "eval/shown": 2.0, "eval/<b>": 3.0, "eval/seconds": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if watch is not None:
        (folder / "watch.json").write_text(json.dumps(watch))
    return render_report(folder).read_text()


def test_the_report_says_what_was_watched(tmp_path):
    page = write_run(tmp_path / "old", None)
    assert "Nothing was watched for reward hacking: the run has no watch.json." in page and 'class="alarm"' not in page
    assert "The run recorded 2 iterations" in page  # the base's line is no iteration
    watch = {"watched": ["a", "b"], "not_watched": ["c: no <i>"], "in_domain": ["shown"], "evaluations": "every 2"}
    page = write_run(tmp_path / "quiet", {**watch, "warnings": []})
    assert "Watched for reward hacking: a; b. Nothing was found in 2 iterations. Not watched: c: no &lt;i&gt;." in page
    assert "shown (trained on)" in page and "&lt;b&gt; (held out)" in page and "<b> (held" not in page
    assert "from 1 to 2." in page and "Every 2. 1.5 s each." in page and 'class="alarm"' not in page
    warning = {"iteration": 2, "kind": "kl", "sentence": "far <away>", "advice": "stay"}
    page = write_run(tmp_path / "loud", {**watch, "warnings": [warning]})
    assert "1 warning<" in page and "Iteration 2: kl.</b> Far &lt;away&gt;." in page and ">Stay.</span>" in page
    assert "Nothing was found" not in page
