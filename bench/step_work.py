"""What bench/step.py measures on: trainers of the tiny SD3 and Wan of tests/tiny_pipelines.py and wider ones."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.utils import logging
from peft import LoraConfig
from torch import Tensor

from vipo import Config, DiffusersPolicy, Trainer
from vipo.trainable import LORA_TARGETS

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
logging.set_verbosity_error()  # the prompt is cut at 8 tokens, on purpose


@dataclass(frozen=True)
class Work:
    """One training step of one group.

    Attributes:
        family: of tests/tiny_pipelines.py.
        width: of an SD3 transformer: 32 is the tiny one's.
        layers: of an SD3 transformer.
        group: samples.
        steps: denoising steps; all but the last are trained.
        pixels: height and width.
        frames: of a clip.
        device: cpu or cuda.
        dtype: of the frozen weights.
    """

    family: str = "sd3"
    width: int = 32
    layers: int = 2
    group: int = 8
    steps: int = 6
    pixels: int = 64
    frames: int = 1
    device: str = "cpu"
    dtype: str = "float32"


TINY, WIDE = Work(), Work(width=320)
CUDA = Work(width=1536, layers=24, steps=16, pixels=512, device="cuda", dtype="bfloat16")
"""SD3 Medium's 2 B transformer with random weights and the tiny encoders; never run here."""


def brightness(frames: Tensor, prompts: Any) -> Tensor:
    """A reward that costs nothing."""
    return frames.mean((1, 2, 3, 4))


def make_policy(work: Work) -> DiffusersPolicy:
    """Build the pipeline, the same weights for the same work, with a LoRA of rank 8."""
    from tiny_pipelines import MODELS, build

    pipeline = build(work.family)
    if work.family == "sd3":
        torch.manual_seed(0)
        config = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
        head = min(work.width // 4, 64)
        config |= {"num_layers": work.layers, "caption_projection_dim": work.width}
        config |= {"attention_head_dim": head, "num_attention_heads": work.width // head}
        with torch.device(work.device):
            transformer = SD3Transformer2DModel(**config)
        pipeline.register_modules(transformer=transformer)
    if work.dtype != "float32":
        pipeline.to(getattr(torch, work.dtype))
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    return DiffusersPolicy(pipeline, kernel=MODELS[work.family].kernel, eta=0.5, train=lora, device=work.device)


def make_trainer(work: Work) -> Trainer:
    """Build the trainer: one prompt per iteration, all steps but the last trained, maps of the embedded backbone."""
    call: dict[str, Any] = {"max_sequence_length": 8}  # few text tokens: the denoiser's share is not padded
    if work.family == "wan":
        call["num_frames"] = work.frames
    folder = tempfile.TemporaryDirectory(prefix="vipo-bench-")
    prompts = Path(folder.name) / "prompts.txt"
    prompts.write_text("a red cat on a green mat\n", encoding="utf-8")
    config = Config.from_mapping(
        {
            "sampling": {"num_inference_steps": work.steps, "height": work.pixels, "width": work.pixels, "call": call},
            "prompts": {"path": str(prompts), "per_iteration": 1, "group_size": work.group},
            "optimizer": {"step_fraction": 1.0},
        }
    )
    with folder:
        return Trainer(config, policy=make_policy(work), reward=brightness)


class Stopwatch:
    """CPU seconds of this process; on a GPU, seconds until the device is done."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self) -> float:
        """Read it."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def least(self, work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        """Least seconds of each of several pieces of work, taken in turns, after one warm-up each."""
        best = dict.fromkeys(work, float("inf"))
        for run in work.values():
            run()
        for _ in range(repeats):
            for name, run in work.items():
                started = self()
                run()
                best[name] = min(best[name], self() - started)
        return best


Calls = list[tuple[tuple[Any, ...], dict[str, Any], bool]]


def denoiser_calls(trainer: Trainer) -> Calls:
    """The arguments of the denoiser's calls in one step, and whether a backward follows."""
    calls: Calls = []
    hook = trainer.policy.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs, torch.is_grad_enabled())), with_kwargs=True
    )
    trainer.step(0)
    hook.remove()
    return calls


def run_denoiser(trainer: Trainer, calls: Calls) -> None:
    """Repeat a step's denoiser calls with nothing around them: forward, and backward where there was one."""
    for args, kwargs, trained in calls:
        with torch.set_grad_enabled(trained):
            output = trainer.policy.denoiser(*args, **kwargs)[0]
        if trained:
            output.sum().backward()
    for parameter in trainer.parameters:
        parameter.grad = None


def joined(calls: Calls) -> Calls:
    """The trained calls of a step as one on all their samples."""
    trained = [kwargs for _, kwargs, with_gradient in calls if with_gradient]
    both = {
        name: torch.cat([kwargs[name] for kwargs in trained]) if isinstance(value, Tensor) else value
        for name, value in trained[0].items()
    }
    return [((), both, True)]
