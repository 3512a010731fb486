"""A tiny random Stable Diffusion pipeline in a folder, as `save_pretrained` writes it: knows cat, dog and letters."""

import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def letters_tokenizer() -> CLIPTokenizer:
    """Every letter is a token, "cat" and "dog" are one each, any other word is as many pieces as letters."""
    pieces = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    merges = []
    for a, b, c in ("cat", "dog"):
        pieces += [a + b, a + b + c + "</w>"]
        merges += [(a, b), (a + b, c + "</w>")]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges, model_max_length=77)


def save_tiny_sd(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    words = letters_tokenizer()
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **ends
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
