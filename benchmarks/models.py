"""Pipelines of true size with random weights, for measuring time: nothing is downloaded and nothing can be seen."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import attnctl
from attnctl.glyph.tokenizer import build_tokenizer


def _clip(width: int, projection: bool = False) -> Any:
    """A text encoder of true width and one layer: its time is not what is measured."""
    config = CLIPTextConfig(
        vocab_size=len(build_tokenizer()), hidden_size=width, intermediate_size=width, projection_dim=width,
        num_hidden_layers=1, num_attention_heads=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5() -> tuple[Any, Any]:
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=512)
    config = T5Config(vocab_size=64, d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=1, is_gated_act=True)
    return tokenizer, T5EncoderModel(config).eval()


def _vae(channels: int, **options: Any) -> Any:
    """Never decodes here; there for its factor of 8."""
    return AutoencoderKL(
        block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=1,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, **options,
    )  # fmt: skip


def glyph_sd() -> Any:
    return attnctl.load("glyph-sd")


def sd15() -> Any:
    """The UNet of Stable Diffusion 1.5: 860 M parameters."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
    return StableDiffusionPipeline(
        unet=unet, vae=_vae(4), text_encoder=_clip(768), tokenizer=build_tokenizer(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    """The UNet of Stable Diffusion XL: 2,570 M parameters."""
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ).eval()  # fmt: skip
    return StableDiffusionXLPipeline(
        unet=unet, vae=_vae(4), text_encoder=_clip(768), tokenizer=build_tokenizer(), text_encoder_2=_clip(1280, True),
        tokenizer_2=build_tokenizer(), scheduler=EulerDiscreteScheduler(steps_offset=1), add_watermarker=False,
    )  # fmt: skip


def sd3(layers: int = 2) -> Any:
    """Stable Diffusion 3 medium, of whose 24 layers it has `layers`."""
    tokenizer, encoder = _t5()
    transformer = SD3Transformer2DModel(num_layers=layers, num_attention_heads=24, caption_projection_dim=1536).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=_vae(16, shift_factor=0.06), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=_clip(768, True), tokenizer=build_tokenizer(), text_encoder_2=_clip(1280, True),
        tokenizer_2=build_tokenizer(), text_encoder_3=encoder, tokenizer_3=tokenizer,
    )  # fmt: skip


def flux(double: int = 1, single: int = 1) -> Any:
    """FLUX.1, of whose 19 double and 38 single blocks it has these."""
    tokenizer, encoder = _t5()
    transformer = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True).eval()
    return FluxPipeline(
        transformer=transformer, vae=_vae(16, shift_factor=0.1), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=_clip(768), tokenizer=build_tokenizer(), text_encoder_2=encoder, tokenizer_2=tokenizer,
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "glyph-sd": (glyph_sd, 128, 20),
    "sd15": (sd15, 512, 1),
    "sdxl": (sdxl, 512, 1),
    "sd3": (sd3, 512, 1),
    "flux": (flux, 512, 1),
}
"""Name -> (how to build it, side of the picture in pixels, denoising steps of one run)."""


def build(name: str, steps: int | None = None, **depth: int) -> Callable[[], Any]:
    """A function that draws once, from the same noise each time, and returns latents; `.pipe` is what draws.

    depth: how many layers or blocks a model has, where its function asks.
    """
    for quiet in (diffusers, transformers):
        quiet.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    make, side, usual = MODELS[name]
    pipe = make(**depth)
    pipe.set_progress_bar_config(disable=True)

    def run() -> Any:
        noise = torch.Generator().manual_seed(0)
        return pipe(
            "a cat and a dog",
            height=side,
            width=side,
            num_inference_steps=steps or usual,
            generator=noise,
            output_type="latent",
        ).images

    run.pipe = pipe  # type: ignore[attr-defined]
    return run
