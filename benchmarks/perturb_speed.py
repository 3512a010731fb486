"""What perturbation guidance costs: ours against diffusers' PAG pipeline of SD 3, in time and in memory.

Both draw with the same random transformer of SD 3 medium's width, the same blocks perturbed, and classifier-free
guidance. Theirs runs every block on three rows (unconditional, conditional, perturbed) and masks whole maps. Ours
starts its third pass at the first perturbed block l0 of L, so (2 + (L - l0) / L) / 3 of their passes are left.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from clock import Sample, placed, watched
from models import MODELS, build
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import attnctl
from attnctl.engine import passes
from attnctl.engine.heads import pick_heads
from attnctl.processors import Pag, Perturb

PROMPT, LAYERS = "a cat and a dog", 6
THEIRS = "diffusers' PAG"


def theirs(pipe: Any, blocks: list[int], steps: int, side: int) -> Callable[[], Any]:
    """diffusers' StableDiffusion3PAGPipeline on the same components."""
    parts = {name: it for name, it in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    names = [f"blocks.{block}" for block in blocks]
    other = diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=names)
    other.set_progress_bar_config(disable=True)

    def run() -> Any:
        noise, processors = torch.Generator().manual_seed(0), dict(pipe.transformer.attn_processors)
        settings = {"height": side, "width": side, "num_inference_steps": steps, "output_type": "latent"}
        drawn = other(PROMPT, generator=noise, pag_scale=3.0, **settings).images
        pipe.transformer.set_attn_processor(processors)
        return drawn

    return run


@contextmanager
def unshared(pipe: Any, control: Any) -> Any:
    """The weak pass runs every block."""
    with patch.object(passes.Prefix, "ask", lambda self, site: None), attnctl.attach(pipe, control):
        yield


def measure(repeats: int, bar: Progress, steps: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Every setting in turn, `repeats` times, each time in another order; ratios are within a round."""
    run, side = build("sd3", steps, layers=LAYERS), MODELS["sd3"][1]
    pipe = placed(run.pipe, device)  # type: ignore[attr-defined]
    blocks = [site.block for site in pick_heads(attnctl.sites(pipe), "mid")]
    control = Pag("mid")
    soft = Perturb("mid", u=0.5)
    drawn: dict[str, Any] = {}
    runs: dict[str, tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]] = {
        "plain": (run, nullcontext),
        THEIRS: (theirs(pipe, blocks, steps, side), nullcontext),
        "Pag": (run, lambda: attnctl.attach(pipe, control)),
        "Pag, nothing shared": (run, lambda: unshared(pipe, control)),
        "Perturb, whole map, u = 0.5": (run, lambda: attnctl.attach(pipe, soft)),
    }
    line = bar.add_task("perturb: sd3", total=(repeats + 1) * len(runs))
    found: dict[str, list[Sample]] = {setting: [] for setting in runs}
    for repeat in range(repeats + 1):
        shift = repeat % len(runs)
        for setting in [*runs][shift:] + [*runs][:shift]:
            call, around = runs[setting]

            def kept(call: Callable[[], Any] = call, setting: str = setting) -> None:
                drawn[setting] = call()

            sample = watched(kept, around(), device)
            if repeat:  # the first round warms up
                found[setting].append(sample)
            bar.advance(line)
    promised = (2 + (LAYERS - blocks[0]) / LAYERS) / 3
    return {
        "model": "sd3",
        "device": device,
        "layers": LAYERS,
        "blocks": blocks,
        "promised": promised,
        "difference": float((drawn["Pag"] - drawn[THEIRS]).abs().max()),
        "samples": {setting: [vars(sample) for sample in samples] for setting, samples in found.items()},
        "rows": [
            {
                "setting": setting,
                "seconds": median(one.seconds for one in own),
                "mebibytes": median(one.mebibytes for one in own),
                "time to theirs": median(a.seconds / b.seconds for a, b in zip(own, found[THEIRS], strict=True)),
                "memory to theirs": median(a.mebibytes / b.mebibytes for a, b in zip(own, found[THEIRS], strict=True)),
            }
            for setting, own in found.items()
        ],
    }


def show(found: dict[str, Any], console: Console) -> None:
    """A row per setting."""
    title = (
        f"SD 3 with {found['layers']} layers, blocks {found['blocks'][0]} to {found['blocks'][-1]} perturbed; "
        f"passes promise {found['promised']:.3f}; latents differ by {found['difference']:.1e} at most"
    )
    page = Table(title=title, box=SIMPLE_HEAD)
    for column in ("setting", "time", "/ theirs", "memory", "/ theirs"):
        page.add_column(column, no_wrap=True, justify="left" if column == "setting" else "right")
    for row in found["rows"]:
        page.add_row(
            row["setting"], f"{row['seconds']:.1f} s", f"{row['time to theirs']:.3f}", f"{row['mebibytes']:,.0f} MiB",
            f"{row['memory to theirs']:.2f}",
        )  # fmt: skip
    Console(width=max(120, console.width)).print(page)
