"""Rule 6: two pipelines in two threads never see each other; one pipeline in two threads is a clear error."""

from __future__ import annotations

import threading

import pytest
import tiny
import torch
from toys import Identity, Output

from attnctl.engine.attachment import attach
from attnctl.engine.control import Control
from attnctl.errors import BusyError


def together(*jobs):
    """Run jobs in threads; their results or exceptions, in order."""
    results: list = [None] * len(jobs)

    def work(i, job):
        try:
            results[i] = job()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i, job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


@pytest.mark.parametrize("family", tiny.MODELS)
def test_two_pipelines_do_not_see_each_other(family):
    strengths = (0.2, 0.7, None)
    pipes = [tiny.MODELS[family]() for _ in strengths]
    alone = []
    for pipe, strength in zip(pipes, strengths, strict=True):
        with attach(pipe, *([Output(strength=strength)] if strength else [])):
            alone.append(tiny.draw(pipe, steps=4))

    def job(pipe, strength):
        def work():
            if strength is None:
                return tiny.draw(pipe, steps=4)
            with attach(pipe, Output(strength=strength)):
                return tiny.draw(pipe, steps=4)

        return work

    results = together(*(job(pipe, strength) for pipe, strength in zip(pipes, strengths, strict=True)))
    for got, want in zip(results, alone, strict=True):
        assert torch.equal(got, want)


class Meet(Identity):
    """Holds the first forward until somebody else has tried the same pipeline."""

    def __init__(self):
        object.__setattr__(self, "inside", threading.Event())
        object.__setattr__(self, "tried", threading.Event())
        super().__init__("cross")

    def attend(self, call, proceed):
        self.inside.set()
        self.tried.wait(60)
        return proceed(call)


def test_one_pipeline_in_two_threads_is_an_error_and_the_first_goes_on():
    pipe = tiny.sd1()
    plain = tiny.draw(pipe)
    meet = Meet()

    def second():
        meet.inside.wait(60)
        try:
            return tiny.draw(pipe)
        finally:
            meet.tried.set()

    with attach(pipe, meet):
        first, error = together(lambda: tiny.draw(pipe), second)
        assert isinstance(error, BusyError) and "StableDiffusionPipeline" in str(error)
        assert torch.equal(first, plain)
        assert torch.equal(tiny.draw(pipe), plain)  # and afterwards all is well


def test_between_two_forwards_it_is_an_error_too():
    """Whoever comes second takes over; the first is told, at its next step, before it can spoil anything."""
    pipe = tiny.sd1()
    plain = tiny.draw(pipe, steps=2)
    paused, done = threading.Event(), threading.Event()

    def pause(*args):
        if not paused.is_set():
            paused.set()
            done.wait(60)
        return {}

    def second():
        paused.wait(60)
        try:
            return tiny.draw(pipe, steps=2)
        finally:
            done.set()

    with attach(pipe, Control()):
        first, other = together(lambda: tiny.draw(pipe, steps=2, callback_on_step_end=pause), second)
    assert isinstance(first, BusyError) and torch.equal(other, plain)


def test_one_thread_after_another_is_fine():
    """Also when the first gave up half-way, as a cancelled generator in a user interface does."""
    pipe = tiny.sd1()
    plain = tiny.draw(pipe)

    def cancelled():
        def stop(*args):
            raise RuntimeError("cancelled")

        return tiny.draw(pipe, callback_on_step_end=stop)

    with attach(pipe, Identity()):
        (first,) = together(cancelled)
        (second,) = together(lambda: tiny.draw(pipe))
    assert isinstance(first, RuntimeError) and torch.equal(second, plain)


def by_hand(pipe, steps=2):
    """A loop that asks the pipeline for nothing, so nobody sees it begin."""
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = torch.randn(1, 5, pipe.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t, words).sample, t, x).prev_sample
    return x


def raised(pipe):
    """A call that ends half-way by an exception."""

    def stop(*args):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        tiny.draw(pipe, steps=2, callback_on_step_end=stop)


@pytest.mark.parametrize("again", [by_hand, tiny.draw])
def test_a_thread_whose_call_ended_half_way_may_draw_again_after_another(again):
    pipe = tiny.sd1()
    plain = again(pipe)
    ended, taken = threading.Event(), threading.Event()

    def first():
        raised(pipe)
        ended.set()
        taken.wait(60)
        return again(pipe)

    def second():
        ended.wait(60)
        try:
            return tiny.draw(pipe)
        finally:
            taken.set()

    with attach(pipe, Control()):
        drawn, _ = together(first, second)
    assert torch.equal(drawn, plain)


def test_while_the_other_draws_a_loop_by_hand_is_still_an_error():
    pipe = tiny.sd1()
    plain = tiny.draw(pipe)
    ended, meet = threading.Event(), Meet()

    def first():
        raised(pipe)
        ended.set()
        meet.inside.wait(60)
        try:
            return by_hand(pipe)
        finally:
            meet.tried.set()

    def second():
        ended.wait(60)
        with attach(pipe, meet):
            return tiny.draw(pipe)

    with attach(pipe, Control()):
        error, drawn = together(first, second)
    assert isinstance(error, BusyError) and torch.equal(drawn, plain)


def test_a_loop_by_hand_that_was_overtaken_is_told():
    """It may have been going on, so this cannot be forgiven: its scheduler and its run are the other's now."""
    pipe = tiny.sd1()

    def first():
        pipe.encode_prompt(tiny.TEXT, "cpu", 1, False)  # a loop begins
        together(lambda: tiny.draw(pipe))
        return by_hand(pipe)

    with attach(pipe, Control()):
        (error,) = together(first)
    assert isinstance(error, BusyError)
