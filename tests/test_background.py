"""Rewards beside the rollout: the same numbers as after it, real overlap, and failures that stop the run."""

import threading

import pytest
import torch
from test_trainer import brightness, colour_backbone, make, numbers, weights

from vipo.cli import main
from vipo.config import Config, MapConfig
from vipo.maps import MapSource
from vipo.rewards.mixture import RewardMixture
from vipo.runlog import PhaseClock

WAIT = 60
"""Seconds until a test gives up on a thread: a bound, never a measurement."""
EIGHTS = {"prompts": {"per_iteration": 2, "group_size": 8}, "sampling": {"micro_batch": 8}}
THREES = {"sampling": {"micro_batch": 3}, "rewards": {"async": True}}


def looks(frames, prompts):
    return frames[:, :, 0].mean((1, 2, 3)), frames[:, :, 0]


def contrast(frames, prompts):
    return (frames - frames.mean()).square().mean((1, 2, 3, 4))  # of a sample and its micro-batch: pieces matter


class Gone(torch.nn.Module):
    """A module, which offloading moves, whose score is not finite in the first micro-batch of an iteration."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, frames, prompts):
        assert not torch.is_grad_enabled()
        self.calls += 1
        return brightness(frames, prompts) * self.weight * (float("nan") if self.calls % 2 else 1)


def pair(tmp_path, reward=None, sections=EIGHTS, **options):
    """The same run with the rewards after the rollout and beside it."""
    for flag in (False, True):
        made = reward() if reward else None
        yield make(tmp_path, reward=made, rewards={"async": flag}, **sections, **options)


def test_beside_the_rollout_or_after_it_is_the_same_bit_for_bit(tmp_path):
    names = {"redness": 1.0, "test_background:contrast": -0.5, "test_background:looks": 2.0}
    after, beside = pair(tmp_path, name=names, sections={**EIGHTS, "map": {"source": "reward"}})
    for iteration in range(2):
        expected = numbers(after.step(iteration))
        assert expected["map_constant"] == 0 and expected["constant_groups"] == 0
        assert numbers(beside.step(iteration)) == expected
    assert torch.equal(weights(beside), weights(after))


def test_dropped_groups_and_offloading_are_the_same_too(tmp_path):
    sections = {**EIGHTS, "model": {"offload": "idle"}}
    after, beside = pair(tmp_path, reward=Gone, sections=sections, on_failure="drop")
    expected = numbers(after.step(0))
    assert expected["dropped_groups"] == 1 and expected["grad_norm"] > 0
    assert numbers(beside.step(0)) == expected


def test_the_next_micro_batch_is_sampled_while_the_reward_is_computed(tmp_path):
    scoring, sampling = threading.Event(), threading.Event()

    def reward(frames, prompts):
        scoring.set()
        assert sampling.wait(WAIT), "the second rollout waits for the first reward"
        return brightness(frames, prompts)

    trainer = make(tmp_path, reward=reward, **THREES)
    rollout, calls = trainer.policy.rollout, []

    def second_meets_the_reward(*args, **keywords):
        calls.append(None)
        if len(calls) == 2:
            sampling.set()
            assert scoring.wait(WAIT), "the reward waits for the end of the rollout"
        return rollout(*args, **keywords)

    trainer.policy.rollout = second_meets_the_reward
    metrics = trainer.step(0)
    assert len(calls) == 2 and metrics["seconds_reward"] >= 0


def test_the_next_micro_batch_is_sampled_while_the_map_is_made(tmp_path):
    making, sampling = threading.Event(), threading.Event()

    def backbone(frames):
        assert threading.current_thread().name.startswith("reward")
        making.set()
        assert sampling.wait(WAIT), "the second rollout waits for the first map"
        return colour_backbone(frames)

    trainer = make(tmp_path, backbone=backbone, **THREES)
    rollout, calls = trainer.policy.rollout, []

    def second_meets_the_map(*args, **keywords):
        calls.append(None)
        if len(calls) == 2:
            sampling.set()
            assert making.wait(WAIT), "the map waits for the end of the rollout"
        return rollout(*args, **keywords)

    trainer.policy.rollout = second_meets_the_map
    metrics = trainer.step(0)
    assert len(calls) == 2 and metrics["map_constant"] == 0


def mixing_backbone(frames):
    """Features that depend on the whole batch: the same bits need the same micro-batches."""
    return colour_backbone(frames) + frames.mean()


MOVING = {"name": {"redness": 1.0, "test_background:contrast": 1.0}, "rewards": {"maps": {"redness": {"floor": 0.2}}}}


@pytest.mark.parametrize(("control", "several"), [(None, MOVING), ("shuffled", {}), ("random", MOVING)])
def test_maps_made_beside_the_rollout_are_the_same_bit_for_bit(tmp_path, control, several):
    """Of groups and calls of two sizes, so of two buckets, with controls drawn over all samples."""
    lines = ['{"prompt": "a red cat"}', '{"prompt": "two dogs", "height": 48}', '{"prompt": "a green house"}']
    (tmp_path / "sizes.jsonl").write_text("\n".join(lines))
    prompts = {"path": str(tmp_path / "sizes.jsonl"), "per_iteration": 3, "group_size": 3}
    sections = {"sampling": {"micro_batch": 2, "num_inference_steps": 2}, "map": {"control": control}}
    made = []
    for flag in (False, True):
        rewards = {**several.get("rewards", {}), "async": flag}
        trainer = make(
            tmp_path, backbone=mixing_backbone, name=several.get("name", "nano"), prompts=prompts, rewards=rewards,
            reward=None if several else brightness, **sections,
        )  # fmt: skip
        found = trainer.experience(0, PhaseClock(trainer.policy.device))
        assert (found.maps is not None) == flag
        made.append(trainer.maps_of(found, 0, trainer.reward_maps))
    assert len({part.shape for part in made[0]}) > 1 and made[0][0].std() > 0
    assert all(torch.equal(after, beside) for after, beside in zip(*made, strict=True))


def test_other_maps_than_the_runs_are_made_when_asked_for(tmp_path):
    trainer = make(tmp_path, **THREES)
    found = trainer.experience(0, PhaseClock(trainer.policy.device))
    ours = trainer.maps_of(found, 0)
    ones = trainer.maps_of(found, 0, MapSource(MapConfig(control="ones")))
    assert torch.equal(ours[0], found.maps[0]) and not torch.equal(ones[0], ours[0]) and ones[0].std() == 0


@pytest.mark.parametrize("options", [{"on_failure": "drop"}, {"model": {"offload": "idle"}}])
def test_maps_wait_where_a_sample_may_be_dropped_or_the_backbone_is_away(tmp_path, options):
    trainer = make(tmp_path, **THREES, **options)
    assert trainer.experience(0, PhaseClock(trainer.policy.device)).maps is None


def test_frames_that_are_not_finite_are_named_before_the_backbone_sees_them(tmp_path):
    trainer = make(tmp_path, reward=lambda frames, prompts: torch.zeros(len(frames)), **THREES)
    decode = trainer.policy.decode
    trainer.policy.decode = lambda traj: decode(traj) * float("nan")
    with pytest.raises(FloatingPointError, match="decoded frames is not finite"):
        trainer.step(0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_score_that_is_not_finite_is_named_before_its_credit(tmp_path, asynchronous):
    def reward(frames, prompts):
        scores, credit = looks(frames, prompts)
        return scores * float("nan"), credit * float("nan")

    sections = {"sampling": {"micro_batch": 3}, "map": {"source": "reward"}}
    trainer = make(tmp_path, reward=reward, rewards={"async": asynchronous}, **sections)
    with pytest.raises(FloatingPointError, match="^reward 'nano' returned nan for sample 0"):
        trainer.step(0)


def test_a_failing_reward_stops_the_rollout_with_its_own_error(tmp_path):
    failed = threading.Event()

    def reward(frames, prompts):
        failed.set()
        raise ValueError("the server is down")

    trainer = make(tmp_path, reward=reward, **{**THREES, "sampling": {"micro_batch": 1}})
    rollout, calls = trainer.policy.rollout, []

    def after_the_failure(*args, **keywords):
        calls.append(None)
        assert len(calls) == 1 or failed.wait(WAIT)
        return rollout(*args, **keywords)

    trainer.policy.rollout = after_the_failure
    with pytest.raises(ValueError, match="^the server is down$"):
        trainer.step(0)
    assert len(calls) < 6, "all was sampled for a reward that is down"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reward")]


def test_a_failing_rollout_ends_the_thread(tmp_path):
    trainer = make(tmp_path, **THREES)
    rollout, calls = trainer.policy.rollout, []

    def fail_the_second_time(*args, **keywords):
        calls.append(None)
        if len(calls) == 2:
            raise ValueError("no memory")
        return rollout(*args, **keywords)

    trainer.policy.rollout = fail_the_second_time
    with pytest.raises(ValueError, match="no memory"):
        trainer.step(0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reward")]


def test_the_command_line_says_what_the_thread_met(tmp_path, monkeypatch, capsys):
    (tmp_path / "rewards_of_mine.py").write_text("def down(frames, prompts):\n    raise ValueError('reward: down')\n")
    monkeypatch.syspath_prepend(tmp_path)
    small = ["--prompts.per_iteration=1", "--prompts.group_size=2", "--sampling.num_inference_steps=2"]
    with pytest.raises(SystemExit) as caught:
        main(["train", "nano_vipo", "--reward.name=rewards_of_mine:down", "--reward.async=true",
              "--sampling.micro_batch=1", f"--run.output={tmp_path / 'out'}", *small])  # fmt: skip
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].count("reward: down")


def test_async_is_the_key_and_needs_micro_batches(tmp_path):
    with pytest.raises(ValueError, match="^reward.async: needs sampling.micro_batch"):
        Config.from_mapping({"reward": {"async": True}})
    config = Config.from_mapping({"reward": {"async": True}, "sampling": {"micro_batch": 3}})
    assert config.reward.asynchronous and "  async: true\n" in config.to_yaml()
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert Config.from_yaml(tmp_path / "run.yaml") == config
    with pytest.raises(ValueError, match="reward.asynchronous: unknown key; did you mean reward.async"):
        Config.from_mapping({"reward": {"asynchronous": True}})


def test_credit_maps_of_two_shapes_are_refused(tmp_path):
    sizes = iter([4, 8, None, 4])

    def reward(frames, prompts):
        size = next(sizes)
        scores = brightness(frames, prompts)
        return scores if size is None else (scores, torch.ones(len(frames), 1, size, size))

    trainer = make(tmp_path, reward=reward, sampling={"micro_batch": 3}, map={"source": "reward"})
    with pytest.raises(ValueError, match=r"got \(1, 4, 4\) and \(1, 8, 8\) with 2 of 2"):
        trainer.step(0)
    with pytest.raises(ValueError, match=r"got \(1, 4, 4\) with 1 of 2"):
        trainer.step(0)


def test_too_many_dropped_groups_stop_the_run(tmp_path):
    mixture = RewardMixture({"a": brightness, "b": brightness})
    bad = torch.ones(2, 8)
    bad[0, 1] = bad[1, 0] = bad[1, 7] = float("nan")  # a in group 0, b in groups 0 and 3: two of four

    def keep(rewards, share):
        return mixture.keep(rewards, ["x"] * 8, 2, "drop", max_dropped=share)

    assert keep(bad, 0.5).tolist() == [False] * 2 + [True] * 4 + [False] * 2
    with pytest.raises(
        FloatingPointError, match=r"'a' in 1 and 'b' in 2 of 4 groups .* 2 would .*max_dropped=0.49 allows"
    ):
        keep(bad, 0.49)
    with pytest.raises(FloatingPointError, match="'b' in 4 of 4 groups .* 4 would be dropped, all of them"):
        keep(torch.tensor([[1.0], [float("inf")]]).expand(2, 8), 1.0)
    hundred = torch.ones(2, 200)
    hundred[0, :58] = float("nan")  # 0.29 * 100 is less than 29 in floating point
    assert mixture.keep(hundred, ["x"] * 200, 2, "drop", max_dropped=0.29).sum() == 142
    trainer = make(tmp_path, reward=Gone(), on_failure="drop", **{**THREES, "rewards": {"max_dropped": 0.4}})
    with pytest.raises(FloatingPointError, match="'nano' in 1 of 2 groups .* 1 would be dropped, more than"):
        trainer.step(0)
    with pytest.raises(ValueError, match="reward.max_dropped: expected less than or equal to 1"):
        Config.from_mapping({"reward": {"max_dropped": 50}})
