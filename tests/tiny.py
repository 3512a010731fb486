"""Tiny pipelines with random weights, one per family, built in code: no downloads, milliseconds to run.

Sizes are chosen so that mistakes show: grids differ between sites, text length differs from image length, and
pictures are not square unless asked. Each call gives a copy of its own.
"""

from __future__ import annotations

import string
import warnings
from typing import Any

import diffusers
import torch
from copies import copied
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from attnctl import load

diffusers.utils.logging.set_verbosity_error()
WORDS = ("cat", "dog", "red", "blue", "and")
TEXT, SIZE = "a cat and a dog", (32, 48)  # height, width in pixels; latents are half of that


def clip_tokenizer() -> CLIPTokenizer:
    """Single letters, and a few words in one piece; "backpack" takes eight."""
    letters = string.ascii_lowercase + string.digits + ",.-'#"
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        head = word[0]
        for letter in word[1:-1]:
            merges.append((head, letter))
            head += letter
            pieces.append(head)
        merges.append((head, word[-1] + "</w>"))
        pieces.append(word + "</w>")
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: letters, and a few words in one piece."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase] + [(f"▁{word}", -1.0) for word in (*WORDS, "a")]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=16)


def clip(tokenizer: CLIPTokenizer, width: int = 32, projection: bool = False) -> Any:
    """A CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5() -> T5EncoderModel:
    """A T5 encoder of width 64."""
    shape = {"d_model": 64, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=64, is_gated_act=True, **shape)).eval()


def autoencoder(**changes: Any) -> Any:
    """Halves each side, four channels."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, **changes,
    ).eval()  # fmt: skip


def ddim() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def unet(**changes: Any) -> Any:
    """Two levels with attention at both: grids of factor 1 and 2, seven cross sites and their self sites."""
    settings: dict[str, Any] = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": 16, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32, "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**settings | changes).eval()


def _sd_parts(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return {
        "unet": unet(**changes), "vae": autoencoder(), "text_encoder": clip(tokenizer), "tokenizer": tokenizer,
        "scheduler": ddim(), "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip


@copied
def sd1(**changes: Any) -> Any:
    return quiet(diffusers.StableDiffusionPipeline(**_sd_parts(**changes)))


@copied
def img2img() -> Any:
    return quiet(diffusers.StableDiffusionImg2ImgPipeline(**_sd_parts()))


@copied
def inpaint() -> Any:
    """A nine-channel UNet: latents, mask, masked picture."""
    return quiet(diffusers.StableDiffusionInpaintPipeline(**_sd_parts(in_channels=9)))


@copied
def controlnet() -> Any:
    parts = _sd_parts()
    net = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8)).eval()
    for parameter in net.parameters():  # its last layers start at zero, which would control nothing
        torch.nn.init.normal_(parameter, std=0.1)
    return quiet(diffusers.StableDiffusionControlNetPipeline(controlnet=net, **parts))


@copied
def sdxl(**changes: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    settings: dict[str, Any] = {
        "cross_attention_dim": 64, "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }  # fmt: skip
    return quiet(
        diffusers.StableDiffusionXLPipeline(
            unet=unet(**settings | changes),
            vae=autoencoder(),
            scheduler=diffusers.EulerDiscreteScheduler(),
            add_watermarker=False,
            text_encoder=clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=clip(tokenizer, projection=True),
            tokenizer_2=tokenizer,
        )  # fmt: skip
    )


@copied
def sd3(**changes: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    settings: dict[str, Any] = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    }  # fmt: skip
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=diffusers.SD3Transformer2DModel(**settings | changes).eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip(tokenizer, projection=True),
            tokenizer=tokenizer,
            text_encoder_2=clip(tokenizer, projection=True),
            tokenizer_2=tokenizer,
            text_encoder_3=t5(),
            tokenizer_3=t5_tokenizer(),
        )  # fmt: skip
    )


def sd35() -> Any:
    """As SD 3.5 medium: query and key norms, and a second, image-only attention in the first blocks."""
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1))


@copied
def flux(**changes: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    settings: dict[str, Any] = {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
    }  # fmt: skip
    return quiet(
        diffusers.FluxPipeline(
            transformer=diffusers.FluxTransformer2DModel(**settings | changes).eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=t5(),
            tokenizer_2=t5_tokenizer(),
        )  # fmt: skip
    )


@copied
def pixart() -> Any:
    """As PixArt-Sigma: cross-attention over T5 alone, a learned variance."""
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, caption_channels=64,
        cross_attention_dim=16, sample_size=16, patch_size=2, use_additional_conditions=False,
    )  # fmt: skip
    return quiet(
        diffusers.PixArtSigmaPipeline(
            tokenizer=t5_tokenizer(), text_encoder=t5(), vae=autoencoder(), scheduler=ddim(), transformer=model.eval()
        )  # fmt: skip
    )


@copied
def chroma() -> Any:
    """As Chroma: FLUX with T5 alone, and guidance in two calls."""
    torch.manual_seed(0)
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return quiet(
        diffusers.ChromaPipeline(
            transformer=model.eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=t5(),
            tokenizer=t5_tokenizer(),
        )  # fmt: skip
    )


@copied
def glyph() -> Any:
    """The trained pipeline that ships with the package, in single precision."""
    return quiet(load("glyph-sd"))


ONE_LEVEL = {
    "block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",), "attention_head_dim": (2,), "transformer_layers_per_block": (1,),
}  # fmt: skip


def small(family: str) -> Any:
    """A pipeline of a family with as few blocks as still differ: the compiler takes long over each of them."""
    if family in ("sd1", "sdxl"):
        return FAMILIES[family](**ONE_LEVEL)
    if family == "flux":
        return flux(num_layers=1)
    return sd3(num_layers=2) if family == "sd3" else sd3(num_layers=2, qk_norm="rms_norm", dual_attention_layers=(0,))


FAMILIES = {"sd1": sd1, "sdxl": sdxl, "sd3": sd3, "sd35": sd35, "flux": flux}
MODELS = {**FAMILIES, "glyph-sd": glyph}  # one trained model among them


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def draw(
    pipe: Any, prompt: Any = TEXT, *, seed: int = 0, steps: int = 2, size: tuple[int, int] | None = SIZE, **changes: Any
) -> Tensor:
    """Run a pipeline and return its latents, (images, ...); each image has a seed of its own, `seed + i`.

    Pass `true_cfg_scale` and `negative_prompt` for FLUX to have an unconditional pass; other families have one.
    """
    count = (len(prompt) if isinstance(prompt, list) else 1) * changes.get("num_images_per_prompt", 1)
    settings: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    if size is not None:
        settings["height"], settings["width"] = size
    if not hasattr(pipe, "unet"):
        settings["max_sequence_length"] = 16
    if isinstance(pipe, diffusers.PixArtSigmaPipeline):  # else it draws the nearest of the sizes it was trained on
        settings["use_resolution_binning"] = settings["clean_caption"] = False
    settings["generator"] = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(**{"prompt": prompt} | settings | changes)[0]


def vision() -> tuple[Any, Any]:
    """(image encoder, image processor) for IP-Adapter."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    return CLIPVisionModelWithProjection(config).eval(), CLIPImageProcessor(size=size, crop_size=size)


def ip_adapter(model: Any, width: int = 16) -> dict[str, dict[str, Tensor]]:
    """Weights of an IP-Adapter for a UNet, as `load_ip_adapter` reads them: random, four image tokens."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    text = model.config.cross_attention_dim
    weights: dict[str, Tensor] = {}
    key = 1
    for name in model.attn_processors:
        if name.endswith("attn2.processor"):
            site = model.get_submodule(name.removesuffix(".processor"))
            weights[f"{key}.to_k_ip.weight"] = random(site.inner_dim, text)
            weights[f"{key}.to_v_ip.weight"] = random(site.inner_dim, text)
            key += 2
    projection = {
        "proj.weight": random(4 * text, width), "proj.bias": random(4 * text),
        "norm.weight": torch.ones(text), "norm.bias": torch.zeros(text),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": weights}
