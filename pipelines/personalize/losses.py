"""The losses of one pass: denoising, and those on maps and on words."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnctl.maps.live import Live
from attnctl.pipelines.personalize.examples import Rows
from attnctl.pipelines.personalize.settings import Settings
from attnctl.processors.attencraft import guidance
from attnctl.processors.contrast import info_nce


@dataclass
class Losses:
    """Of one pass.

    Attributes:
        total: weighted, with gradient.
        told: name -> unweighted, without gradient.
        coverage: (concepts,), of the nouns' maps, see `Calibrated`; None where they are not calibrated.
    """

    total: Tensor
    told: dict[str, Tensor] = field(default_factory=dict)
    coverage: Tensor | None = None

    def add(self, name: str, loss: Tensor, weight: float) -> None:
        """One more."""
        self.total = self.total + weight * loss
        self.told[name] = loss.detach()


def losses_of(settings: Settings, rows: Rows, errors: Tensor, states: Tensor, live: Live | None) -> Losses:
    """All losses of a pass but `keep`, in float32.

    Args:
        settings: with their weights.
        rows: of the pass.
        errors: (rows,), the denoising losses.
        states: (rows, text rows, width), of the captions.
        live: maps of the new words and then of their nouns; None where no loss needs them.
    """
    weight = torch.ones_like(errors)
    weight[settings.rows :] = settings.regular_weight
    denoise = (weight * errors).mean()
    found = Losses(denoise, {"denoise": denoise.detach()})
    if live is None:
        return found
    count, views = live.present.shape[1] // 2, len(rows.subset)
    with torch.autocast(errors.device.type, enabled=False):
        if settings.calibration.acts:
            maps = live.maps()
            present = live.present[:, :count] & live.present[:, count:]  # regular pictures have none of the new words
            read = settings.calibration.read(maps[:, :count], maps[:, count:], present)
            found.total, found.coverage = found.total + read.total, read.coverage
            found.told["binding"] = read.binding[:views].mean().detach()
            if read.apart.shape[1]:
                found.told["apart"] = read.apart[:views].mean().detach()
        if settings.guide > 0 and rows.masks is not None:
            away = guidance(live.maps()[:views, :count], rows.masks.to(errors.device), settings.guidance)
            said = live.present[:views, :count]
            found.add("guide", rows.share * (away * said).sum() / said.sum().clamp_min(1), settings.guide)
        if settings.contrast > 0:
            spoken = of_phrases(states.float(), live)[:views]
            said = (live.present[:, :count] & live.present[:, count:])[:views].to(errors.device)
            found.add(
                "contrast",
                info_nce(spoken[:, :count], spoken[:, count:], said, settings.temperature),
                settings.contrast,
            )
    return found


def of_phrases(states: Tensor, live: Live) -> Tensor:
    """(rows, phrases, width): text states, mean over the tokens of each phrase; zeros where a row lacks it.

    Args:
        states: (rows, text rows, width).
        live: which text rows are whose.
    """
    tokens, members = live.tokens.to(states.device), live.members.to(states)
    picked = torch.take_along_dim(states, tokens[:, :, None], 1)  # (rows, tokens, width)
    return members @ picked / members.sum(-1, keepdim=True).clamp_min(1)
