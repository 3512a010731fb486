"""glyph-sd: a small Stable Diffusion on the glyph world."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from attnctl import attach
from attnctl.glyph.scenes import Renderer
from attnctl.glyph.tokenizer import build_tokenizer
from attnctl.glyph.train.denoiser import Denoiser
from attnctl.glyph.train.encoded import encode
from attnctl.glyph.train.explicit import Explicit
from attnctl.glyph.train.grounding import GRID, MapScore, grounding_loss, map_test
from attnctl.glyph.train.loop import Losses
from attnctl.glyph.words import CONCEPTS

WIDTH = 128
BATCH = 32


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise, with v-prediction, which stays well-behaved at the noisy end."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def new_text_encoder() -> CLIPTextModel:
    """Token and position embeddings without a layer: a word's meaning sits in its own token.

    A contextual encoder trained together with the UNet puts the sentence into any token, and the maps of all words
    become one map.
    """
    tokenizer = build_tokenizer()
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=0,
            num_attention_heads=4,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Equal shares of the normalised sum, so that a word can be found by its place as well as by its name.
    for table in model.get_input_embeddings(), _positions(model):
        nn.init.normal_(table.weight, std=0.02)
    return model


def _positions(model: CLIPTextModel) -> nn.Embedding:
    return next(m for name, m in model.named_modules() if name.endswith("position_embedding"))


def new_unet(channels: int) -> UNet2DConditionModel:
    """Cross-attention at 16 x 16, 8 x 8 and 4 x 4, four heads everywhere."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def noised(alphas: Tensor, latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy latents and the velocity to predict; alphas: (n,) cumulative products."""
    alpha, sigma = alphas.sqrt()[:, None, None, None], (1 - alphas).sqrt()[:, None, None, None]
    return alpha * latents + sigma * noise, alpha * noise - sigma * latents


@torch.no_grad()
def map_scores(pipe: StableDiffusionPipeline, scenes: int = 64) -> dict[int, MapScore]:
    """The map test on held-out two-thing scenes, noised to t = 300, 500 and 700."""
    drawn = [Renderer(stream=4).scene(k, "held_out", 2) for k in range(scenes)]
    data = encode(pipe.vae, pipe.tokenizer, drawn)
    latents = data["latents"].float().to(pipe.device)
    text = pipe.text_encoder(data["ids"].long().to(pipe.device)).last_hidden_state
    pieces = {i for word in CONCEPTS for i in pipe.tokenizer(word).input_ids[1:-1]}
    nouns = torch.isin(data["ids"].long(), torch.tensor(sorted(pieces)))
    scores, explicit = {}, Explicit()
    with attach(pipe, explicit) as attached:
        for t in (300, 500, 700):
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(t)).to(pipe.device)
            times = torch.full((len(latents),), t, device=pipe.device)
            noisy, _ = noised(pipe.scheduler.alphas_cumprod.to(pipe.device)[times], latents, noise)
            with attached.batch([scene.caption for scene in drawn]) as block:
                pipe.unet(noisy, times, text)
            maps = [site.cpu() for site in block.state(explicit)[GRID]]
            scores[t] = map_test(maps, data["owner"].long(), nouns, data["masks"].float())
    return scores


class Denoising(Denoiser):
    """v-prediction with min-SNR weights (gamma 5)."""

    name, guidance, rows = "glyph-sd", 5.0, BATCH

    def build(self) -> None:
        self.scheduler = new_scheduler()
        self.alphas = self.scheduler.alphas_cumprod.to(self.device)
        unet = new_unet(self.vae.config.latent_channels).to(memory_format=torch.channels_last)
        self.network = nn.ModuleDict({"unet": unet, "text": new_text_encoder()}).to(self.device)
        self.explicit = Explicit()

    def loss(self, step: int, rng: torch.Generator) -> Losses:
        self.made_by["steps"] = step + 1
        rows, captions = self.source.rows(self.batch, rng)
        # Evenly spread over the noise levels, which makes the loss of a batch less noisy.
        spread = (torch.arange(self.batch) + torch.rand(self.batch, generator=rng)) / self.batch
        t = (spread * len(self.alphas)).long().to(self.device)
        noise = torch.randn(rows["latents"].shape, generator=rng).to(self.device)
        ids, owner = self.dropped(rows, rng)
        noisy, velocity = noised(self.alphas[t], rows["latents"].float(), noise)
        with self.attached.batch(captions) as block, torch.autocast(noisy.device.type, torch.bfloat16):
            text = self.network["text"](ids).last_hidden_state
            got = self.network["unet"](noisy.contiguous(memory_format=torch.channels_last), t, text).sample
        snr = self.alphas[t] / (1 - self.alphas[t])
        squared = F.mse_loss(got.float(), velocity, reduction="none").mean((1, 2, 3))
        losses = {"velocity": (squared * snr.clamp(max=5) / (snr + 1)).mean()}
        if self.grounding:
            # Where hardly anything is left of the scene, nobody can know where a thing is.
            certainty = self.alphas[t].sqrt()
            ground = grounding_loss(block.state(self.explicit), owner, rows["masks"].float(), certainty)
            losses["grounding"] = self.grounding * ground
        return losses

    def pipeline(self, network: Any) -> StableDiffusionPipeline:
        pipe = StableDiffusionPipeline(
            unet=network["unet"],
            vae=self.vae,
            text_encoder=network["text"],
            tokenizer=self.tokenizer,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def map_scores(self, pipe: Any) -> dict[int, MapScore]:
        return map_scores(pipe)
