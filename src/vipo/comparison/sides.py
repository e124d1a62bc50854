"""What is compared: two sides, each a pipeline with or without an adapter, known by the bytes of its weights."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from ..build import make_policy
from ..checkpoint import latest_checkpoint, list_checkpoints, require_whole
from ..config import Config
from ..loading import load_lora, pipeline_folder, read_index
from ..named import apply_overrides
from ..policy import DiffusersPolicy
from ..runlog import CONFIG
from ..scheduler import is_flow

_PARTS = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")
"""Suffixes of what a pipeline reads from its folder: weights, configs, tokenizers."""


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        name: "base" or "trained".
        pipeline: its folder.
        lora: folder of an adapter on top, or None.
        fingerprint: SHA-256 of every byte that is loaded.
    """

    name: str
    pipeline: Path
    lora: Path | None
    fingerprint: str

    def load(self, config: Config) -> DiffusersPolicy:
        """Load the model, to be sampled from by `DiffusersPolicy.generate`."""
        model = config.model.model_copy(update={"path": str(self.pipeline), "compile": False})
        policy = make_policy(config.model_copy(update={"model": model}), trainable=False)
        if self.lora is not None:
            load_lora(policy.pipeline, policy.denoisers, self.lora)
        return policy


@dataclass(frozen=True)
class Contest:
    """Two sides and how both are sampled.

    Attributes:
        config: model, sampling and map of both; `reward` names what they are measured by.
        base: the side before training.
        trained: the side after.
        subject: what the user named, for the page.
        in_domain: rewards that were trained on; None where it is not known.
        trained_on: prompt file that was trained on; None where it is not known.
    """

    config: Config
    base: Side
    trained: Side
    subject: dict[str, Any]
    in_domain: frozenset[str] | None
    trained_on: str | None


def contest_of_run(
    run: Path, checkpoint: int | None = None, rewards: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Contest:
    """Compare the model that a run started from with one of its checkpoints.

    Args:
        run: directory of `vipo train`.
        checkpoint: iteration; None for the newest.
        rewards: names; empty for those that were trained on, which keep their paths and options in any case.
        overrides: of the run's config, such as "--sampling.num_inference_steps=28".

    Raises:
        ValueError: no run, no such checkpoint, or a wrong override.
    """
    file, found = run / CONFIG, list_checkpoints(run / "checkpoints")
    if not file.is_file():
        raise ValueError(f"{run} holds no run of vipo train (no {CONFIG}); for two models give --model instead")
    if not found:
        raise ValueError(f"{run} has no checkpoint yet; expected {run / 'checkpoints' / 'step_000001'} or later")
    for_rewards, others = _split(overrides)
    config = Config.from_yaml(file, others)
    trained_on = frozenset(config.reward.weights)
    config = _measured_by(config, rewards or sorted(trained_on), for_rewards)
    newest = latest_checkpoint(run / "checkpoints") if checkpoint is None else None
    chosen = newest or run / "checkpoints" / f"step_{checkpoint:06d}"
    if chosen not in found:
        steps = ", ".join(str(int(path.name.removeprefix("step_"))) for path in found)
        raise ValueError(f"--checkpoint: {run} has no checkpoint of iteration {checkpoint}; there are {steps}")
    weights = require_whole(chosen) / "weights"
    lora, full = (weights, None) if config.model.train == "lora" else (None, weights)
    base, trained = sides(config.model.path, lora=lora, full=full, allow_pickle=config.model.allow_pickle)
    subject = {"run": str(run), "checkpoint": int(chosen.name.removeprefix("step_")), "model": config.model.path}
    return Contest(config, base, trained, subject, trained_on, config.prompts.path)


def contest_of_models(
    model: str, lora: Path | None, full: str | None, rewards: Sequence[str], overrides: Sequence[str] = ()
) -> Contest:
    """Compare a pipeline with itself under an adapter, or with another pipeline.

    What the overrides leave open is the pipeline's own: number of steps, guidance, size.

    Args:
        model: folder, hub id, nano or nano_video.
        lora: folder of an adapter for it.
        full: instead of an adapter, the trained pipeline.
        rewards: names, at least one.
        overrides: such as "--sampling.guidance_scale=3.5".

    Raises:
        ValueError: a pipeline or adapter that is not there, both or neither of `lora` and `full`.
    """
    if (lora is None) == (full is None):
        raise ValueError("--model: expected the trained side as --lora FOLDER or as --trained PIPELINE, one of them")
    if not rewards:
        raise ValueError("--rewards: expected at least one; what was trained on is not known with --model")
    for_rewards, others = _split(overrides)
    allowed = apply_overrides({"model": {}}, others)["model"].get("allow_pickle") is True
    base, trained = sides(model, lora=lora, full=full, allow_pickle=allowed)
    mapping = apply_overrides({"model": {"path": model}, "sampling": _own_sampling(base.pipeline)}, others)
    config = _measured_by(Config.from_mapping(mapping), rewards, for_rewards)
    subject = {"model": model, **({"lora": str(lora)} if lora is not None else {"trained": full})}
    return Contest(config, base, trained, subject, None, None)


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the reward section, and the others."""
    return [o for o in overrides if o.startswith("--reward.")], [o for o in overrides if not o.startswith("--reward.")]


def _measured_by(config: Config, rewards: Sequence[str], overrides: Sequence[str]) -> Config:
    """The config with these rewards, their paths, options and device the config's unless the overrides have others."""
    given = apply_overrides({"reward": {}}, overrides)["reward"]
    section: dict[str, Any] = {"name": dict.fromkeys(rewards, 1.0)}
    section["device"] = given.pop("device", config.reward.device)
    for key, known in (("paths", config.reward.paths), ("options", config.reward.options)):
        stated = given.pop(key, {})
        kept = {name: value for name, value in known.items() if name in rewards}
        section[key] = {**kept, **stated} if isinstance(stated, dict) else stated
    if given:
        raise ValueError(f"--reward.{next(iter(given))}: vipo eval takes --reward.paths, .options and .device only")
    return Config.from_mapping({**config.model_dump(mode="json"), "reward": section, "watch": {}})


def sides(
    model: str | Path, *, lora: Path | None, full: str | Path | None, allow_pickle: bool = False
) -> tuple[Side, Side]:
    """Find both sides and take their fingerprints: a changed byte is another model, whatever its name and date."""
    folder = pipeline_folder(model, allow_pickle=allow_pickle)
    base = Side("base", folder, None, fingerprint(folder))
    if full is not None:
        other = pipeline_folder(full, allow_pickle=allow_pickle)
        return base, Side("trained", other, None, fingerprint(other))
    assert lora is not None
    if not any(lora.glob("*.safetensors")):
        raise ValueError(f"lora: no .safetensors in {lora}; expected a folder written by save_lora_weights")
    both = hashlib.sha256(f"{base.fingerprint} {fingerprint(lora)}".encode()).hexdigest()
    return base, Side("trained", folder, lora, both)


def fingerprint(folder: Path) -> str:
    """SHA-256 of the names and bytes of everything that a pipeline reads from its folder."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in _PARTS and path.is_file()):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def _own_sampling(folder: Path) -> dict[str, Any]:
    """What a pipeline's call does by default: its steps, its own guidance, and the kernel that fits its schedule."""
    index = read_index(folder, allow_pickle=True)  # that of a side, whose weights have been looked at
    pipeline = getattr(diffusers, index["_class_name"], None)
    if pipeline is None or "scheduler" not in index:
        raise ValueError(f"--model: diffusers has no pipeline {index['_class_name']} with a scheduler; cannot drive it")
    steps = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
    kind = getattr(diffusers, index["scheduler"][1])
    flow = is_flow(kind.from_pretrained(folder, subfolder="scheduler"))
    return {"num_inference_steps": steps, "guidance_scale": None, "kernel": "flow_grpo" if flow else "ddim"}
