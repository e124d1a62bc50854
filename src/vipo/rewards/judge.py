"""A vision-language model as the judge, behind any server with OpenAI's /v1/chat/completions (vLLM, SGLang, ...).

yes_no   P(yes) / (P(yes) + P(no)) of the answer's first token   (VQAScore, arXiv 2404.01291, normalised over both)
score    (x - low) / (high - low), x the number in the answer
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from ..types import check_choice, check_shape
from .endpoint import Endpoint, where_finite
from .wire import encode_png

TEMPLATES = {
    "yes_no": 'Does this picture, or do these frames of one clip, show "{prompt}"? Answer with yes or no only.',
    "score": 'How well does this picture, or do these frames of one clip, show "{prompt}"? '
    "Answer with a number from {low} (not at all) to {high} (perfectly) only.",
}
"""What is asked where `template` is None."""
_BLANKS = " \t\r\n\u2581\u0120"  # the last two are what SentencePiece and byte-level BPE write for a leading blank


class _Token(BaseModel):
    token: str
    logprob: float


class _Position(BaseModel):
    top_logprobs: list[_Token]


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    logprobs: _Logprobs | None = None


class Completion(BaseModel):
    """What is read of a chat completion."""

    choices: Annotated[list[_Choice], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class JudgeReward(Endpoint):
    """Scores in [0, 1] from a vision-language model at temperature 0, one request per sample.

    `url` is the server's base, as http://127.0.0.1:8000/v1; /chat/completions is added where it is not there. An answer
    that says nothing (neither yes nor no, no number, a number outside the range) is NaN, and so is a sample that is not
    finite.
    """

    model: str
    """The name that the server knows the model by."""
    mode: Literal["yes_no", "score"] = "yes_no"
    """From the log-probs of yes and no, or from the number that the model writes."""
    template: str | None = None
    """The question, with {prompt}; in mode score also {low} and {high}. None for TEMPLATES[mode]."""
    low: float = 0.0
    """The number that becomes 0 (score)."""
    high: float = 10.0
    """The number that becomes 1 (score)."""
    pattern: str = r"-?\d+(?:\.\d+)?"
    """Regular expression of the number: its first match in the answer, or that match's first group (score)."""
    frames: int = 4
    """Frames of a clip that are shown, evenly spaced from the first to the last (1: the first)."""
    max_tokens: int = 32
    """Longest answer (score); yes_no reads one token."""

    def __post_init__(self) -> None:
        """Raise ValueError for a setting that cannot work."""
        super().__post_init__()
        base, mark, query = self.url.partition("?")
        base = base.rstrip("/").removesuffix("/chat/completions")
        object.__setattr__(self, "url", f"{base}/chat/completions{mark}{query}")
        check_choice("mode", self.mode, TEMPLATES)
        if not self.model:
            raise ValueError("model: expected the name that the server knows the model by")
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError(f"template: expected {{prompt}} in it, got {self.template!r}")
        if not -math.inf < self.low < self.high < math.inf or self.frames < 1 or self.max_tokens < 1:
            raise ValueError(
                "expected low < high, frames >= 1 and max_tokens >= 1, "
                f"got {self.low}, {self.high}, {self.frames}, {self.max_tokens}"
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern: {self.pattern!r} is no regular expression: {error}") from error

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N,) float32 in [0, 1], on the CPU.

        Raises:
            ConnectionError: the server could not be reached, or answered 5xx, in every attempt.
            ValueError: it refused the request, or its reply is no chat completion (yes_no: with log-probs).
        """
        check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
        pixels = frames.cpu()
        scores = self.each(lambda i: self._ask(pixels[i], prompts[i]), range(len(prompts)))
        return where_finite(pixels, torch.tensor(scores, dtype=torch.float32))

    def _ask(self, frames: Tensor, prompt: str) -> float:
        choice = self.post(self._question(frames, prompt), Completion).choices[0]
        if self.mode == "score":
            return parse_score(choice.message.content or "", self.pattern, self.low, self.high)
        positions = choice.logprobs.content if choice.logprobs else None
        if not positions:
            raise ValueError(f"{self.place}: the reply holds no log-probs; does the server give them? or mode=score")
        return yes_probability((top.token, top.logprob) for top in positions[0].top_logprobs)

    def _question(self, frames: Tensor, prompt: str) -> dict[str, Any]:
        """The request's JSON; the prompt is put in last, so that its own braces stay what they are."""
        text = self.template or TEMPLATES[self.mode]
        for name, value in (("low", f"{self.low:g}"), ("high", f"{self.high:g}"), ("prompt", prompt)):
            text = text.replace(f"{{{name}}}", value)
        shown = torch.linspace(0, len(frames) - 1, min(self.frames, len(frames))).round().long()
        pictures = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode_png(frame)}"}}
            for frame in frames[shown]
        ]
        question = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}],
            "temperature": 0,
        }
        if self.mode == "score":
            return {**question, "max_tokens": self.max_tokens}
        return {**question, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}


def yes_probability(log_probs: Iterable[tuple[str, float]]) -> float:
    """P(yes) / (P(yes) + P(no)) over (token, log-prob); case and blanks do not count; NaN where neither is there."""
    answers = {"yes": -math.inf, "no": -math.inf}
    for token, value in log_probs:
        word = token.strip(_BLANKS).casefold()
        if word in answers:
            answers[word] = _log_sum(answers[word], value)
    total = _log_sum(answers["yes"], answers["no"])
    return math.nan if total == -math.inf else math.exp(answers["yes"] - total)


def parse_score(answer: str, pattern: str, low: float, high: float) -> float:
    """(x - low) / (high - low) of the first number x that the pattern finds; NaN for none or one outside the range."""
    match = re.search(pattern, answer)
    try:
        value = float(match[1 if match.re.groups else 0]) if match else math.nan
    except (TypeError, ValueError):  # a group that took no part, or a match that is no number
        return math.nan
    return (value - low) / (high - low) if low <= value <= high else math.nan


def _log_sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b)), also where both are far below what exp can hold."""
    top = max(a, b)
    return top if top == -math.inf else top + math.log(math.exp(a - top) + math.exp(b - top))
