"""Rule 1, first half: at zero strength nothing changes, not by a bit; and sites nobody selects are not touched."""

from __future__ import annotations

import pytest
import tiny
import torch
from contract_table import CASES, differs, every_pair, fewer_pairs
from toys import Identity, Output

from attnctl import sites
from attnctl.engine.attachment import attach

GUIDED = {"flux": {"true_cfg_scale": 2.0, "negative_prompt": "blue"}}
UNGUIDED = {"flux": {}}


@every_pair
def test_still_control_changes_no_bit_and_acting_one_does(case, family):
    still_and_acting(case, family, GUIDED.get(family, {}))


@fewer_pairs
def test_without_guidance(case, family):
    still_and_acting(case, family, UNGUIDED.get(family, {"guidance_scale": 1.0}))


def still_and_acting(case, family, settings):
    pipe = tiny.MODELS[family]()
    plain = tiny.draw(pipe, **settings)
    with attach(pipe, case.still()):
        assert torch.equal(tiny.draw(pipe, **settings), plain)
    with attach(pipe, case.acting()):
        drawn = tiny.draw(pipe, **settings)
    assert differs(drawn, plain) if case.moves else torch.equal(drawn, plain)


@pytest.mark.parametrize("family", tiny.MODELS)
def test_all_controls_still_at_once(family):
    pipe = tiny.MODELS[family]()
    plain = tiny.draw(pipe)
    with attach(pipe, *(case.still() for case in CASES.values() if family in case.families)):
        assert torch.equal(tiny.draw(pipe), plain)


@pytest.mark.parametrize("family", tiny.MODELS)
def test_site_nobody_selects_keeps_its_processor(family):
    pipe = tiny.MODELS[family]()
    model = tiny.denoiser(pipe)
    chosen = sites(pipe)[1].name
    before = dict(model.attn_processors)
    with attach(pipe, Identity(chosen)):
        changed = [name for name, processor in model.attn_processors.items() if processor is not before[name]]
        assert changed == [f"{chosen}.processor"]


@pytest.mark.parametrize("family", tiny.MODELS)
def test_empty_attachment_touches_no_site(family):
    pipe = tiny.MODELS[family]()
    before = dict(tiny.denoiser(pipe).attn_processors)
    plain = tiny.draw(pipe)
    with attach(pipe):
        assert tiny.denoiser(pipe).attn_processors == before
        assert torch.equal(tiny.draw(pipe), plain)


def test_controls_compose_in_order():
    """Output halves, then adds; the other way round is something else."""

    class Add(Identity):
        def attend(self, call, proceed):
            return proceed(call) + 1.0

    pipe = tiny.sd1()
    results = []
    for controls in ([Output(), Add()], [Add(), Output()], [Output()]):
        with attach(pipe, *controls):
            results.append(tiny.draw(pipe, guidance_scale=1.0))
    assert differs(results[0], results[1]) and differs(results[0], results[2])


def test_still_control_changes_nothing_beside_an_acting_one():
    pipe = tiny.sd1()
    with attach(pipe, Output()):
        alone = tiny.draw(pipe)
    for case in CASES.values():
        with attach(pipe, case.still(), Output(), case.still()):
            assert torch.equal(tiny.draw(pipe), alone)
