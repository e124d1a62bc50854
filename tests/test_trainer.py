"""The training loop on a tiny SD3: invariants, determinism, exact resume, failures, what a run leaves behind."""

import json

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import build

from vipo import Config, DiffusersPolicy, PerceptualStructuring, Trainer
from vipo.checkpoint import list_checkpoints
from vipo.prompts import prompt_batch
from vipo.psm import BackboneError
from vipo.rewards.mixture import RewardMixture
from vipo.runlog import PhaseClock, read_metrics
from vipo.trainer import make_policy

CALL = {"max_sequence_length": 8}


def colour_backbone(frames):
    """Patch features without a network: local mean and contrast of 8x8 patches."""
    patches = frames.unfold(3, 8, 8).unfold(4, 8, 8)
    return torch.cat([patches.mean((-1, -2)), patches.std((-1, -2))], 2).movedim(2, -1)


def brightness(frames, prompts):
    return frames.mean((1, 2, 3, 4))


def make(
    tmp_path,
    reward=brightness,
    train="lora",
    backbone=colour_backbone,
    on_failure="stop",
    name="nano",
    rewards=None,
    **sections,
):
    prompts = tmp_path / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("a red cat\ntwo dogs\na green house\n")
    mapping = {
        "sampling": {
            "kernel": "flow_grpo", "num_inference_steps": 4, "height": 32, "width": 32, "eta": 0.7, "call": CALL,
        },
        "prompts": {"path": str(prompts), "per_iteration": 2, "group_size": 3},
        "reward": {"on_failure": on_failure, "name": name, **(rewards or {})},
        "optimizer": {"step_fraction": 1.0, "learning_rate": 1e-3},
        "run": {"output": str(tmp_path / "run"), "iterations": 3, "save_every": 2, "sample_every": 2},
    }  # fmt: skip
    for name, section in sections.items():
        mapping[name] = {**mapping.get(name, {}), **section}
    config = Config.from_mapping(mapping)
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_q", "to_v"])
    policy = DiffusersPolicy(
        build("sd3"), kernel="flow_grpo", eta=0.7, train=adapter if train == "lora" else train, device="cpu"
    )
    psm = None if config.map.control == "ones" else PerceptualStructuring(backbone)
    return Trainer(config, policy=policy, psm=psm, reward=reward)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.parameters])


def numbers(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("seconds")}


def test_a_run_leaves_everything_behind(tmp_path):
    trainer = make(tmp_path)
    before = weights(trainer).clone()
    seen = []
    trainer.run(on_iteration=lambda i, metrics: seen.append((i, metrics["reward_mean"])))
    run = tmp_path / "run"
    assert [i for i, _ in seen] == [1, 2, 3]
    assert not torch.equal(weights(trainer), before)
    assert Config.from_yaml(run / "config.yaml") == trainer.config
    metrics = read_metrics(run)
    assert [line["iteration"] for line in metrics] == [1, 2, 3]
    expected = {"reward_mean", "group_std", "loss", "clip_fraction", "approx_kl", "grad_norm", "map_entropy"}
    assert expected <= set(metrics[0])
    assert metrics[0]["clip_fraction"] == 0 and metrics[0]["ratio_max"] == 1  # on-policy
    assert metrics[0]["map_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics[0]["seconds"] > metrics[0]["seconds_update"] > 0
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"iteration_{i:06d}.png" for i in (1, 2, 3)]
    assert len(list((run / "maps").iterdir())) == 3
    assert list((run / "tensorboard").glob("events*"))
    assert json.loads((run / "summary.json").read_text())["state"] == "finished"
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_000002", "step_000003"]
    plain = build("sd3")
    plain.load_lora_weights(run / "checkpoints" / "step_000003" / "weights")
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32, **CALL}
    theirs = plain("a red cat", generator=torch.Generator().manual_seed(1), output_type="pt", **call)[0]
    ours = trainer.policy.generate(["a red cat"], seeds=[1], **call)
    torch.testing.assert_close(ours[:, 0], theirs, rtol=0, atol=1e-5)


def test_two_seeded_runs_are_equal_and_another_seed_differs(tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = make(tmp_path, run={"output": str(tmp_path / name), "seed": seed})
        trainer.run()
        runs.append(([numbers(line) for line in read_metrics(tmp_path / name)], weights(trainer)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_resume_continues_bit_for_bit(tmp_path, train):
    whole = make(tmp_path, train=train, run={"output": str(tmp_path / "whole"), "iterations": 4})
    whole.run()
    make(tmp_path, train=train, run={"iterations": 2}).run()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 3, "reward_mean": 99}\n{"iterat')  # written after the checkpoint, then killed
    resumed = make(tmp_path, train=train, run={"iterations": 4})
    resumed.run(mode="resume")
    assert torch.equal(weights(resumed), weights(whole))
    ours, theirs = (list(map(numbers, read_metrics(tmp_path / name))) for name in ("run", "whole"))
    assert ours == theirs


def test_an_existing_run_is_not_touched_without_a_word(tmp_path):
    make(tmp_path, run={"iterations": 1}).run()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="already holds a run; give --resume, --overwrite"):
        make(tmp_path).run()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    make(tmp_path, run={"iterations": 1}).run(mode="overwrite")
    with pytest.raises(ValueError, match="holds no run"):
        make(tmp_path, run={"output": str(tmp_path / "other")}).run(mode="resume")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        make(tmp_path, run={"output": str(tmp_path / "full")}).run(mode="overwrite")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def bad_reward(frames, prompts):
    rewards = frames.mean((1, 2, 3, 4))
    rewards[4] = float("nan")
    return rewards


def test_a_nan_reward_stops_and_names_the_sample(tmp_path):
    trainer = make(tmp_path, reward=bad_reward)
    before = weights(trainer).clone()
    with pytest.raises(
        FloatingPointError, match="returned nan for sample 4 of 6, prompt '.*'; set reward.on_failure=drop"
    ):
        trainer.step(0)
    assert torch.equal(weights(trainer), before)


def test_several_rewards_have_weights_and_are_logged_apart(tmp_path):
    names = {"redness": 1.0, "test_trainer:brightness": -0.5}
    trainer = make(tmp_path, reward=None, name=names)
    metrics = trainer.step(0)
    means = [metrics[f"reward_mean/{name}"] for name in names]
    assert metrics["reward_mean"] == pytest.approx(means[0] - 0.5 * means[1], abs=1e-6)
    assert means[1] == pytest.approx(trainer.frames.mean().item(), abs=1e-5)
    with pytest.raises(ValueError, match="one object was given for several names: redness, test_trainer:brightness"):
        make(tmp_path, name=names)
    summed = make(tmp_path, reward=None, name=names, on_failure="drop")
    apart, together = (
        summed.config.model_copy(update={"reward": summed.config.reward.model_copy(update={"combine": combine})})
        for combine in ("advantages", "rewards")
    )
    advantages = []
    for config in (apart, together):
        summed.rollouts.config = config
        advantages.append(summed.experience(0, PhaseClock(summed.policy.device)).advantages)
    assert not torch.allclose(*advantages)
    opposed = {"redness": lambda f, p: torch.tensor([0.0, 1, 2] * 2), "b": lambda f, p: torch.tensor([4.0, 2, 0] * 2)}
    summed.rollouts.config = apart
    summed.reward = summed.rollouts.reward = RewardMixture(opposed, {"redness": 2.0, "b": 1.0})
    assert summed.step(0)["constant_groups"] == 0
    summed.reward = summed.rollouts.reward = RewardMixture({name: lambda f, p: torch.ones(6) for name in opposed})
    assert summed.step(0)["constant_groups"] == 2
    bad = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, float("nan"), 4.0]])
    kept = RewardMixture({"a": brightness, "b": brightness}).keep(bad, ["x"] * 4, 2, "drop")
    assert kept.tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="reward.name: expected at least one reward, and weights other than 0"):
        make(tmp_path, name={"redness": 0.0})
    with pytest.raises(ValueError, match="reward.paths, reward.options: 'hpsv3' is not in reward.name"):
        Config.from_mapping({"reward": {"options": {"hpsv3": {"dtype": "bfloat16"}}}})
    credit = {"redness": lambda f, p: (brightness(f, p), f.mean(2)), "b": lambda f, p: (brightness(f, p), f.mean(2))}
    with pytest.raises(ValueError, match="expected a credit map of one reward at most, got redness, b"):
        RewardMixture(credit)(trainer.frames, ["a"] * len(trainer.frames))


def test_a_sample_that_is_not_finite_is_dropped_with_its_group(tmp_path):
    trainer = make(tmp_path, on_failure="drop")
    before, decode = weights(trainer), trainer.policy.decode

    def overflows(traj):
        frames = decode(traj)
        frames[4] = float("nan")
        return frames

    trainer.policy.decode = overflows
    metrics = trainer.step(0)
    assert metrics["dropped_groups"] == 1 and not any(value != value for value in metrics.values())
    assert bool(torch.isfinite(trainer.frames).all()) and not torch.equal(weights(trainer), before)


def test_a_nan_reward_may_drop_its_group(tmp_path):
    trainer = make(tmp_path, reward=bad_reward, on_failure="drop")
    metrics = trainer.step(0)
    assert metrics["dropped_groups"] == 1
    assert metrics["reward_std"] == metrics["group_std"]  # statistics of the one group that is left
    assert metrics["grad_norm"] > 0


def test_a_reward_of_the_wrong_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"reward: expected one number per sample, shape \(6,\), got \(3,\)"):
        make(tmp_path, reward=lambda frames, prompts: torch.zeros(3)).step(0)


def test_constant_rewards_teach_nothing_and_are_counted(tmp_path):
    metrics = make(tmp_path, reward=lambda frames, prompts: torch.ones(6)).step(0)
    assert metrics["constant_groups"] == 2
    assert metrics["grad_norm"] == 0


def test_a_backbone_that_fails_stops_the_run(tmp_path):
    def broken(frames):
        raise RuntimeError("CUDA error: device-side assert")

    with pytest.raises(BackboneError, match="the map's backbone failed on frames of shape .*device-side assert"):
        make(tmp_path, backbone=broken).step(0)
    with pytest.raises(BackboneError, match="features are not finite"):
        make(tmp_path, backbone=lambda frames: colour_backbone(frames) * float("nan")).step(0)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path):
    trainer = make(tmp_path, sampling={"micro_batch": 3})
    found = trainer.experience(0, PhaseClock(trainer.policy.device))
    found.trajectories[1].steps[2].log_probs[0] = float("nan")
    before = weights(trainer)
    maps = trainer.maps_of(found, 0)
    with pytest.raises(FloatingPointError, match="loss of step 2 is not finite"):
        trainer._update(found, maps)
    assert torch.equal(weights(trainer), before)


def test_micro_batches_give_the_whole_batchs_gradient(tmp_path):
    whole, parts = make(tmp_path), make(tmp_path, sampling={"micro_batch": 3})
    a, b = whole.step(0), parts.step(0)
    assert a["reward_mean"] == pytest.approx(b["reward_mean"], rel=1e-4)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    # Adam's first step is sign-like, so compare where the gradient is not tiny: nearly all weights agree
    assert ((weights(whole) - weights(parts)).abs() < 1e-4).float().mean() > 0.97


def test_ones_at_position_level_is_scalar_grpo_on_policy(tmp_path):
    ones = {"control": "ones"}
    a = make(tmp_path, map=ones, loss={"level": "position"})
    b = make(tmp_path, map=ones, loss={"level": "sample", "clip_range": 1e-4})
    first, second = a.step(0), b.step(0)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
    assert ((weights(a) - weights(b)).abs() < 1e-5).float().mean() > 0.98
    vipo = make(tmp_path, loss={"level": "position"})
    assert vipo.step(0)["grad_norm"] != pytest.approx(first["grad_norm"], rel=1e-3)


def test_several_updates_split_the_steps_and_leave_the_policy(tmp_path):
    trainer = make(tmp_path, optimizer={"updates_per_rollout": 3, "learning_rate": 3e-2})
    found = trainer.experience(0, PhaseClock(trainer.policy.device))
    assert sorted(sum(found.plan, [])) == [0, 1, 2] and len(found.plan) == 3
    assert list(found.trajectories[0].steps) == [0, 1, 2]  # of the six: what is not trained is not kept
    metrics = trainer.step(0)
    assert metrics["ratio_max"] > 1.001  # the second and third update are off-policy
    assert metrics["approx_kl"] > 0


def test_what_saves_memory_changes_nothing(tmp_path):
    """Offloaded, stored on the CPU, decoded in slices: the same numbers, bit for bit."""
    plain = make(tmp_path, loss={"kl_beta": 0.1})
    saving = make(tmp_path, loss={"kl_beta": 0.1}, model={"offload": "idle"}, sampling={"store_on_cpu": True})
    for iteration in range(2):
        assert numbers(saving.step(iteration)) == numbers(plain.step(iteration))
    assert torch.equal(weights(saving), weights(plain))


def test_a_window_of_the_untrained_expert_is_one_clear_line(tmp_path):
    trainer = make(tmp_path, sampling={"window": 1})
    traj = trainer.policy.rollout(["a"], seeds=[1], num_inference_steps=4, height=32, width=32, **CALL)
    traj.keep([])
    with pytest.raises(ValueError, match="sampling.window: none of the stochastic steps .* set sampling.window_range"):
        trainer.rollouts._choose_steps(traj, 0)


def test_a_config_sets_the_pipelines_options(tmp_path):
    folder = tmp_path / "sd3"
    build("sd3").save_pretrained(folder)
    model = {"path": str(folder), "offload": "sequential", "vae_slicing": True, "vae_tiling": True, "device": "cpu"}
    config = Config.from_mapping({"model": model, "sampling": {"kernel": "flow_grpo", "unconditional": "frozen"}})
    policy = make_policy(config)
    assert (policy.idle.mode, policy.unconditional) == ("sequential", "frozen")
    assert policy.pipeline.vae.use_slicing and policy.pipeline.vae.use_tiling
    with pytest.raises(ValueError, match="vae_channels_last: offload=sequential brings the weights .*; leave it off"):
        make_policy(Config.from_mapping({"model": {**model, "vae_channels_last": True}}))
    plain = Config.from_mapping({"model": {"path": str(folder), "vae_channels_last": True, "device": "cpu"}})
    weight = make_policy(plain).pipeline.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_kl_is_logged_and_pulls_back(tmp_path):
    free = make(tmp_path)
    held = make(tmp_path, loss={"kl_beta": 100.0})
    for trainer in (free, held):
        for iteration in range(3):
            metrics = trainer.step(iteration)
    assert metrics["kl"] > 0
    reference = make(tmp_path)
    assert (weights(held) - weights(reference)).norm() < (weights(free) - weights(reference)).norm()


@pytest.mark.parametrize("control", ["centre", "shuffled", "inverted", "random"])
def test_control_maps_train(tmp_path, control):
    metrics = make(tmp_path, map={"control": control}).step(0)
    assert metrics["map_mean"] == pytest.approx(1, abs=1e-4)


def test_a_reward_that_shows_where_it_looked(tmp_path):
    def left(frames, prompts):
        half = torch.zeros(len(frames), 1, 1, 2)
        half[..., 0] = 1
        return brightness(frames, prompts), half

    trainer = make(tmp_path, reward=left, map={"source": "reward"})
    trainer.step(0)
    assert trainer.maps[..., 0].min() > 1.5 and trainer.maps[..., -1].max() < 0.5
    with pytest.raises(ValueError, match="map.source=reward: the reward returned scores only"):
        make(tmp_path, map={"source": "reward"}).step(0)


def test_boxes_from_a_file_and_a_missing_one_is_found_before_the_run(tmp_path):
    path = tmp_path / "masks.jsonl"
    entries = [{"prompt": prompt, "boxes": [[0, 0, 0.5, 1]]} for prompt in ("a red cat", "two dogs", "a green house")]
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    trainer = make(tmp_path, map={"source": "masks", "path": str(path)})
    trainer.step(0)
    assert trainer.maps[..., 0].min() > 1.5 and trainer.maps[..., -1].max() == 0
    path.write_text(json.dumps(entries[0]))
    with pytest.raises(ValueError, match="no entry for 2 prompts, first 'two dogs'"):
        make(tmp_path, map={"source": "masks", "path": str(path)})


def test_a_window_trains_its_steps_only(tmp_path):
    trainer = make(
        tmp_path, sampling={"num_inference_steps": 6, "window": 2, "window_mode": "sliding", "window_every": 1}
    )
    for iteration, expected in enumerate([[0, 1], [1, 2], [2, 3], [3, 4], [0, 1]]):
        found = trainer.experience(iteration, PhaseClock(trainer.policy.device))
        assert found.trajectories[0].stochastic_steps == expected
    assert trainer.step(1)["grad_norm"] > 0


def test_prompts_with_their_own_sizes_and_keywords(tmp_path):
    entries = [{"prompt": "a cat", "height": 48}, {"prompt": "a dog", "negative_prompt": "a cat"}, {"prompt": "a cow"}]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    trainer = make(tmp_path, prompts={"path": str(path), "per_iteration": 3})
    batch = prompt_batch(trainer.prompts, 0, per_iteration=3, group_size=3, seed=0)
    trajectories = trainer.experience(0, PhaseClock(trainer.policy.device)).trajectories
    assert [set(traj.prompts) for traj in trajectories] == [{text} for text in dict.fromkeys(batch.prompts)]
    heights = {traj.prompts[0]: traj.latent_shape[2] for traj in trajectories}
    assert heights["a cat"] * 2 == heights["a dog"] * 3
    metrics = trainer.step(0)
    assert metrics["grad_norm"] > 0 and metrics["map_mean"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("frames", "alone"), [(9, True), (8, False)])
def test_maps_of_clips_read_every_frame_in_its_group(tmp_path, frames, alone):
    trainer = make(tmp_path)
    clips = torch.rand(2, frames, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latent_frames = 3 if alone else 2
    maps = trainer.allocation_maps(clips, ["", ""], (latent_frames, 4, 4), iteration=0)
    expected = PerceptualStructuring(colour_backbone)(clips, (latent_frames, 4, 4), 4, first_frame_alone=alone)
    assert torch.equal(maps, expected)


def test_shuffled_maps_differ_from_iteration_to_iteration(tmp_path):
    trainer = make(tmp_path, map={"control": "shuffled"})
    frames = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second, again = (trainer.allocation_maps(frames, ["", ""], (1, 4, 4), iteration=i) for i in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_a_dropped_sample_needs_no_credit(tmp_path):
    def bad(frames, prompts):
        rewards, credit = brightness(frames, prompts), frames[:, :, 0].clone()
        rewards[0], credit[0] = float("nan"), float("nan")
        return rewards, credit

    trainer = make(tmp_path, reward=bad, on_failure="drop", map={"source": "reward"})
    metrics = trainer.step(0)
    assert metrics["dropped_groups"] == 1 and metrics["map_constant"] == 3 and metrics["grad_norm"] > 0
