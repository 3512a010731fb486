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
from attnctl.errors import ControlError, PhraseError
from attnctl.processors import Control, Segregation, TokenMaps
from attnctl.processors.latents.map_gradient import (
    PhraseTokens,
    phrase_maps,
    read_maps,
    step_size,
)
from attnctl.processors.segregation import Apart, segregation_loss


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
    with pytest.raises(ControlError, match="no setting 'strenght'; did you mean strength"):
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
            tokens = read_maps(step, z, trace.sites, trace.phrase_tokens.tokens)
            maps = phrase_maps(tokens, trace.phrase_tokens, self.maps)
            loss = segregation_loss(maps, trace.terms[0].pairs, trace.phrase_tokens.present)
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
            maps.append(torch.stack([p[i].mean(0)[:, trace.phrase_tokens.tokens[i]] for i in range(images)]))
        mean = torch.stack(maps).mean(0).mT.unflatten(-1, (h, w))
        prepared = phrase_maps(mean, trace.phrase_tokens, control.maps)
        loss = segregation_loss(prepared, trace.terms[0].pairs, trace.phrase_tokens.present)
        return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("theirs", [False, True])
def test_the_gradient_of_the_stopped_forward_is_that_of_the_whole(pipes, family, theirs, monkeypatch):
    settings: dict[str, Any] = {"maps": "attend-and-excite", "relative": None} if theirs else {}
    if not theirs:  # the fused route, which these small models would not take
        monkeypatch.setattr("attnctl.maps.probabilities.FEW", 0)
    pipe, control = pipes[family], Watched("cat", "dog", window=(0, 1), **settings)
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
    pipe, control = tiny.sd1().to(torch.float16), Loud("cat", "dog", window=(0, 1))
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


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_every_denoiser_call_gets_an_update(scheduler):
    pipe, control = tiny.sd1(), Segregation("cat", "dog", window=(0, 1))
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    with attach(pipe, control) as run:
        assert tiny.draw(pipe, steps=6).isfinite().all()
    assert len(run.run.state(control).losses) == run.run.calls == run.run.steps >= 6


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


def test_many_phrases_are_set_up_at_once(monkeypatch):
    from torch.overrides import TorchFunctionMode

    from attnctl.words import phrases as prompts

    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    names = tuple(f"word{k}" for k in range(64))
    found = torch.eye(64)[None].repeat(2, 1, 1)
    apart = Apart(names)
    with Count():
        useful = apart.begin(
            SimpleNamespace(prompts=["a", "b"]), names, [], PhraseTokens(found[0], found[0], found, found)
        )
    assert len(apart.pairs) == 2016 and useful.all() and apart.present.all() and Count.calls < 200

    read, spans = [], prompts._spans
    monkeypatch.setattr(prompts, "_spans", lambda tokenizer, text: read.append(text) or spans(tokenizer, text))
    pipe, texts = tiny.sd1(), ["a cat and a dog", "a red cat and a dog"]
    with attach(pipe, Segregation("cat", "dog", "and"), TokenMaps("cat")):
        tiny.draw(pipe, texts, steps=1)
    assert sorted(read) == sorted(texts)
