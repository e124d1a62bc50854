"""The parts of a user's model from its config.json files: no weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from ..config import Config
from ..loading import CALL_FILE
from ..nano import resolve
from ..pipelines import DENOISERS
from .published import BACKBONES, FAMILIES, MODELS, Latents, Model, Part


def find_model(config: Config) -> Model:
    """Find what `config.model.path` and `config.map.backbone` name: a published model, or a folder.

    Raises:
        ValueError: neither is known here, a folder is not complete, or its denoiser is of an unknown class.
    """
    path = resolve(config.model.path, "t2i")
    if path in MODELS:
        known = MODELS[path]
        _require_size(config)
        return Model(**{**vars(known), "backbones": _backbones(config)})
    folder = Path(path)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"--memory: {path} is no folder with a model_index.json and not among the models whose sizes are known "
            f"({', '.join(MODELS)}); give a folder: its config.json files are enough"
        )
    index = json.loads((folder / "model_index.json").read_text())
    parts = {
        name: part
        for name, entry in index.items()
        if isinstance(entry, list) and (part := _part(folder / name, *entry)) is not None
    }
    denoisers = [name for name in DENOISERS if name in parts]
    if len(denoisers) != 1 or "vae" not in parts or parts[denoisers[0]][0] not in FAMILIES:
        raise ValueError(
            f"--memory: {folder} has {', '.join(parts[name][0].__name__ for name in denoisers) or 'no denoiser'}; it "
            f"knows pipelines with a vae and one denoiser of {', '.join(kind.__name__ for kind in FAMILIES)}"
        )
    file = folder / CALL_FILE
    call = {**(json.loads(file.read_text())["call"] if file.is_file() else {}), **config.sampling.pipeline_call}
    denoiser = parts.pop(denoisers[0])
    family, encoders = FAMILIES[denoiser[0]], {n: parts.pop(n) for n in list(parts) if n.startswith("text_encoder")}
    clip = next((part[1]["max_position_embeddings"] for part in encoders.values()), 0) if family.clip_tokens else 0
    return Model(
        denoiser,
        parts.pop("vae"),
        encoders,
        _encoded(call, denoiser[1].get("sample_size")),
        clip + (call.get("max_sequence_length", family.sequence) if family.sequence else 0),
        more=parts,
        backbones=_backbones(config),
    )


def _part(folder: Path, library: str | None, name: str | None) -> Part | None:
    """Class and config of a component; None for what holds no weights."""
    file = folder / "config.json"
    if library is None or name is None or not file.is_file():
        return None
    owner = {"diffusers": diffusers, "transformers": transformers}.get(library)
    made = getattr(owner or getattr(diffusers.pipelines, library, None), name, None)
    if made is None:
        raise ValueError(f"--memory: {folder}: there is no {library}.{name}")
    if not issubclass(made, nn.Module):
        return None
    return made, {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("_")}


def _backbones(config: Config) -> dict[str, Part]:
    """The map's backbone by its name, where the map has one."""
    name = config.map.backbone
    if config.map.source != "psm":
        return {}
    if name in BACKBONES:
        return {name: BACKBONES[name]}
    file = Path(resolve(name, "backbone")) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"--memory: map.backbone: no config.json in {file.parent}; known without a folder: {', '.join(BACKBONES)}"
        )
    found = json.loads(file.read_text())
    made: Any = transformers.MODEL_MAPPING[type(transformers.AutoConfig.for_model(**found))]
    return {name: (made, found)}


def _require_size(config: Config) -> None:
    if config.sampling.height is None or config.sampling.width is None:
        raise ValueError("--memory: set sampling.height and sampling.width")


def _encoded(call: dict[str, Any], sample_size: int | None) -> Any:
    """Make (config, VAE) -> `Latents`: what the VAE makes of frames of the call's size, on the meta device."""

    def latents(config: Config, vae: Any) -> Latents:
        unit = 2 ** (len(vae.config.block_out_channels) - 1) if "block_out_channels" in vae.config else None
        default = sample_size * unit if sample_size and unit else None
        height, width = call.get("height", default), call.get("width", default)
        if height is None or width is None:
            raise ValueError("--memory: set sampling.height and sampling.width")
        image = isinstance(vae, diffusers.AutoencoderKL)
        frames = 1 if image else call.get("num_frames", 1)
        with torch.no_grad(), torch.device("meta"):
            pixels = torch.empty(1, 3, frames, height, width, dtype=vae.dtype)
            shape = vae.encode(pixels[:, :, 0] if image else pixels).latent_dist.mean.shape[1:]
        c, *grid = shape
        t, h, w = (1, *grid) if image else grid
        return Latents(c, (t, h, w), frames * height * width)

    return latents
