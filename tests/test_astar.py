import json
from types import SimpleNamespace

import diffusers
import pytest
import tiny
import torch

from attnctl import attach
from attnctl.errors import ControlError, PhraseError
from attnctl.processors import AStar, Binding, Control, Excitation, Retention, Segregation, TokenMaps
from attnctl.processors.binding import binding_loss
from attnctl.processors.latents.map_gradient import PhraseTokens
from attnctl.processors.latents.masks import binarise
from attnctl.processors.retention import Keep, retention_loss
from attnctl.processors.segregation import segregation_loss

TEXTS = ["a cat and a red dog", "a red dog and a cat"]


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd1()


class Views:
    """Mixed into a control: keeps what its losses were shown."""

    def losses(self):
        self._set(views=[])
        found = super().losses()
        first = found[0]
        read = first.read

        def keep(view):
            reading = read(view)
            self.views.append(view)
            return reading

        first.read = keep
        return found


def trace_of(pipe, control, texts=TEXTS, steps=3):
    with attach(pipe, control) as run:
        tiny.draw(pipe, texts, steps=steps)
    return run.run.state(control)


# --- the sum of the paper ---------------------------------------------------------------------------------------------


def test_one_gradient_of_all_losses_as_written(pipe):
    class Seen(Views, AStar):
        pass

    settings = {"maps": "attend-and-excite", "rule": "otsu", "retention": 0.5, "binding": 1, "window": (0, 1)}
    control = Seen("cat", "dog", bonds=("red dog",), **settings)
    trace = trace_of(pipe, control)
    assert len(trace.updates) == len(control.views) == 3
    before = None
    for view, one in zip(control.views, trace.evaluations, strict=True):
        maps = view.maps.detach()  # cat, dog, red dog
        want = segregation_loss(maps, [(0, 1)])
        if before is not None:
            want += 0.5 * (retention_loss(maps[:, :2], binarise(before[:, :2], "otsu")) - 2 * 0.5)
        red, dog = [[5], [2]], [[6], [3]]  # rows of the text, from 1
        shares = view.tokens.detach()
        for image in range(2):
            bond = torch.stack([shares[image, red[image][0] - 1], shares[image, dog[image][0] - 1]])[None]
            rest = [row for row in range(6) if row + 1 not in (red[image][0], dog[image][0])]
            want[image] += binding_loss(bond, [(0, 1)], shares[image, rest][None], torch.ones(1, 1, 4))[0]
        torch.testing.assert_close(one.excess, want, atol=1e-5, rtol=1e-4)
        before = maps


def test_alone_each_method_is_what_it_is_in_the_sum(pipe):
    pairs = (
        (AStar("cat", "dog", retention=0), Segregation("cat", "dog")),
        (AStar("cat", "dog", segregation=0, retention=1, window=(0, 1)), Retention("cat", "dog")),
        # no pair: its own adjective
        (AStar("red", "dog", bonds=("red dog",), retention=0, binding=1, window=(0, 1)), Binding("red dog")),
    )
    for one, other in pairs:
        for a, b in zip(trace_of(pipe, one).losses, trace_of(pipe, other).losses, strict=True):
            torch.testing.assert_close(a, b)


def test_weights_and_phrases_are_checked():
    for settings in ({"segregation": -1.0}, {"segregation": 0, "retention": 0}, {"rule": "median"}, {"share": 0.0}):
        with pytest.raises(ControlError):
            AStar("cat", "dog", **settings)
    with pytest.raises(ControlError, match="AStar needs two phrases"):
        AStar("cat")
    for bond in ("car", ("red", "red"), ("a", "red", "car"), 3):
        with pytest.raises((ControlError, TypeError)):
            Binding(bond)
    assert Binding("a  red car", ("red", "car")).phrases == ("a red car", ("red", "car"))


# --- masks ------------------------------------------------------------------------------------------------------------


def keep_of(images=2, **settings):
    keep = Keep(("cat", "dog"), **settings)
    run = SimpleNamespace(whole=(32, 48), view=(0.0, 0.0, 1.0, 1.0))
    rows = torch.tensor([[2, 5]]).expand(images, 2)
    found = PhraseTokens(
        rows, torch.ones_like(rows, dtype=torch.bool), torch.eye(2).expand(images, 2, 2), torch.eye(2)[None, :, None]
    )
    keep.begin(run, ("cat", "dog"), [], found)
    return keep


def view_of(maps, images, preparation="mean"):
    return SimpleNamespace(maps=maps, images=images, preparation=preparation)


def test_masks_roll_with_steps_and_not_with_updates():
    keep, maps = keep_of(rule="half"), torch.rand(4, 2, 2, 6, 5)
    keep.begin_step(0)
    values, counts = keep.parts(view_of(maps[0], [0, 1]))
    assert not counts.any() and not values.any()  # nothing to keep yet
    assert not keep.parts(view_of(maps[1], [0, 1]))[1].any()  # a second update of the same step
    keep.begin_step(1)
    values, counts = keep.parts(view_of(maps[2], [0, 1]))
    assert counts.all()
    torch.testing.assert_close(values.sum(-1), retention_loss(maps[2], binarise(maps[1])))  # the last that was read
    values, _ = keep.parts(view_of(maps[3][1:], [1]))  # one image goes on alone, against the same mask
    torch.testing.assert_close(values.sum(-1), retention_loss(maps[3], binarise(maps[1]))[1:])
    keep.begin_step(2)
    latest = torch.stack([maps[2][0], maps[3][1]])
    values, _ = keep.parts(view_of(maps[0], [0, 1]))
    torch.testing.assert_close(values.sum(-1), retention_loss(maps[0], binarise(latest)))


def test_a_region_counts_from_the_first_step_and_stays():
    keep, maps = keep_of(masks=(("dog", (24, 0, 48, 32)),)), torch.rand(2, 2, 4, 6)
    right = torch.zeros(4, 6)
    right[:, 3:] = 1
    for step in range(3):
        keep.begin_step(step)
        values, counts = keep.parts(view_of(maps, [0, 1]))
        assert counts.tolist() == [[step > 0, True]] * 2
        torch.testing.assert_close(values[:, 1], retention_loss(maps[:, 1:], right.expand(2, 1, 4, 6)))


def test_shares_are_compared_with_shares():
    keep = keep_of(masks=(("cat", (0, 0, 0.5, 1)),))
    mask = torch.zeros(2, 2, 4, 6)
    mask[:, 0, :, :3] = 1
    keep.begin_step(0)
    values, counts = keep.parts(view_of(mask / 12, [0, 1], "share"))
    assert (
        values.tolist() == [[0.5, 0]] * 2 and counts.tolist() == [[True, False]] * 2
    )  # a perfect map has the least loss


def test_steps_are_counted_and_not_timesteps():
    """PNDM gives one timestep twice; its second step has a mask already, and the first none."""
    pipe = tiny.sd1()
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    trace = trace_of(pipe, Retention("cat", "dog"), steps=4)
    times = pipe.scheduler.timesteps.tolist()
    assert len(times) == 5 and len(set(times)) == 4
    known = [one.parts["retention"].isfinite().all().item() for one in trace.evaluations]
    assert known == [False, True, True, True, True]
    assert trace.updates[0].share.eq(0).all() and (trace.updates[1].share > 0).all()


def test_a_region_pulls_its_word_into_it(pipe):
    control = Retention(masks={"cat": (0, 0, 0.5, 1)}, relative=0.01, updates=4, window=(0, 0.5))
    losses = torch.stack(trace_of(pipe, control, steps=2).losses)
    assert losses.shape == (4, 2) and (losses.diff(dim=0) < 0).all()


def test_regions_are_checked():
    for masks in (3, {"cat": "left"}, (("cat",),), {3: (0, 0, 1, 1)}, (("cat", (0, 0, 1, 1)),) * 2):
        with pytest.raises(ControlError):
            Retention(masks=masks)
    with pytest.raises(ControlError, match="Retention needs a phrase"):
        Retention()


# --- the loop ---------------------------------------------------------------------------------------------------------


class Moves(Control):
    def before_denoise(self, step):
        self.seen.append(torch.equal(step.latents[0], step.sample.base[0]))


def test_an_image_that_has_enough_stops_costing(pipe):
    losses = trace_of(pipe, Segregation("cat", "dog", relative=1e-3), steps=1).losses[0]
    middle = float(losses.mean())
    low, high = int(losses.argmin()), int(losses.argmax())
    trace = trace_of(pipe, Segregation("cat", "dog", relative=1e-3, updates=3, loss_target=middle), steps=1)
    assert [update.images for update in trace.updates] == [(high,)] * 3
    assert [one.images for one in trace.evaluations] == [(0, 1), (high,), (high,)]
    every = trace_of(pipe, Segregation("cat", "dog", relative=1e-3, updates=3), steps=1)
    for one, other in zip(trace.losses, every.losses, strict=True):  # the other is as it would have been
        torch.testing.assert_close(one[high], other[high], atol=1e-6, rtol=1e-4)
        assert one[low].isnan()
    moves = Moves()
    moves.seen = []
    still = Segregation("cat", "dog", updates=3, loss_target=1.0, window=(0, 1))
    with attach(pipe, still, moves) as run:
        tiny.draw(pipe, TEXTS, steps=2)
    assert moves.seen == [True, True] and len(run.run.state(still).evaluations) == 2


def test_an_image_whose_phrases_are_all_seen_stops_costing(pipe):
    free = trace_of(pipe, Segregation("cat", "dog", relative=1e-3, look_ahead=0), steps=1)
    peaks = free.evaluations[0].peaks
    sites = [site.layer for site in free.sites]
    kept = TokenMaps("cat", "dog", keep="layer")
    with attach(pipe, kept) as run:
        tiny.draw(pipe, TEXTS, steps=1)
    read = [[run.maps.get(word, layer=layer) for layer in sites] for word in ("cat", "dog")]
    by_hand = [torch.stack(maps).mean(0).amax((1, 2)) for maps in read]
    torch.testing.assert_close(peaks, torch.minimum(*by_hand), atol=1e-6, rtol=1e-4)
    low = int(peaks.argmin())
    trace = trace_of(
        pipe,
        Segregation("cat", "dog", relative=1e-3, look_ahead=0, updates=2, peak_target=float(peaks.mean())),
        steps=1,
    )
    assert [update.images for update in trace.updates] == [(low,)] * 2
    one = trace.to_dict()["steps"][0]["evaluations"][0]
    assert one["peaks"] == pytest.approx(peaks.tolist())
    for wrong in (0.0, -1.0, float("nan"), 1.5):
        with pytest.raises(ControlError, match="peak_target is a probability"):
            Segregation("cat", "dog", peak_target=wrong)


def test_bfloat16_finds_nearly_the_same_gradient(pipe):
    moved = []
    for bfloat16 in (False, True):
        with attach(pipe, AStar("cat", "dog", relative=0.5, bfloat16=bfloat16)):
            moved.append(tiny.draw(pipe, TEXTS, steps=1))
    plain = tiny.draw(pipe, TEXTS, steps=1)
    one, other = ((found - plain).flatten(1) for found in moved)
    assert not torch.equal(one, other) and torch.cosine_similarity(one, other).min() > 0.98


def test_checkpointing_changes_the_memory_only(pipe):
    plain, saving = (
        trace_of(pipe, AStar("cat", "dog", bonds=("red dog",), checkpoint=checkpoint)) for checkpoint in (False, True)
    )
    for one, other in zip(plain.losses, saving.losses, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_side_by_side_they_make_an_update_each(pipe):
    one, other = Segregation("cat", "dog", window=(0, 1)), Excitation("cat", "dog")
    with attach(pipe, one, other) as run:
        tiny.draw(pipe, TEXTS)
    assert len(run.run.state(one).updates) == len(run.run.state(other).updates) == 2


def test_what_an_image_lacks(pipe):
    texts = ["a cat and a dog", "a red dog"]
    trace = trace_of(pipe, AStar("cat", "dog", bonds=("red dog",)), texts)
    first = trace.to_dict()["steps"][0]["evaluations"][0]["losses"]
    assert first["segregation"]["cat | dog"][1] is None and first["segregation"]["cat | dog"][0] > 0
    assert first["binding"]["red | dog"][0] is None and first["binding"]["red | dog"][1] is not None
    with attach(pipe, Binding("red dog")), pytest.raises(PhraseError, match="'red dog' is not in the prompt"):
        tiny.draw(pipe, texts)


def test_the_report_is_plain_data_and_says_what_was_spent(pipe):
    control = AStar("cat", "dog", updates=2, retention=1, window=(0, 1))
    with attach(pipe, control) as run:
        assert run.report.traces == ()
        tiny.draw(pipe, TEXTS, steps=3)
    report = json.loads(json.dumps(run.report.to_dict()))
    (told,) = report["traces"]
    assert told["control"] == "AStar" and told["forwards"] == told["updates"] == 6 and told["image_forwards"] == 12
    assert [step["step"] for step in told["steps"]] == [0, 1, 2] and told["skipped"] == [0, 0]
    evaluations, updates = told["steps"][1]["evaluations"], told["steps"][1]["updates"]
    assert len(evaluations) == len(updates) == 2
    losses = evaluations[0]["losses"]
    assert set(losses) == {"segregation", "retention"} and set(losses["retention"]) == {"cat", "dog"}
    total = [
        sum(values) for values in zip(*losses["retention"].values(), losses["segregation"]["cat | dog"], strict=True)
    ]
    assert evaluations[0]["total"] == pytest.approx(total, abs=1e-6) and min(total) > 0
    assert updates[0]["share"] == pytest.approx([0.02, 0.02], abs=1e-4)
    assert told["sites"] and "AStar: 6 updates" in str(run.report)


@pytest.mark.parametrize("preparation", ["attend-and-excite", "attend-and-excite-padded", "share"])
def test_every_family_takes_every_preparation(preparation):
    for family in ("sdxl", "sd35", "flux"):
        other = tiny.FAMILIES[family]()
        control = AStar("cat", "dog", bonds=("red dog",), maps=preparation)
        trace = trace_of(other, control, steps=2)
        assert all(one.excess.isfinite().all() for one in trace.evaluations) and not trace.skipped.any()
        assert all((update.share > 0).all() for update in trace.updates)


def test_a_region_for_a_noun_counts_where_the_phrase_is_longer():
    pipe, texts = tiny.sd1(), ["a red cat and a dog", "a cat and a dog"]
    control = AStar("red cat", "cat", "dog", masks={"cat": (0, 0, 0.5, 1)})
    with attach(pipe, control) as attachment:
        tiny.draw(pipe, texts)
    trace = attachment.run.state(control)
    keep = next(term for term in trace.terms if term.name == "retention")
    assert keep.phrases == ("red cat", "cat", "dog")
    first, later = trace.evaluations[0].parts["retention"], trace.evaluations[-1].parts["retention"]
    assert first.isnan().tolist() == [[True, False, True], [True, False, True]]  # only the region is there at once
    assert later.isnan().tolist() == [[True, False, False], [True, False, False]]


# --- defaults and presets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [20, 50])
def test_by_default_the_first_steps_alone_are_guided(pipe, steps):
    for control in (AStar("cat", "dog"), Segregation("cat", "dog")):
        trace = trace_of(pipe, control, texts=TEXTS[:1], steps=steps)
        assert [update.step for update in trace.updates] == list(range(3 if steps == 20 else 8))


def test_the_early_steps_are_those_of_the_run_wherever_it_starts():
    pipe = tiny.sd1()
    later = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with attach(tiny.quiet(later), AStar("cat", "dog")) as run:
        noise = torch.Generator().manual_seed(0)
        picture = torch.rand(1, 3, 32, 48)
        later("a cat and a dog", picture, strength=0.5, num_inference_steps=20, generator=noise, output_type="latent")
    assert [step["step"] for step in run.report.to_dict()["traces"][0]["steps"]] == [0, 1]  # of 10


def test_a_region_is_placed_in_all_steps(pipe):
    control = AStar("cat", "dog", masks={"cat": (0, 0, 0.5, 1)})
    assert [update.step for update in trace_of(pipe, control, steps=10).updates] == list(range(10))
    for settings in ({"placing": 0}, {"window": (0, 0.2)}):
        control = AStar("cat", "dog", masks={"cat": (0, 0, 0.5, 1)}, **settings)
        assert [update.step for update in trace_of(pipe, control, steps=10).updates] == [0, 1]


def test_a_preset_is_settings_and_those_beside_it_come_first(pipe):
    paper = AStar("cat", "dog", preset="paper")
    assert (paper.maps, paper.relative, paper.window, paper.rule) == ("attend-and-excite", None, (0.0, 1.0), "half")
    assert paper.retention == paper.segregation == 1 and paper.preset is None
    assert AStar("cat", "dog", preset="thorough", relative=0.03) == AStar("cat", "dog", window=(0, 0.5), relative=0.03)
    assert AStar("cat", "dog", preset="thorough", window=None) == AStar("cat", "dog")
    down = trace_of(pipe, Segregation("cat", "dog", preset="down"))
    assert down.sites and all(site.name.startswith("down_blocks") for site in down.sites)
    with pytest.raises(ControlError, match="a preset of AStar is one of thorough, always, down, paper; not 'fast'"):
        AStar("cat", "dog", preset="fast")


def test_no_mask_is_smaller_than_a_thing(pipe):
    """Of 24 cells, 14 %: three. The rule "half" would keep the peak alone."""
    maps = torch.full((1, 1, 4, 6), 0.01)
    maps[0, 0, 1, 2:5] = torch.tensor([0.4, 1.0, 0.4])
    keep = next(loss for loss in AStar("cat", "dog").losses() if isinstance(loss, Keep))
    assert binarise(maps, keep.rule, keep.share).sum() == 3 and binarise(maps, "half").sum() == 1
