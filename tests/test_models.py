"""Every family of docs/models.md through the one DiffusersPolicy: replay, sampler, layout, gradients, saving."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FluxImg2ImgPipeline,
    LTXImageToVideoPipeline,
    UNet2DModel,
    WanImageToVideoPipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import MODELS, build

from vipo.pipelines import check_replayable, compile_blocks, enable_vae
from vipo.policy import DiffusersPolicy, to_grid
from vipo.psm.latent_grid import frame_groups
from vipo.scheduler import Recording, SamplerSettings, Scoring, stochastic_scheduler
from vipo.types import StepRecord

PROMPTS, SEEDS, STEPS = ["a red cat", "two blue dogs"], [11, 12], 3
VIDEO = {
    "wan": 4,
    "wan_i2v": 4,
    "wan22_a14b": 4,
    "wan22_5b": 4,
    "hunyuan_video": 4,
    "cogvideox": 4,
    "cogvideox_i2v": 4,
    "ltx": 8,
    "mochi": 6,
}
UNREACHED = {"qwen_image": 0.8, "qwen_image_edit": 0.8, "hidream": 0.6}
"""Share of the weights that gradients reach, where not all: a last text stream, experts that no token chose."""


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Qwen-Image-Edit scales every condition to one megapixel."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (64, 64, None))


def make(name, pipeline=None, **options):
    options = {"eta": 0.6, "device": "cpu", "train": "full", **options}
    return DiffusersPolicy(pipeline or build(name), kernel=MODELS[name].kernel, **options)


def rollout(policy, name, **more):
    return policy.rollout(PROMPTS, seeds=SEEDS, num_inference_steps=STEPS, **{**MODELS[name].call, **more})


def gradients(policy, traj, steps=None):
    """Gradients of the mean log-prob by name, and the largest difference between replayed and recorded log-probs."""
    drift = []

    def on_step(k, log_probs, old_log_probs):
        drift.append((log_probs - old_log_probs).abs().max().item())
        (log_probs * to_grid(traj.steps[k].latents, traj)).mean().backward()

    policy.replay(traj, steps=steps, on_step=on_step)
    found = {key: p.grad for key, p in policy.trainable_parameters().items() if p.grad is not None}
    for p in policy.trainable_parameters().values():
        p.grad = None
    return {key: grad for key, grad in found.items() if grad.abs().sum() > 0}, max(drift)


@pytest.mark.parametrize("name", MODELS)
def test_replay_gradients_and_grid(name):
    family = MODELS[name]
    policy = make(name)
    traj = rollout(policy, name)
    assert traj.stochastic_steps == list(range(STEPS - 1))
    assert traj.latent_shape[1:] == family.grid
    frames = policy.decode(traj)
    t = family.grid[0]
    assert frames.shape[:3] == (2, 1 if t == 1 else 1 + (t - 1) * VIDEO[name], 3)
    assert frame_groups(frames.shape[1], t) == (VIDEO.get(name, 1), True)
    reached, drift = gradients(policy, traj)
    assert drift == 0
    assert len(reached) >= UNREACHED.get(name, 0.95) * len(policy.trainable_parameters())
    assert gradients(policy, traj, [1])[1] == 0  # a step alone
    if family.unguided:
        free = rollout(policy, name, **family.unguided)
        assert gradients(policy, free)[1] == 0
        assert not torch.equal(free.final, traj.final)


@pytest.mark.parametrize("name", MODELS)
def test_eta_zero_is_the_pipelines_own_sampler_and_decode_its_own_tail(name):
    family = MODELS[name]
    policy = make(name, eta=0.0)
    pipeline = build(name)
    for more in [{}, family.unguided] if family.unguided else [{}]:
        call = {**family.call, **more}
        decoded = policy.decode(rollout(policy, name, **more))
        generated = policy.generate(PROMPTS, seeds=SEEDS, num_inference_steps=STEPS, **call)
        if "negative_prompt" in call:  # these pipelines want one per prompt, and so one image where they encode both
            call["negative_prompt"] = [call["negative_prompt"]] * 2
        if name in ("qwen_image_edit", "cogvideox_i2v"):
            call["image"] = [call["image"]] * 2
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        theirs = pipeline(prompt=PROMPTS, generator=generators, num_inference_steps=STEPS, output_type="pt", **call)[0]
        theirs = theirs if theirs.ndim == 5 else theirs[:, None]
        torch.testing.assert_close(decoded, theirs, rtol=0, atol=1e-5)
        torch.testing.assert_close(generated, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].lora])
def test_adapter_with_checkpointing_has_the_gradients_of_the_adapter_without(name):
    policy = make(name, train="lora")
    traj = rollout(policy, name)
    plain, drift = gradients(policy, traj)
    assert drift == 0
    assert plain and all("lora_B" in key for key in plain)  # lora_B starts at zero, so lora_A has no gradient yet
    if name == "chroma":
        with pytest.raises(ValueError, match="not with ChromaPipeline: diffusers 0.42 drops its attention mask there"):
            policy.enable_gradient_checkpointing()
        return
    policy.enable_gradient_checkpointing()
    again, drift = gradients(policy, traj)
    assert drift == 0 and again.keys() == plain.keys()
    for key, grad in plain.items():
        torch.testing.assert_close(again[key], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_replays_exactly(name):
    policy = make(name, build(name).to(torch.bfloat16), train="lora" if MODELS[name].lora else "none")
    traj = rollout(policy, name)
    drift = []
    with torch.no_grad():
        policy.replay(traj, on_step=lambda k, new, old: drift.append((new - old).abs().max().item()))
    assert drift == [0.0] * (STEPS - 1)
    assert policy.decode(traj).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_saved_weights_give_the_same_picture_in_plain_diffusers(name, tmp_path):
    family = MODELS[name]
    adapter = LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["to_q", "to_v"])
    policy = make(name, train=adapter if family.lora else "full")
    with torch.no_grad():
        for p in policy.trainable_parameters().values():
            p.mul_(1.2)
    call = {**family.call, **family.unguided, "num_inference_steps": 2}
    trained = policy.generate(PROMPTS, seeds=SEEDS, **call)
    policy.save(tmp_path)
    plain = build(name) if family.lora else DiffusionPipeline.from_pretrained(tmp_path)
    untrained = make(name, train="none").generate(PROMPTS, seeds=SEEDS, **call)
    if family.lora:
        plain.load_lora_weights(tmp_path)
        if name == "wan22_a14b":
            second = {"weight_name": "transformer_2_lora_weights.safetensors", "load_into_transformer_2": True}
            plain.load_lora_weights(tmp_path, adapter_name="second", **second)
    same = make(name, plain, train="none").generate(PROMPTS, seeds=SEEDS, **call)
    torch.testing.assert_close(same, trained, rtol=0, atol=1e-5)
    assert (untrained - trained).abs().max() > 1e-4


def test_of_two_experts_both_or_one_are_trained(tmp_path):
    """The first expert has the steps above the boundary (0.875 of 1000), the second the others."""
    policy = make("wan22_a14b")
    policy.keep_reference()
    traj = rollout(policy, "wan22_a14b")
    reached = [{key.split(".")[0] for key in gradients(policy, traj, [k])[0]} for k in range(STEPS - 1)]
    assert reached == [{"transformer"}, {"transformer_2"}]
    with torch.no_grad():
        for p in policy.trainable_parameters().values():
            p.add_(0.01)
    kls = {}
    policy.add_reference(traj)
    policy.replay(traj, with_kl=True, on_step=lambda k, new, old, kl: kls.update({k: kl.mean().item()}))
    assert kls.keys() == {0, 1} and min(kls.values()) > 0
    policy.save(tmp_path)
    saved = policy.saved_weights(tmp_path)
    assert all(torch.equal(saved[key], p) for key, p in policy.trainable_parameters().items())

    policy = make("wan22_a14b", train={"transformer_2": "lora"})
    assert (policy.denoiser_name, list(policy.denoisers)) == ("transformer_2", ["transformer_2"])
    assert all(key.startswith("transformer_2.") for key in policy.trainable_parameters())
    traj = rollout(policy, "wan22_a14b")
    assert traj.stochastic_steps == [1]  # the noise of the first expert's step is not trained
    assert gradients(policy, traj)[0]
    with pytest.raises(ValueError, match="train: expected names out of transformer, transformer_2, got unet"):
        make("wan22_a14b", train={"unet": "lora"})
    with pytest.raises(ValueError, match="an adapter for every trained denoiser or all weights of each, not both"):
        make("wan22_a14b", train={"transformer": "lora", "transformer_2": "full"})


def scheduled(original, kernel, steps):
    """Our scheduler in the place of another, with the schedule of a call."""
    scheduler = stochastic_scheduler(original, SamplerSettings(kernel, 0.5))
    scheduler.transition = Scoring({}, range(steps), lambda k, gaussian: None)
    scheduler.set_timesteps(steps)
    return scheduler


def test_a_multistep_flow_solver_keeps_its_schedule():
    original = build("wan22_5b").scheduler
    ours = scheduled(original, "flow_grpo", 6)
    assert original.num_inference_steps is None  # the pipeline's own is not touched
    original.set_timesteps(6)
    assert torch.equal(ours.sigmas, original.sigmas) and torch.equal(ours.timesteps, original.timesteps)


def test_diffusion_schedules_keep_their_noise_levels():
    cogvideox = build("cogvideox").scheduler
    assert torch.equal(scheduled(cogvideox, "ddim", 5).alphas_cumprod, cogvideox.alphas_cumprod)
    plain = DDIMScheduler.from_config(cogvideox.config)
    assert not torch.allclose(cogvideox.alphas_cumprod.float(), plain.alphas_cumprod)
    ours = scheduled(DPMSolverMultistepScheduler(), "ddim", 5)
    assert ours.timesteps.tolist() == [999, 799, 599, 399, 199]
    levels = ours._levels
    assert all(after == before for (_, after), (before, _) in zip(levels, levels[1:], strict=False))


def test_what_cannot_be_driven_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"train: diffusers has no LoRA here \(PixArtTransformer2DModel: add_adapter"):
        make("pixart_sigma", train="lora")
    with pytest.raises(ValueError, match="cfg_trunc_ratio=0.25 makes a step of Lumina2Pipeline depend on its place"):
        rollout(make("lumina2"), "lumina2", cfg_trunc_ratio=0.25)
    with pytest.raises(ValueError, match="WanPipeline takes no keyword 'image'"):
        rollout(make("wan"), "wan", image=None)

    image = MODELS["wan_i2v"].call["image"]
    parts = {**build("wan22_5b").components, "image_encoder": None, "image_processor": None}
    policy = DiffusersPolicy(WanImageToVideoPipeline(**parts, expand_timesteps=True), train="none", device="cpu")
    with pytest.raises(ValueError, match="does not hand its latents to the VAE as a permutation"):
        rollout(policy, "wan22_5b", image=image)

    refusal = "cannot drive LTXImageToVideoPipeline: it steps only the frames after the first"
    with pytest.raises(ValueError, match=refusal):
        DiffusersPolicy(LTXImageToVideoPipeline(**build("ltx").components), train="none", device="cpu")
    with pytest.raises(ValueError, match="cannot drive FluxImg2ImgPipeline: it starts in the middle of its schedule"):
        DiffusersPolicy(FluxImg2ImgPipeline(**build("flux").components), train="none", device="cpu")
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline leaves out 1 steps of its schedule"):
        rollout(make("sdxl"), "sdxl", denoising_end=0.7)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    pixels = DDIMPipeline(unet=UNet2DModel(8, block_out_channels=(32,), **blocks), scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="DDIMPipeline has no transformer or unet, or no vae: cannot drive it"):
        DiffusersPolicy(pixels, kernel="ddim", device="cpu")


def test_a_pipeline_that_changes_latents_between_steps_is_refused():
    pipeline, (a, b, c) = build("sd3"), torch.randn(3, 2, 4)
    check_replayable(pipeline, [(a, None)], {0: StepRecord(a, b, None), 1: StepRecord(b, c, None)})
    with pytest.raises(
        ValueError, match="StableDiffusion3Pipeline changes the latents before step 1: cannot replay it"
    ):
        check_replayable(pipeline, [(a, None)], {0: StepRecord(a, b, None), 1: StepRecord(c, b, None)})
    with pytest.raises(ValueError, match="does not call prepare_latents once and scheduler.step"):
        check_replayable(pipeline, [], {0: StepRecord(a, b, None)})


@pytest.mark.parametrize("name", MODELS)
def test_the_table_in_the_docs_has_every_family(name):
    table = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    assert f"| {name} | {type(build(name)).__name__} |" in table


@pytest.mark.parametrize("name", ["sd3", "wan_i2v", "flux_kontext", "qwen_image_edit", "flux2_edit"])
def test_a_replay_encodes_nothing_again(name):
    policy = make(name, train="none")
    traj = rollout(policy, name)
    encoded = []
    parts = [part for key, part in policy.pipeline.components.items() if "_encoder" in key and part is not None]
    for part in [*parts, policy.pipeline.vae.encoder]:
        part.register_forward_hook(lambda *a: encoded.append(type(a[0]).__name__))
    policy.replay(traj, on_step=lambda *a: None)
    policy.decode(traj)
    assert encoded == []


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "sana"])
def test_a_shift_of_ones_own_replaces_the_pipelines(name):
    """sigma <- 7 sigma / (1 + 6 sigma) of equally spaced levels, whatever shift the folder or the size asks for."""
    policy = make(name, shift=7.0)
    scheduler = stochastic_scheduler(policy.pipeline.scheduler, policy.settings)
    scheduler.transition = Recording(SEEDS)
    levels = torch.linspace(1, 1 / STEPS, STEPS)
    scheduler.set_timesteps(sigmas=levels.tolist())
    torch.testing.assert_close(scheduler.sigmas[:-1], 7 * levels / (1 + 6 * levels))
    own = make(name)
    assert not torch.equal(rollout(policy, name).steps[STEPS - 1].latents, rollout(own, name).steps[STEPS - 1].latents)
    assert gradients(policy, rollout(policy, name))[1] == 0


def test_a_shift_needs_a_flow():
    with pytest.raises(ValueError, match="shift: .* is a diffusion scheduler, which has none"):
        make("sd15", shift=3.0)


PREFIXED = ["sd15", "flux_kontext", "qwen_image_edit", "wan_i2v", "wan22_a14b", "hunyuan_video", "cogvideox", "mochi"]


@pytest.mark.parametrize("name", PREFIXED)
def test_steps_before_the_first_stochastic_one_are_computed_once_per_group(name):
    policy = make(name, stochastic_steps=[1])
    call = {**MODELS[name].call, "num_inference_steps": STEPS}
    start = {"seeds": [1, 2, 3, 4], "initial_seeds": [7, 7, 8, 8]}  # one prompt from two noises, two from one
    samples = []
    denoiser = next(iter(policy.denoisers.values()))
    hook = denoiser.register_forward_pre_hook(
        lambda module, a, k: samples.append(len(k.get("hidden_states", a[0] if a else k.get("sample")))),
        with_kwargs=True,
    )
    shared = policy.rollout(["a red cat"] * 3 + ["two dogs"], **start, **call)
    seen = list(samples)
    apart = policy.rollout(["a red cat"] * 3 + ["two dogs"], **start, **call, share_prefix=False)
    assert sum(seen) < sum(samples[len(seen) :])
    assert list(shared.steps) == list(apart.steps) == [0, 1, 2]
    for k in range(STEPS):  # a batch of two rounds otherwise than a batch of four
        torch.testing.assert_close(shared.steps[k].latents, apart.steps[k].latents, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(policy.decode(shared), policy.decode(apart), rtol=0, atol=1e-3)
    assert gradients(policy, shared)[1] == 0
    hook.remove()


APART = {
    "wan": {},
    "qwen_image": {},
    "lumina2": {},
    "chroma": {},
    "flux2_klein": {},
    "wan22_a14b": {},
    "hunyuan_video": {"true_cfg_scale": 3.0, "negative_prompt": "blurred"},
}


@pytest.mark.parametrize("name", APART)
def test_a_frozen_unconditional_branch_has_no_gradient(name):
    """The gradient is that of denoisers whose outputs, but for the first of each step, are detached by hand."""
    policy = make(name, unconditional="frozen")
    traj = rollout(policy, name, **APART[name])
    frozen, drift = gradients(policy, traj)
    assert drift == 0
    policy.unconditional = "trained"
    both, _ = gradients(policy, traj)
    calls = []

    def detach(module, inputs, output):
        calls.append(1)
        if len(calls) % 2 == 0:
            return (output[0].detach(),) if isinstance(output, tuple) else type(output)(output[0].detach())
        return None

    hooks = [denoiser.register_forward_hook(detach) for denoiser in policy.denoisers.values()]
    expected, _ = gradients(policy, traj)
    for hook in hooks:
        hook.remove()
    assert frozen.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(frozen[key], grad, rtol=1e-4, atol=1e-8)
    assert any(not torch.allclose(both[key], frozen[key], rtol=1e-2) for key in frozen)


def test_without_a_branch_of_its_own_nothing_can_be_frozen():
    for name, call in (("sd3", {}), ("wan", MODELS["wan"].unguided)):
        with pytest.raises(ValueError, match="calls its denoiser once per step .*no branch to freeze; use trained"):
            rollout(make(name, unconditional="frozen"), name, **call)


OFFLOADED = ["sd15", "flux2_klein_edit", "wan_i2v", "hunyuan_video"]


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "idle") for name in OFFLOADED), ("sd15", "sequential"), ("wan_i2v", "sequential")]
)
def test_offloaded_encoders_and_vae_give_the_same_samples(name, mode, tmp_path):
    plain, policy = make(name), make(name, offload=mode)
    assert all(hasattr(part, "_hf_hook") for part in policy.idle.parts.values())
    assert not set(policy.idle.parts) & {"unet", "transformer"} and "vae" in policy.idle.parts
    if mode == "sequential":
        assert {p.device.type for p in policy.idle.parts["vae"].parameters()} == {"meta"}
    a, b = rollout(plain, name), rollout(policy, name)
    assert torch.equal(a.final, b.final)
    assert torch.equal(plain.decode(a), policy.decode(b))
    assert gradients(policy, b)[1] == 0
    policy.save(tmp_path)
    again = make(name, DiffusionPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(rollout(again, name).final, b.final, rtol=0, atol=1e-5)
    assert torch.equal(rollout(policy, name).final, b.final)  # saving has left the hooks as they were


def test_the_vae_may_work_in_tiles_and_slices():
    plain, policy = make("wan"), make("wan")
    traj = rollout(policy, "wan")
    enable_vae(policy.pipeline, tiling=True, slicing=True)
    assert policy.pipeline.vae.use_tiling and policy.pipeline.vae.use_slicing
    torch.testing.assert_close(policy.decode(traj), plain.decode(traj), rtol=0, atol=1e-4)  # smaller than a tile
    policy.pipeline.vae = torch.nn.Identity()
    with pytest.raises(ValueError, match="vae: Identity has no enable_slicing; leave it off"):
        enable_vae(policy.pipeline, tiling=False, slicing=True)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_a_channels_last_vae_decodes_the_same(name):
    plain, policy = make(name), make(name)
    traj = rollout(policy, name)
    enable_vae(policy.pipeline, tiling=False, slicing=False, channels_last=True)
    layouts = {w.is_contiguous() for w in policy.pipeline.vae.parameters() if w.ndim in (4, 5) and w[0, 0].numel() > 1}
    assert False in layouts
    torch.testing.assert_close(policy.decode(traj), plain.decode(traj), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_compiled_blocks_are_called_and_replay_exactly(name):
    """The backend "eager" runs what the compiler has traced, so nothing but the tracing is new."""
    policy = make(name, train="lora")
    compile_blocks(policy.denoisers, backend="eager")
    traj = rollout(policy, name)
    assert gradients(policy, traj)[1] == 0
    assert any(module._compiled_call_impl for module in policy.denoiser.modules())
    with pytest.raises(ValueError, match="compile: SD3Transformer2DModel names no repeated blocks; leave it off"):
        compile_blocks({"transformer": build("sd3").transformer})


def test_of_pictures_of_equal_area_each_has_its_own_layout():
    """FLUX.2 takes its size from the picture where none is given; both sizes pack into equally many tokens."""
    family = MODELS["flux2_edit"]
    call = {k: v for k, v in family.call.items() if k not in ("height", "width", "image")}
    policy = make("flux2_edit")
    for size in ((64, 96), (96, 64)):
        traj = policy.rollout(PROMPTS, seeds=SEEDS, num_inference_steps=2, image=Image.new("RGB", size, "red"), **call)
        frames = policy.decode(traj)
        ratio = frames.shape[3] / frames.shape[4]
        assert traj.latent_shape[2] / traj.latent_shape[3] == pytest.approx(ratio)
    assert len(policy._layouts) == 2


def test_a_window_without_a_step_of_the_trained_expert_is_one_clear_line_and_a_prefix_may_be_the_others():
    policy = make("wan22_a14b", train={"transformer_2": "lora"}, unconditional="frozen", stochastic_steps=[1])
    call = {**MODELS["wan22_a14b"].call, "num_inference_steps": STEPS}
    traj = policy.rollout(["a red cat"] * 2, seeds=SEEDS, initial_seeds=[7, 7], **call)
    assert traj.stochastic_steps == [1] and gradients(policy, traj)[1] == 0
    policy.settings = replace(policy.settings, stochastic_steps=(0,))
    assert policy.rollout(PROMPTS, seeds=SEEDS, **call).stochastic_steps == []
    for steps in ((STEPS,), (-1,)):
        policy.settings = replace(policy.settings, stochastic_steps=steps)
        with pytest.raises(ValueError, match=f"stochastic_steps: {steps[0]} is not one of 3 steps"):
            policy.rollout(PROMPTS, seeds=SEEDS, **call)


def test_a_pipeline_may_get_another_policy_with_another_offload():
    pipeline = build("sd15")
    samples = [rollout(make("sd15", pipeline, offload=mode), "sd15").final for mode in ("sequential", "idle", "none")]
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])
    assert not hasattr(pipeline.vae, "_hf_hook")
