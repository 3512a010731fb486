"""Heads as text: block:head, blocks, stages, globs, files; and what is said where nothing fits."""

from __future__ import annotations

import json

import pytest
import tiny

from attnctl import sites
from attnctl.engine.heads import pick_heads, write_heads
from attnctl.errors import NoSiteError

SD1, SD3, SD35, FLUX = (sites(make()) for make in (tiny.sd1, tiny.sd3, tiny.sd35, tiny.flux))


def picked(available, heads):
    return {
        site.name.removesuffix(".attn1").removesuffix(".attn"): own
        for site, own in pick_heads(available, heads).items()
    }


def test_numbers_are_those_of_transformer_blocks():
    assert [site.block for site in SD1] == [n for n in range(7) for _ in range(2)]  # a self and a cross site each
    assert [(site.name, site.block) for site in SD35][:4] == [
        ("transformer_blocks.0.attn", 0), ("transformer_blocks.0.attn2", 0),
        ("transformer_blocks.1.attn", 1), ("transformer_blocks.1.attn2", 1),
    ]  # fmt: skip
    assert [(site.name, site.block) for site in FLUX][-1] == ("single_transformer_blocks.1.attn", 3)


@pytest.mark.parametrize(
    ("available", "heads", "want"),
    [
        (SD3, "1:3", {"transformer_blocks.1": (3,)}),
        (SD3, "1:3, 0:1 1:0", {"transformer_blocks.0": (1,), "transformer_blocks.1": (0, 3)}),
        (SD3, "L1H3 l0h1", {"transformer_blocks.0": (1,), "transformer_blocks.1": (3,)}),
        (SD3, 1, {"transformer_blocks.1": (0, 1, 2, 3)}),
        (SD3, ("0:1", 2), {"transformer_blocks.0": (1,), "transformer_blocks.2": (0, 1, 2, 3)}),
        (SD3, "1-2:0", {"transformer_blocks.1": (0,), "transformer_blocks.2": (0,)}),
        (SD3, "1:1-2", {"transformer_blocks.1": (1, 2)}),
        (SD3, "MID", {"transformer_blocks.1": (0, 1, 2, 3)}),
        (SD3, "1:0,2:1", {"transformer_blocks.1": (0,), "transformer_blocks.2": (1,)}),
        (SD3, "mid", {"transformer_blocks.1": (0, 1, 2, 3)}),
        (SD35, "1:3", {"transformer_blocks.1": (3,)}),
        (SD35, "*.attn2:0", {"transformer_blocks.0.attn2": (0,), "transformer_blocks.1.attn2": (0,)}),
        (FLUX, "3:1", {"single_transformer_blocks.1": (1,)}),
        (SD1, "mid", {"mid_block.attentions.0.transformer_blocks.0": (0, 1)}),
        (SD1, "2:1", {"mid_block.attentions.0.transformer_blocks.0": (1,)}),
        (SD1, "mid_block.*:1", {"mid_block.attentions.0.transformer_blocks.0": (1,)}),
    ],
)  # fmt: skip
def test_picked(available, heads, want):
    assert picked(available, heads) == want


def test_whole_sides_of_a_unet():
    assert [site.block for site in pick_heads(SD1, "down up")] == [0, 1, 3, 4, 5, 6]
    assert list(pick_heads(SD1, "all")) == [site for site in SD1 if site.kind == "self"]


@pytest.mark.parametrize(
    ("available", "heads", "said"),
    [
        (SD3, "1:4", r"heads '1:4': transformer_blocks.1.attn has heads 0 to 3"),
        (SD3, "1:x", r"has heads 0 to 3"),
        (SD3, "7", r"no such block; there are blocks 0 to 2 \(3 blocks of 4 heads\)"),
        (SD3, "1-7", "no such block"),
        (SD3, "2-1", "write the smaller block first, 1-2"),
        (SD3, "1:0,2", "is 2 a head or a block\\? Write 1:2"),
        (SD3, "down", "'down' name nothing here"),
        (SD3, "nose", "'nose' name nothing here"),
        (SD3, "", "names no head"),
        (SD3, (), "names no head"),
        (SD3, True, "heads are text"),
        (SD3, 1.5, "heads are text"),
        (SD3, (None,), "heads are text"),
        (SD1, "*.attn2", "cross-attention has no heads to break"),
        ([site for site in SD1 if site.kind == "cross"], "0", "no self or joint attention"),
    ],
)
def test_refused(available, heads, said):
    with pytest.raises(NoSiteError, match=said) as caught:
        pick_heads(available, heads)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("available", [SD1, SD3, SD35, FLUX])
@pytest.mark.parametrize("heads", ["all", "1:1 2", "0-1:0 2:1", "*"])
def test_written_and_read_again(available, heads):
    once = pick_heads(available, heads)
    assert pick_heads(available, write_heads(once)) == once


def test_from_a_file(tmp_path):
    file = tmp_path / "dark.json"
    file.write_text(json.dumps({"heads": "0:1 1:3", "shape": "3 blocks of 4 heads"}))
    assert pick_heads(SD3, str(file)) == pick_heads(SD3, "0:1 1:3")
    with pytest.raises(NoSiteError, match="for a denoiser with 3 blocks of 4 heads; this one has 4 blocks of 2 heads"):
        pick_heads(FLUX, str(file))
    file.write_text(json.dumps({"heads": ["0:1", "1:3"]}))
    assert pick_heads(SD3, (str(file), "2:0")) == pick_heads(SD3, "0:1 1:3 2:0")
    spaced = tmp_path / "two words.json"
    spaced.write_text(file.read_text())
    assert pick_heads(SD3, str(spaced)) == pick_heads(SD3, "0:1 1:3")
    file.write_text(json.dumps({"heads": str(file)}))
    with pytest.raises(NoSiteError, match="names another file"):
        pick_heads(SD3, str(file))
    for content in ("[]", "{}", "not json", '{"heads": 1.5}', '{"heads": null}'):
        file.write_text(content)
        with pytest.raises(NoSiteError, match="dark.json"):
            pick_heads(SD3, str(file))
    with pytest.raises(NoSiteError, match="cannot be read from .*gone.json: No such file"):
        pick_heads(SD3, str(tmp_path / "gone.json"))
