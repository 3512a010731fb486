import numpy as np
import pytest
import torch
from PIL import Image

from attnctl.errors import ControlError
from attnctl.regions import Region

SIZE = (64, 96)  # picture: height, width


def test_a_box_covers_cells_by_area():
    got = Region((0.25, 0.0, 0.75, 0.5)).on((4, 6), SIZE)
    want = torch.zeros(4, 6)
    want[:2, 2:4], want[:2, 1], want[:2, 4] = 1, 0.5, 0.5
    torch.testing.assert_close(got, want)


def test_a_box_in_pixels_is_the_same_box():
    shares, pixels = Region((0.25, 0.125, 0.75, 1)), Region((24, 8, 72, 64))
    for grid in ((4, 6), (5, 7), (16, 24)):
        torch.testing.assert_close(shares.on(grid, SIZE), pixels.on(grid, SIZE))
    assert Region((0, 0, 1, 1)).on((3, 5), SIZE).eq(1).all()
    assert Region((48, 0, 96, 64)).on((2, 2), SIZE).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("grid", [(4, 6), (3, 7), (64, 96), (100, 130)])
def test_a_mask_is_averaged_by_area(grid):
    mask = torch.zeros(SIZE)
    mask[16:48, 24:72] = 1
    box = Region((0.25, 0.25, 0.75, 0.75)).on(grid, SIZE)
    torch.testing.assert_close(Region(mask).on(grid, SIZE), box, atol=1e-5, rtol=0)
    torch.testing.assert_close(box.mean(), torch.tensor(0.25), atol=1e-5, rtol=0)


def test_every_way_to_say_a_mask():
    mask = torch.zeros(8, 12)
    mask[2:5, 3:9] = 1
    want = Region(mask).on((4, 6), SIZE)
    grey = Image.fromarray((mask * 255).byte().numpy())
    layer = Image.new("RGBA", (12, 8), (0, 0, 0, 0))  # black paint: its alpha counts, not its colour
    layer.paste((0, 0, 0, 255), (3, 2, 9, 5))
    for other in (
        mask.bool(), mask.numpy(), mask.bool().numpy(), (mask * 255).byte(), mask[..., None], grey, grey.convert("1"),
        grey.convert("RGB"), layer, np.array(layer),
    ):  # fmt: skip
        torch.testing.assert_close(Region(other).on((4, 6), SIZE), want)
    assert torch.equal(Region(Region(mask)).on((4, 6), SIZE), want)


def test_regions_compare_by_what_they_are():
    mask = torch.eye(4)
    assert Region((0, 0, 1, 1)) == Region([0, 0, 1, 1]) != Region((0, 0, 1, 0.5))
    assert Region(mask) == Region(mask.clone()) != Region(1 - mask)
    assert hash(Region(mask)) == hash(Region(mask.clone())) and Region(mask) != Region((0, 0, 1, 1))
    assert repr(Region((0, 0, 0.5, 1))) == "Region((0.0, 0.0, 0.5, 1.0))" and "4 x 4" in repr(Region(mask))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ((0.5, 0, 0.2, 1), "left < right"),
        ((0, 0, 1), "a region is a box"),
        ("left", "cannot read the picture left of a region: there is no such file"),
        ((0, 0, 0.5, 64), "a box is in shares of the picture or in pixels, not in both"),
        ((0.25, 0, 48, 64), "not in both"),
        (None, "a region is a box"),
        (torch.zeros(4, 4), "an empty region"),
        (Image.new("RGBA", (4, 4)), "an empty region"),
        (torch.full((4, 4), 2.0), "from 0 to 1"),
        (torch.full((4, 4), float("nan")), "from 0 to 1"),
        (torch.ones(4), "a mask is"),
        (torch.ones(2, 4, 4, 4), "a mask is"),
    ],
)
def test_what_is_no_region(what, said):
    with pytest.raises(ControlError, match=said):
        Region(what)


def test_a_box_in_pixels_of_another_picture():
    with pytest.raises(ControlError, match=r"ends beyond the picture, which is 96 x 64"):
        Region((0, 0, 64, 128)).on((4, 6), SIZE)
    assert Region((0, 0, 64, 64)).on((1, 3), SIZE).tolist() == [[1, 1, 0]]


def test_a_mask_of_zeros_and_ones_in_bytes():
    mask = np.zeros((4, 6), np.uint8)
    mask[:2] = 1
    assert Region(mask).on((2, 1), SIZE).tolist() == [[1], [0]]
    assert Region(mask * 255) == Region(mask)


def test_a_mask_in_a_file(tmp_path):
    mask = np.zeros((4, 6), np.uint8)
    mask[:2] = 255
    Image.fromarray(mask).save(tmp_path / "a mask.png")
    for name in (tmp_path / "a mask.png", str(tmp_path / "a mask.png")):
        assert Region(name) == Region(mask)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ControlError, match="it is not a whole picture"):
        Region(tmp_path / "text.png")
    with pytest.raises(ControlError, match="cannot read the picture .*: there is no such file"):
        Region(tmp_path / "none.png")


def test_a_mask_as_text_is_the_same_mask(tmp_path):
    from attnctl.regions import written

    mask = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    Image.fromarray(mask).save(tmp_path / "mask.png")
    text = written(str(tmp_path / "mask.png"))
    assert text.startswith("data:image/png;base64,") and Region(text) == Region(mask)
    assert written(text) == text
    with pytest.raises(ControlError, match="it is not a whole picture"):
        Region(text[:60])


def test_a_box_beside_the_picture():
    with pytest.raises(ControlError, match="outside of the picture, which is 96 x 64"):
        Region((100, 0, 120, 20)).on((4, 6), SIZE)
