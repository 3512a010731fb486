"""Every family record holds on its tiny pipeline, and the oracle notices when one does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from attnctl.engine.families import registry as families
from attnctl.engine.verify import verify
from attnctl.errors import FamilyError

EXTRA = {"sd3": {"max_sequence_length": 16}, "sd35": {"max_sequence_length": 16}, "flux": {"max_sequence_length": 16}}


@pytest.mark.parametrize("size", [(32, 48), (64, 32)])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_record_holds(family, size):
    pipe = tiny.FAMILIES[family]()
    found = verify(pipe, height=size[0], width=size[1], **EXTRA.get(family, {}))
    assert found.rows == ((0,) if family == "flux" else (1,))
    cells = size[0] * size[1] // 16
    text = {"sd1": (0, 77), "sdxl": (0, 77), "flux": (0, 16)}.get(family, (cells, cells + 93))
    assert found.text == text


def test_record_of_sequential_guidance_holds():
    guided = {"true_cfg_scale": 2.0, "negative_prompt": "blue"}
    found = verify(tiny.flux(), height=32, width=48, **EXTRA["flux"], **guided)
    assert found.rows == (0,)


WRONG = {
    "text order": ("sd3", "text moves keys", {"site": lambda *_: ("joint", 2, "text-first")}),
    "no text": ("sd1", "text moves keys", {"site": lambda *_: ("cross", 1, None)}),
}


def test_rows_are_told_by_what_was_encoded_whatever_the_record_says(monkeypatch):
    wrong = tuple(replace(record, branches="sequential") for record in families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", wrong)
    assert verify(tiny.FAMILIES["sd1"](), height=32, width=48).rows == (1,)


@pytest.mark.parametrize("name", ["text order"])
def test_wrong_record_is_found_out(name, monkeypatch):
    family, message, changes = WRONG[name]
    wrong = tuple(
        replace(record, **changes) if record.model in type(tiny.denoiser(tiny.FAMILIES[family]())).__name__ else record
        for record in families.FAMILIES
    )
    monkeypatch.setattr(families, "FAMILIES", wrong)
    with pytest.raises(FamilyError, match=message):
        verify(tiny.FAMILIES[family](), height=32, width=48, **EXTRA.get(family, {}))


def test_transposed_grid_is_found_out(monkeypatch):
    transposed = tuple(replace(record, latent_size=lambda *args, old=record.latent_size: old(*args)[::-1])
                       for record in families.FAMILIES)  # fmt: skip
    monkeypatch.setattr(families, "FAMILIES", transposed)
    with pytest.raises(FamilyError, match="latents at cell"):
        verify(tiny.sd1(), height=32, width=64)


def test_nothing_is_left(monkeypatch):
    pipe = tiny.sd1()
    before = tiny.draw(pipe)
    verify(pipe, height=32, width=32)
    assert not pipe.unet._forward_pre_hooks and torch.equal(tiny.draw(pipe), before)
