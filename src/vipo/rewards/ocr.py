"""Text rendering: is the text that the prompt puts in quotes written in the picture?"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..types import check_shape

_QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')
Reader = Callable[[NDArray[np.uint8]], str]
"""A picture (Y, X, 3) RGB -> the text in it."""


class OcrAccuracy:
    """Accuracy of rendered text, in [0, 1] (Flow-GRPO, arXiv 2505.05470, section on visual text rendering).

        s = 1 - min(edit distance(read, wanted), |wanted|) / |wanted|;   1 if `wanted` occurs in what was read

    Blanks and case do not count. A clip's score is the mean of its frames' scores.

    Args:
        read: an OCR.
    """

    def __init__(self, read: Reader) -> None:
        self.read = read

    @torch.no_grad()
    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts with a quoted text each: (N,) float32."""
        sizes = check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
        wanted = [_plain(quoted_text(prompt)) for prompt in prompts]
        pictures = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().numpy()
        scores = [
            accuracy(_plain(self.read(p)), text) for clip, text in zip(pictures, wanted, strict=True) for p in clip
        ]
        return torch.tensor(scores, dtype=torch.float32).view(sizes["N"], sizes["F"]).mean(1)


def quoted_text(prompt: str) -> str:
    """Return the first text in double quotes (straight or curly).

    Raises:
        ValueError: there is none.
    """
    match = _QUOTED.search(prompt)
    if match is None or not _plain(match[1] or match[2]):
        raise ValueError(f'ocr: the prompt {prompt!r} has no text in double quotes, such as: a sign that says "hello"')
    return match[1] or match[2]


def accuracy(read: str, wanted: str) -> float:
    """1 - min(edit distance, |wanted|) / |wanted|, and 1 where `wanted` occurs in `read`."""
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: least number of insertions, deletions and substitutions."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def load_ocr(path: str | None, device: torch.device | str) -> OcrAccuracy:
    """Load OCR accuracy with rapidocr (PP-OCR in ONNX; its models come in its wheel), which runs on the CPU.

    Raises:
        ValueError: rapidocr is not installed, or a path was given.
    """
    if path is not None:
        raise ValueError(f"ocr: takes no path, got {path!r}; its models come with rapidocr")
    try:
        rapidocr: Any = importlib.import_module("rapidocr")
        importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ValueError(f'ocr: {error}; pip install "vipo[ocr]"') from error
    engine = rapidocr.RapidOCR(params={"Global.log_level": "critical"})

    def read(picture: NDArray[np.uint8]) -> str:
        found = engine(np.ascontiguousarray(picture[:, :, ::-1]))  # it wants OpenCV's BGR
        return "".join(found.txts or ())

    return OcrAccuracy(read)
