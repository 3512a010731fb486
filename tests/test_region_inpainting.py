"""Regions in image-to-image and inpainting: they speak of the whole picture, also where a crop of it is drawn."""

from __future__ import annotations

import pytest
import tiny
import torch
from contract_table import close, differs
from PIL import Image
from toys import Spy

from attnctl import attach
from attnctl.areas import on_grid
from attnctl.processors import Couple, Regions
from attnctl.regions import Region

PICTURE = Image.effect_noise((96, 64), 80).convert("RGB")
HOLE = Image.new("L", (96, 64))
HOLE.paste(255, (56, 8, 88, 56))


@pytest.mark.parametrize("what", [(0.5, 0, 0.75, 1), (48, 0, 72, 64), "mask"])
def test_a_view_shows_a_part_of_the_region(what):
    if what == "mask":
        what = torch.zeros(16, 24)
        what[:, 12:18] = 1
    region = Region(what)
    seen = on_grid(region, (4, 8), (64, 96), (0.5, 0.25, 1.0, 0.75))
    assert seen.int().tolist() == [[1] * 4 + [0] * 4] * 4
    assert not on_grid(region, (4, 8), (64, 96), (0, 0, 0.4, 1)).any()  # out of view


def test_a_crop_is_the_region_in_the_coordinates_of_the_crop():
    """Boxes of the whole picture become boxes of the crop; pixels are those of the whole picture."""
    pipe, spy = tiny.inpaint(), Spy()
    settings = {
        "image": PICTURE, "mask_image": HOLE, "strength": 1.0, "size": (64, 64), "padding_mask_crop": 4,
        "output_type": "pil",
    }  # fmt: skip
    with attach(pipe, spy):
        tiny.draw(pipe, **settings)
    left, top, right, bottom = spy.runs[0].view
    assert spy.runs[0].whole == (64, 96) and (left, right) != (0, 1)
    middle = (left + right) / 2
    drawn = []
    for box in ((left, top, middle, bottom), (left * 96, top * 64, middle * 96, bottom * 64)):
        with attach(pipe, Regions({"cat": box}), Couple({"a red dog": box})) as run:
            tiny.draw(pipe, **settings)
            state = run.run.state(run.controls[0])
        drawn.append(state.masks((8, 8), [0]).view(8, 8))
    assert drawn[0].int().tolist() == [[1] * 4 + [0] * 4] * 8 and torch.equal(*drawn)


def test_out_of_the_crop_nothing_is_empty():
    pipe = tiny.inpaint()
    with attach(pipe, Regions({"cat": (0, 0, 0.2, 1)}), Couple({"a red dog": (0, 0, 0.2, 1)}, feather=0.2)):
        drawn = tiny.draw(
            pipe, image=PICTURE, mask_image=HOLE, strength=1.0, size=(64, 64), padding_mask_crop=4, output_type="pil"
        )
    assert len(drawn) == 1


def test_image_to_image():
    pipe = tiny.img2img()
    settings = {"image": PICTURE.resize((48, 32)), "strength": 0.6, "size": None, "steps": 5}
    plain = tiny.draw(pipe, **settings)
    with attach(pipe, Couple({"a red dog": (0, 0, 1, 1)})):
        got = tiny.draw(pipe, **settings)
    assert differs(got, plain) and close(got, tiny.draw(pipe, "a red dog", **settings), 1e-4)


def test_image_prompts_by_region_beside_regions():
    """diffusers' own masks of IP-Adapter images go on to count."""
    pipe, drawn = tiny.sd1(), []
    pipe.load_ip_adapter(tiny.ip_adapter(pipe.unet), subfolder=None, weight_name=None, image_encoder_folder=None)
    embeds = [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(5))]
    for left in (True, False):
        mask = torch.zeros(1, 1, 32, 48)
        mask[..., : 24 if left else 48] = 1
        with attach(pipe, Couple({"a red dog": (0, 0, 0.5, 1)})):
            settings = {"ip_adapter_image_embeds": embeds, "cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
            drawn.append(tiny.draw(pipe, **settings))
    assert differs(*drawn)
