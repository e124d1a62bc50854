"""The gradient signal fraction on a tiny SD3 whose reward sees one region only, and `vipo check --signal`."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from tiny_pipelines import build

from vipo import Config, DiffusersPolicy, PerceptualStructuring, Trainer, signal
from vipo.cli import main
from vipo.estimators import Estimate
from vipo.runlog import PhaseClock
from vipo.signal import MapSignal, estimate, map_kinds, measure_signal, policy_gradient, recommend, signal_config


class LocalDecoder(torch.nn.Module):
    """Latents -> pictures position by position, so that a region of the picture is one of the latents."""

    def forward(self, latents, *args, **kwargs):
        return torch.nn.functional.interpolate(0.2 * latents[:, :3], size=(32, 32))


def upper_left(frames, prompts):
    """A reward that sees the upper left quarter only."""
    return frames[..., :16, :16].mean((1, 2, 3, 4))


def true_region(frames, prompts):
    maps = torch.zeros(len(frames), frames.shape[1], 4, 4)
    maps[..., :2, :2] = 1
    return maps


def config_of(tmp_path, **sections):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\ntwo dogs\na green house\n")
    mapping = {
        "sampling": {
            "kernel": "flow_grpo", "num_inference_steps": 2, "height": 32, "width": 32,
            "call": {"max_sequence_length": 8},
        },
        "prompts": {"path": str(prompts), "group_size": 4},
        "map": {"source": "test_signal:true_region"},
        "optimizer": {"step_fraction": 1.0},
    }  # fmt: skip
    for name, section in sections.items():
        mapping[name] = {**mapping.get(name, {}), **section}
    return Config.from_mapping(mapping)


def builder(reward=upper_left, psm=None):
    """Make a trainer of a tiny SD3, all of whose denoiser is trained."""

    def make(config):
        torch.manual_seed(0)
        pipeline = build("sd3")
        pipeline.vae.decoder = LocalDecoder()
        policy = DiffusersPolicy(pipeline, kernel="flow_grpo", eta=0.7, train="full", device="cpu")
        return Trainer(config, policy=policy, reward=reward, psm=psm)

    return make


def test_the_true_region_has_more_signal_and_its_inverse_less(tmp_path):
    """The advantage depends on the noise of one quarter; elsewhere the policy's gradient is noise alone.

    Expected with a quarter: three to four times the fraction of ones, and 0 for the inverted map. Seen over seeds 0 to
    3 with 12 groups: .047 to .066 against .008 to .021 (ones) and -.002 to .007 (inverted).
    """
    config = config_of(tmp_path, prompts={"group_size": 16})
    seen = []
    report = measure_signal(config, 24, build=builder(), progress=lambda *told: seen.append(told))
    rows = {row.name: row for row in report.maps}
    assert list(rows) == ["ones", "test_signal:true_region", "shuffled", "inverted", "centre"]
    ones, own, inverted = (rows[name] for name in ("ones", "test_signal:true_region", "inverted"))
    assert own.difference.low > 0
    assert own.fraction.value > 2 * ones.fraction.value > 4 * inverted.fraction.value
    assert own.cosine == pytest.approx(1, abs=0.3)  # the same expected direction, without the noise
    assert ones.cosine == ones.mean_cosine == pytest.approx(1)
    assert ones.difference is None
    assert own.difference.value == pytest.approx(own.fraction.value - ones.fraction.value)
    assert report.recommendation.startswith("Use the test_signal:true_region map: its gradient signal fraction is 0.0")
    assert (report.groups, report.skipped, report.group_size, report.sketch) == (24, 0, 16, None)
    assert seen[-1][:3] == ("signal", 120, 120)


def test_ones_is_scalar_grpo(tmp_path):
    gradients = []
    for level in ("position", "sample"):
        trainer = builder()(config_of(tmp_path, prompts={"per_iteration": 1}, loss={"level": level}))
        found = trainer.experience(0, PhaseClock(trainer.policy.device))
        gradients.append(policy_gradient(trainer, found, [torch.ones(4, 1, *found.buckets[0].grid[1:])]))
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6 * float(gradients[0].abs().max()))


def test_the_gradient_is_that_of_training(tmp_path):
    """What `Trainer.step` hands its optimizer, clipping apart."""
    config = config_of(tmp_path, prompts={"per_iteration": 1}, optimizer={"max_grad_norm": 1e9})
    trainer = builder()(config)
    found = trainer.experience(0, PhaseClock(trainer.policy.device))
    ours = policy_gradient(trainer, found, trainer.maps_of(found, 0))
    assert all(p.grad is None for p in trainer.parameters)
    trainer.step(0)
    theirs = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trainer.parameters])
    assert float(ours.norm()) > 0 and torch.equal(ours, theirs)


def test_nothing_is_trained_and_the_same_seed_gives_the_same_numbers(tmp_path):
    made = []

    def build_one(config):
        made.append(builder()(config))
        made[-1].before = [p.detach().clone() for p in made[-1].parameters]
        return made[-1]

    first, second = (measure_signal(config_of(tmp_path), 4, build=build_one) for _ in range(2))
    assert [row.fraction for row in first.maps] == [row.fraction for row in second.maps]
    assert all(torch.equal(p, before) for p, before in zip(made[0].parameters, made[0].before, strict=True))
    assert not (tmp_path / "runs").exists()


def test_the_measured_run(tmp_path):
    config = config_of(
        tmp_path,
        sampling={"num_inference_steps": 5},
        optimizer={"updates_per_rollout": 2},
        loss={"kl_beta": 0.1},
        map={"control": "shuffled"},
    )
    measured = signal_config(config)
    assert (measured.prompts.per_iteration, measured.optimizer.updates_per_rollout) == (1, 1)
    assert (measured.loss.kl_beta, measured.map.control) == (0, None)
    assert measured.trained_steps == config.trained_steps == 4
    with pytest.raises(ValueError, match="at loss.level=sample a map acts through its mean only; add"):
        signal_config(config_of(tmp_path, loss={"level": "sample"}))


def test_kinds():
    config = signal_config(Config.from_mapping({"map": {"smoothing": 2}}))
    kinds = map_kinds(config, ["orientation=library", "components=1,control=random"])
    assert list(kinds) == [
        "ones", "psm", "shuffled", "inverted", "centre", "orientation=library", "components=1,control=random",
    ]  # fmt: skip
    assert kinds["psm"] == config.map and all(kind.smoothing == 2 for kind in kinds.values())
    assert kinds["shuffled"].control == "shuffled" and kinds["orientation=library"].orientation == "library"
    assert (kinds["components=1,control=random"].components, kinds["components=1,control=random"].control) == (
        1,
        "random",
    )


def test_a_backbone_is_shared_and_asked_once_per_map_source(tmp_path):
    asked = Counter()

    def backbone(frames):
        asked["calls"] += 1
        patches = frames.unfold(3, 8, 8).unfold(4, 8, 8)
        return torch.cat([patches.mean((-1, -2)), patches.std((-1, -2))], 2).movedim(2, -1)

    config = config_of(tmp_path, map={"source": "psm", "backbone": "/no/such/folder"})
    more = ["orientation=library", "control=random"]
    report = measure_signal(config, 4, more, build=builder(psm=PerceptualStructuring(backbone)))
    assert asked["calls"] == 4 * 2  # psm and another orientation; controls are made from psm's map
    rows = {row.name: row for row in report.maps}
    assert len({row.norm for row in rows.values()}) == len(rows) == 7  # seven different maps
    with pytest.raises(ValueError, match="/no/such/other"):
        measure_signal(config, 4, ["backbone=/no/such/other"], build=builder(psm=PerceptualStructuring(backbone)))


def only_some(value):
    """A reward that gives `value` to every picture of dogs."""

    def reward(frames, prompts):
        rewards = upper_left(frames, prompts)
        return torch.where(torch.tensor(["dogs" in prompt for prompt in prompts]), torch.tensor(value), rewards)

    return reward


def test_groups_that_teach_nothing_are_skipped_and_counted(tmp_path):
    constant = measure_signal(config_of(tmp_path), 12, build=builder(only_some(0.5)))
    assert constant.groups + constant.skipped == 12 and constant.groups >= 4 and constant.skipped >= 1
    dropped = measure_signal(
        config_of(tmp_path, reward={"on_failure": "drop"}), 12, build=builder(only_some(float("nan")))
    )
    assert (dropped.groups, dropped.maps[0].fraction) == (constant.groups, constant.maps[0].fraction)
    with pytest.raises(FloatingPointError, match="nan for sample"):
        measure_signal(config_of(tmp_path), 12, build=builder(only_some(float("nan"))))
    with pytest.raises(ValueError, match="0 of 4 groups have rewards that differ, need 4: raise --groups"):
        measure_signal(config_of(tmp_path), 4, build=builder(lambda frames, prompts: torch.ones(len(frames))))


def test_a_map_without_a_gradient_is_an_error():
    gradients = {"ones": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), "mine": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match="the gradient of mine is 0 in every group"):
        estimate(gradients, {"ones": 1.0, "mine": 1.0})


def test_prompts_are_drawn_independently(tmp_path):
    drawn = []

    def reward(frames, prompts):
        drawn.append(prompts[0])
        return upper_left(frames, prompts)

    measure_signal(config_of(tmp_path), 12, build=builder(reward))
    counts = Counter(drawn)
    assert len(drawn) == 12 and len(counts) == 3
    epochs = [set(drawn[i : i + 3]) for i in range(0, 12, 3)]
    assert any(len(epoch) < 3 for epoch in epochs)  # epochs of a permutation would hold each prompt once


def test_gradients_that_do_not_fit_are_sketched(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    whole = measure_signal(config, 6, build=builder())
    monkeypatch.setattr(signal, "MEMORY", 4 * 6 * 5 * 20_000)
    sketched = measure_signal(config, 6, build=builder())
    assert (whole.sketch, sketched.sketch, whole.parameters) == (None, 20_000, sketched.parameters)
    assert whole.parameters > 20_000
    for exact, close in zip(whole.maps, sketched.maps, strict=True):
        assert close.norm == pytest.approx(exact.norm, rel=0.05)
        assert close.fraction.value == pytest.approx(exact.fraction.value, abs=0.02) and close != exact


def row(name, value, low=None, high=None):
    difference = None if low is None else Estimate((low + high) / 2, low, high)
    return MapSignal(name, Estimate(value, value - 0.01, value + 0.01), difference, 0.9, 0.8, 1.0, 2.0)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([row("psm", 0.03, 0.01, 0.03)], "Use the psm map: its gradient signal fraction is 0.0300 [0.0200, 0.0400], "
         "that of ones 0.0100."),
        ([row("psm", 0.03, 0.01, 0.03), row("orientation=border,smoothing=0", 0.05, 0.03, 0.05)],
         "Use the psm map with --map.orientation=border --map.smoothing=0: its"),
        ([row("psm", 0.01, -0.01, 0.01), row("centre", 0.03, 0.01, 0.03)], "Use the psm map with --map.control=centre"),
        ([row("psm", 0.0, -0.02, -0.01), row("inverted", 0.03, 0.01, 0.03)],
         "The inverted psm map has the most signal: psm points the wrong way here; its"),
        ([row("psm", 0.02, 0.0, 0.02), row("shuffled", 0.03, 0.01, 0.03)], "The shuffled psm map has the most signal"),
        ([row("psm", 0.0, -0.03, -0.01), row("centre", 0.011, -0.01, 0.012)], "Do not use the psm map: -0.0200 ["),
        ([row("psm", 0.0, -0.03, 0.01), row("inverted", 0.011, -0.01, 0.012)],
         "24 groups cannot tell any map from ones, and none is ahead: try other maps, or --groups 96."),
        ([row("psm", 0.02, -0.02, 0.04), row("shuffled", 0.05, -0.01, 0.02)],
         "24 groups cannot tell any map from ones. psm is ahead by 0.0100 [-0.0200, 0.0400]; if that is real, between "
         "72 and 216 groups would show it (--groups 72)."),
    ],
)  # fmt: skip
def test_recommendations(rows, sentence):
    assert recommend([row("ones", 0.01), *rows], 24).startswith(sentence)


SMALL = ["--prompts.group_size=2", "--sampling.num_inference_steps=3"]


def test_command_line(tmp_path):
    command = ["check", "nano_vipo", "--signal", "--groups", "4", *SMALL, "--json", "deep/signal.json"]
    command += ["--maps", "orientation=library", "smoothing=0,control=random"]
    done = subprocess.run(
        [sys.executable, "-m", "vipo", *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "150", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert "4 groups of 2" in done.stdout and "cosine to scalar GRPO" in done.stdout
    record = json.loads((tmp_path / "deep" / "signal.json").read_text())
    names = ["ones", "psm", "shuffled", "inverted", "centre", "orientation=library", "smoothing=0,control=random"]
    assert [entry["name"] for entry in record["maps"]] == names
    assert all(name in done.stdout for name in names)
    assert record["recommendation"].split(":")[0] in done.stdout
    assert record["kind"] == "signal" and record["groups"] == 4 and record["vipo_version"]
    for entry in record["maps"]:
        found = entry["fraction"]
        assert found["low"] < found["value"] < found["high"] and entry["norm"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nano_vipo", "--signal", "--groups", "3"], "--groups: expected at least 4, got 3"),
        (["nano_vipo", "--groups", "8"], "--groups: goes with --signal only"),
        (["nano_vipo", "--memory", "--signal"], "--signal and --memory: give one of them"),
        (["nano_vipo", "--json", "a.json"], "--json: goes with --signal only"),
        (["nano_vipo", "--maps", "smoothing=0"], "--maps: goes with --signal only"),
        (["nano_grpo", "--signal"], "at loss.level=sample a map acts through its mean only; add --loss.level=position"),
        (["nano_vipo", "--signal", "--maps", "skewness"], "--maps: skewness: expected KEY=VALUE of the map section"),
        (["nano_vipo", "--signal", "--maps", "orientaton=library"], "did you mean map.orientation?"),
        (["nano_vipo", "--signal", "--maps", "orientation=up"], "map.orientation: "),
        (["nano_vipo", "--signal", "--maps", "smoothing=0,device=cpu"], "use --map.device=cpu"),
        (["nano_vipo", "--signal", "--maps", "smoothing=["], "--maps: smoothing=[: [ is not a YAML value"),
        (["nano_vipo", "--signal", "--json", "."], "--json: . is a folder, expected a file"),
    ],
)
def test_bad_input(capsys, arguments, line):
    with pytest.raises(SystemExit) as caught:
        main(["check", *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("vipo: error: ") and line in error and "Traceback" not in error
