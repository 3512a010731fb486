"""What guidance by gradients costs: ours against diffusers' Attend-and-Excite, in time and in memory.

Both draw with the same random UNet of true size and Attend-and-Excite's schedule: one update in each step of the first
half. Their thresholds, which would repeat updates, are left out: with random weights no loss falls. Cost is the time
beyond the plain run, memory the highest resident set beyond what was there before the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
from attnctl.processors import AStar, Excitation

WIDTH = 120  # characters of the table of results
PROMPT, WORDS = "a cat and a dog", ("cat", "dog")
STEPS = {"sd15": 2}
"""Denoising steps of one run; of other models as in `models.MODELS`."""
DEPTH = {"sd3": {"layers": 6}, "flux": {"double": 2, "single": 4}}
"""Of 24 layers, and of 19 and 38 blocks: enough for the middle third, where maps are read, to be a third."""

Setting = Callable[[Any], AbstractContextManager[Any]]


def controlled(control: Any) -> Setting:
    return lambda pipe: attnctl.attach(pipe, control)


@contextmanager
def to_the_end(pipe: Any, control: Any) -> Iterator[None]:
    """The extra forward does not stop after the last site."""

    def see(self: passes.Watch, call: Any) -> None:
        if callback := self.waiting.pop(call.site.name, None):
            callback(call)

    with ExitStack() as stack:
        stack.enter_context(patch.object(passes.Watch, "see", see))
        stack.enter_context(attnctl.attach(pipe, control))
        yield


def theirs(pipe: Any, side: int, steps: int) -> Callable[[], None]:
    """diffusers' StableDiffusionAttendAndExcitePipeline on the same components."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        other = diffusers.StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    ids = pipe.tokenizer(PROMPT).input_ids
    names = pipe.tokenizer.convert_ids_to_tokens(ids)
    indices = [k for k, name in enumerate(names) if name.removesuffix("</w>") in WORDS]

    def run() -> None:
        noise, processors = torch.Generator().manual_seed(0), dict(pipe.unet.attn_processors)
        other(
            PROMPT, indices, height=side, width=side, num_inference_steps=steps, generator=noise, output_type="latent",
            max_iter_to_alter=steps // 2, thresholds={}, attn_res=(side // 32, side // 32),
        )  # fmt: skip
        pipe.unet.set_attn_processor(processors)

    return run


def settings_of(name: str) -> dict[str, Setting]:
    """What is measured beside the plain run."""
    half = (0.0, 0.5)
    schedule = Excitation(*WORDS, maps="attend-and-excite-padded", relative=None, window=half)
    found: dict[str, Setting] = {}
    if name == "sd15":
        found["ours, their schedule"] = controlled(schedule)
        down = Excitation(*WORDS, relative=None, window=half, where="down_blocks.2.*attn2")
        found["... sites of the way down only"] = controlled(down)
        found["... in bfloat16"] = controlled(Excitation(*WORDS, relative=None, window=half, bfloat16=True))
        found["... both"] = controlled(
            Excitation(*WORDS, relative=None, window=half, where="down_blocks.2.*attn2", bfloat16=True)
        )
    every = AStar(*WORDS, look_ahead=0, window=(0, 1))
    found["A-STAR, every step"] = controlled(every)
    found["A-STAR without early stop"] = lambda pipe: to_the_end(pipe, every)
    return found


def measure(name: str, repeats: int, bar: Progress, device: str = "cpu") -> dict[str, Any]:
    """Every setting in turn, `repeats` times, each time in another order; ratios are within a round."""
    steps = STEPS.get(name, MODELS[name][2])
    run = build(name, steps, **DEPTH.get(name, {}))
    pipe = placed(run.pipe, device)  # type: ignore[attr-defined]
    runs: dict[str, tuple[Callable[[], None], Setting]] = {"plain": (run, lambda pipe: nullcontext())}
    if name == "sd15":
        runs["diffusers' Attend-and-Excite"] = theirs(pipe, MODELS[name][1], steps), lambda pipe: nullcontext()
    runs |= {setting: (run, around) for setting, around in settings_of(name).items()}
    line = bar.add_task(f"guided: {name}", total=(repeats + 1) * len(runs))
    found: dict[str, list[Sample]] = {setting: [] for setting in runs}
    for repeat in range(repeats + 1):
        shift = repeat % len(runs)
        for setting in [*runs][shift:] + [*runs][:shift]:
            call, around = runs[setting]
            sample = watched(call, around(pipe), device)
            if repeat:  # the first round warms up
                found[setting].append(sample)
            bar.advance(line)
    return {
        "model": name,
        "device": device,
        "depth": DEPTH.get(name),
        "steps": steps,
        "samples": {setting: [vars(sample) for sample in samples] for setting, samples in found.items()},
        "rows": [row(setting, found) for setting in runs],
    }


def row(setting: str, found: dict[str, list[Sample]]) -> dict[str, Any]:
    """Medians; cost and memory also as parts of those of the peer, where there is one."""
    plain, own = found["plain"], found[setting]
    beyond = [b.seconds - a.seconds for a, b in zip(plain, own, strict=True)]
    figures: dict[str, Any] = {
        "setting": setting,
        "seconds": median(one.seconds for one in own),
        "whole": median(b.seconds / a.seconds for a, b in zip(plain, own, strict=True)),
        "mebibytes": median(one.mebibytes for one in own),
    }
    if peer := found.get("diffusers' Attend-and-Excite"):
        theirs = [b.seconds - a.seconds for a, b in zip(plain, peer, strict=True)]
        figures["cost to theirs"] = median(a / b for a, b in zip(beyond, theirs, strict=True))
        figures["whole to theirs"] = median(a.seconds / b.seconds for a, b in zip(own, peer, strict=True))
        figures["memory to theirs"] = median(a.mebibytes / b.mebibytes for a, b in zip(own, peer, strict=True))
    return figures


def show(measured: list[dict[str, Any]], console: Console) -> None:
    """A row per setting."""
    page = Table(title="medians; cost is the time beyond the plain run", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (
        "model",
        "setting",
        "time",
        "/ plain",
        "memory",
        "cost / theirs",
        "whole / theirs",
        "memory / theirs",
    ):
        page.add_column(column, no_wrap=True, justify="left" if column in ("model", "setting") else "right")
    for one in measured:
        page.add_section()
        for number, figures in enumerate(one["rows"]):
            ratios = [figures.get(name) for name in ("cost to theirs", "whole to theirs", "memory to theirs")]
            page.add_row(
                "" if number else one["model"], figures["setting"], f"{figures['seconds']:.1f} s",
                f"{figures['whole']:.2f}", f"{figures['mebibytes']:,.0f} MiB",
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            )  # fmt: skip
    Console(width=max(WIDTH, console.width)).print(page)  # rather wrapped by a narrow terminal than cut short
