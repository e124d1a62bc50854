"""Load and save `diffusers` pipelines: by hub id, by folder, or "nano"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import get_peft_model_state_dict
from torch import nn

from .nano import assets_path, resolve

CALL_FILE = "vipo.json"
"""Optional file in a pipeline folder: {"call": {...}}, keywords that every call of this pipeline needs."""


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, call: dict[str, Any]) -> None:
    """Write a whole pipeline, and the keywords its calls need, so that `from_pretrained(folder)` loads it."""
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: [None, None] for name, component in pipeline.components.items() if component is None}
    (folder / "model_index.json").write_text(
        json.dumps({**absent, **index}, indent=2) + "\n"
    )  # diffusers leaves them out
    if call:
        (folder / CALL_FILE).write_text(json.dumps({"call": call}) + "\n")


def save_lora(pipeline: DiffusionPipeline, denoisers: dict[str, nn.Module], folder: Path) -> None:
    """Write the adapters of a pipeline's denoisers for `pipeline.load_lora_weights(folder)`.

    A second denoiser's adapter has a file of its own: load_lora_weights(folder,
    weight_name="transformer_2_lora_weights.safetensors", load_into_transformer_2=True).
    """
    for name, denoiser in denoisers.items():
        layers = get_peft_model_state_dict(denoiser)  # one naming for all: diffusers goes by the first key
        kind = name.removesuffix("_2")
        type(pipeline).save_lora_weights(
            folder,
            **{f"{kind}_lora_layers": layers},
            **{f"{kind}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict()},  # type: ignore[index,union-attr]
            weight_name=None if kind == name else f"{name}_lora_weights.safetensors",
        )


def load_pipeline(name: str | Path, dtype: torch.dtype | None = None) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Load a pipeline ("nano", "nano_video", a folder or a hub id; safetensors only) and the keywords its calls need.

    Raises:
        ValueError: there is no such folder or hub id, or it holds no pipeline.
    """
    path = str(assets_path("t2v")) if name == "nano_video" else resolve(str(name), "t2i")
    folder = Path(path)
    local = folder.is_dir()
    if local and not (folder / "model_index.json").is_file():
        raise ValueError(f"pipeline: no model_index.json in {folder}; expected a folder written by save_pretrained")
    if not local and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise ValueError(f"pipeline: no such folder: {path}; give a folder, a hub id (owner/name), nano or nano_video")
    index = json.loads((folder / "model_index.json").read_text()) if local else {}
    absent = {name: None for name, entry in index.items() if entry == [None, None]}  # such as SD3's T5
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            path, dtype=dtype or torch.float32, use_safetensors=True, local_files_only=local, **absent
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].split(" (")[0]
        fix = (
            "is the folder complete?"
            if local
            else "check the name, your access and the network, or give a local folder"
        )
        raise ValueError(f"pipeline: cannot load {path}: {reason}; {fix}") from error
    settings = folder / CALL_FILE
    call = json.loads(settings.read_text())["call"] if local and settings.is_file() else {}
    return pipeline, call
