import re
from itertools import combinations

import numpy as np
import pytest

from attnctl.glyph import scenes
from attnctl.glyph.scenes import Renderer, Scene, caption, font_path
from attnctl.glyph.words import ANIMALS, COLOURS, CONCEPTS, OBJECTS, WORN, is_held_out

drawn = pytest.mark.usefixtures("font")


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [Renderer().scene(seed) for seed in range(500)]


def same(one: Scene, two: Scene) -> bool:
    masks = all(np.array_equal(a.mask, b.mask) and a.box == b.box for a, b in zip(one.things, two.things, strict=True))
    return one.caption == two.caption and masks and np.array_equal(one.image, two.image)


def pairs(scene: Scene) -> list[tuple[str, str]]:
    return list(combinations([thing.concept for thing in scene.things], 2))


def test_a_missing_font_is_told_with_its_package(monkeypatch):
    monkeypatch.setattr(scenes, "_FONT_PLACES", ("/nowhere/NotoColorEmoji.ttf",))
    monkeypatch.setattr(scenes.shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        font_path()


@drawn
def test_the_same_seed_gives_the_same_scene_whatever_was_drawn_before():
    first = [Renderer().scene(seed) for seed in (3, 4, 5)]
    renderer = Renderer()
    renderer.scene(17)
    assert all(same(renderer.scene(seed), scene) for seed, scene in zip((5, 4, 3), first[::-1], strict=True))
    assert not same(first[0], first[1])
    assert not same(Renderer(stream=1).scene(3), first[0])
    things = [("cat", None), ("car", "red")]
    assert same(renderer.render(things, 3), Renderer().render(things, 3))
    assert not same(renderer.render(things, 3), renderer.render(things, 4))


@drawn
def test_train_scenes_never_show_a_held_out_pair(many):
    assert not any(is_held_out(a, b) for scene in many for a, b in pairs(scene))


@drawn
def test_held_out_scenes_always_show_one():
    held_out = [Renderer().scene(seed, "held_out") for seed in range(60)]
    assert all(any(is_held_out(a, b) for a, b in pairs(scene)) for scene in held_out)
    assert {len(scene.things) for scene in held_out} == {2, 3}
    everything = [Renderer().scene(seed, "all", 2) for seed in range(100)]
    assert 5 < sum(is_held_out(a, b) for scene in everything for a, b in pairs(scene)) < 40


@drawn
def test_numbers_of_things(many):
    share = [sum(len(scene.things) == count for scene in many) / len(many) for count in (1, 2, 3)]
    assert np.allclose(share, (0.3, 0.55, 0.15), atol=0.07)
    for count in (1, 2, 3):
        assert all(len(Renderer().scene(seed, count=count).things) == count for seed in range(5))
    only = Renderer(counts=(0, 0, 1))
    assert all(len(only.scene(seed).things) == 3 for seed in range(5))
    assert {thing.concept for scene in many for thing in scene.things} == set(CONCEPTS)
    assert all(a != b for scene in many for a, b in pairs(scene))


@drawn
def test_masks_are_disjoint_and_boxes_tight(many):
    for scene in many:
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
        assert sum(thing.mask.astype(int) for thing in scene.things).max() == 1
        for thing in scene.things:
            assert thing.mask.shape == (128, 128) and thing.mask.dtype == bool
            x0, y0, x1, y1 = (round(edge * 128) for edge in thing.box)
            inside = thing.mask[y0:y1, x0:x1]
            assert inside.sum() == thing.mask.sum() > 100
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            assert 1 <= x0 and x1 <= 127 and 1 <= y0 and y1 <= 127  # nothing is cut off


@drawn
def test_things_stay_visible(many):
    parts = [thing.visible for scene in many for thing in scene.things]
    assert 0.7 <= min(parts) < 0.95 and max(parts) == 1
    # `visible` is told by the masks: alone, nothing hides anything.
    assert all(thing.visible == 1 for scene in many if len(scene.things) == 1 for thing in scene.things)


@drawn
def test_sizes(many):
    for count, (low, high) in {1: (0.42, 0.86), 2: (0.3, 0.56), 3: (0.2, 0.41)}.items():
        longest = [
            max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1])
            for scene in many
            if len(scene.things) == count
            for thing in scene.things
        ]
        assert low <= min(longest) < max(longest) <= high
        assert max(longest) - min(longest) > 0.1


@drawn
def test_things_lie_left_right_above_and_below_whatever_the_caption_order(many):
    twos = [scene.things for scene in many if len(scene.things) == 2]
    for low, high in ((0, 2), (1, 3)):
        before = np.mean([one.box[low] + one.box[high] < two.box[low] + two.box[high] for one, two in twos])
        assert 0.4 < before < 0.6
        apart = np.mean([one.box[high] <= two.box[low] or two.box[high] <= one.box[low] for one, two in twos])
        assert 0.33 < apart < 0.85


@drawn
def test_captions_tell_the_things_and_only_true_colours(many):
    colour = "|".join(COLOURS)
    seen, tinted, named = set(), [], []
    for scene in many:
        told = re.findall(rf"(, | and | with |^)a (?:({colour}) )?({'|'.join(CONCEPTS)})\b", scene.caption)
        assert "".join(f"{joint}a {hue} {word}".replace("  ", " ") for joint, hue, word in told) == scene.caption
        assert [word for *_, word in told] == [thing.concept for thing in scene.things]
        for (_, hue, word), thing in zip(told, scene.things, strict=True):
            assert hue in ("", thing.colour)
            if word in OBJECTS:
                tinted.append(thing.colour is not None)
                named += [bool(hue)] if thing.colour else []
            else:
                assert thing.colour is None
        joints = tuple(joint for joint, *_ in told)
        seen.add(joints)
        if " with " in joints:
            assert told[0][2] in ANIMALS and told[1][2] in WORN
    assert seen == {("",), ("", " and "), ("", " with "), ("", ", ", " and ")}
    assert np.isclose(np.mean(tinted), 0.8, atol=0.06) and np.isclose(np.mean(named), 0.85, atol=0.06)


def test_caption_templates():
    assert caption([("elephant", None)]) == "a elephant"
    assert caption([("cat", None), ("crown", None)]) == "a cat with a crown"
    assert caption([("crown", "red"), ("cat", None)]) == "a red crown and a cat"
    assert caption([("cat", None), ("car", "red"), ("bow", "blue")]) == "a cat, a red car and a blue bow"


@drawn
@pytest.mark.parametrize("concept", OBJECTS)
def test_each_colour_looks_like_itself(concept):
    references = np.array(list(COLOURS.values()), float)
    for k, colour in enumerate(COLOURS):
        scene = Renderer().render([(concept, colour)], 0)
        seen = np.median(scene.image[scene.things[0].mask], axis=0)
        assert np.linalg.norm(references - seen, axis=1).argmin() == k


@drawn
def test_things_stand_off_from_the_background(many):
    for scene in many:
        background = np.median(scene.image[~np.any([thing.mask for thing in scene.things], 0)], 0)
        for thing in scene.things:
            assert np.linalg.norm(scene.image[thing.mask].mean(0) - background) > 35


@drawn
def test_the_mask_lies_on_the_thing():
    for concept in CONCEPTS:
        scene = Renderer().render([(concept, None)], 1)
        mask = scene.things[0].mask
        far = ~mask
        for axis in (0, 1):
            for _ in range(3):
                far &= np.roll(far, 1, axis) & np.roll(far, -1, axis)
        # Beyond the outline there is only the gradient: neighbours hardly differ.
        steps = np.abs(np.diff(scene.image.astype(int), axis=1)).max(-1)
        assert steps[far[:, 1:] & far[:, :-1]].max() <= 2
        assert steps[mask[:, 1:]].max() > 20


@drawn
def test_where_things_overlap_the_mask_belongs_to_the_one_that_is_seen():
    overlapping = 0
    for seed in range(40):
        scene = Renderer().render([("apple", "black"), ("bowl", "white")], seed)
        if min(thing.visible for thing in scene.things) < 0.93:
            overlapping += 1
            dark, light = (scene.image[thing.mask].mean(-1) for thing in scene.things)
            assert (dark < 128).mean() > 0.97 and (light > 128).mean() > 0.97
    assert overlapping >= 3


@drawn
def test_outlines_have_no_dark_fringe():
    pixels = np.asarray(scenes._sprites()["frog", None].image.convert("RGBA"))
    edge = (pixels[..., 3] > 40) & (pixels[..., 3] < 215)
    assert edge.sum() > 50 and np.median(pixels[edge][:, 1]) > 180


@drawn
def test_things_are_mirrored_half_of_the_time():
    def leans_left(seed: int) -> bool:
        thing = Renderer().render([("chair", None)], seed).things[0]
        rows, columns = np.nonzero(thing.mask)
        back = rows < rows.min() + np.ptp(rows) / 3
        return bool(columns[back].mean() < (columns.min() + columns.max()) / 2)

    assert 10 < sum(leans_left(seed) for seed in range(40)) < 30


@drawn
def test_requests_that_make_no_scene_are_refused():
    renderer = Renderer()
    for things in ([], [("cat", None)] * 2, [("zebra", None)], [("cat", "red")], [("car", "cyan")]):
        with pytest.raises(ValueError):
            renderer.render(things, 0)
    for split, count in (("test", None), ("train", 4), ("held_out", 1)):
        with pytest.raises(ValueError):
            renderer.scene(0, split, count)


@drawn
def test_render_draws_what_is_named_in_that_order():
    scene = Renderer().render([("bench", "white"), ("mouse", None), ("apple", None)], 2)
    assert [(thing.concept, thing.colour) for thing in scene.things] == [
        ("bench", "white"),
        ("mouse", None),
        ("apple", None),
    ]
    assert scene.caption == "a white bench, a mouse and a apple"
