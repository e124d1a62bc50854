"""Rewards: a reward is any callable (frames, prompts) -> (N,), higher is better; it may add a credit map.

Named ones are in REWARDS; `package.module:function` names anybody's own.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..named import calling, import_function
from ..types import check_shape
from .judge import JudgeReward as JudgeReward
from .preference import ClipPreference as ClipPreference
from .remote import RemoteReward as RemoteReward
from .rules import redness as redness


class Reward(Protocol):
    """A scorer of samples against their prompts."""

    def __call__(self, frames: Tensor, prompts: Sequence[str], /) -> Tensor | tuple[Tensor, Tensor]:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N,), higher is better.

        A reward that knows where it looked returns (scores (N,), credit (N, F, h, w) >= 0), for map.source=reward.
        """
        ...


class Scores(NamedTuple):
    """What a reward gave: `rewards` (N,) float32, maybe not finite, and `credit` (N, F, h, w) float32 or None."""

    rewards: Tensor
    credit: Tensor | None

    def credit_of(self, kept: Tensor) -> Tensor | None:
        """Return the credit with ones for the samples that are not kept (N,): a dropped sample has no say."""
        return None if self.credit is None else torch.where(kept.view(-1, 1, 1, 1), self.credit, 1)


class Named(NamedTuple):
    """A named reward: the function of a module of this package that loads it.

    Attributes:
        module: of vipo.rewards, imported when it is asked for.
        function: what gives the reward, see `kind`.
        path: what is loaded where no path is given: a hub id, a name, or None.
        options: keyword arguments of the function, before the caller's.
        kind: "loaded": (path, device, **options) -> reward; "server": (path, **options) -> reward, the path being an
            address; "ready": the function is the reward.
    """

    module: str
    function: str
    path: str | None = None
    options: Mapping[str, Any] = {}
    kind: Literal["loaded", "server", "ready"] = "loaded"

    def __call__(
        self,
        device: torch.device | str,
        path: str | None = None,
        options: Mapping[str, Any] | None = None,
        shared: dict[Any, Any] | None = None,
    ) -> Reward:
        """Load the reward; see `load_reward`.

        Raises:
            ValueError: nothing loadable there, or an option that it does not have.
        """
        function: Callable[..., Any] = getattr(import_module(f".{self.module}", __name__), self.function)
        taken = ("path", "device", "url", "shared")
        parameters = signature(function).parameters
        known = [] if self.kind == "ready" else [name for name in parameters if name not in taken]
        for option in options or {}:
            if option in self.options or option not in known:
                free = [name for name in known if name not in self.options]
                near = get_close_matches(option, free, 1, 0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(free) or 'none'}"
                raise ValueError(f"reward: {self.function} has no option {option!r}; {hint}")
        if self.kind == "ready":
            if path is not None:
                raise ValueError(f"reward: {self.function} takes no path, got {path!r}")
            reward: Reward = function
            return reward
        where = path if path is not None else self.path
        if self.kind == "server":
            if where is None:
                raise ValueError(
                    f"reward: {self.function} needs an address: set reward.paths, as http://host:8000/score"
                )
            asked: Reward = function(where, **self.options, **(options or {}))
            return asked
        together = {"shared": shared} if "shared" in parameters else {}
        loaded: Reward = function(where, device, **together, **self.options, **(options or {}))
        return loaded


_CLIP_L = "openai/clip-vit-large-patch14"
_VIDEO_REWARD = "KwaiVGI/VideoReward"
REWARDS: dict[str, Named] = {
    "nano": Named("preference", "load_clip", "nano"),
    "nano_vq": Named("preference", "load_clip", "nano_vq"),
    "nano_mq": Named("preference", "load_clip", "nano_mq"),
    "pickscore": Named("preference", "load_clip", "yuvalkirstain/PickScore_v1"),
    "hpsv2.1": Named("preference", "load_clip", "RE-N-Y/hpsv21", {"scale": "cosine", "fit": "pad"}),
    "clipscore": Named("preference", "load_clip", _CLIP_L, {"scale": "clipscore"}),
    "aesthetic": Named("preference", "load_aesthetic", "RE-N-Y/laion-aesthetic"),
    "clip_iqa": Named("preference", "load_quality", _CLIP_L),
    "imagereward": Named("blip", "load_image_reward", "RE-N-Y/ImageReward"),
    "hpsv3": Named("vision_language", "load_hpsv3", "MizzenAI/HPSv3"),
    "videoalign": Named("vision_language", "load_videoalign", _VIDEO_REWARD),
    "videoalign_vq": Named("vision_language", "load_videoalign", _VIDEO_REWARD, {"dimensions": ("VQ",)}),
    "videoalign_mq": Named("vision_language", "load_videoalign", _VIDEO_REWARD, {"dimensions": ("MQ",)}),
    "videoalign_ta": Named("vision_language", "load_videoalign", _VIDEO_REWARD, {"dimensions": ("TA",)}),
    "geneval": Named("detection", "load_geneval"),
    "ocr": Named("ocr", "load_ocr"),
    "remote": Named("remote", "RemoteReward", kind="server"),
    "judge": Named("judge", "JudgeReward", kind="server"),
    "imscore": Named("wrappers", "load_imscore"),
    "dynamic_degree": Named("motion", "dynamic_degree", kind="ready"),
    "motion_smoothness": Named("motion", "motion_smoothness", kind="ready"),
    "redness": Named("rules", "redness", kind="ready"),
    "brightness": Named("rules", "brightness", kind="ready"),
    "compressibility": Named("rules", "compressibility", kind="ready"),
    "incompressibility": Named("rules", "incompressibility", kind="ready"),
    "nano_shape_iou": Named("rules", "nano_metric", None, {"metric": "shape_iou"}),
    "nano_shape": Named("rules", "nano_metric", None, {"metric": "shape_accuracy"}),
    "nano_colour": Named("rules", "nano_metric", None, {"metric": "colour_error"}),
}
"""Named rewards: (device, path, options) -> reward. docs/rewards.md says what each measures and how it was checked."""


def load_reward(
    name: str,
    device: torch.device | str = "cpu",
    *,
    path: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    shared: dict[Any, Any] | None = None,
) -> Reward:
    """Find a reward by its name or as "package.module:function".

    Args:
        name: one of REWARDS, or a user's function.
        device: of the weights.
        path: of a named reward, instead of the published weights: a folder, a .safetensors file or a hub id;
            of "geneval" the metadata file. Apart from the name, whose colon means a function.
        options: keyword arguments of a named reward's loading function, such as dtype.
        shared: the models of the rewards loaded before, which later ones use instead of loading theirs again.

    Raises:
        ValueError: no such reward, module, function or option, or nothing loadable there.
    """
    if name in REWARDS:
        return REWARDS[name](torch.device(device), None if path is None else str(path), options, shared)
    if ":" not in name:
        near = get_close_matches(name, REWARDS, 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"reward.name: unknown reward {name!r}; {hint}expected {', '.join(REWARDS)} or package.module:function"
        )
    if path is not None or options:
        raise ValueError(f"reward: {name!r} is a function and takes no path and no options")
    reward: Reward = import_function("reward.name", name, "(frames, prompts) -> (N,)")
    return reward


def load_rewards(
    names: Sequence[str],
    device: torch.device | str,
    paths: Mapping[str, str],
    options: Mapping[str, Mapping[str, Any]],
    shared: dict[Any, Any] | None = None,
) -> dict[str, Reward]:
    """Load the rewards of a run by name; those of one model (videoalign_vq, videoalign_mq) share it.

    With `shared`, as `load_reward` has it, they share it also with those of an earlier call.
    """
    shared = {} if shared is None else shared
    return {
        name: load_reward(name, device, path=paths.get(name), options=options.get(name), shared=shared)
        for name in names
    }


def sharing(rewards: Mapping[str, Reward]) -> list[list[str]]:
    """Group the names of rewards that share weights: asked about one batch in turn, they run their model once."""
    groups: dict[Any, list[str]] = {}
    for name, reward in rewards.items():
        weight = next(reward.parameters(), None) if isinstance(reward, nn.Module) else None
        groups.setdefault(name if weight is None else id(weight), []).append(name)
    return list(groups.values())


@torch.no_grad()
def score(
    reward: Reward, frames: Tensor, prompts: Sequence[str], name: str = "", device: torch.device | str | None = None
) -> Scores:
    """Apply a reward and check what comes back, on the frames' device; the rewards may not be finite.

    Args:
        reward: the scorer.
        frames: (N, F, 3, Y, X), in [0, 1].
        prompts: N.
        name: "package.module:function" of a user's reward, for the error when it raises.
        device: where the reward wants its frames; None for where they are.

    Raises:
        ValueError: the reward returned anything but N numbers, or these and a credit map (N, F, h, w), or a user's
            reward raised.
    """
    sizes = check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
    with calling(f"reward {name!r}") if ":" in name else contextlib.nullcontext():
        found = reward(frames if device is None else frames.to(device), prompts)
    values, credit = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    expected = f"reward: expected one number per sample, shape ({len(prompts)},), got"
    try:
        rewards = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{expected} {type(values).__name__} {reprlib.repr(values)}") from None
    if tuple(rewards.shape) != (len(prompts),) or rewards.is_complex():
        raise ValueError(f"{expected} {tuple(rewards.shape)} of {rewards.dtype}")
    if credit is not None:
        credit = torch.as_tensor(credit)
        check_shape("reward's credit map", credit, "N F h w", {"N": sizes["N"], "F": sizes["F"]})
        credit = credit.to(frames.device, torch.float32)
    return Scores(rewards.to(frames.device, torch.float32), credit)
