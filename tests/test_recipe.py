"""Recipes: kept in the PNG, read back, and honest about what has changed."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from attnctl.app import recipe as recipes
from attnctl.app.recipe import Recipe, RecipeError, pixel_hash, read, save, weights_hash

RECIPE = Recipe(
    model="glyph-sd",
    weights="w",
    prompt="a cät “and” a dog",
    negative=None,
    seed=2**40,
    steps=20,
    width=128,
    height=96,
    guidance=5.0,
    controls=("segregation(cat, dog)",),
    maps=("cat",),
    device="cpu",
    dtype="float32",
    threads=2,
    versions={"torch": "2.13.0"},
)


def picture(colour="red"):
    return Image.new("RGB", (12, 8), colour)


def test_a_saved_picture_gives_back_pixels_and_recipe(tmp_path):
    save(picture(), tmp_path / "new" / "one.png", RECIPE)
    found, recipe = read(tmp_path / "new" / "one.png")
    assert found.tobytes() == picture().tobytes()
    assert recipe == replace(RECIPE, pixels=pixel_hash(picture()))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.png"]


def test_pixel_hash_sees_one_pixel_and_the_shape():
    other = picture()
    other.putpixel((3, 3), (255, 0, 1))
    turned = picture().transpose(Image.Transpose.ROTATE_90)
    assert len({pixel_hash(one) for one in (picture(), other, turned)}) == 3


def test_digest_names_the_drawing_not_the_picture_of_it():
    assert RECIPE.digest() == replace(RECIPE, shows="comparison", pixels="p").digest()
    assert RECIPE.digest() != replace(RECIPE, seed=1).digest()


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save(picture(), tmp_path / "a" / "b" / "one.png", RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_picture_that_was_there(tmp_path, monkeypatch):
    save(picture(), tmp_path / "one.png", RECIPE)
    monkeypatch.setattr(recipes.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(picture("blue"), tmp_path / "one.png", RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]
    assert read(tmp_path / "one.png")[0].getpixel((0, 0)) == (255, 0, 0)


def test_what_cannot_be_read_is_told_apart(tmp_path):
    with pytest.raises(RecipeError, match="there is no such file"):
        read(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(RecipeError, match="it is not a whole picture"):
        read(tmp_path / "text.png")
    picture().save(tmp_path / "bare.png")
    with pytest.raises(RecipeError, match="carries no attnctl recipe"):
        read(tmp_path / "bare.png")


def test_half_a_picture_is_refused(tmp_path):
    save(Image.effect_noise((64, 64), 90), tmp_path / "one.png", RECIPE)
    content = (tmp_path / "one.png").read_bytes()
    (tmp_path / "one.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(RecipeError, match="it is not a whole picture"):
        read(tmp_path / "one.png")


def test_changed_pixels_are_noticed(tmp_path):
    path = tmp_path / "one.png"
    save(picture(), path, RECIPE)
    info = recipes.PngInfo()
    info.add_itxt(recipes.CHUNK, Image.open(path).info[recipes.CHUNK])
    picture("blue").save(path, pnginfo=info)
    with pytest.raises(RecipeError, match="was changed since it was drawn"):
        read(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": "x"}'])
def test_broken_recipe(text):
    with pytest.raises(RecipeError, match="the recipe cannot be read"):
        Recipe.from_json(text)


def test_differences_name_versions_and_weights():
    assert RECIPE.differences({"torch": "2.13.0"}, "w") == []
    assert RECIPE.differences({"torch": "2.14.0"}, "v") == [
        "drawn with torch 2.13.0, redrawn with torch 2.14.0",
        "the weights of glyph-sd are not those it was drawn with",
    ]


class Pipe:
    def __init__(self, **components):
        self.components = components


def test_weights_hash_sees_every_module_and_every_type():
    layer = torch.nn.Linear(2, 2)
    first = weights_hash(Pipe(unet=layer, tokenizer=object(), vae=None))
    assert weights_hash(Pipe(unet=layer)) == first
    assert weights_hash(Pipe(vae=layer)) != first
    assert weights_hash(Pipe(unet=torch.nn.Linear(2, 2))) != first
    with torch.no_grad():
        layer.bias[1] += 1e-3
    assert weights_hash(Pipe(unet=layer)) != first
    weights_hash(Pipe(unet=torch.nn.BatchNorm1d(2).to(torch.bfloat16)))  # a scalar buffer, and a type numpy lacks


@pytest.mark.parametrize(
    ("name", "value"),
    [("threads", 0), ("threads", "x"), ("threads", 1_000_000), ("width", 100_000), ("height", 8193), ("steps", 10**9)]
    + [("controls", None), ("shows", "foo"), ("shows", []), ("versions", [])]
    + [("model", 3), ("seed", "1"), ("seed", -1), ("seed", True), ("steps", "abc"), ("guidance", "3"), ("width", 0)],
)
def test_a_recipe_of_wrong_types_is_refused(name, value):
    text = json.dumps(json.loads(RECIPE.to_json()) | {name: value})
    with pytest.raises(RecipeError, match=f"the recipe cannot be read: {name} is "):
        Recipe.from_json(text)
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE


def test_a_picture_gets_the_rights_that_the_process_gives(tmp_path, monkeypatch):
    import os

    before = os.umask(0o027)
    try:
        monkeypatch.setattr(recipes.os, "umask", lambda _: pytest.fail("other threads would make files meanwhile"))
        save(picture(), tmp_path / "one.png", RECIPE)
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert (tmp_path / "one.png").stat().st_mode & 0o777 == 0o640


def test_other_tools_read_the_settings(tmp_path):
    save(picture(), tmp_path / "one.png", replace(RECIPE, negative="a bird,\nblue", sampler="DDIM"))
    assert Image.open(tmp_path / "one.png").info["parameters"] == (
        "a cät “and” a dog\nNegative prompt: a bird,\nblue\n"
        "Steps: 20, Sampler: DDIM, CFG scale: 5, Seed: 1099511627776, Size: 128x96, Model: glyph-sd"
    )
    save(picture(), tmp_path / "two.png", replace(RECIPE, width=None, height=None, guidance=None, shows="plain"))
    assert Image.open(tmp_path / "two.png").info["parameters"] == (
        "a cät “and” a dog\nSteps: 20, Seed: 1099511627776, Size: 12x8, Model: glyph-sd"
    )
    named = replace(RECIPE, model="/models/a, b: c\nd", width=None, height=None, shows="maps")
    save(picture(), tmp_path / "three.png", named)
    assert Image.open(tmp_path / "three.png").info["parameters"].endswith(', Model: "a, b: c\\nd"')


def test_a_recipe_of_before_there_were_samplers_is_read():
    content = json.loads(RECIPE.to_json())
    del content["sampler"]
    assert Recipe.from_json(json.dumps(content)) == RECIPE
    for wrong in (3, []):
        with pytest.raises(RecipeError, match="sampler is"):
            Recipe.from_json(json.dumps(content | {"sampler": wrong}))
