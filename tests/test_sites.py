"""Sites: the facts are checked against what a running denoiser does, the selection language against its description."""

from __future__ import annotations

import pytest
import tiny
import torch
from toys import Spy

from attnctl import sites as discover
from attnctl.engine.attachment import attach
from attnctl.engine.sites import Site, select
from attnctl.errors import ControlError, NoSiteError, UnsupportedPipelineError


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_are_in_execution_order(family):
    pipe = tiny.FAMILIES[family]()
    spy = Spy(look=lambda call: call.site)
    with attach(pipe, spy):
        tiny.draw(pipe, steps=1)
    assert tuple(spy.seen[: len(discover(pipe))]) == discover(pipe)
    assert [site.layer for site in discover(pipe)] == list(range(len(discover(pipe))))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("size", [(32, 48), (48, 32), (64, 64)])
def test_grid_and_slices_are_those_of_the_tokens(family, size):
    pipe = tiny.FAMILIES[family]()
    spy = Spy(look=lambda call: (call.site, call.grid, call.text, call.image, call.q.shape[2], call.k.shape[2]))
    with attach(pipe, spy) as attachment:
        tiny.draw(pipe, steps=1, size=size)
    assert attachment.run.latent_size == (size[0] // 2, size[1] // 2)
    text_rows = {"sd1": 77, "sdxl": 77, "sd3": 77 + 16, "sd35": 77 + 16, "flux": 16}[family]
    for site, (height, width), text, image, queries, keys in spy.seen:
        assert (height, width) == (size[0] // 2 // site.factor, size[1] // 2 // site.factor)
        assert image.stop - image.start == height * width
        if site.kind == "self":
            assert queries == keys == height * width and text == slice(0, 0)
        elif site.kind == "cross":
            assert keys == text_rows and text == slice(0, keys) and queries == height * width
        else:
            assert queries == keys == text_rows + height * width
            assert text.stop - text.start == text_rows
            assert {text.start, image.start} == {0, text_rows if site.order == "text-first" else height * width}


def test_kinds():
    assert [site.kind for site in discover(tiny.sd1())] == ["self", "cross"] * 7
    assert {site.kind for site in discover(tiny.flux())} == {"joint"}
    assert [site.kind for site in discover(tiny.sd35())] == ["joint", "self", "joint", "self", "joint"]


def test_sdxl_counts_every_transformer_block():
    deep = [site for site in discover(tiny.sdxl()) if site.name.startswith("mid_block")]
    assert len(deep) == 4 and {site.heads for site in deep} == {4} and {site.factor for site in deep} == {2}


def test_a_denoiser_has_sites_too():
    pipe = tiny.sd1()
    assert discover(pipe.unet) == discover(pipe)
    pipe.unet = torch.compile(pipe.unet)
    assert discover(pipe) == discover(pipe.unet)


def test_image_projections_are_not_sites():
    pipe = tiny.sd1()
    before = discover(pipe)
    pipe.unet._load_ip_adapter_weights([tiny.ip_adapter(pipe.unet)])
    assert discover(pipe) == before


def test_unknown_things_have_no_sites():
    with pytest.raises(UnsupportedPipelineError, match="UNet.*SD3.*FLUX"):
        discover(torch.nn.Linear(2, 2))


def test_halving_rounds_up():
    assert Site("a", "self", 1, 1, 0, 4).grid(9, 17) == (3, 5)
    with pytest.raises(NoSiteError, match="no image grid"):
        Site("a", "text", 1, 1, 0, None).grid(8, 8)


SITES = (
    Site("down.0.attn1", "self", 2, 8, 0, 1),
    Site("down.0.attn2", "cross", 2, 8, 1, 1),
    Site("mid.attn2", "cross", 4, 8, 2, 2),
    Site("refiner.0", "text", 4, 8, 3, None),
    Site("up.0.attn", "joint", 4, 8, 4, 2, "text-first"),
)


@pytest.mark.parametrize(
    ("selection", "layers"),
    [
        (None, [0, 1, 2, 4]),
        ("cross", [1, 2]),
        ("text", [3]),
        ("factor:2", [2, 4]),
        ("2", [2]),
        ("1-3", [1, 2, 3]),
        ("mid.attn2", [2]),
        ("*.attn2", [1, 2]),
        (lambda site: site.heads == 4 and site.kind != "text", [2, 4]),
        (["self", "joint"], [0, 4]),
        (["factor:1", ["4"]], [0, 1, 4]),
        (SITES[2], [2]),
        ((SITES[4], SITES[0]), [0, 4]),
    ],
)
def test_selection(selection, layers):
    assert [site.layer for site in select(SITES, selection)] == layers


@pytest.mark.parametrize(
    ("selection", "asked"),
    [
        ("attn9", "'attn9'"),
        ("factor:16", "'factor:16'"),
        (["8-9", "x*"], "any of '8-9', 'x\\*'"),
        ([], "empty selection"),
    ],
)
def test_no_match_names_what_was_asked_and_what_exists(selection, asked):
    with pytest.raises(
        NoSiteError, match=f"{asked}.*1 self, 2 cross, 1 joint, 1 text in layers 0-4.*factors 1, 2"
    ) as e:
        select(SITES, selection)
    assert "\n" not in str(e.value)


def test_tokens_that_fit_no_grid_are_an_error():
    with pytest.raises(ControlError, match="20 queries and 20 keys, which is no 4 x 6 grid"):
        SITES[0].layout((4, 6), 20, 20, None)


def test_reference_picture_after_the_drawn_one_is_not_image():
    assert SITES[4].layout((2, 2), 5 + 4 + 4, 5 + 4 + 4, 5) == (slice(0, 5), slice(5, 9))


def test_a_layer_is_a_number_and_other_types_are_refused():
    found = discover(tiny.sd1())
    assert [site.layer for site in select(found, [1, 2])] == [1, 2] and select(found, 1) == select(found, "1")
    for wrong in (True, 0.5, [0.5], [True]):
        with pytest.raises(NoSiteError, match="a layer such as 7"):
            select(found, wrong)
