"""The samples of both sides on the disk: made once, rounded to 8 bits before anything looks at them, read by all.

    OUT/samples/<fingerprint of the model>/<digest of everything else>.png            pictures
                                                             .safetensors   clips, uint8 (F, 3, Y, X)

The digest is that of the prompt, its keywords with the pixels of its pictures, the seed, the sampling settings and the
versions of torch and diffusers: what could change a sample changes its name, so a stale file is never found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import Config
from ..evaluation import BATCH
from ..files import write_atomically
from ..media import read_frames, write_image
from ..prompts import noise_seed, split_batches
from ..types import Prompt
from .sides import Side


class SampleStore:
    """P prompts x S seeds, the same for every side, in the order of the prompts.

    Args:
        folder: of the files.
        prompts: P prompts.
        seeds: S, samples per prompt.
        config: model and sampling.
        seed: another one gives other noise throughout.

    Attributes:
        entries: the prompt of each of the P * S samples.
        noise: their seeds.
        batches: positions of the samples that are made, and scored, together; always the same ones, so that an
            evaluation that was killed goes on with the very numbers it would have had.
    """

    def __init__(self, folder: Path, prompts: Sequence[Prompt], seeds: int, config: Config, *, seed: int = 0) -> None:
        self.folder, self.config, self.seeds = folder, config, seeds
        self.entries = [prompt for prompt in prompts for _ in range(seeds)]
        self.noise = [noise_seed(prompt, j, seed) for prompt in prompts for j in range(seeds)]
        self.batches = split_batches(self.entries, config.sampling.given_micro_batch or BATCH)
        self._settings = sampling_settings(config)

    def path(self, side: Side, position: int) -> Path:
        """Where a sample is or will be, without the suffix that its number of frames decides."""
        entry = self.entries[position]
        told = {"prompt": entry.text, "call": _plain(entry.call), "seed": self.noise[position], **self._settings}
        digest = hashlib.sha256(json.dumps([side.fingerprint, told], sort_keys=True).encode()).hexdigest()
        return self.folder / side.fingerprint[:16] / digest[:32]

    def file(self, side: Side, position: int) -> Path | None:
        """The file of a sample, None where it has not been made."""
        path = self.path(side, position)
        return next((p for p in (path.with_suffix(".png"), path.with_suffix(".safetensors")) if p.is_file()), None)

    def make(self, side: Side, on_done: Callable[[int], None]) -> None:
        """Make the samples of a side that are not there; its model is loaded only if one is missing.

        Args:
            side: to sample from.
            on_done: told the number of samples that are there.
        """
        policy, done = None, 0
        for batch in self.batches:
            missing = [position for position in batch if self.file(side, position) is None]
            if missing:
                policy = policy or side.load(self.config)
                sampling, entry = self.config.sampling, self.entries[batch[0]]
                frames = policy.generate(
                    [self.entries[position].text for position in batch],
                    seeds=[self.noise[position] for position in batch],
                    num_inference_steps=sampling.num_inference_steps,
                    **{**sampling.pipeline_call, **entry.call},
                )
                for position, sample in zip(batch, frames, strict=True):
                    if position in missing:
                        write_sample(self.path(side, position), sample)
            done += len(batch)
            on_done(done)

    def read(self, side: Side, batch: Sequence[int]) -> Tensor:
        """Read samples (n, F, 3, Y, X) of one shape, float32 in [0, 1], multiples of 1 / 255."""
        files = [self.file(side, position) for position in batch]
        assert None not in files, "make comes before read"
        return torch.stack([read_sample(file) for file in files if file is not None])


def sampling_settings(config: Config) -> dict[str, Any]:
    """Everything that both sides share and a sample depends on."""
    model, sampling = config.model, config.sampling
    device = model.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "num_inference_steps": sampling.num_inference_steps,
        **_plain(sampling.pipeline_call),
        "shift": sampling.shift,
        **{
            name: getattr(model, name)
            for name in ("dtype", "autocast", "vae_tiling", "vae_slicing", "vae_channels_last")
        },
        "device": torch.device(device).type,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def _plain(value: Any) -> Any:
    """A keyword of the pipeline's call as JSON has it; a picture by the digest of its pixels."""
    if isinstance(value, Image.Image):
        return [value.mode, *value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def write_sample(path: Path, frames: Tensor) -> None:
    """Write a sample (F, 3, Y, X) in 8 bits and without loss: a picture as PNG, a clip as safetensors."""
    if len(frames) == 1:
        write_image(path.with_suffix(".png"), frames[0])
        return
    pixels = (frames.float().clamp(0, 1).cpu() * 255).round().to(torch.uint8).contiguous()
    write_atomically(path.with_suffix(".safetensors"), lambda partial: save_file({"frames": pixels}, partial))


def read_sample(file: Path) -> Tensor:
    """Read what `write_sample` wrote: (F, 3, Y, X), float32 in [0, 1]."""
    if file.suffix == ".png":
        return read_frames(file)
    try:
        return load_file(file)["frames"].float() / 255
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{file}: not readable: {error}; delete it and start again") from error
