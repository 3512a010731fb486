"""glyph-sd3: a small Stable Diffusion 3 on the glyph world: joint attention, flow matching, two CLIPs, no T5."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from attnctl import attach
from attnctl.glyph.scenes import Renderer
from attnctl.glyph.tokenizer import build_tokenizer
from attnctl.glyph.train.denoiser import Denoiser
from attnctl.glyph.train.encoded import encode
from attnctl.glyph.train.explicit import Explicit
from attnctl.glyph.train.grounding import MapScore, grounding_loss, map_test
from attnctl.glyph.train.loop import Losses
from attnctl.glyph.words import CONCEPTS

BATCH = 48
WIDTH = 160  # of a token inside the transformer, and of a word
WIDTHS = (64, 96)  # of a word in each of the two text encoders, side by side
ROWS = 24  # text rows that are computed; the last stands for all padding behind it
LENGTH, NOTHING = 77, 256  # rows that the pipeline makes of CLIP, and of the T5 that is not there
REPEATS = (1,) * (ROWS - 1) + (LENGTH - ROWS + 1, NOTHING)
GRID = 8


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Straight paths from noise to pictures; `shift` spends more steps on the noisy half, where things get a place."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.5)


def new_text_encoder(width: int) -> CLIPTextModelWithProjection:
    """Words as the pipeline reads them, before the last layer: token and position embeddings, so a word is its own row.

    The pooled text is always zero: what is asked for reaches the picture by attention alone.
    """
    tokenizer = build_tokenizer()
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            projection_dim=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).requires_grad_(False)
    nn.init.zeros_(model.text_projection.weight)
    for table in tables(model):
        nn.init.normal_(table.weight.requires_grad_(True), std=0.5)
    return model


def tables(encoder: nn.Module) -> tuple[nn.Embedding, nn.Embedding]:
    """The token and the position embeddings of a CLIP."""
    found = [m for name, m in encoder.named_modules() if name.endswith(("token_embedding", "position_embedding"))]
    tokens, positions = sorted((m for m in found if isinstance(m, nn.Embedding)), key=lambda m: -m.num_embeddings)
    return tokens, positions


def new_transformer(channels: int) -> SD3Transformer2DModel:
    """8 blocks of 8 heads on 8 x 8 patches; at the start every block passes its input on."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=8,
        attention_head_dim=WIDTH // 8,
        num_attention_heads=8,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(".linear") or name == "proj_out"):
            nn.init.zeros_(module.weight)  # modulations and gates
            nn.init.zeros_(module.bias)
    return model


def text_rows(encoders: Any, ids: Tensor) -> Tensor:
    """(batch, ROWS + 1, WIDTH): words in both encoders side by side, then one row for the T5 that is not there."""
    parts = []
    for encoder in encoders:
        tokens, positions = tables(encoder)
        parts.append(tokens(ids[:, :ROWS]) + positions.weight[:ROWS])
    return F.pad(torch.cat(parts, -1), (0, 0, 0, 1))


def noise_levels(count: int, rng: torch.Generator) -> Tensor:
    """(count,) parts of noise in (0, 1), logit-normal around .55 and evenly spread, so that batches differ little."""
    even = (torch.arange(count) + torch.rand(count, generator=rng)) / count
    return torch.sigmoid(0.2 + 1.1 * torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)))


@torch.no_grad()
def map_scores(pipe: StableDiffusion3Pipeline, scenes: int = 64) -> dict[int, MapScore]:
    """The map test on held-out two-thing scenes, with 30, 50 and 70 % of noise (told as t = 300, 500, 700)."""
    drawn = [Renderer(stream=4).scene(k, "held_out", 2) for k in range(scenes)]
    data = encode(pipe.vae, pipe.tokenizer, drawn)
    latents = data["latents"].float().to(pipe.device)
    text = text_rows([pipe.text_encoder, pipe.text_encoder_2], data["ids"].long().to(pipe.device))
    pieces = {i for word in CONCEPTS for i in pipe.tokenizer(word).input_ids[1:-1]}
    nouns = torch.isin(data["ids"].long(), torch.tensor(sorted(pieces)))[:, :ROWS]
    masks = F.adaptive_avg_pool2d(data["masks"].float(), GRID)
    scores, explicit = {}, Explicit(REPEATS)
    pooled = text.new_zeros(scenes, 16)
    with attach(pipe, explicit) as attached:
        for t in (300, 500, 700):
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(t)).to(pipe.device)
            with attached.batch([scene.caption for scene in drawn], max_sequence_length=1) as block:
                pipe.transformer(
                    latents.lerp(noise, t / 1000), text, pooled, torch.full((scenes,), float(t), device=pipe.device)
                )
            maps = [site[:, :, :ROWS].cpu() for site in block.state(explicit)[GRID]]
            scores[t] = map_test(maps, data["owner"].long()[:, :ROWS], nouns, masks)
    return scores


class Flow(Denoiser):
    """Flow matching: noise minus picture."""

    name, guidance, rows = "glyph-sd3", 4.0, BATCH

    def build(self) -> None:
        self.vae.register_to_config(shift_factor=0.0)  # the pipeline adds it
        encoders = nn.ModuleList([new_text_encoder(width) for width in WIDTHS])
        transformer = new_transformer(self.vae.config.latent_channels)
        self.network = nn.ModuleDict({"transformer": transformer, "text": encoders}).to(self.device)
        self.explicit = Explicit(REPEATS)

    def loss(self, step: int, rng: torch.Generator) -> Losses:
        self.made_by["steps"] = step + 1
        rows, captions = self.source.rows(self.batch, rng)
        part = noise_levels(self.batch, rng).to(self.device)
        latents = rows["latents"].float()
        noise = torch.randn(latents.shape, generator=rng).to(self.device)
        ids, owner = self.dropped(rows, rng)
        text = text_rows(self.network["text"], ids)
        pooled = text.new_zeros(self.batch, 16)
        noisy = torch.lerp(latents, noise, part[:, None, None, None])
        with (
            self.attached.batch(captions, max_sequence_length=1) as block,
            torch.autocast(torch.device(self.device).type, torch.bfloat16),
        ):
            got = self.network["transformer"](noisy, text, pooled, 1000 * part).sample
        losses = {"flow": F.mse_loss(got.float(), noise - latents)}
        if self.grounding:
            maps = {side: [site[..., :ROWS] for site in sites] for side, sites in block.state(self.explicit).items()}
            # Where hardly anything is left of the scene, nobody can know where a thing is.
            losses["grounding"] = self.grounding * grounding_loss(
                maps, owner[:, :ROWS], rows["masks"].float(), 1 - part
            )
        return losses

    def pipeline(self, network: Any) -> StableDiffusion3Pipeline:
        """Padding that training leaves out looks like the last row that is trained."""
        one, two = network["text"]
        for encoder in one, two:
            positions = tables(encoder)[1].weight.data
            positions[ROWS:] = positions[ROWS - 1]
        pipe = StableDiffusion3Pipeline(
            transformer=network["transformer"],
            vae=self.vae,
            text_encoder=one,
            text_encoder_2=two,
            text_encoder_3=None,
            tokenizer=self.tokenizer,
            tokenizer_2=build_tokenizer(),
            tokenizer_3=None,
            scheduler=new_scheduler(),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def map_scores(self, pipe: Any) -> dict[int, MapScore]:
        return map_scores(pipe)
