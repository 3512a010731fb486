import math
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny
import torch
from eager import written_out

import attnctl
from attnctl import attach
from attnctl.errors import ControlError, NoSiteError, PhraseError
from attnctl.processors import Control, Segregation, TokenMaps
from attnctl.processors.losses import segregation_loss
from attnctl.processors.map_gradient import (
    blur,
    coarsest,
    default_sites,
    descend,
    gradients,
    phrase_maps,
    read_maps,
    step_size,
    wanted,
)
from attnctl.prompts import TextStream
from attnctl.sites import Site


def fields(*rows, seed=0):
    torch.manual_seed(seed)
    return torch.rand(*rows, dtype=torch.float64)


# --- preparation of maps ----------------------------------------------------------------------------------------------


def request_for(*images, phrases=2):
    """Wanted of images given as tuples of token counts per phrase, after two tokens of no phrase."""
    most = max(2 + sum(image) for image in images)
    members, real = torch.zeros(len(images), phrases, most), torch.zeros(len(images), most, dtype=torch.bool)
    for i, image in enumerate(images):
        at = 2
        for j, count in enumerate(image):
            members[i, j, at : at + count] = 1
            at += count
        real[i, :at] = True
    return SimpleNamespace(members=members.double(), real=real)


def test_the_kernel_of_attend_and_excite():
    one = torch.zeros(1, 1, 5, 7)
    one[0, 0, 2, 3] = 1
    out = blur(one)[0, 0]
    assert out.sum() == pytest.approx(1)
    assert [round(float(out[2 + i, 3 + j]), 3) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))] == [
        0.332,
        0.122,
        0.122,
        0.045,
    ]
    torch.testing.assert_close(blur(torch.ones(2, 3, 4, 6)), torch.ones(2, 3, 4, 6))  # nothing is lost at the borders


def test_attend_and_excite_lets_the_prompts_tokens_compete():
    p = torch.full((1, 75, 4, 4), 0.2 / 74)
    p[:, 0] = 0.05
    request = SimpleNamespace(members=torch.zeros(1, 1, 75), real=torch.ones(1, 75, dtype=torch.bool))
    request.members[0, 0, 0] = 1
    got = phrase_maps(p, request, "attend-and-excite")
    want = math.exp(5) / (math.exp(5) + 74 * math.exp(20 / 74))
    torch.testing.assert_close(got, torch.full_like(got, want))
    assert 0.58 < want < 0.63


@pytest.mark.parametrize("preparation", ["attend-and-excite", "attend-and-excite-padded", "share", "mean"])
def test_tokens_of_a_phrase_are_summed_and_fillers_ignored(preparation):
    p = fields(2, 5, 4, 5) * 0.1
    request = request_for((2, 1), (1, 1))
    both = phrase_maps(p, request, preparation)
    assert both.shape == (2, 2, 4, 5)
    alone = request_for((1, 1))
    torch.testing.assert_close(phrase_maps(p[1:, :4], alone, preparation), both[1:])
    if preparation == "mean":
        torch.testing.assert_close(both[0, 0], p[0, 2] + p[0, 3])
    if preparation == "share":
        torch.testing.assert_close(both.sum((-2, -1)), torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("preparation", ["attend-and-excite", "share", "mean"])
def test_gradients_equal_finite_differences(preparation):
    p = (fields(2, 5, 4, 3) * 0.1).requires_grad_()
    request = request_for((2, 1), (1, 1))
    assert torch.autograd.gradcheck(
        lambda p: segregation_loss(phrase_maps(p, request, preparation), [(0, 1)], request.members.any(-1)), p
    )


def test_a_phrase_an_image_does_not_have_is_no_obstacle():
    p = fields(1, 3, 4, 4).requires_grad_()
    request = request_for((1, 0))
    for preparation in ("attend-and-excite", "share", "mean"):
        maps = phrase_maps(p, request, preparation)
        assert maps.isfinite().all() and maps[0, 1].eq(0).all()
        loss = segregation_loss(maps, [(0, 1)], request.members.any(-1))
        assert loss.eq(0).all() and torch.autograd.grad(loss.sum(), p)[0].isfinite().all()


# --- the step ---------------------------------------------------------------------------------------------------------


def test_the_schedule_of_attend_and_excite():
    assert [round(step_size(i, 50), 2) for i in (0, 10, 20, 24, 49)] == [20.0, 18.95, 17.84, 17.38, 14.14]
    assert step_size(0, 1) == step_size(0, 0) == 20


def test_each_image_gets_its_own_gradient_and_a_bad_one_is_dropped():
    z = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 6.0]], requires_grad=True)
    losses = torch.stack([z[0].square().sum(), (z[1] / 0).sum(), 3 * z[2].sum()])
    gradient, finite = gradients(losses, z, torch.tensor([4096.0, 1.0, 0.25]))
    assert finite.tolist() == [True, False, True]
    assert gradient.tolist() == [[2.0, 4.0], [0.0, 0.0], [3.0, 3.0]]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_a_step_down(relative, keep_norm):
    z, g = fields(3, 4, 5, 5), fields(3, 4, 5, 5, seed=1)
    g[1] = 0
    moved = descend(z, g, 0.1, relative, keep_norm)
    assert torch.equal(moved[1], z[1])
    lengths = [one.flatten(1).norm(dim=1) for one in (z, g, moved, moved - z)]
    if keep_norm:
        torch.testing.assert_close(lengths[2], lengths[0])
    else:
        torch.testing.assert_close(lengths[3][[0, 2]], 0.1 * (lengths[0] if relative else lengths[1])[[0, 2]])
    torch.testing.assert_close(descend(z[2:], g[2:], 0.1, relative, keep_norm), moved[2:])


# --- which sites, which tokens ----------------------------------------------------------------------------------------


def cross(*factors):
    return tuple(Site(f"attn{i}", "cross", 8, 40, i, factor) for i, factor in enumerate(factors))


@pytest.mark.parametrize(
    ("latent", "factor"),
    [
        ((64, 64), 4),
        ((96, 96), 4),
        ((64, 96), 4),
        ((48, 64), 4),
        ((16, 16), 1),
        ((16, 24), 1),
        ((8, 8), 1),
        ((40, 40), 2),
    ],
)
def test_the_default_is_the_coarsest_grid_that_still_shows_things(latent, factor):
    sites = cross(1, 2, 4, 8, 4, 2, 1)
    assert {site.factor for site in coarsest(sites, latent)} == {factor}


def test_joint_models_are_read_in_the_middle():
    def joint(n):
        return tuple(Site(f"blocks.{i}", "joint", 24, 64, i, 2, "image-first") for i in range(n))

    for count, middle in ((3, [1]), (4, [1, 2]), (24, [*range(8, 16)]), (1, [0]), (2, [0, 1])):
        assert [site.layer for site in default_sites(joint(count))] == middle
    own = Site("own", "self", 8, 40, 9, 1)
    assert default_sites((own, *cross(1))) == cross(1)
    with pytest.raises(NoSiteError):
        Segregation("cat", "dog").sites((own,))


def test_phrases_of_each_prompt():
    tokenizer = tiny.clip_tokenizer()
    texts = [(TextStream(tokenizer, prompt),) for prompt in ("a cat and a dog", "a red cat", "a dog and a dog")]
    some = wanted(texts, ["cat", "dog"], columns="phrases")
    assert some.present.tolist() == [[True, True], [True, False], [False, True]]
    assert some.tokens.tolist() == [[2, 5], [3, 0], [2, 5]]
    assert some.real.tolist() == [[True, True], [True, False], [True, True]]
    assert some.members.tolist() == [[[1, 0], [0, 1]], [[1, 0], [0, 0]], [[0, 0], [1, 1]]]
    every = wanted(texts, ["cat", "dog"], columns="prompt")
    assert every.tokens.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert every.members[0].tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    padded = wanted(texts, ["cat", "dog"], columns="padded")
    assert padded.tokens.tolist() == [[*range(1, 76)]] * 3 and padded.real.all()
    assert padded.members[1].nonzero().tolist() == [[0, 2]]
    two = [(TextStream(tokenizer, "a cat"), TextStream(tokenizer, "a cat", 77, 16))]
    assert wanted(two, ["cat"], columns="padded").tokens.tolist() == [[*range(1, 76), *range(78, 92)]]
    with pytest.raises(PhraseError, match="'bird' is not in the prompt; its words are"):
        wanted(texts, ["cat", "bird"], columns="phrases")


def test_settings_out_of_range():
    for phrases in ((), ("cat",), ("cat", "cat"), (("cat", "cat"),)):
        with pytest.raises(ControlError, match="needs two phrases"):
            Segregation(*phrases)
    for settings in (
        {"strength": -1.0}, {"strength": math.nan}, {"relative": 0.0}, {"updates": 0}, {"maps": "median"},
        {"window": (0.5, 0.2)},
        {"refine": 3}, {"refine": [0.5]},
    ):  # fmt: skip
        with pytest.raises(ControlError):
            Segregation("cat", "dog", **settings)
    with pytest.raises(TypeError, match="no setting 'strenght'; it has strength, maps"):
        Segregation("cat", "dog", strenght=1.0)
    one = Segregation("cat", ("cat", "dog"), strength=0.5)
    assert one.phrases == ("cat", ("cat", "dog")) and one == Segregation("cat", ("cat", "dog"), strength=0.5)
    assert "strength=0.5" in repr(one) and hash(one)


# --- on pipelines -----------------------------------------------------------------------------------------------------

TEXTS = ["a cat and a dog", "a red dog and a blue cat", "a dog, a cat"]


@pytest.fixture(scope="module")
def pipes():
    return {name: make() for name, make in tiny.FAMILIES.items()}


class Watched(Segregation):
    """Keeps what every update was made of."""

    def begin(self, run):
        self._set(watched=[])
        return super().begin(run)

    def before_denoise(self, step):
        before = step.latents.clone()
        super().before_denoise(step)
        trace = step.run.state(self)
        with torch.enable_grad():
            z = before.clone().requires_grad_()
            tokens = read_maps(step, z, trace.sites, trace.wanted.tokens)
            maps = phrase_maps(tokens, trace.wanted, self.maps)
            loss = segregation_loss(maps, trace.terms[0].pairs, trace.wanted.present)
            gradient = torch.autograd.grad(loss.sum(), z)[0]
        one = SimpleNamespace(step=step, before=before, after=step.latents, loss=loss.detach(), gradient=gradient)
        self.watched.append(one)


def full_pass(pipe, control, trace, one, images):
    """The same loss and gradient from an ordinary forward to the end, with attention written out."""
    model, step = tiny.denoiser(pipe), one.step
    arguments = {
        name: value[step.rows.cond] if isinstance(value, torch.Tensor) and value.ndim and len(value) == step.rows.total
        else {k: v[step.rows.cond] for k, v in value.items()} if isinstance(value, dict) else value
        for name, value in step.arguments.items()
    }  # fmt: skip
    z = one.before.clone().requires_grad_()
    arguments[next(iter(arguments))] = z * step.scale
    sites = attnctl.sites(pipe)
    with written_out(model) as forwards, torch.enable_grad():
        model(**arguments)
        maps = []
        for site in trace.sites:
            p = forwards[0][sites.index(site)]
            h, w = site.grid(*step.run.latent_size)
            if site.kind == "joint":
                text = p.shape[-1] - h * w
                p = p[:, :, text:, :text] if site.order == "text-first" else p[:, :, : h * w, h * w :]
            maps.append(torch.stack([p[i].mean(0)[:, trace.wanted.tokens[i]] for i in range(images)]))
        mean = torch.stack(maps).mean(0).mT.unflatten(-1, (h, w))
        prepared = phrase_maps(mean, trace.wanted, control.maps)
        loss = segregation_loss(prepared, trace.terms[0].pairs, trace.wanted.present)
        return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("theirs", [False, True])
def test_the_gradient_of_the_stopped_forward_is_that_of_the_whole(pipes, family, theirs, monkeypatch):
    settings: dict[str, Any] = {"maps": "attend-and-excite", "relative": None} if theirs else {}
    if not theirs:  # the fused route, which these small models would not take
        monkeypatch.setattr("attnctl.probabilities.FEW", 0)
    pipe, control = pipes[family], Watched("cat", "dog", **settings)
    with attach(pipe, control) as run:
        tiny.draw(pipe, TEXTS)
    trace, watched = run.run.state(control), control.watched
    assert len(watched) == 2 and len(trace.losses) == 2
    for one, losses in zip(watched, trace.losses, strict=True):
        loss, gradient = full_pass(pipe, control, trace, one, 3)
        torch.testing.assert_close(losses, loss, atol=1e-6, rtol=1e-4)
        length = gradient.norm()
        assert length > 0 and (one.gradient - gradient).norm() < 2e-3 * length
        if theirs:  # in units where latents have variance 1, the step is Attend-and-Excite's
            size = step_size(one.step.index, 2)
            in_units = (one.after - one.before) * one.step.scale, -size * one.gradient / one.step.scale
            torch.testing.assert_close(*in_units, atol=1e-5, rtol=1e-2)
            assert (one.step.scale < 0.5) == (family == "sdxl" and one.step.index == 0)  # Euler starts at sigma 14
        else:
            share = (one.after - one.before).flatten(1).norm(dim=1) / one.before.flatten(1).norm(dim=1)
            torch.testing.assert_close(share, torch.full((3,), 0.02), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_small_steps_lower_the_loss(pipes, family):
    control = Segregation("cat", "dog", relative=2e-3, updates=4, window=(0, 0.5))
    with attach(pipes[family], control) as run:
        tiny.draw(pipes[family], TEXTS)
    losses = torch.stack(run.run.state(control).losses)  # (updates, images)
    assert losses.shape == (4, 3) and (losses.diff(dim=0) < 0).all()
    assert "4 updates" in str(run.run.state(control))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_is_what_its_pictures_are_alone(pipes, family):
    pipe = pipes[family]
    control = Segregation("cat", "dog", "red", relative=0.05)
    with attach(pipe, control) as run:
        batch = tiny.draw(pipe, TEXTS)
        together = torch.stack(run.run.state(control).losses, dim=1)
    for i, text in enumerate(TEXTS):
        phrases = [phrase for phrase in ("cat", "dog", "red") if phrase in text]
        control = Segregation(*phrases, relative=0.05)
        with attach(pipe, control) as run:
            alone = tiny.draw(pipe, text, seed=i)
            torch.testing.assert_close(torch.cat(run.run.state(control).losses), together[i], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(alone[0], batch[i], atol=2e-3 * float(alone.abs().max()), rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_strength_zero_changes_no_bit(pipes, family):
    pipe, still = pipes[family], Segregation("cat", "dog", strength=0)
    plain = tiny.draw(pipe, TEXTS)
    with attach(pipe, still, TokenMaps()) as run:
        assert torch.equal(tiny.draw(pipe, TEXTS), plain)
    assert str(run.run.state(still)) == "no update"
    with attach(pipe, Segregation("cat", "dog", window=(0.6, 1)), TokenMaps()):
        assert torch.equal(tiny.draw(pipe, TEXTS), plain)  # of two steps none lies there


def test_phrases_that_are_not_there(pipes):
    pipe = pipes["sd1"]
    for phrases, texts in (
        (("cat", "bird"), ["a cat and a dog"]),
        (("cat", "dog"), ["a cat and a dog", "a cat"]),
        ((("cat", "dog"), ("red", "blue")), ["a cat and a dog", "a blue cat", "red and blue"]),
    ):
        with (
            attach(pipe, Segregation(*phrases)),
            pytest.raises(PhraseError, match="not in the prompt; its words are"),
        ):
            tiny.draw(pipe, texts)


@pytest.mark.parametrize("family", ["sd1", "sd35", "flux"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family, dtype):
    pipe = tiny.FAMILIES[family]()
    control = Segregation("cat", "dog", relative=0.02)
    with attach(pipe, control) as run:
        tiny.draw(pipe, TEXTS)
        want = run.run.state(control).losses[0]
        tiny.draw(pipe.to(dtype), TEXTS)
    trace = run.run.state(control)
    assert not trace.skipped.any() and all(one.dtype == torch.float32 for one in trace.losses)
    torch.testing.assert_close(trace.losses[0], want, atol=0.02, rtol=0)


class Loud(Segregation):
    """Scales the second image's loss beyond what half precision can hold."""

    def begin(self, run):
        trace = super().begin(run)
        trace.scale[1] = 2.0**60
        return trace


def test_an_update_that_overflows_is_skipped_for_its_image_alone():
    pipe, control = tiny.sd1().to(torch.float16), Loud("cat", "dog")
    moves = []

    class Moves(Control):
        def before_denoise(self, step):
            moves.append(step.latents - step.sample.base)

    with attach(pipe, control, Moves()) as run:
        picture = tiny.draw(pipe, TEXTS, steps=2)
    trace = run.run.state(control)
    assert picture.isfinite().all()
    assert trace.skipped.tolist() == [0, 2, 0] and trace.scale.tolist() == [2.0**12, 2.0**52, 2.0**12]
    assert "skipped [0, 2, 0]" in str(trace)
    assert [move.flatten(1).any(1).tolist() for move in moves] == [[True, False, True]] * 2


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_every_denoiser_call_gets_an_update(scheduler):
    pipe, control = tiny.sd1(), Segregation("cat", "dog")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    with attach(pipe, control) as run:
        assert tiny.draw(pipe, steps=6).isfinite().all()
    assert len(run.run.state(control).losses) == run.run.calls == run.run.steps >= 6


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)])
def test_blur_of_a_single_row_keeps_what_is_flat(shape):
    torch.testing.assert_close(blur(torch.ones(1, 2, *shape)), torch.ones(1, 2, *shape))


@pytest.mark.parametrize("settings", [{"strength": 1e999}, {"relative": 1e999}, {"relative": float("nan")}])
def test_settings_that_are_not_finite_are_refused(settings):
    with pytest.raises(ControlError, match="finite"):
        Segregation("cat", "dog", **settings)


@pytest.mark.parametrize("phrases", [("cat", "Cat"), ("cat", "cat#1"), ("dog", "cat", "CAT")])
def test_phrases_that_are_the_same_words_are_refused(phrases):
    import tiny

    pipe = tiny.sd1()
    with attach(pipe, Segregation(*phrases)), pytest.raises(ControlError, match="share words of the prompt"):
        pipe("a cat and a dog", num_inference_steps=1, height=16, width=16)


def test_a_phrase_that_is_part_of_a_longer_one_is_not_asked_for_again():
    """So a picture does not depend on what the other prompts of its batch are called."""
    import tiny

    pipe, texts = tiny.sd1(), ["a red cat and a dog", "a cat and a dog"]
    together = Segregation("red cat", "cat", "dog", maps="share")
    with attach(pipe, together) as attachment:
        both = tiny.draw(pipe, texts)
    trace = attachment.run.state(together)
    pairs, values = trace.terms[0].labels, trace.evaluations[0].parts["segregation"]
    assert pairs == ("red cat | cat", "red cat | dog", "cat | dog")
    assert values.isnan().tolist() == [[True, False, True], [True, True, False]]
    for k, (text, phrases) in enumerate(zip(texts, (("red cat", "dog"), ("cat", "dog")), strict=True)):
        with attach(pipe, Segregation(*phrases)):
            torch.testing.assert_close(tiny.draw(pipe, text, seed=k)[0], both[k], atol=1e-4, rtol=1e-3)
    pairs_of_his_own = Segregation(("cat", "dog"), ("red cat", "dog"))
    with attach(pipe, pairs_of_his_own) as attachment:
        tiny.draw(pipe, texts[0])
    assert not attachment.run.state(pairs_of_his_own).evaluations[0].parts["segregation"].isnan().any()
    with (
        pytest.raises(ControlError, match="'red cat' and 'cat' cannot be kept apart"),
        attach(pipe, Segregation("red cat", "cat")),
    ):
        tiny.draw(pipe, texts[0])
