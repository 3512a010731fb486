"""Attention written out is attention; one row that stands for many weighs as many; the maps are those of the text."""

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, UNet2DConditionModel
from torch import nn

from attnctl import attach
from attnctl.glyph.tokenizer import build_tokenizer
from attnctl.glyph.train import sd3
from attnctl.glyph.train.explicit import Explicit
from attnctl.glyph.train.sd import new_text_encoder, new_unet

CAPTIONS = ["a cat and a dog", "a red car"]


def _like_trained(model: nn.Module) -> Any:
    """Weights that show everything: none is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def joint() -> StableDiffusion3Pipeline:
    one, two = (sd3.new_text_encoder(width) for width in sd3.WIDTHS)
    for encoder in one, two:
        positions = sd3.tables(encoder)[1].weight.data
        positions[sd3.ROWS :] = positions[sd3.ROWS - 1]
    return StableDiffusion3Pipeline(
        transformer=_like_trained(sd3.new_transformer(4)), vae=None, scheduler=sd3.new_scheduler(),
        text_encoder=one.eval(), text_encoder_2=two.eval(), text_encoder_3=None,
        tokenizer=build_tokenizer(), tokenizer_2=build_tokenizer(), tokenizer_3=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_what_is_trained_is_what_the_stock_pipeline_runs(joint: StableDiffusion3Pipeline, sample: torch.Tensor) -> None:
    """25 text rows with their repeats predict what the pipeline's 77 + 256 rows do."""
    transformer: SD3Transformer2DModel = joint.transformer
    times = torch.tensor([300.0, 800.0])
    text, _, pooled, _ = joint.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
    assert text.shape[1] == 77 + 256
    assert not pooled.any()
    stock = transformer(sample, text, pooled, times).sample
    ids = joint.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    rows = sd3.text_rows([joint.text_encoder, joint.text_encoder_2], ids)
    assert rows.shape == (2, 25, sd3.WIDTH)
    explicit = Explicit(sd3.REPEATS)
    with attach(joint, explicit) as attached, attached.batch(CAPTIONS, max_sequence_length=1) as block:
        short = transformer(sample, rows, pooled, times).sample
        maps = block.state(explicit)[8]
    assert torch.allclose(short, stock, atol=2e-4 * float(stock.abs().max()))
    with attach(joint, Explicit()) as attached, attached.batch(CAPTIONS, max_sequence_length=1):
        unweighted = transformer(sample, rows, pooled, times).sample
    assert not torch.allclose(unweighted, stock, atol=2e-2 * float(stock.abs().max()))
    assert [tuple(one.shape) for one in maps] == [(2, 64, 25)] * 8


@torch.no_grad()
def test_written_out_it_is_the_unets_own_attention(sample: torch.Tensor) -> None:
    unet: UNet2DConditionModel = _like_trained(new_unet(4))
    from diffusers import StableDiffusionPipeline

    from attnctl.glyph.train.sd import new_scheduler

    pipe = StableDiffusionPipeline(
        unet=unet, vae=None, text_encoder=new_text_encoder(), tokenizer=build_tokenizer(), scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    times, text = torch.tensor([300, 800]), pipe.encode_prompt(CAPTIONS, "cpu", 1, False)[0]
    own = unet(sample, times, text).sample
    explicit = Explicit()
    with attach(pipe, explicit) as attached, attached.batch(CAPTIONS) as block:
        written = unet(sample, times, text).sample
        maps = block.state(explicit)
    assert torch.allclose(written, own, atol=1e-4 * float(own.abs().max()))
    assert {side: len(sites) for side, sites in maps.items()} == {16: 3, 8: 3}
    for sites in maps.values():
        for site in sites:  # cross-attention has no key but the text
            assert torch.allclose(site.sum(-1), torch.ones(()), atol=1e-5)
