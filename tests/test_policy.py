"""Any pipeline as a policy: exact replay, eta = 0 is diffusers' own sampler, layout, decode, gradients, saving."""

import math

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import FAMILIES, build

from vipo.kernels import Gaussian, gaussian_log_prob
from vipo.policy import DiffusersPolicy, to_grid
from vipo.trainable import LORA_TARGETS

PROMPTS, SEEDS, STEPS = ["a red cat", "two blue dogs"], [11, 12], 5


def make(name, pipeline=None, **options):
    options = {"eta": 0.6, "device": "cpu", "train": "full", **options}
    return DiffusersPolicy(pipeline or build(name), kernel=FAMILIES[name].kernel, **options)


def rollout(policy, name, prompts=PROMPTS, seeds=SEEDS, **more):
    return policy.rollout(prompts, seeds=seeds, num_inference_steps=STEPS, **{**FAMILIES[name].call, **more})


def drift(policy, traj, steps=None):
    """Largest difference between replayed and recorded log-probs, and the steps seen."""
    seen = {}
    policy.replay(traj, steps=steps, on_step=lambda k, new, old: seen.update({k: (new - old).abs().max().item()}))
    return max(seen.values()), list(seen)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_replay_equals_rollout_and_gradients_reach_the_trained_weights(name, train, checkpointing):
    policy = make(name, train=train)
    if checkpointing:
        policy.enable_gradient_checkpointing()
    traj = rollout(policy, name)
    assert traj.stochastic_steps == list(range(STEPS - 1))
    seen = []

    def on_step(k, log_probs, old_log_probs):
        assert log_probs.shape == (2, *traj.latent_shape)
        assert not old_log_probs.requires_grad
        seen.append((k, (log_probs - old_log_probs).abs().max().item()))
        log_probs.mean().backward()

    policy.replay(traj, on_step=on_step)
    assert seen == [(k, 0.0) for k in range(STEPS - 1)]
    reached = {key for key, p in policy.trainable_parameters().items() if p.grad is not None and p.grad.abs().sum() > 0}
    if train == "lora":
        assert all("lora_" in key for key in policy.trainable_parameters())
        assert any("lora_B" in key for key in reached)
    else:
        assert len(reached) > 0.8 * len(policy.trainable_parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_replay_of_some_steps_calls_the_denoiser_for_those_only(name):
    policy = make(name)
    traj = rollout(policy, name)
    calls = []
    hook = policy.denoiser.register_forward_hook(lambda *a: calls.append(1))
    assert drift(policy, traj, [1, 3]) == (0.0, [1, 3])
    hook.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_replay_sees_changed_weights(name):
    policy = make(name)
    traj = rollout(policy, name)
    with torch.no_grad():
        for p in policy.trainable_parameters().values():
            p.mul_(1.01)
    assert drift(policy, traj)[0] > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("guidance", [False, True])
def test_eta_zero_is_the_pipelines_own_sampler(name, guidance):
    call = {**FAMILIES[name].call, "guidance_scale": FAMILIES[name].call["guidance_scale"] if guidance else 1.0}
    policy = make(name, eta=0.0)
    ours = policy.decode(policy.rollout(PROMPTS, seeds=SEEDS, num_inference_steps=STEPS, **call))
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipeline = build(name)
    theirs = pipeline(prompt=PROMPTS, generator=generators, num_inference_steps=STEPS, output_type="pt", **call)[0]
    torch.testing.assert_close(ours[:, 0], theirs, rtol=0, atol=1e-5)
    generated = policy.generate(PROMPTS, seeds=SEEDS, num_inference_steps=STEPS, **call)
    torch.testing.assert_close(generated, ours, rtol=0, atol=1e-6)
    assert rollout(policy, name).stochastic_steps == []


@pytest.mark.parametrize("name", FAMILIES)
def test_layout_puts_packed_latents_where_the_vae_reads_them(name):
    policy = make(name)
    traj = rollout(policy, name)
    c, t, h, w = traj.latent_shape
    assert (t, h, w) == (1, 8, 6)
    packed = traj.final
    assert torch.equal(traj.layout.sort().values, torch.arange(packed[0].numel()))
    caught = []
    decode = policy.pipeline.vae.decode
    policy.pipeline.vae.decode = lambda z, *a, **k: (caught.append(z), decode(z, *a, **k))[1]
    policy.decode(traj)
    config = policy.pipeline.vae.config
    scaled = to_grid(packed, traj)[:, :, 0] / config.scaling_factor + (config.shift_factor or 0.0)
    torch.testing.assert_close(caught[0], scaled, rtol=1e-5, atol=1e-5)


def test_recorded_log_probs_are_those_of_the_recorded_values():
    """A scheduler-free oracle for SD3: recompute one step's mean from the denoiser's output caught by a hook."""
    policy = make("sd3", eta=0.6)
    outputs = []
    hook = policy.denoiser.register_forward_hook(lambda m, a, k, out: outputs.append(out[0]), with_kwargs=True)
    traj = rollout(policy, "sd3", guidance_scale=1.0)
    hook.remove()
    scheduler = build("sd3").scheduler
    scheduler.set_timesteps(STEPS)
    k = 2
    s, n = scheduler.sigmas[k].item(), scheduler.sigmas[k + 1].item()
    scale = 0.6 * math.sqrt(s / (1 - s))
    x, v = traj.steps[k].latents, outputs[k]
    mean = x + (v + scale**2 / (2 * s) * (x + (1 - s) * v)) * (n - s)
    expected = gaussian_log_prob(traj.steps[k].next_latents, Gaussian(mean, scale * math.sqrt(s - n)))
    torch.testing.assert_close(traj.steps[k].log_probs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_depends_on_its_own_seed_only(name):
    policy = make(name)
    both, alone = rollout(policy, name), rollout(policy, name, PROMPTS[1:], SEEDS[1:])
    for a, b in zip(both.steps.values(), alone.steps.values(), strict=True):
        torch.testing.assert_close(a.next_latents[1:], b.next_latents, rtol=1e-3, atol=1e-3)
    again = rollout(policy, name)
    assert torch.equal(again.final, both.final)


def test_equal_initial_seeds_give_equal_noise_and_different_samples():
    policy = make("sd3")
    traj = rollout(policy, "sd3", ["a red cat"] * 2, [1, 2], initial_seeds=[7, 7])
    assert torch.equal(traj.steps[0].latents[0], traj.steps[0].latents[1])
    assert not torch.equal(traj.steps[0].next_latents[0], traj.steps[0].next_latents[1])


def test_bfloat16_autocast_replays_exactly():
    policy = make("sd3", train="lora", autocast=torch.bfloat16)
    assert drift(policy, rollout(policy, "sd3"))[0] == 0


def test_bfloat16_weights_replay_exactly_and_the_adapter_stays_float32():
    policy = make("flux", build("flux").to(torch.bfloat16), train="lora")
    assert {p.dtype for p in policy.trainable_parameters().values()} == {torch.float32}
    traj = rollout(policy, "flux")
    assert traj.steps[0].latents.dtype == torch.bfloat16
    assert drift(policy, traj)[0] == 0
    assert traj.latent_shape == (16, 1, 8, 6)


def test_pictures_of_equal_area_have_layouts_of_their_own():
    """FLUX packs 64x48 and 48x64 into one shape of tokens."""
    policy = make("flux")
    tall = rollout(policy, "flux")
    wide = rollout(policy, "flux", height=48, width=64)
    assert tall.steps[0].latents.shape == wide.steps[0].latents.shape
    assert (tall.latent_shape, wide.latent_shape) == ((16, 1, 8, 6), (16, 1, 6, 8))


def test_stochastic_steps_may_be_a_window():
    policy = make("sd3", stochastic_steps=[1, 2])
    traj = rollout(policy, "sd3")
    assert traj.stochastic_steps == [1, 2]
    with pytest.raises(ValueError, match=r"steps: expected ascending steps out of \[1, 2\].*got \[0\]"):
        policy.replay(traj, steps=[0], on_step=lambda *a: None)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_kl_to_the_reference_is_zero_before_an_update_and_exact_after(train):
    policy = make("sd3", train=train)
    policy.keep_reference()
    traj = rollout(policy, "sd3")
    policy.add_reference(traj, steps=[1])
    kls = []

    def on_step(k, log_probs, old_log_probs, kl):
        kls.append(kl.detach())

    policy.replay(traj, steps=[1], with_kl=True, on_step=on_step)
    assert kls[0].shape == (2, *traj.latent_shape)
    assert kls[0].abs().max() == 0
    reference = traj.steps[1].reference_mean
    with torch.no_grad():
        for p in policy.trainable_parameters().values():
            p.add_(0.02)
    policy.add_reference(traj, steps=[1])
    assert torch.equal(traj.steps[1].reference_mean, reference)  # the reference does not move with the weights
    policy.replay(traj, steps=[1], with_kl=True, on_step=on_step)
    moved = []
    policy._rescore(traj, [1], lambda k, gaussian: moved.append(gaussian))
    expected = (moved[0].mean.detach().double() - reference.double()).square() / (2 * moved[0].std ** 2)
    torch.testing.assert_close(kls[1], to_grid(expected.float(), traj), rtol=1e-4, atol=1e-7)
    assert kls[1].mean() > 0


def test_kl_without_a_reference_is_refused():
    policy = make("sd3")
    traj = rollout(policy, "sd3")
    with pytest.raises(ValueError, match="call add_reference"):
        policy.replay(traj, with_kl=True, on_step=lambda *a: None)
    with pytest.raises(ValueError, match="call keep_reference"):
        policy.add_reference(traj)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("targets", [["to_q", "to_v"], LORA_TARGETS], ids=["some", "default"])
def test_saved_lora_gives_the_trained_look_in_plain_diffusers(name, targets, tmp_path):
    adapter = LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=targets)
    policy = make(name, train=adapter)
    trained = policy.generate(PROMPTS, seeds=SEEDS, num_inference_steps=2, **FAMILIES[name].call)
    policy.save(tmp_path)
    plain = build(name)
    call = dict(FAMILIES[name].call, num_inference_steps=2, output_type="pt", prompt=PROMPTS)

    def sample():
        return plain(generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], **call)[0]

    untrained = sample()
    plain.load_lora_weights(tmp_path)
    torch.testing.assert_close(sample(), trained[:, 0], rtol=0, atol=1e-5)
    assert (untrained - trained[:, 0]).abs().max() > 1e-3


def test_saved_full_pipeline_gives_the_trained_look_in_plain_diffusers(tmp_path):
    policy = make("sd3")
    with torch.no_grad():
        for p in policy.trainable_parameters().values():
            p.mul_(1.05)
    trained = policy.generate(PROMPTS, seeds=SEEDS, num_inference_steps=2, **FAMILIES["sd3"].call)
    policy.save(tmp_path)
    again = DiffusersPolicy(tmp_path, kernel="flow_grpo", train="none", device="cpu")
    same = again.generate(PROMPTS, seeds=SEEDS, num_inference_steps=2, **FAMILIES["sd3"].call)
    torch.testing.assert_close(same, trained, rtol=0, atol=1e-5)
    assert type(again.pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"  # ours left no trace


def test_pipeline_is_left_as_it_was():
    pipeline = build("sd3")
    scheduler = pipeline.scheduler
    policy = make("sd3", pipeline)
    traj = rollout(policy, "sd3")
    policy.replay(traj, on_step=lambda *a: None)
    policy.decode(traj)
    assert pipeline.scheduler is scheduler
    assert not {"encode_prompt", "prepare_latents"} & set(pipeline.__dict__)
    assert "decode" not in pipeline.vae.__dict__


def test_a_kernel_that_does_not_fit_is_refused_at_once():
    with pytest.raises(ValueError, match="is a flow scheduler; expected one of flow_grpo.*got 'ddim'"):
        DiffusersPolicy(build("sd3"), kernel="ddim", device="cpu")
    with pytest.raises(ValueError, match="is a diffusion scheduler; expected ddim, got 'flow_grpo'"):
        DiffusersPolicy(build("sd15"), kernel="flow_grpo", device="cpu")


def test_a_missing_pipeline_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no such folder: ./nowhere"):
        DiffusersPolicy("./nowhere")
    with pytest.raises(ValueError, match="no model_index.json"):
        DiffusersPolicy(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device: 'cuda' is not to be had by this torch here; expected one of cpu"):
        DiffusersPolicy(build("sd3"), device="cuda")


def test_wrong_number_of_seeds_is_refused():
    with pytest.raises(ValueError, match=r"seeds: expected one per prompt \(2\), got 1"):
        make("sd3").rollout(PROMPTS, seeds=[1], num_inference_steps=2)


def test_policy_learns_a_toy_reward():
    """A few updates of GRPO on the mean of the latents must raise it."""
    from vipo import group_advantages, pixel_advantages, policy_loss

    policy = make("sd3", eta=0.7)
    optimizer = torch.optim.Adam(policy.trainable_parameters().values(), 3e-3)
    means = []
    for iteration in range(20):
        seeds = [100 * iteration + i for i in range(8)]
        traj = policy.rollout(
            ["a cat"] * 8, seeds=seeds, initial_seeds=[0] * 8, num_inference_steps=4, height=32, width=32,
            guidance_scale=1.0, max_sequence_length=8,
        )  # fmt: skip
        rewards = traj.final.mean((1, 2, 3))
        means.append(rewards.mean().item())
        advantages = pixel_advantages(group_advantages(rewards, 8), torch.ones(8, *traj.latent_shape[1:]))
        optimizer.zero_grad()
        policy.replay(
            traj,
            on_step=lambda k, new, old, a=advantages: policy_loss(new, old, a, clip_range=0.1)[0].backward(),
        )
        optimizer.step()
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 0.2, means
