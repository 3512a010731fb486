"""Masks of the things in the picture: found or given, in every view, and what they do to what is trained on."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from attnctl.errors import ControlError
from attnctl.pipelines import Personalizer
from attnctl.pipelines.personalize import masks as masks_file
from attnctl.pipelines.personalize.concepts import read_concepts
from attnctl.pipelines.personalize.examples import remasked, subsets, views_of
from attnctl.pipelines.personalize.masks import MaskError, given_masks, masks_from
from attnctl.pipelines.personalize.settings import settings_of
from attnctl.pipelines.personalize.views import View, box_of, painted_out, views_around
from attnctl.processors.attencraft import divided

FEW = {
    "steps": 3, "rows": 2, "regular_rows": 1, "regular": 2, "view_count": 3, "kv_rate": 0.05, "word_rate": 0.05,
}  # fmt: skip
CONCEPTS = read_concepts("cat, dog")
LEFT, RIGHT = (2, 4, 7, 12), (9, 4, 15, 12)  # of 16 pixels


def scene(size=16):
    """A red and a blue box on white, and the mask of each."""
    picture, masks = Image.new("RGB", (16, 16), "white"), {}
    for noun, box, colour in (("cat", LEFT, (255, 0, 0)), ("dog", RIGHT, (0, 0, 255))):
        picture.paste(colour, box)
        masks[noun] = Image.new("L", (16, 16))
        masks[noun].paste(255, box)
    return picture.resize((size, size), 0), {noun: mask.resize((size, size), 0) for noun, mask in masks.items()}


class Plain:
    """A pipeline whose latents are the pixels themselves."""

    vae_scale_factor = 1

    class vae:
        config = type("Config", (), {"scaling_factor": 1.0})
        device, dtype = "cpu", torch.float32

        @staticmethod
        def encode(x):
            dist = type("Dist", (), {"mode": lambda self: x})()
            return type("Out", (), {"latent_dist": dist})()


def views(**settings):
    picture, given = scene()
    masks = given_masks(given, CONCEPTS, 16, picture.size)
    chosen = settings_of("ours", **{"view_count": 12} | settings)
    return views_of(Plain, picture, CONCEPTS, chosen, masks, lambda *told: None)


def colours(latents):
    """(examples, cells) bool: red, blue."""
    x = latents.flatten(2)
    return x[:, 0] - x[:, 2] > 1.0, x[:, 2] - x[:, 0] > 1.0


def test_subsets():
    assert subsets(1) == [(0,)] and subsets(2) == [(0, 1), (0,), (1,)]
    assert subsets(3) == [(0, 1, 2), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    assert subsets(4) == [(0, 1, 2, 3), (0,), (1,), (2,), (3,)]


@pytest.mark.parametrize("kind", ["ours", "paper"])
def test_masks_lie_on_their_things_in_every_view(kind):
    found = views(views=kind, zoom=False)
    assert found.masks.shape == (36, 2, 16, 16) and found.subset.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    for k, seen in enumerate(colours(found.latents)):
        mask = found.masks[:, k].flatten(1)
        assert (mask[seen].mean() > 0.8) and (mask[~seen].mean() < 0.1)


def test_captions_name_what_their_subset_has():
    found = views()
    assert found.captions[0] == "a <v1> cat and a <v2> dog"
    assert set(found.captions[12:24]) == {"a <v1> cat"} and set(found.captions[24:]) == {"a <v2> dog"}
    prefixed = views(views="paper", zoom=False).captions
    assert all(one.endswith("a <v2> dog") and "cat" not in one for one in prefixed[24:])


def test_a_thing_alone_is_large_whole_and_without_the_other():
    found = views()
    red, blue = colours(found.latents)
    assert not blue[12:24].any() and not red[24:].any()
    for own in (red[12:24], blue[24:]):
        height = own.view(-1, 16, 16).any(2).sum(1).float() / 16
        assert height.min() > 0.35 and height.max() < 0.9


def test_the_loss_counts_where_it_is_told_to():
    union, rest, whole = (views(counted=name, zoom=False) for name in ("union", "rest", "view"))
    assert torch.allclose(union.valid[24:], union.masks[24:, 1]) and torch.allclose(
        union.valid[:12], union.masks[:12].amax(1)
    )
    assert (rest.valid[:12] == 1).all() and not rest.valid[24:][rest.masks[24:, 0] > 0.2].any()
    assert (rest.valid[24:].mean((1, 2)) > 0.4).all() and (whole.valid == 1).all()


def test_all_things_in_every_view_without_subsets():
    found = views(subsets="all")
    assert found.subsets == 1 and set(found.captions) == {"a <v1> cat and a <v2> dog"} and found.masks is not None


def test_what_is_painted_out_is_gone_and_the_rest_is_as_it_was():
    picture, masks = scene()
    mask = torch.from_numpy(np.asarray(masks["dog"]) > 0)
    found = np.asarray(painted_out(picture, mask), int)
    assert (found[~mask.numpy()] == np.asarray(picture)[~mask.numpy()]).all()
    near_white = found[mask.numpy()].min(-1)
    assert np.median(near_white) > 200


def test_views_around_a_thing_hold_all_of_it():
    box = box_of(torch.from_numpy(np.asarray(scene()[1]["cat"]) > 0))
    assert box == tuple(side / 16 for side in LEFT)
    for view in views_around(box, 50, np.random.default_rng(0)):
        left, top, right, bottom = view.box
        assert left <= box[0] and top <= box[1] and right >= box[2] and bottom >= box[3]
        assert 0.42 - 1e-6 <= (box[3] - box[1]) / (bottom - top) <= 0.8 + 1e-6


def test_given_masks_are_placed_as_the_picture_is():
    wide = Image.new("L", (32, 16))
    wide.paste(255, (16, 0, 32, 16))
    clear = Image.new("RGBA", (32, 16), (255, 255, 255, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 16, 16))
    masks = given_masks({"cat": wide, "<v2>": clear}, CONCEPTS, 32, (320, 160))
    assert masks[0, 8:24, 16:].all() and masks[0].sum() == 256 and masks[1, 8:24, :16].all() and masks[1].sum() == 256


@pytest.mark.parametrize(
    "change, told",
    [
        ({"bird": "cat"}, "there is a mask for 'bird'; concepts are cat, dog"),
        ({"dog": None}, "'dog' has no mask"),
        ({"dog": "empty"}, "the mask of 'dog' is empty"),
        ({"dog": "cat"}, "the masks of 'cat' and 'dog' show the same place"),
        ({"dog": "tall"}, "the mask of 'dog' is 16 x 48, another shape than the picture, "),
    ],
)
def test_masks_that_make_no_sense_are_told(change, told):
    masks = scene()[1] | {"empty": Image.new("L", (16, 16)), "tall": Image.new("L", (16, 48), 255)}
    given = {noun: masks[noun] for noun in ("cat", "dog")} | {
        noun: masks[name] for noun, name in change.items() if name
    }
    given = {noun: mask for noun, mask in given.items() if change.get(noun, "") is not None}
    with pytest.raises(ControlError, match=told):
        given_masks(given, CONCEPTS, 16, scene()[0].size)


def relevant(cat, dog, rest):
    """Three columns of a 3 x 3 grid each."""
    return torch.tensor([cat, dog, rest]).unsqueeze(1).expand(3, 3, 3).float()


def test_masks_come_from_relevance_at_the_size_of_the_picture():
    found = masks_from(relevant([0.9, 0, 0], [0, 0.9, 0], [0, 0, 0.9]), CONCEPTS, Image.new("RGB", (30, 30)))
    assert found.masks.shape == (2, 30, 30) and found.masks[0, :, :8].all() and not found.masks[0, :, 16:].any()


@pytest.mark.parametrize(
    "maps, told",
    [
        (
            ([0.9, 0, 0], [1.0, 0, 0], [0, 1.0, 1.0]),
            "'cat' and 'dog' look at the same place of the picture; give masks",
        ),
        (([0.9, 0, 0], [0, 0.9, 0], [0, 1.0, 1.0]), "'dog' and the background look at the same place"),
        (([0.9, 0, 0], [0, 0.9, 0], [0, 0.85, 1.0]), "hardly any place of the picture is that of 'dog' alone"),
    ],
)
def test_things_that_cannot_be_told_apart_are_told_with_a_picture(maps, told):
    with pytest.raises(MaskError, match=told) as raised:
        masks_from(relevant(*maps), CONCEPTS, Image.new("RGB", (30, 30)))
    assert raised.value.picture.width > 600


def test_a_pipeline_that_cannot_tell_things_apart_is_left_as_it_was():
    pipe = tiny.sd1()
    for _ in range(2):  # the second time says the same, not that the words are there already
        with pytest.raises(MaskError, match="give masks of your own"):
            Personalizer(pipe, "cat, dog", **FEW).learn(scene()[0])


@pytest.mark.parametrize("subset", ["uniform", "loss"])
def test_given_masks_train_every_subset_and_the_guidance(subset):
    picture, masks = scene(32)
    told = []
    settings = FEW | {"steps": 8, "guide": 0.5, "subsets": subset}
    trainer = Personalizer(tiny.sd1(), "cat, dog", **settings)
    found = trainer.learn(picture, told.append, masks=masks)
    assert {"guide", "binding", "keep"} <= told[0].losses.keys() and len(found.words) == 2
    assert found.settings["masks"] == "given"
    without = Personalizer(tiny.sd1(), "cat, dog", **settings | {"guide": 0.0}).learn(picture, masks=masks)
    assert not torch.equal(found.words["<v1>"][0], without.words["<v1>"][0])


def test_a_training_with_masks_and_loss_weights_goes_on_to_the_same_weights(tmp_path):
    picture, masks = scene(32)
    settings = FEW | {"steps": 6, "subsets": "loss"}
    whole = Personalizer(tiny.sd1(), "cat, dog", **settings).learn(picture, masks=masks)

    def stop(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Personalizer(tiny.sd1(), "cat, dog", **settings).learn(picture, stop, folder=tmp_path, every=2, masks=masks)
    again = Personalizer(tiny.sd1(), "cat, dog", **settings)
    other = dict(masks, cat=Image.fromarray(255 - np.asarray(masks["dog"])))
    with pytest.raises(ControlError, match="was begun with other masks"):
        again.learn(picture, folder=tmp_path, resume=True, every=2, masks=dict(other, dog=masks["dog"]))
    found = again.learn(picture, folder=tmp_path, resume=True, every=2, masks=masks)
    assert all(torch.equal(found.words[word][0], whole.words[word][0]) for word in whole.words)


def test_keeping_holds_other_words_and_the_padding():
    """The keys of other words change much less with it, those of the new word still do."""
    picture, masks = scene(32)
    drift = {}
    for weight in (0.0, 1e4):
        pipe = tiny.sd1()
        before = {n: p.detach().clone() for n, p in pipe.unet.named_parameters() if "attn2.to_k" in n}
        found = Personalizer(pipe, "cat, dog", **FEW | {"steps": 10, "keep": weight}).learn(picture, masks=masks)
        other = pipe.encode_prompt("a red clock", "cpu", 1, False)[0][0]
        after = dict(pipe.unet.named_parameters())
        drift[weight] = sum(float((other @ (after[n] - p).T).square().mean()) for n, p in before.items())
        assert len(found.words) == 2
    assert drift[1e4] < drift[0.0] / 3


# --- masks that are looked for again ----------------------------------------------------------------------------------


def test_views_take_other_masks_and_stay_as_they_are():
    chosen = settings_of("ours", view_count=12, refresh=5)
    found = views(refresh=5)
    masks = given_masks(scene()[1], CONCEPTS, 16, scene()[0].size)
    again = remasked(found, masks, chosen)
    assert torch.equal(again.masks, found.masks) and torch.equal(again.valid, found.valid)
    other = remasked(found, masks.flip(0), chosen)
    assert torch.equal(other.masks, found.masks.flip(1)) and other.latents is found.latents
    assert not torch.equal(other.valid, found.valid) and views().places is None
    view = View((-0.1, 0.2, 0.9, 1.2), (0.1, 0.2, 0.3, 0.4), True)
    assert View.of(view.numbers) == view


RENEW = {
    "steps": 4, "rows": 1, "view_count": 2, "kv_rate": 1e-3, "bind": 0.0, "separate": 0.0, "keep": 0.0,
    "counted": "union",
}  # fmt: skip


def cat_and_car(told=None, where=None, resume=False, **settings):
    picture = Image.open(Path(__file__).parent / "glyph" / "data" / "cat-car.png")
    return Personalizer(tiny.glyph(), "cat, car", **RENEW | settings).learn(
        picture, told, folder=where, resume=resume, every=3
    )


def test_masks_are_renewed_while_it_trains_and_a_training_goes_on_to_the_same_weights(tmp_path):
    told = []
    whole = cat_and_car(told.append, refresh=2)
    assert [one.renewed for one in told] == [(0, 0), (0, 0), (1, 1), (1, 1)]  # at the end there is no use for it
    assert not torch.equal(whole.words["<v1>"][0], cat_and_car().words["<v1>"][0])

    def stop(progress):
        if progress.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cat_and_car(stop, tmp_path, refresh=2)
    again = cat_and_car(where=tmp_path, resume=True, refresh=2)
    assert all(torch.equal(again.words[word][0], whole.words[word][0]) for word in whole.words)
    assert all(torch.equal(again.lora[name][1], up) for name, (_, up) in whole.lora.items())


@pytest.mark.parametrize("maps", [([0.9, 0, 0], [0, 0, 0.9], [0, 0.9, 0]), ([0.9, 0, 0], [0, 0, 0], [0, 0.9, 0.9])])
def test_masks_that_moved_or_went_are_not_taken(monkeypatch, maps):
    """A thing elsewhere than before, and one without a place."""
    former = divided(relevant([0.9, 0, 0], [0, 0.9, 0], [0, 0, 0.9]))[:-1].float()
    settings = settings_of("ours", refresh=1)
    monkeypatch.setattr(masks_file, "look", lambda *asked: relevant([0.9, 0, 0], [0, 0.9, 0], [0, 0, 0.9]))
    taken = masks_file.renewed(None, None, former, CONCEPTS, settings)
    assert taken.shape == (2, 12, 12) and taken[0, :, :4].all() and not taken[1, :, 8:].any()
    monkeypatch.setattr(masks_file, "look", lambda *asked: relevant(*maps))
    assert masks_file.renewed(None, None, former, CONCEPTS, settings) is None


def test_refreshing_what_is_not_there_is_told():
    picture, masks = scene(32)
    with pytest.raises(ControlError, match="yours stay as they are"):
        Personalizer(tiny.sd1(), "cat, dog", **FEW, refresh=2).learn(picture, masks=masks)
    with pytest.raises(ControlError, match="one concept has none"):
        Personalizer(tiny.sd1(), "cat", **FEW, refresh=2).learn(picture)
    with pytest.raises(ControlError, match="masks=none has none"):
        settings_of("paper", refresh=20)
