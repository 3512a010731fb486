"""The model cards of the glyph pipelines."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class _About:
    """What sets one pipeline apart, in words."""

    name: str
    kind: str
    text: str
    command: str
    sampler: str
    grid: str
    noise: str = ""
    told: str = ""


_SD = _About(
    name="glyph-sd",
    kind="A small Stable Diffusion",
    text="""Text encoder: token and position embeddings without
  a layer, so that a word's meaning sits in its own token. Prediction: v.""",
    command="sd",
    sampler="DDIM",
    grid="16 x 16",
)
_SD3 = _About(
    name="glyph-sd3",
    kind="A small Stable Diffusion 3",
    text="""Transformer: 8 blocks of joint
  attention, 8 heads, 8 x 8 patches. Text: token and position embeddings of two small CLIPs, so that a word's meaning
  sits in its own token; no T5. The pooled text is zero: words act by attention alone. Prediction: flow.""",
    command="sd3",
    sampler="Euler",
    grid="8 x 8",
    noise=" (t / 1000 is its part)",
    told=", with `text_encoder_3=None, tokenizer_3=None`",
)


def weak(quality: dict[str, Any]) -> str:
    """The concepts that fail most, worst first."""
    parts = sorted(quality.get("weak", {}).items(), key=lambda one: one[1])
    return ", ".join(f"{concept} ({part:.0%})" for concept, part in parts) or "none"


def history(made: dict[str, Any]) -> str:
    """The runs of a training in words, the first one first; `after` is how the weights that it began with were made."""
    before = f"{history(made['after'])};\n  then " if "after" in made else ""
    often = ", ".join(f"{concept} ({weight:g} times)" for concept, weight in made.get("weights", {}).items())
    text = (
        f"{made['steps']:,} steps of {made['batch']} on {made['scenes']:,} scenes, seed {made['seed']}, "
        f"grounding loss {made['grounding']:g}"
    )
    return f"{before}{text}" + (f",\n  more often: {often}" if often else "")


def card(found: dict[str, Any], made: dict[str, Any], pipe: Any) -> str:
    """The model card, in Markdown."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    size = sum(p.numel() for part in parts for p in part.parameters())
    about = _SD if hasattr(pipe, "unet") else _SD3
    q = found["quality"]
    sweep = [
        f"| {s['guidance']:g} | {s['singles']:.1%} | {s['colours']:.1%} | {s['present']:.1%} |" for s in found["sweep"]
    ]
    maps = [f"| {t} | {m['pointing']:.1%} | {m['share']:.2f} |" for t, m in found["maps"].items()]
    return f"""# {about.name}

{about.kind}, trained from nothing on the glyph world: 12 animals and 12 objects in 11 colours, 128 x 128.
An ordinary diffusers folder: `attnctl.load("{about.name}")`,
or `{type(pipe).__name__}.from_pretrained` on it{about.told}.

- Size: {size:,} parameters, half precision. Autoencoder: f = 8, {pipe.vae.config.latent_channels} channels,
  {found["autoencoder_psnr"]:.1f} dB PSNR on scenes of other seeds. {about.text}
- Data: scenes of one to three things, drawn by `attnctl.glyph.scenes` with their captions. The pairs in
  `attnctl.glyph.words.HELD_OUT` never appear together.
- Training: `python -m attnctl.glyph.train autoencoder`, then `python -m attnctl.glyph.train {about.command}`, on a CPU:
  {history(made)}.
- Scores: `python -m attnctl.glyph.train score`; the judge reads the pictures. 20 steps of {about.sampler}.

## Pictures, at guidance {found["guidance"]:g}

| what | right |
|---|---|
| "a X": X and nothing else | {q["singles"]:.1%} |
| "a C O": the object in its colour | {q["colours"]:.1%} |
| pairs of animals, both present | {q["present"]:.1%} |
| ... pairs seen in training | {q["present_seen"]:.1%} |
| ... pairs left out of training | {q["present_held_out"]:.1%} |

Concepts right in less than 90 % of the pictures of them alone: {weak(q)}.

Pairs are meant to fail at times, as those of large models do: that is what controls repair.

## Guidance, on a part of the prompts

| scale | single things | colours | both animals |
|---|---|---|---|
{chr(10).join(sweep)}

## Word maps, on scenes of held-out pairs with noise added{about.noise}

Mean over heads and layers at {about.grid}. Pointing: the map of a noun peaks on its own thing. Own share: its
mass there over its mass on both things.

| t | pointing | own share |
|---|---|---|
{chr(10).join(maps)}

## Licence

Apache-2.0. Trained on pictures rendered with Noto Color Emoji (noto-emoji project, copyright 2013-2017 Google Inc. and
Arjen Nienhuis; image sources under Apache-2.0, font under the SIL Open Font License 1.1), which is not contained.
"""
