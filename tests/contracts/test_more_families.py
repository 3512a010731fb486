"""Families by record alone: PixArt-Sigma and Chroma. Identity, restoration, maps, rows, segregation, true records."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from contract_table import differs, trace
from toys import Identity, Spy

from attnctl import register
from attnctl.engine.attachment import attach
from attnctl.engine.families.pixart import PIXART
from attnctl.engine.families.record import Family
from attnctl.engine.families.registry import FAMILIES
from attnctl.engine.verify import verify
from attnctl.errors import ControlError, UnsupportedPipelineError
from attnctl.processors import Perturb, Regions, Segregation, Slg, TokenMaps

MAKE = {"pixart": tiny.pixart, "chroma": tiny.chroma}
VERIFY = {"pixart": {"use_resolution_binning": False, "clean_caption": False}, "chroma": {}}


@pytest.mark.parametrize("family", MAKE)
def test_identity_and_restoration(family):
    pipe = MAKE[family]()
    plain, before = tiny.draw(pipe), trace(pipe)
    with attach(pipe, Identity()):
        assert torch.equal(tiny.draw(pipe), plain)
    assert trace(pipe) == before and torch.equal(tiny.draw(pipe), plain)


@pytest.mark.parametrize("family", MAKE)
def test_the_record_is_true(family):
    found = verify(MAKE[family](), height=32, width=48, max_sequence_length=16, **VERIFY[family])
    assert found.text == (0, 16)


@pytest.mark.parametrize("family", MAKE)
def test_maps_are_of_the_words_and_the_picture_is_untouched(family):
    pipe = MAKE[family]()
    plain = tiny.draw(pipe)
    with attach(pipe, TokenMaps()) as run:
        assert torch.equal(tiny.draw(pipe), plain)
    maps = {word: run.maps[word] for word in ("cat", "dog")}
    assert maps["cat"].shape == (1, 8, 12) and 0 < float(maps["cat"].mean()) < 1
    assert not torch.allclose(maps["cat"], maps["dog"])


@pytest.mark.parametrize("family", MAKE)
def test_only_the_prompts_rows_are_conditional(family):
    pipe = MAKE[family]()
    spy = Spy(look=lambda call: (call.step.rows.cond is not None, call.step.rows.total))
    with attach(pipe, spy) as run:
        tiny.draw(pipe, guidance_scale=3.0, negative_prompt="blue")
    rows = list(dict.fromkeys(spy.seen))
    assert rows == ([(True, 2)] if family == "pixart" else [(True, 1), (False, 1)])
    assert run.run.calls == run.run.steps == 2


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize(
    "control",
    [
        Segregation("cat", "dog", look_ahead=0, window=(0, 1)),
        Segregation("cat", "dog"),
        Regions({"cat": (0, 0, 0.5, 1)}),
        Perturb("1", scale=3.0),
        Slg("1", window=(0, 1)),
    ],
    ids=["segregation", "look ahead", "regions", "perturb", "slg"],
)
def test_methods_act(family, control):
    pipe = MAKE[family]()
    plain = tiny.draw(pipe)
    with attach(pipe, control):
        drawn = tiny.draw(pipe)
    assert drawn.isfinite().all() and (differs(drawn, plain) or control == Segregation("cat", "dog"))


def test_capitals_are_found_where_the_pipeline_reads_small_letters():
    pipe = tiny.pixart()
    with attach(pipe, TokenMaps("CAT")) as run:
        tiny.draw(pipe, "a CAT and a dog")
    assert float(run.maps["CAT"].mean()) > 0


def test_a_record_is_registered_once():
    with pytest.raises(ControlError, match="UNet2DConditionModel is known already"):
        register(FAMILIES[0])


def test_pipelines_of_known_denoisers_that_cannot_work_are_refused_by_name():
    class KolorsPipeline(diffusers.StableDiffusionPipeline):
        pass

    pipe = KolorsPipeline(**tiny._sd_parts())
    with pytest.raises(UnsupportedPipelineError, match="KolorsPipeline is not supported: its prompts are read by"):
        attach(pipe, Identity())


def test_the_page_about_families_writes_the_record_that_ships():
    page = (Path(__file__).parents[2] / "docs/families.md").read_text()
    space: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], space)
    pipe = tiny.pixart()
    assert space["record"].sites(pipe.transformer) == PIXART.sites(pipe.transformer)
    told, shipped = (
        {one.name: getattr(record, one.name) for one in fields(Family)} for record in (space["record"], PIXART)
    )
    functions = {name for name, value in shipped.items() if callable(value)}
    assert {name for name in told if told[name] != shipped[name]} <= functions
