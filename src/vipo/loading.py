"""Load and save `diffusers` pipelines: by hub id, by folder, or "nano"."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .files import require_safetensors
from .nano import resolve

CALL_FILE = "vipo.json"
"""Optional file in a pipeline folder: {"call": {...}}, keywords that every call of this pipeline needs."""

_NOT_LOADED = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError),
    *(SafetensorError, UnpicklingError, EOFError),
)

_ADAPTER_KEYS = (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.")
"""What marks an adapter's tensor in a file of PEFT or diffusers; other trainers' files are converted by diffusers."""


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


def save_lora(
    pipeline: DiffusionPipeline,
    denoisers: dict[str, nn.Module],
    folder: Path,
    states: Mapping[str, dict[str, Tensor]] | None = None,
) -> None:
    """Write the adapters of a pipeline's denoisers for `pipeline.load_lora_weights(folder)`.

    A second denoiser's adapter has a file of its own: load_lora_weights(folder,
    weight_name="transformer_2_lora_weights.safetensors", load_into_transformer_2=True).
    """
    for name, denoiser in denoisers.items():
        # one naming for all: diffusers goes by the first key
        layers = get_peft_model_state_dict(denoiser, (states or {}).get(name))
        kind = name.removesuffix("_2")
        type(pipeline).save_lora_weights(
            folder,
            **{f"{kind}_lora_layers": layers},
            **{f"{kind}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict()},  # type: ignore[index,union-attr]
            weight_name=None if kind == name else f"{name}_lora_weights.safetensors",
        )


def load_lora(pipeline: DiffusionPipeline, denoisers: dict[str, nn.Module], folder: Path) -> None:
    """Attach the adapters that `save_lora`, or any trainer for `diffusers`, wrote to a folder.

    Raises:
        ValueError: no safetensors there, adapters of another model, or layers that diffusers would leave out.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"lora: no .safetensors in {folder}; expected a folder written by save_lora_weights")
    before, expected = _adapter_tensors(pipeline), 0
    for file in files:
        second = [name for name in denoisers if name.endswith("_2") and file.name.startswith(name)]
        more = {f"load_into_{second[0]}": True} if second else {}
        try:
            with safe_open(file, "pt") as stored:
                expected += sum(any(part in key for part in _ADAPTER_KEYS) for key in stored.keys())  # noqa: SIM118
            pipeline.load_lora_weights(folder, weight_name=file.name, **more)
        except (ValueError, RuntimeError, OSError, AttributeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"lora: {file} does not fit {type(pipeline).__name__}: {reason}; is it of another model?"
            ) from error
    loaded = len(_adapter_tensors(pipeline)) - len(before)
    if loaded == 0 or loaded < expected:  # diffusers only warns of what it leaves out
        raise ValueError(
            f"lora: {loaded} of {expected} tensors of {folder} fit {type(pipeline).__name__}; is it of another model, "
            "or does it mix two namings (lora_A and lora.down)?"
        )
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)


def _adapter_tensors(pipeline: DiffusionPipeline) -> list[str]:
    """Names of the adapters' weights in all networks of a pipeline."""
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return [
        name for part in networks for name, _ in part.named_parameters() if ".lora_A." in name or ".lora_B." in name
    ]


def pipeline_folder(name: str | Path, *, allow_pickle: bool = False) -> Path:
    """Folder of a pipeline named as for `load_pipeline`; a hub id is downloaded to the hub's cache first.

    Raises:
        ValueError: there is no such folder or hub id, or it holds no pipeline.
    """
    path, local = _locate(name)
    if local:
        read_index(Path(path), allow_pickle=allow_pickle)
        return Path(path)
    try:
        return Path(DiffusionPipeline.download(path, use_safetensors=None if allow_pickle else True))
    except (OSError, ValueError) as error:
        raise _not_loadable(path, local, error) from error


def _locate(name: str | Path) -> tuple[str, bool]:
    """Folder or hub id of a pipeline, and whether it is a folder."""
    path = resolve(str(name), "t2i")
    folder = Path(path)
    local = folder.is_dir()
    if local and not (folder / "model_index.json").is_file():
        raise ValueError(f"pipeline: no model_index.json in {folder}; expected a folder written by save_pretrained")
    if not local and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise ValueError(f"pipeline: no such folder: {path}; give a folder, a hub id (owner/name), nano or nano_video")
    return path, local


def read_index(folder: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Read the model_index.json of a pipeline's folder.

    Raises:
        ValueError: it is none, or a component brings code of its own or, unless `allow_pickle`, has no weights in
            safetensors, or has them in several .bin files, which diffusers' pipelines do not find.
    """
    index = _read_mapping(folder / "model_index.json")
    for name, entry in index.items():
        library = entry[0] if isinstance(entry, list) and len(entry) == 2 else None
        foreign = isinstance(library, str) and (folder / name / f"{library}.py").is_file()
        if foreign or (name == "_class_name" and not isinstance(entry, str)):
            raise ValueError(
                f"pipeline: {folder} brings code of its own ({name}: {entry}), which is never run; give a pipeline of "
                "diffusers, or build the object yourself and hand it to vipo.DiffusersPolicy"
            )
        if library is not None:
            _require_readable(folder / name, entry[1], allow_pickle=allow_pickle)
    if "_class_name" not in index:
        raise ValueError(f"pipeline: {folder / 'model_index.json'} names no _class_name; is the folder complete?")
    return index


def _require_readable(folder: Path, kind: Any, *, allow_pickle: bool) -> None:
    """Raise ValueError for a component of which diffusers would not find, or may not read, the weights."""
    if not allow_pickle:
        require_safetensors("pipeline", folder)
    elif (folder / "diffusion_pytorch_model.bin.index.json").is_file() and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"pipeline: {folder} has its weights in several .bin files, which diffusers does not find in a pipeline; "
            f"convert them once: diffusers.{kind}.from_pretrained(FOLDER, use_safetensors=False).save_pretrained"
            "(FOLDER), which reads tensors only"
        )


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"pipeline: {file} is not JSON: {error}; is the folder complete?") from None
    if not isinstance(found, dict):
        raise ValueError(f"pipeline: {file}: expected a mapping, got {type(found).__name__}; is the folder complete?")
    return found


def _not_loadable(path: str, local: bool, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(" (")[0]
    fix = "is the folder complete?" if local else "check the name, your access and the network, or give a local folder"
    return ValueError(f"pipeline: cannot load {path}: {reason}; {fix}")


@contextlib.contextmanager
def _listening(*, allow_pickle: bool) -> Iterator[None]:
    """Refuse a denoiser or VAE of which diffusers only says that weights are missing and were drawn at random.

    With `allow_pickle` keep it from logging as an error that there is no safetensors, before it reads the .bin as told.
    """
    logger = logging.getLogger("diffusers.models.modeling_utils")
    expected = ("An error occurred while trying to fetch", "Defaulting to unsafe serialization")
    level, shown, random = logger.level, logger.isEnabledFor(logging.WARNING), list[str]()

    def heard(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if "are newly initialized" in said:
            random.append(said)
        return (shown or record.levelno > logging.WARNING) and not (allow_pickle and said.startswith(expected))

    logger.filters.insert(0, heard)  # before that of diffusers, which lets nothing through on ranks but the first
    logger.setLevel(min(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        logger.removeFilter(heard)
        logger.setLevel(level)
    if random:
        kind = random[0].removeprefix("Some weights of ").split()[0]
        missing = random[0].partition("[")[2].partition("]")[0].split(", ")
        raise ValueError(f"weights of {kind} are missing and would be random, such as {missing[0]}")


def load_pipeline(
    name: str | Path, dtype: torch.dtype | None = None, *, allow_pickle: bool = False
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Load a pipeline ("nano", "nano_video", a folder or a hub id) and the keywords its calls need.

    Weights are read from safetensors; with `allow_pickle` from .bin where there is nothing else. diffusers and
    transformers read that with weights_only: anything in it but tensors is an error, and is not run.

    Raises:
        ValueError: there is no such folder or hub id, or it holds no pipeline.
    """
    path, local = _locate(name)
    folder = Path(path)
    index = read_index(folder, allow_pickle=allow_pickle) if local else {}
    absent = {name: None for name, entry in index.items() if entry == [None, None]}  # such as SD3's T5
    safe = None if allow_pickle else True
    try:
        with _listening(allow_pickle=allow_pickle):
            pipeline = DiffusionPipeline.from_pretrained(
                path, dtype=dtype or torch.float32, use_safetensors=safe, local_files_only=local, **absent
            )
    except _NOT_LOADED as error:
        raise _not_loadable(path, local, error) from error
    settings = folder / CALL_FILE
    call = _read_mapping(settings).get("call") if local and settings.is_file() else {}
    if not isinstance(call, dict):
        raise ValueError(f'pipeline: {settings}: expected {{"call": {{keyword: value}}}}, got {call!r}')
    return pipeline, call
