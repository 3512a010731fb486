"""What users of A-STAR did that went wrong once: batches of different prompts, regions, numbers, odd arguments."""

import diffusers
import numpy as np
import pytest
import tiny
import torch
from contract_table import close

from attnctl import attach
from attnctl.app.control_text import parse_control
from attnctl.app.trace_pictures import loss_curves
from attnctl.errors import ControlError, UnsupportedPipelineError
from attnctl.pipelines import AStarPipeline
from attnctl.processors import AStar, Binding, Excitation, Retention, Segregation
from attnctl.words.phrases import tokens

LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
DRAW = {"num_inference_steps": 2, "height": 32, "width": 48, "output_type": "latent"}
PROMPTS = ["a red cat and a blue dog", "a blue cat and a red dog"]


def seeds(count):
    return [torch.Generator().manual_seed(k) for k in range(count)]


def losses(report, trace=0):
    return report.to_dict()["traces"][trace]["steps"][-1]["evaluations"][-1]["losses"]


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_prompt_of_a_list_is_bound_as_it_would_be_alone(family):
    pipe, settings = tiny.FAMILIES[family](), DRAW | ({} if family in ("sd1", "sdxl") else {"max_sequence_length": 16})
    astar = AStarPipeline.from_pipe(pipe, relative=0.05)
    said = {"cat": ["red", "blue"], "dog": ["red", "blue"]}
    found = astar(PROMPTS, ["cat", "dog"], said, num_images_per_prompt=2, generator=seeds(4), **settings)
    bound = [set(losses(found.report, trace)["binding"]) for trace in range(2)]
    assert bound == [{"red | cat", "blue | dog"}, {"blue | cat", "red | dog"}]
    for number, (prompt, own) in enumerate(zip(PROMPTS, ("red", "blue"), strict=True)):
        other = "blue" if own == "red" else "red"
        alone = astar(
            prompt, ["cat", "dog"], {"cat": own, "dog": other}, generator=seeds(4)[2 * number :][:2],
            num_images_per_prompt=2, **settings,
        )  # fmt: skip
        assert close(found.images[2 * number : 2 * number + 2], alone.images)


def test_modifiers_stay_where_no_noun_claims_them():
    astar = AStarPipeline.from_pipe(tiny.sd1())
    prompts = ["a red cat and a dog", "a cat and a dog, all red"]
    found = astar(prompts, ["cat", "dog"], {"cat": "red", "dog": "red"}, generator=seeds(2), **DRAW)
    bound = [set(losses(found.report, trace)["binding"]) for trace in range(2)]
    assert bound == [{"red | cat"}, {"red | cat", "red | dog"}]


def test_a_modifier_stands_before_whole_words_alone():
    astar = AStarPipeline.from_pipe(tiny.sd1())
    prompts = ["a red catfish, a cat and a dog", "a red cat and a dog"]
    found = astar(prompts, ["cat", "dog"], {"cat": "red", "dog": "red"}, generator=seeds(2), **DRAW)
    bound = [set(losses(found.report, trace)["binding"]) for trace in range(2)]
    assert bound == [{"red | cat", "red | dog"}, {"red | cat"}]


def test_a_single_bond_among_the_settings_is_one_bond():
    astar = AStarPipeline.from_pipe(tiny.sd1(), bonds="black dog")
    found = astar("a cat and a black dog", ["cat", "dog"], generator=seeds(1), **DRAW)
    assert set(losses(found.report)["binding"]) == {"black | dog"}


def test_subjects_are_read_prompt_by_prompt():
    pytest.importorskip("HanTa")
    astar = AStarPipeline.from_pipe(tiny.sd1())
    found = astar(["a cat and a cat", "a cat and a dog"], generator=seeds(2), **DRAW)
    assert found.subjects == ("cat#1", "cat#2", "cat", "dog")
    assert [set(losses(found.report, trace)["segregation"]) for trace in range(2)] == [{"cat#1 | cat#2"}, {"cat | dog"}]


def test_a_control_acts_on_its_own_images_alone():
    pipe = tiny.sd1()
    plain = tiny.draw(pipe, ["a cat and a dog"] * 3)
    with attach(pipe, Segregation("cat", "dog", images=1, relative=0.1, window=(0, 1))) as run:
        found = tiny.draw(pipe, ["a cat and a dog"] * 3)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[2]) and not close(found[1], plain[1])
    assert run.report.to_dict()["traces"][0]["image_forwards"] == 2
    with attach(pipe, Segregation("cat", "dog", images=(2, 0, 1), relative=0.1)):
        every = tiny.draw(pipe, ["a cat and a dog"] * 3)
    with attach(pipe, Segregation("cat", "dog", relative=0.1)):
        assert torch.equal(tiny.draw(pipe, ["a cat and a dog"] * 3), every)
    with (
        attach(pipe, Segregation("cat", "dog", images=(0, 3))),
        pytest.raises(ControlError, match="no image 3 .* 3 are"),
    ):
        tiny.draw(pipe, ["a cat and a dog"] * 3)


def test_a_look_ahead_is_of_the_images_that_are_asked_for():
    pipe = tiny.sd1()
    settings = {"look_ahead": 2, "peak_target": 0.9}
    prompts = ["a cat and a dog"] * 3
    with attach(pipe, Segregation("cat", "dog", **settings)) as run:
        tiny.draw(pipe, prompts)
    every = run.report.to_dict()["traces"][0]["look_ahead"]
    with attach(pipe, Segregation("cat", "dog", images=(2, 0), **settings)) as run:
        tiny.draw(pipe, prompts)
    some = run.report.to_dict()["traces"][0]["look_ahead"]
    assert every["forwards"] == some["forwards"] == 3 and some["peaks"][1] is None
    assert some["peaks"][0] == pytest.approx(every["peaks"][0], abs=1e-5)
    assert some["peaks"][2] == pytest.approx(every["peaks"][2], abs=1e-5)


# --- regions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"look_ahead": 2, "peak_target": 0.001}, {"peak_target": 0.001}])
def test_a_picture_with_a_region_is_never_left_alone(settings):
    pipe, prompts = tiny.sd1(), ["a cat and a dog", "a bird and a dog"]
    control = Retention("dog", masks={"cat": LEFT}, **settings)
    with attach(pipe, control) as run:
        tiny.draw(pipe, prompts)
    moved = [update for step in run.report.to_dict()["traces"][0]["steps"] for update in step["updates"]]
    assert [update["images"] for update in moved] == [[0], [0]]


def test_regions_have_a_weight_of_their_own():
    pipe = tiny.sd1()

    def drawn(**settings):
        with attach(pipe, AStar("cat", "dog", masks={"cat": LEFT}, **settings)) as run:
            latents = tiny.draw(pipe)
        return latents, run.report.to_dict()["traces"][0]["steps"][0]["evaluations"][0]

    both, read = drawn(placing=1.0)
    assert read["losses"]["retention"]["dog"] == [None] and read["losses"]["retention"]["cat"][0] > 0
    away, none = drawn(placing=0.0)
    assert none["losses"]["retention"]["cat"] == [None] and not torch.equal(both, away)
    heavy, more = drawn(placing=3.0, retention=0.0)
    gained = 2 * read["losses"]["retention"]["cat"][0]
    assert more["total"][0] == pytest.approx(read["total"][0] + gained, rel=1e-4) and not torch.equal(heavy, both)


def test_what_a_call_says_comes_before_the_settings_and_beside_them():
    astar = AStarPipeline.from_pipe(tiny.sd1(), masks={"cat": LEFT}, bonds=(("a", "cat"),))
    plain = AStarPipeline.from_pipe(tiny.sd1())
    here, there = (
        one("a red cat and a dog", ["cat", "dog"], generator=seeds(1), **more, **DRAW)
        for one, more in (
            (astar, {"masks": {"cat": RIGHT}, "modifiers": {"cat": "red"}}),
            (plain, {"masks": {"cat": RIGHT}, "modifiers": {"cat": ["a", "red"]}}),
        )
    )
    assert torch.equal(here.images, there.images)
    assert set(losses(here.report)["binding"]) == {"a | cat", "red | cat"}


@pytest.mark.parametrize("box", [(0.5, 0, 1.01, 1), (0, 0, 1, 2), (0, 0, 1.5, 1.5)])
def test_shares_that_pass_the_end_are_no_pixels(box):
    with pytest.raises(ControlError, match="a box in shares of the picture ends at 1"):
        Retention(masks={"cat": box})


# --- phrases ----------------------------------------------------------------------------------------------------------


def test_numbered_phrases_beside_the_plain_one_are_refused_and_not_passed_over():
    with (
        attach(tiny.sd1(), Segregation("cat", "cat#1", "cat#2")) as run,
        pytest.raises(ControlError, match="cannot be kept apart: they share words"),
    ):
        tiny.draw(run.pipe, "a cat and a cat")


def test_a_numbered_bond_is_of_that_phrase():
    pipe = tiny.sd1()
    with attach(pipe, Binding("red car#2", "red car#1", relative=0.1)) as run:
        tiny.draw(pipe, "a car, a red car and a red car")
    assert set(losses(run.report)["binding"]) == {"red | car#2", "red | car#1"}
    found = run.run.state(run.controls[0]).terms[0]
    rows = [tokens(run.run, phrase, 0) for phrase in ("red car#2", "red car#1")]
    read = run.run.state(run.controls[0]).phrase_tokens.tokens[0]
    for bond, own in enumerate(rows):
        bound = read[(found.modifiers[0, bond] + found.nouns[0, bond]).bool()].tolist()
        assert sorted(bound) == own


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": None}, "prompt is a text or a list of texts"),
        ({"prompt": []}, "prompt is a text or a list"),
        ({"subjects": None}, "subjects are several phrases, or 'auto'; not None"),
        ({"subjects": "cat"}, "subjects are several phrases, or 'auto'; not 'cat'"),
        ({"modifiers": ["red car"]}, r"modifiers are a dict, such as \{'car': 'red'\}; not \['red car'\]"),
        ({"modifiers": {"cat": None}}, "the modifiers of 'cat' are a word or several, not None"),
        ({"masks": [LEFT]}, "masks are a dict"),
        ({"controls": Segregation("cat", "dog")}, "controls are a list"),
    ],
)
def test_arguments_of_another_kind_are_told(given, told):
    astar = AStarPipeline.from_pipe(tiny.sd1())
    with pytest.raises(ControlError, match=told):
        astar(**{"prompt": "a cat and a dog", "subjects": ["cat", "dog"]} | given, **DRAW)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"updates": 1.5}, "updates is a whole number, not 1.5"),
        ({"updates": float("nan")}, "updates is a whole number"),
        ({"look_ahead": 2.0, "peak_target": 0.2}, "look_ahead is a whole number"),
        ({"loss_target": "x"}, "loss_target is a finite number"),
        ({"loss_target": float("nan")}, "loss_target is a finite"),
        ({"keep_norm": "no"}, "keep_norm is True or False"),
        ({"refine": {0.5: 0.2}}, "refine holds pairs"),
        ({"refine": {-1: 0.2}}, "refine holds pairs"),
        ({"refine": {0: float("nan")}}, "refine holds pairs"),
        ({"window": 0.5}, "window is"),
        ({"images": ()}, "images are numbers of images"),
        ({"images": (-1,)}, "images are numbers"),
    ],
)
def test_settings_of_another_kind_are_told(settings, told):
    with pytest.raises(ControlError, match=told):
        Excitation("cat", **settings)


@pytest.mark.parametrize("bonds", [3, [3]])
def test_bonds_of_another_kind_are_told(bonds):
    with pytest.raises(ControlError, match="bond"):
        AStar("cat", "dog", bonds=bonds)


def test_binding_may_be_all_there_is():
    astar = AStarPipeline.from_pipe(tiny.sd1(), segregation=0, retention=0)
    found = astar("a red cat and a dog", ["cat", "dog"], {"cat": "red"}, generator=seeds(1), **DRAW)
    assert set(losses(found.report)) == {"binding"}
    with pytest.raises(ControlError, match="AStar has nothing to do"):
        astar("a red cat and a dog", ["cat", "dog"], generator=seeds(1), **DRAW)


def test_a_slip_in_a_setting_is_not_given_to_diffusers():
    with pytest.raises(ControlError, match="no setting 'lookahead'; did you mean 'look_ahead'"):
        AStarPipeline.from_pretrained("glyph-sd", lookahead=2, peak_target=0.2)
    with pytest.raises(UnsupportedPipelineError):
        AStarPipeline.from_pipe("glyph-sd")


def test_embeddings_are_told_by_the_prompt():
    pipe = tiny.sd1()
    cond, uncond = pipe.encode_prompt("a cat and a dog", "cpu", 1, True)
    astar = AStarPipeline.from_pipe(pipe)
    found = astar(
        "a cat and a dog", ["cat", "dog"], prompt_embeds=cond, negative_prompt_embeds=uncond, generator=seeds(1), **DRAW
    )
    want = astar("a cat and a dog", ["cat", "dog"], generator=seeds(1), **DRAW)
    assert torch.equal(found.images, want.images)


def test_pipelines_whose_first_argument_is_a_picture():
    pipe = tiny.quiet(diffusers.FluxKontextPipeline(**tiny.flux().components))
    settings = {"num_inference_steps": 2, "max_sequence_length": 16, "output_type": "latent", "height": 32, "width": 48}
    found = AStarPipeline.from_pipe(pipe, window=(0, 1))(
        "a cat and a dog", ["cat", "dog"], generator=seeds(1), max_area=32 * 48, _auto_resize=False,
        image=torch.rand(1, 3, 32, 48), **settings,
    )  # fmt: skip
    assert found.report.to_dict()["traces"][0]["updates"] == 2


# --- on the command line ----------------------------------------------------------------------------------------------


def test_refinement_is_written_as_a_dict_as_well():
    known = {"Excitation": Excitation}
    written = parse_control("excitation(cat, refine={0: 0.95, 10: 0.5})", known)
    assert (
        written.refine
        == ((0, 0.95), (10, 0.5))
        == parse_control("excitation(cat, refine=[[0, 0.95], [10, 0.5]])", known).refine
    )


def test_curves_of_losses_below_zero_are_in_the_picture():
    steps = [
        {"step": k, "evaluations": [{"images": [0], "losses": {"binding": {"red | car": [-1.0 - k]}}}]}
        for k in range(4)
    ]
    picture = loss_curves([{"control": "Binding", "steps": steps}], 0)
    pixels = np.asarray(picture).astype(int)
    assert ((pixels[..., 2] > 150) & (pixels[..., 0] < 80)).sum() > 300  # the curve itself, not only its legend
