"""Maps of their own for some rewards of a run: A_i[p] = sum_r w_r A_i^r M_i^r[p] (config key reward.maps)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import MapConfig
from .maps import MapSource, mean_statistics, shared_sources

LOGGED = ("entropy", "mean", "flicker")
"""Statistics of a reward's own map that are logged; the main map has all of them."""


class RewardMaps:
    """The main map and the maps of the rewards, made together: one load and one forward per backbone, one map each.

    Args:
        own: the map section, of the rewards without a section of their own.
        main: its source.
        sections: by reward, those that have their own.
        names: of all rewards, in their order.
        device: where further backbones go.
    """

    def __init__(
        self,
        own: MapConfig,
        main: MapSource,
        sections: Mapping[str, MapConfig],
        names: Sequence[str],
        device: torch.device | str,
    ) -> None:
        self.sections = sections
        self.sources = shared_sources(own, main, sections.values(), device)
        self.order = [own, *(sections.get(name, own) for name in names)]
        self.names = names

    @property
    def backbone(self) -> nn.ModuleList:
        """All backbones that are modules, to be moved as one."""
        found = {id(source.backbone): source.backbone for source in self.sources.values()}
        return nn.ModuleList([backbone for backbone in found.values() if isinstance(backbone, nn.Module)])

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError now for a prompt that a source will not know."""
        for source in self.sources.values():
            source.check(prompts)

    def __call__(
        self,
        frames: Tensor,
        prompts: Sequence[str],
        latent_shape: tuple[int, int, int],
        temporal_compression: int = 1,
        *,
        first_frame_alone: bool = True,
        credit: Tensor | None = None,
        generator: torch.Generator | None = None,
        of: int | None = None,
        first: int = 0,
    ) -> Tensor:
        """Make maps as `MapSource` does: (1 + R, N, T, H, W), the main map and that of each reward."""
        features: dict[int, Tensor] = {}
        made = {}
        for section, source in self.sources.items():
            backbone = id(source.backbone)
            if source.psm is not None and backbone not in features:
                features[backbone] = source.psm.features(frames)
            made[section] = source(
                frames,
                prompts,
                latent_shape,
                temporal_compression,
                first_frame_alone=first_frame_alone,
                credit=credit,
                generator=generator,
                of=of,
                first=first,
                features=features.get(backbone),
            )
        return torch.stack([made[section] for section in self.order])

    def statistics(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Statistics of the rewards' own maps, of maps (1 + R, n, T, H, W) per bucket, for the log."""
        found = {
            name: mean_statistics([part[row] for part in maps])
            for row, name in enumerate(self.names, 1)
            if name in self.sections
        }
        return {f"map_{key}/{name}": own[key] for name, own in found.items() for key in LOGGED}
