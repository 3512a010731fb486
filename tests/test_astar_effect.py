"""What A-STAR as written does to pictures of the embedded model: it repairs far more than it breaks, and it places."""

import cases as cases_of
import effect
import pytest
import torch

import attnctl
from attnctl.glyph import judge
from attnctl.glyph.words import benchmark
from attnctl.pipelines import AStarPipeline
from attnctl.processors import AStar


@pytest.fixture(scope="module")
def pipe():
    pipe = attnctl.load("glyph-sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_by_default_it_repairs_three_times_what_it_breaks(pipe):
    """The benchmark's fixed subset: 16 prompts of each category, a picture each, nothing chosen by their results."""
    prompts, eye = benchmark(), judge.load()
    (control,) = effect.CONDITIONS["astar"](prompts[:1])
    assert control == AStar(*control.phrases)  # no setting
    cases = [cases_of.Case(k, 0, name) for name in ("none", "astar") for k in cases_of.subset(prompts, each=16)]
    results = {}
    for group in cases_of.batches(cases, 12):
        images = effect.draw_batch(pipe, prompts, group, 20, 3.0)
        for case, reading in zip(group, eye.read(images), strict=True):
            results[case.name] = effect.judged(prompts[case.prompt], reading)
    told = effect.summary(prompts, cases, results)["all"]
    change = told["all right"]["astar"]["against none"]
    repaired, broken = (change[kind]["hits"] for kind in ("repaired", "broken"))
    assert repaired >= max(3 * broken, 6), (repaired, broken)
    assert 0.9 < told["thing area"]["astar"]["value"] < 1.15  # nothing shrinks, as once it did


@pytest.mark.slow
def test_masks_place_beside_modifiers(pipe):
    """Every fourth prompt of an animal and a coloured object, eight of them: the animal left, the object right."""
    prompts = [one for one in benchmark() if one.category == "animal-object" and one.things[1][1]][::4][:8]
    astar, eye, placed = AStarPipeline.from_pipe(pipe), judge.load(), 0
    for number, prompt in enumerate(prompts):
        (animal, _), (thing, colour) = prompt.things
        noise = torch.Generator().manual_seed(number)
        masks = {animal: (0, 0, 0.5, 1), thing: (0.5, 0, 1, 1)}
        output = astar(
            prompt.text, [animal, thing], {thing: colour}, masks, num_inference_steps=20, guidance_scale=3.0,
            generator=noise,
        )  # fmt: skip
        seen = {one.concept: one.box for one in eye.read(output.images)[0].things}
        middle = {name: (box[0] + box[2]) / 2 for name, box in seen.items()}
        placed += middle.get(animal, 1) < 0.5 < middle.get(thing, 0)
    assert placed >= 5, placed
