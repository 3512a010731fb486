"""The autoencoder of the glyph world: 128 x 128 pixels to 16 x 16 latents."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from attnctl.glyph.scenes import SIDE, Renderer, font_path
from attnctl.glyph.train.loop import Losses

CHANNELS = 12
CROP = 64
BATCH = 12


def new() -> AutoencoderKL:
    """f = 8 and 12 channels; convolutional but for one attention at the bottom, so it may be trained on crops.

    Started at random it needs thousands of steps to find the weaker colour axes, so it starts as a plain average over
    cells: residual branches add nothing yet and resampling mixes no channels. The norms would still take away how light
    and how colourful a whole picture is; one group each, and large biases to compare with, leave that in.
    """
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=1,
        sample_size=SIDE,
    )
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            if module.conv_shortcut is not None:
                nn.init.orthogonal_(module.conv_shortcut.weight)
        elif isinstance(module, Upsample2D):
            nn.init.dirac_(module.conv.weight)
        elif isinstance(module, Downsample2D):
            nn.init.zeros_(module.conv.weight)
            module.conv.weight.data[:, :, :2, :2] = torch.eye(module.conv.out_channels)[:, :, None, None] / 4
    model.quant_conv.weight.data[CHANNELS:] = 0  # the log-variances: hardly any noise, or it drowns what is still weak
    model.quant_conv.bias.data[CHANNELS:] = -6
    for first in model.encoder.conv_in, model.decoder.conv_in:
        nn.init.normal_(first.bias)
    return model


def pixels(images: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def pictures(values: Tensor) -> np.ndarray:
    """The inverse of `pixels`, clipped."""
    return (values.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def strangers(count: int, seed: int) -> np.ndarray:
    """(count, 128, 128, 3) uint8: a few emoji from anywhere in the font on plain grounds.

    The autoencoder sees some of these, so that it can also carry things outside the 24 concepts.
    """
    rng = np.random.default_rng(seed)
    font = ImageFont.truetype(font_path(), 109)
    codes = [*range(0x1F300, 0x1F5FF), *range(0x1F600, 0x1F64F), *range(0x1F680, 0x1F6FC), *range(0x1F90C, 0x1F9FF)]
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for image in images:
        ground = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(110, 256, 3)))
        for code in rng.choice(codes, 4):
            glyph = Image.new("RGBA", (136, 128))
            ImageDraw.Draw(glyph).text((0, 0), chr(code), font=font, embedded_color=True)
            side = int(rng.integers(36, 100))
            glyph = glyph.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR).resize((side, side))
            x, y = rng.integers(-20, 90, 2).tolist()
            ground.paste(glyph, (x, y), glyph)
        image[:] = np.asarray(ground)
    return images


class Autoencoding:
    """Squared error, more of it for hues, a little absolute error for edges, and a light pull to unit variance."""

    def __init__(self, scenes: int, seed: int, device: str) -> None:
        render = Renderer(stream=1)
        world = np.stack([render.scene(seed * 1_000_000 + k, split="all").image for k in range(scenes)])
        self.images = np.concatenate([world, strangers(scenes // 4, seed)])
        self.held_out = pixels(np.stack([Renderer(stream=2).scene(k, split="all").image for k in range(48)])).to(device)
        self.device = device
        torch.manual_seed(seed)
        self.network: Any = new().to(device).to(memory_format=torch.channels_last)

    def loss(self, step: int, rng: torch.Generator, batch: int = BATCH) -> Losses:
        which = torch.randint(len(self.images), (batch,), generator=rng).tolist()
        corners = torch.randint(SIDE - CROP + 1, (batch, 2), generator=rng).tolist()
        crops = [self.images[k][y : y + CROP, x : x + CROP] for k, (y, x) in zip(which, corners, strict=True)]
        wanted = pixels(np.stack(crops)).to(self.device).contiguous(memory_format=torch.channels_last)
        posterior = self.network.encode(wanted).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng).to(self.device)
        got = self.network.decode(posterior.mean + posterior.std * noise).sample
        off = got - wanted
        return {
            "squared": off.square().mean(),
            "colour": 2 * (off - off.mean(1, keepdim=True)).square().mean(),  # hues vary little, but count
            "absolute": 0.1 * off.abs().mean(),
            "kl": 2e-6 * posterior.kl().mean() / posterior.mean[0, 0].numel(),  # per position
        }

    @torch.no_grad()
    def report(self, network: Any, folder: Path, step: int) -> str:
        again = torch.cat([network.decode(network.encode(x).latent_dist.mode()).sample for x in self.held_out.split(8)])
        latents = torch.cat([network.encode(x).latent_dist.mode() for x in self.held_out.split(8)])
        rows = torch.cat([self.held_out[:8], again[:8]])
        sheet(pictures(rows), 8).save(folder / f"report-{step:06d}.png")
        spread, error = latents.std((0, 2, 3)), psnr(self.held_out, again)
        return f"PSNR {error:.2f} dB on held-out scenes, latent std by channel {spread.min():.2f}-{spread.max():.2f}"

    @torch.no_grad()
    def export(self, network: Any, folder: Path) -> None:
        """Sets the scaling factor, so that scaled latents have unit variance, and saves a diffusers folder."""
        latents = torch.cat([network.encode(x).latent_dist.mode() for x in self.held_out.split(8)])
        network.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
        network.to("cpu").save_pretrained(folder / "vae")


def psnr(wanted: Tensor, got: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; images in [-1, 1]."""
    error = (got.clamp(-1, 1) - wanted).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())


def sheet(images: np.ndarray, columns: int) -> Image.Image:
    """Pictures (n, h, w, 3) in rows of `columns`, two pixels apart."""
    n, h, w, _ = images.shape
    page = Image.new("RGB", (columns * (w + 2), -(-n // columns) * (h + 2)), "white")
    for k, image in enumerate(images):
        page.paste(Image.fromarray(image), (k % columns * (w + 2), k // columns * (h + 2)))
    return page
