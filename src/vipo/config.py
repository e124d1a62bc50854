"""The configuration of a run: frozen, strict, one parser for YAML files and for the command line.

Every field has its meaning, unit and default here; `vipo train --help` prints them from these docstrings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from .config_errors import describe
from .named import apply_overrides, read_yaml
from .parallel_config import ParallelConfig
from .section import Fraction, Positive, Section
from .types import check_choice
from .watch_config import WatchConfig


def _clip_bounds(value: float | tuple[float, float]) -> float | tuple[float, float]:
    low, high = value if isinstance(value, tuple) else (value, value)
    if not (0 < low < 1 and high > 0):
        raise ValueError("expected 0 < low < 1 and high > 0")
    return value


def _range(value: tuple[int, int] | None) -> tuple[int, int] | None:
    if value is not None and not 0 <= value[0] < value[1]:
        raise ValueError("expected 0 <= first < end")
    return value


def _map_source(value: str) -> str:
    if value not in ("psm", "masks", "reward") and ":" not in value:
        hint = "; ones is a control now: map.control=ones" if value == "ones" else ""
        raise ValueError(f"expected psm, masks, reward or package.module:function{hint}")
    return value


class ModelConfig(Section):
    """Which pipeline is trained, and which of its weights."""

    path: str = "nano"
    """"nano" or "nano_video" (embedded), a folder written by save_pretrained, or a hub id."""
    train: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter, or all weights of the denoiser."""
    denoisers: Annotated[list[str], Field(min_length=1)] | None = None
    """Which denoisers are trained where there are several (Wan 2.2 A14B: transformer, transformer_2); null for all."""
    lora_rank: Positive = 16
    """Rank of the adapter."""
    lora_alpha: Positive = 32
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    lora_targets: list[str] | None = None
    """Names of the adapted layers; null for the attention projections."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights; trained weights are always float32."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Autocast around the pipeline's networks, in rollout and replay alike; null for none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    offload: Literal["none", "idle", "sequential"] = "none"
    """Encoders, VAE, map backbone and reward wait on the CPU while idle; sequential moves encoders layer by layer."""
    vae_tiling: bool = False
    """Decode in tiles, of clips also in time where the VAE can: less memory, seams are blended."""
    vae_slicing: bool = False
    """Decode one sample at a time: less memory."""
    vae_channels_last: bool = False
    """Keep the VAE's convolutions channels last: faster; frames differ by rounding. See docs/performance.md."""
    compile: bool = False
    """Compile the denoiser's repeated blocks; the first calls take minutes."""
    device: str | None = None
    """Torch device; null for cuda where there is one, else cpu."""
    allow_pickle: bool = False
    """Also read .bin weights of pipeline and backbone folders, tensors only (weights_only). Short: --allow-pickle."""


class SamplingConfig(Section):
    """How the policy samples during training."""

    kernel: Literal["flow_grpo", "dance_grpo", "flow_cps", "ddim"] = "dance_grpo"
    """Step kernel; ddim for Stable Diffusion 1.x / XL, the others for flow matching. The ViPO paper: dance_grpo."""
    eta: Annotated[float, Field(gt=0)] = 0.5
    """Noise scale of the kernel. The ViPO paper: 0.3 (FLUX), 0.25 (Wan)."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 8
    """Denoising steps K; the last one is deterministic and never trained. The ViPO paper: 8 (FLUX), 16 (Wan)."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """Shift of a flow schedule towards noise; null for the pipeline's own. The ViPO paper: 3 (FLUX), 8 (Wan)."""
    guidance_scale: float | None = 1.0
    """Passed to the pipeline's call; null for the pipeline's own default. The ViPO paper: 3.5 (FLUX), 5 (Wan)."""
    unconditional: Literal["trained", "frozen"] = "trained"
    """frozen: no gradient through guidance's unconditional branch, where a pipeline computes it apart; less memory."""
    height: Positive | None = None
    """Pixels; null for the pipeline's default."""
    width: Positive | None = None
    """Pixels; null for the pipeline's default."""
    call: dict[str, Any] = {}
    """Further keywords of the pipeline's call."""
    window: Positive | None = None
    """Stochastic steps per iteration, the others are plain ODE steps; null for all. MixGRPO: 4; Flow-GRPO-Fast: 3."""
    window_mode: Literal["fixed", "sliding", "random", "scattered"] = "fixed"
    """Where the window is: at the start of window_range, sliding through it, at random in it; or scattered steps."""
    window_range: Annotated[tuple[int, int] | None, AfterValidator(_range)] = None
    """First step and end (exclusive) that the window may reach; null for all but the last. Flow-GRPO-Fast: [0, 6]."""
    window_every: Positive = 25
    """Iterations between two moves of a sliding window. MixGRPO: 25."""
    window_stride: Positive = 1
    """Steps per move of a sliding window. MixGRPO: 1."""
    same_initial_noise: bool = True
    """Start all samples of a group from the same noise, as the ViPO paper does."""
    micro_batch: Positive | Literal["auto"] | None = None
    """Samples per rollout and replay call; null for all of an iteration; auto for the most that memory holds."""
    store_on_cpu: bool = False
    """Keep the latents and log-probs of the trained steps on the CPU between rollout and update."""

    @property
    def given_micro_batch(self) -> int | None:
        """`micro_batch` where it is a number."""
        return None if self.micro_batch == "auto" else self.micro_batch

    @property
    def reach(self) -> tuple[int, int]:
        """First stochastic step and the end (exclusive); the last denoising step is always deterministic."""
        first, end = self.window_range or (0, self.num_inference_steps - 1)
        return first, min(end, self.num_inference_steps - 1)

    @model_validator(mode="after")
    def _check(self) -> SamplingConfig:
        first, end = self.reach
        if first >= end or (self.window or 1) > end - first:
            raise ValueError(
                f"sampling.window: {self.window or 'all'} stochastic steps do not fit into steps {first} to {end - 1} "
                f"(of {self.num_inference_steps}, the last is deterministic); change window or window_range"
            )
        return self

    @property
    def pipeline_call(self) -> dict[str, Any]:
        """Keywords of the pipeline's call; what is null is left to the pipeline."""
        given = {"guidance_scale": self.guidance_scale, "height": self.height, "width": self.width}
        return {**{key: value for key, value in given.items() if value is not None}, **self.call}


class PromptsConfig(Section):
    """Which prompts, and how they form groups."""

    path: str = "nano"
    """"nano" or "nano_video" (embedded), a text file with one prompt per line, or .jsonl with keywords."""
    per_iteration: Positive = 4
    """Prompts (groups) per iteration."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Samples per prompt, G. The ViPO paper: 12 (FLUX), 8 (Wan)."""


class RewardConfig(Section):
    """What is rewarded."""

    name: str | dict[str, float] = "nano"
    """One reward (a name of docs/rewards.md, or package.module:function), or several with their weights."""
    paths: dict[str, str] = {}
    """By reward: a folder, file or hub id instead of the published one; of remote and judge the server's address."""
    options: dict[str, dict[str, Any]] = {}
    """By reward: its options, see docs/rewards.md."""
    combine: Literal["advantages", "rewards"] = "advantages"
    """Of several: weighted sum of the advantages that each gives alone (the ViPO paper: VQ and MQ), or of rewards."""
    on_failure: Literal["stop", "drop"] = "stop"
    """A reward that is NaN or infinite: stop the run, or drop the sample's whole group and count it."""
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.5
    """With on_failure drop: the run stops when a larger share of an iteration's groups would be dropped, or all."""
    maps: dict[str, dict[str, Any]] = {}
    """By reward: changes of the map section for its own advantage, as {nano_mq: {motion: difference}}."""
    device: str | None = None
    """Torch device of the rewards' models, such as another GPU; null for the run's. model.offload leaves them there."""
    asynchronous: bool = Field(default=False, alias="async")
    """Score each micro-batch and make its maps in a thread while the next is sampled; same bits. Needs micro_batch."""
    std: Literal["population", "sample"] = "population"
    """Divisor of the group's standard deviation: G or G - 1."""
    advantage_clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Bound of the group advantages, in standard deviations; null for none."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight by name."""
        return {self.name: 1.0} if isinstance(self.name, str) else self.name

    @model_validator(mode="after")
    def _check(self) -> RewardConfig:
        if not self.weights or not all(self.weights.values()):
            raise ValueError(f"reward.name: expected at least one reward, and weights other than 0, got {self.name}")
        for name, changes in self.maps.items():
            check_choice("reward.maps", name, self.weights)
            if "device" in changes:
                raise ValueError("reward.maps: device is one for all maps; set map.device")
        if self.maps and self.combine == "rewards":
            raise ValueError("reward.maps: needs reward.combine=advantages: summed rewards have one advantage, one map")
        return self


class MapConfig(Section):
    """The allocation map: where the advantage goes."""

    source: Annotated[str, AfterValidator(_map_source)] = "psm"
    """psm (ViPO), masks (a file of masks or boxes), reward (the reward's own credit), or package.module:function."""
    path: Path | None = None
    """For source masks: JSON lines of prompt and mask (a file) or boxes, see vipo.maps.MaskFile."""
    control: Literal["ones", "centre", "shuffled", "inverted", "random"] | None = None
    """Instead of the map: ones (scalar GRPO), centre (a blob); or made from it: shuffled, inverted, random."""
    backbone: str = "nano"
    """"nano", a folder or a hub id: DINOv2, DINOv3, SAM, CLIP, SigLIP, ResNet, ConvNeXt, V-JEPA 2, VideoMAE."""
    layer: Annotated[int, Field(ge=-1)] = -1
    """Hidden state of the backbone: -1 the last, 0 the embeddings."""
    chunk: Positive | None = None
    """Frames per forward pass of the backbone; null for 32, on a CPU as many as make up 512 x 512 pixels."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Autocast inside the backbone; null for float32. See docs/maps.md for its effect."""
    components: Positive = 3
    """Principal components K. The ViPO paper: 3."""
    orientation: Literal["border_energy", "border", "skewness", "energy", "centre", "library"] = "border_energy"
    """How principal components become non-negative; library is the released code's rule."""
    weighting: Literal["variance", "mean", "first"] = "variance"
    """Weights of the components. The ViPO paper: variance."""
    smoothing: Annotated[float, Field(ge=0)] = 1.0
    """Gaussian smoothing in patches. The ViPO paper: 1."""
    normalisation: Literal["mean", "minmax"] = "mean"
    """mean: 1 on average per sample, which preserves the advantage's total; minmax: the released code's."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Below 1 sharper, above 1 flatter (mean normalisation)."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Least weight of any position (mean normalisation)."""
    motion: Literal["none", "difference", "flow"] = "none"
    """Second map of a clip: frame difference or optical flow."""
    combine: Literal["product", "mean", "max", "power"] = "product"
    """How the motion map joins the first."""
    motion_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the motion map (mean and power)."""
    pca_scope: Literal["sample", "frame"] = "sample"
    """One basis per sample (clip) or per frame."""
    solver: Literal["subspace", "exact"] = "subspace"
    """PCA by subspace iteration or by a full eigendecomposition."""
    device: str | None = None
    """Torch device of the map's backbone, such as another GPU; null for the run's. model.offload leaves it there."""
    image_size: Positive | None = None
    """Pixels of the shorter side that the backbone sees; null for the frames' own size."""

    def changed(self, changes: dict[str, Any]) -> MapConfig:
        """Return the section with other values; ValueError says what is wrong with them."""
        return Config.from_mapping({"map": {**self.model_dump(), **changes}}).map

    @property
    def label(self) -> str:
        """What the maps are, in a word: the control, or the source."""
        return self.control or self.source

    @model_validator(mode="after")
    def _check(self) -> MapConfig:
        if (self.source == "masks") != (self.path is not None):
            raise ValueError("map.path: expected a .jsonl file with map.source=masks, and only there")
        if self.normalisation == "minmax" and (self.floor > 0 or self.temperature != 1):
            raise ValueError("map.floor and map.temperature need map.normalisation=mean")
        return self


class LossConfig(Section):
    """The objective."""

    level: Literal["position", "sample"] = "position"
    """Ratio per latent position (ViPO) or per sample (scalar GRPO)."""
    channel_reduction: Literal["mean", "sum"] = "mean"
    """How log-probs of a position's channels are reduced before the ratio."""
    clip_range: Annotated[float | tuple[float, float], AfterValidator(_clip_bounds)] = 0.1
    """Half-width of the ratio's clip range, or [low, high]; see docs/log.md for its calibration per level."""
    kl_beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL to the reference weights; 0 for none."""


class OptimizerConfig(Section):
    """AdamW, and how a rollout is used."""

    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """The ViPO paper: 1e-5 (full weights); LoRA wants about 30 times more."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's. The ViPO paper: 1e-4."""
    state: Literal["float32", "8bit"] = "float32"
    """AdamW's moments: 8 bytes per weight, or 2 (needs bitsandbytes), see docs/performance.md."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient is scaled down to this norm."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """Iterations of a run that may be skipped for a NaN or infinite tensor, weights untouched; 0 stops at the first."""
    updates_per_rollout: Positive = 1
    """Optimizer steps per rollout: the trained steps are shuffled and split between them. 1 is on-policy."""
    epochs: Positive = 1
    """Passes over a rollout, each with all its updates; above 1 the later ones are off-policy."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Iterations over which the learning rate rises to its value, linearly from 1 / warmup of it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after the warm-up: constant, or falling towards 0 at the end of run.iterations."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per optimizer step of an average of the trained weights, saved as weights_ema; null for none."""
    step_fraction: Fraction = 0.6
    """Share of the stochastic steps that are trained, drawn anew per iteration. The ViPO paper: 0.6."""


class RunConfig(Section):
    """The run itself: where, how long, how often."""

    output: Path = Path("runs/vipo")
    """Run directory; must be new, unless --resume or --overwrite is given."""
    iterations: Positive = 50
    """Rollouts."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of prompts, noise and trained steps. One seed gives one result on one machine."""
    save_every: Positive = 25
    """Iterations between checkpoints; the last iteration is always saved."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Keep also the checkpoint with the highest mean training reward over the save_every iterations before it."""
    sample_every: Positive = 10
    """Iterations between saved pictures of samples and maps."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    threads: Positive | None = None
    """CPU threads of torch; null for torch's own choice."""


class Config(Section):
    """A whole run. The default is ViPO on the nano pipeline."""

    model: ModelConfig = ModelConfig()
    sampling: SamplingConfig = SamplingConfig()
    prompts: PromptsConfig = PromptsConfig()
    reward: RewardConfig = RewardConfig()
    map: MapConfig = MapConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    watch: WatchConfig = WatchConfig()
    parallel: ParallelConfig = ParallelConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        both = [name for name in self.watch.rewards if name in self.reward.weights]
        if both:
            raise ValueError(f"watch.rewards: {both[0]!r} is trained on (reward.name), so it is not held out")
        scored = (*self.reward.weights, *self.watch.rewards)
        foreign = [name for name in (*self.reward.paths, *self.reward.options) if name not in scored]
        if foreign:
            raise ValueError(f"reward.paths, reward.options: {foreign[0]!r} is not in reward.name or watch.rewards")
        trained = self.trained_steps
        if self.optimizer.updates_per_rollout > trained:
            raise ValueError(
                f"optimizer.updates_per_rollout: {self.optimizer.updates_per_rollout} updates need as many trained "
                f"steps, but sampling.num_inference_steps and optimizer.step_fraction leave {trained}"
            )
        if self.model.train == "full" and self.model.dtype != "float32" and self.model.autocast is None:
            raise ValueError(
                "model.autocast: model.train=full keeps the trained weights in float32, so "
                f"model.dtype={self.model.dtype} needs model.autocast={self.model.dtype}"
            )
        if self.parallel.context > 1 and self.model.compile:
            raise ValueError("parallel.context: was not tried with compiled blocks; set model.compile=false")
        _ = self.reward_maps  # checks them
        if self.reward.asynchronous and self.sampling.micro_batch is None:
            raise ValueError(
                "reward.async: needs sampling.micro_batch: without it all is sampled at once, and then scored"
            )
        if self.sampling.kernel in ("flow_cps", "ddim") and self.sampling.eta > 1:
            raise ValueError(f"sampling.eta: expected at most 1 for {self.sampling.kernel}, got {self.sampling.eta}")
        return self

    @property
    def reward_maps(self) -> dict[str, MapConfig]:
        """The map section of each reward that has its own; ValueError for what is no change of it."""
        try:
            return {name: self.map.changed(changes) for name, changes in self.reward.maps.items()}
        except ValueError as error:
            raise ValueError(f"reward.maps: {error}") from None

    @property
    def reward_offload(self) -> Literal["none", "idle", "sequential"]:
        """`model.offload` of the rewards; those with a device of their own stay there."""
        return self.model.offload if self.reward.device is None else "none"

    @property
    def map_offload(self) -> Literal["none", "idle", "sequential"]:
        """`model.offload` of the map's backbone; one with a device of its own stays there."""
        return self.model.offload if self.map.device is None else "none"

    @property
    def trained_steps(self) -> int:
        """Denoising steps trained per rollout; the last step is deterministic."""
        first, end = self.sampling.reach
        return max(1, round(self.optimizer.step_fraction * (self.sampling.window or end - first)))

    @property
    def num_samples(self) -> int:
        """N = B * G, samples per iteration."""
        return self.prompts.per_iteration * self.prompts.group_size

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> Config:
        """Build a config from nested dicts.

        Raises:
            ValueError: one line per problem: the key, what was expected, what was got, and the nearest right key.
        """
        try:
            return cls.model_validate(mapping)
        except ValidationError as error:
            # a mapping was meant for the union's other arm: that it is no string is not what is wrong
            found = [e for e in error.errors() if e["type"] != "string_type" or not isinstance(e["input"], dict)]
            keys = [key for key, _, _ in fields()]
            lines = dict.fromkeys(describe(e, keys) for e in found or error.errors())
            raise ValueError("\n".join(lines)) from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """Read a YAML file, then apply overrides like "--loss.level=sample".

        Raises:
            ValueError: the file is missing, is not UTF-8 or not YAML, or a value is wrong.
        """
        return cls.from_mapping(apply_overrides(read_yaml(Path(path)), overrides))

    def to_yaml(self) -> str:
        """The resolved config, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def fields() -> Iterator[tuple[str, str, str]]:
    """Every key of a config as (section.key, default, help)."""
    for section, field in Config.model_fields.items():
        default = field.default
        for attribute, entry in type(default).model_fields.items():
            name = entry.alias or attribute
            value = (
                yaml.safe_dump(default.model_dump(mode="json")[name], default_flow_style=True)
                .strip()
                .removesuffix("...")
            )
            yield f"{section}.{name}", value.strip(), str(entry.description)
