"""A map for each reward's advantage: the formula, shared backbones, its way into the gradient, what is refused."""

import numpy as np
import pytest
import torch

from vipo.advantages import mixed_pixel_advantages, pixel_advantages
from vipo.cli import main
from vipo.config import Config
from vipo.maps import MapSource, shared_sources
from vipo.reward_maps import RewardMaps
from vipo.runlog import PhaseClock
from vipo.signal import policy_gradient, signal_config
from vipo.trainer import Trainer


def test_matches_the_float64_oracle_and_one_map_is_the_shared_path():
    generator = np.random.default_rng(3)
    terms, maps = generator.normal(size=(3, 4)), generator.random((3, 4, 2, 3, 5))
    expected = sum(terms[r][:, None, None, None] * maps[r] for r in range(3))
    found = mixed_pixel_advantages(torch.tensor(terms), torch.tensor(maps))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    shared = torch.tensor(maps[0])
    torch.testing.assert_close(
        mixed_pixel_advantages(torch.tensor(terms), shared.expand(3, -1, -1, -1, -1)),
        pixel_advantages(torch.tensor(terms).sum(0), shared),
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="expected values >= 0"):
        mixed_pixel_advantages(torch.ones(2, 1), -torch.ones(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="with R = 2"):
        mixed_pixel_advantages(torch.ones(2, 1), torch.ones(3, 1, 1, 1, 1))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(
        Config.from_mapping(
            {
                "model": {"path": "nano_video"},
                "prompts": {"path": "nano_video", "per_iteration": 2, "group_size": 2},
                "sampling": {"num_inference_steps": 3, "micro_batch": 2},
                "reward": {"name": {"nano_vq": 1, "nano_mq": 0.5}, "maps": {"nano_mq": {"motion": "difference"}}},
                "optimizer": {"step_fraction": 1.0},
                "run": {"output": str(tmp_path_factory.mktemp("runs") / "run")},
            }
        )
    )


def test_the_motion_reward_is_spread_by_the_motion_map(trainer):
    found = trainer.experience(0, PhaseClock(trainer.policy.device))
    vq, mq = found.terms
    torch.testing.assert_close(found.advantages, vq + mq)
    assert vq.abs().max() > 0.5 and 0.2 < mq.abs().max() <= 0.5 + 1e-6  # two samples: at most 1, times the weight
    forwards = []
    handle = trainer.map_source.backbone.register_forward_hook(lambda *_: forwards.append(None))
    made = trainer.maps_of(found, 0, trainer.reward_maps)
    handle.remove()
    assert len(forwards) == len(found.trajectories) == 2  # one per micro-batch, not one per map
    assert len(made) == len(found.buckets) == len(trainer.reward_maps.backbone) == 1
    maps = trainer.maps_of(found, 0)
    moving = MapSource(trainer.config.map.changed({"motion": "difference"}))
    moving = trainer.maps_of(found, 0, moving)
    assert torch.equal(made[0], torch.stack([maps[0], maps[0], moving[0]]))

    mixed, shared = policy_gradient(trainer, found, made), policy_gradient(trainer, found._replace(terms=None), maps)
    apart = [
        policy_gradient(trainer, found._replace(terms=None, advantages=row), spread)
        for row, spread in ((vq, maps), (mq, moving))
    ]
    size = shared.norm()
    assert (mixed - shared).norm() > 0.01 * size
    assert (mixed - sum(apart)).norm() < 1e-4 * size  # on-policy the gradient is linear in the advantages
    alike = RewardMaps(
        trainer.config.map, trainer.map_source, {"nano_mq": trainer.config.map}, ["nano_vq", "nano_mq"], "cpu"
    )
    equal = policy_gradient(trainer, found, trainer.maps_of(found, 0, alike))
    assert (equal - shared).norm() < 1e-5 * size


def test_a_step_logs_the_maps_apart_and_shows_the_main_one(trainer):
    metrics = trainer.step(0)
    assert metrics["grad_norm"] > 0
    own = {name: value for name, value in metrics.items() if name.startswith("map_") and "/" in name}
    assert set(own) == {"map_entropy/nano_mq", "map_mean/nano_mq", "map_flicker/nano_mq"}
    assert own["map_mean/nano_mq"] == pytest.approx(1, abs=1e-4)
    assert own["map_entropy/nano_mq"] != metrics["map_entropy"]
    assert trainer.maps.shape[0] == trainer.frames.shape[0] == 4
    torch.testing.assert_close(trainer.maps.mean((1, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)


def test_sources_with_one_backbone_share_it():
    own = Config().map
    sections = [own.changed(changes) for changes in ({"smoothing": 0}, {"layer": 1}, {"layer": 1, "components": 1})]
    one, two, three, four = shared_sources(own, MapSource(own), [*sections, own], "cpu").values()
    assert two.psm.backbone is one.psm.backbone and (two.psm.smoothing, one.psm.smoothing) == (0, 1)
    assert three.psm.backbone is not one.psm.backbone and three.psm.backbone is four.psm.backbone


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"maps": {"nano_mq": {"motoin": "flow"}}}, "reward.maps: map.motoin: unknown key; did you mean map.motion?"),
        ({"maps": {"nano_mq": {"motion": "fast"}}}, "reward.maps: map.motion: expected 'none', 'difference' or 'flow'"),
        ({"maps": {"nano_mqq": {}}}, "reward.maps: expected one of nano_vq, nano_mq, got 'nano_mqq'; did you mean"),
        ({"maps": {"nano_mq": {}}, "combine": "rewards"}, "reward.maps: needs reward.combine=advantages"),
    ],
)
def test_what_cannot_work_is_one_line(reward, message):
    with pytest.raises(ValueError) as caught:
        Config.from_mapping({"reward": {"name": {"nano_vq": 1, "nano_mq": 1}, **reward}})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_the_signal_refuses_and_the_check_looks_at_every_map(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        "reward: {name: {nano: 1, redness: 1}, maps: {redness: {orientation: library}, nano: {control: ones}}}\n"
        f"run: {{output: {tmp_path / 'out'}}}\n"
    )
    config = Config.from_yaml(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match="--signal: measures one map .* add --reward.maps="):
        signal_config(config)
    assert Config.from_yaml(tmp_path / "run.yaml", ["--reward.maps={}"]).reward.maps == {}
    with pytest.raises(SystemExit) as caught:
        main(["check", str(tmp_path / "run.yaml"), "--sampling.num_inference_steps=2"])
    said = capsys.readouterr().out
    assert caught.value.code == 0, said
    assert "map of redness" in said and "map of nano" in said
