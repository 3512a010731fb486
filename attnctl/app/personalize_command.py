"""attnctl personalize: learn new things from one picture, write their files, and draw with them."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctl.app.command import UsageError, check_writable, plain, tell
from attnctl.errors import instead, short

if TYPE_CHECKING:
    from PIL import Image
    from rich.progress import Progress as Bars

    from attnctl.pipelines.personalize.files import Learnt
    from attnctl.pipelines.personalize.trainer import Progress

SAMPLES = 4  # pictures of each prompt on the sheet


def run(
    picture: Path,
    concepts: str,
    out: Path,
    model: str,
    preset: str | None,
    changes: list[str],
    sample: str | None,
    device: str | None,
    threads: int | None,
) -> None:
    """See `attnctl personalize`."""
    from attnctl.app import loading
    from attnctl.app.asked import open_model
    from attnctl.app.bars import bars, paused
    from attnctl.app.recipe import open_picture
    from attnctl.pipelines.personalize.concepts import read_concepts
    from attnctl.pipelines.personalize.settings import settings_of

    small = model in loading.embedded()
    chosen = preset or ("ours" if small else "paper")
    asked = settings_in(changes)
    settings_of(chosen, **asked)  # a wrong one fails before anything is loaded
    read_concepts(concepts)
    source = open_picture(picture)
    check_writable(out)

    from attnctl.pipelines.personalizer import Personalizer

    with bars() as bar:
        pipe = open_model(model, device, "float32", bar, 2 if threads is None and small else threads)
        personalizer = Personalizer(pipe, concepts, chosen, **asked)
        shown = Shown(bar)
        learnt = personalizer.learn(source, shown.step, shown.stage)
        folder = learnt.save(out)
        with paused(bar):
            for line in shown.warnings(learnt):
                tell(line)
        sheet = sample_sheet(pipe, learnt, sample, source, personalizer.side, loading.USUAL.get(model, {}), bar)
        path = folder / "sample.png"
        sheet.save(path)
        with paused(bar):
            print(shown.summary(), *(plain(folder / name) for name in learnt.files), plain(path), sep="\n", flush=True)


def settings_in(changes: list[str]) -> dict[str, Any]:
    """The settings of `--set name=value`; values are numbers, true, false, none or words."""
    from attnctl.pipelines.personalize.settings import Settings

    known, found = [one.name for one in fields(Settings)], dict[str, Any]()
    for change in changes:
        name, equals, value = (part.strip() for part in change.partition("="))
        if not equals or not value:
            raise UsageError(f"--set {short(change)}: write it as name=value, such as steps=100")
        if name not in known:
            raise UsageError(f"--set {short(change)}: there is no setting {name!r}; {instead(name, known)}")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class Shown:
    """The bars of a training, and what it came to."""

    def __init__(self, bar: Bars) -> None:
        self.bar, self.latest = bar, None
        self.task: Any = None
        self.label = ""

    latest: Progress | None

    def stage(self, name: str, done: int, total: int) -> None:
        """Something is being prepared."""
        self._at(name, done, total)

    def step(self, progress: Progress) -> None:
        """A step is done."""
        self.latest = progress
        told = "  ".join(f"{name} {value:.3f}" for name, value in progress.losses.items())
        self._at("training", progress.step, progress.steps, f"training  {told}")

    def _at(self, label: str, done: int, total: int, text: str | None = None) -> None:
        if label != self.label:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task, self.label = self.bar.add_task(label, total=total), label
        self.bar.update(self.task, completed=done, description=text or label)

    def summary(self) -> str:
        """The losses of the last step, one line."""
        if self.latest is None:
            return "nothing was left to train"
        told = ", ".join(f"{name} {value:.3f}" for name, value in self.latest.losses.items())
        return f"{self.latest.step} steps; in the last one: {told}"

    def warnings(self, learnt: Learnt) -> list[str]:
        """What went wrong in the maps, one line each."""
        if self.latest is None:
            return []
        return [
            f"the map of {concept.noun!r} covers the background ({spread:.0%} of the picture): "
            "lower the weights of the calibration, such as --set separate=0.0002"
            for concept, spread in zip(learnt.concepts, self.latest.coverage, strict=True)
            if spread > FLOODED
        ]


FLOODED = 0.5  # mean of a noun's min-max map; that of a thing is about the share of the picture it fills


def sample_sheet(
    pipe: Any, learnt: Learnt, sample: str | None, source: Image.Image, side: int, usual: dict[str, Any], bar: Bars
) -> Image.Image:
    """Rows of pictures: the one that was given, each concept alone, all together, and a prompt of the caller's."""
    import torch

    from attnctl.sheets import grid

    phrases = [one.phrase for one in learnt.concepts]
    prompts = [f"a {phrase}" for phrase in phrases]
    if len(phrases) > 1:
        prompts.append(" and ".join(prompts))
    prompts += [sample] if sample else []
    small = source.convert("RGB")
    small.thumbnail((side, side))
    rows: list[Any] = [[("the picture", small)]]
    task = bar.add_task("samples", total=len(prompts))
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": usual.get("steps"), "guidance_scale": usual.get("guidance")}
    settings = {name: value for name, value in settings.items() if value is not None}
    for prompt in prompts:
        dice = [torch.Generator("cpu").manual_seed(k) for k in range(SAMPLES)]
        found = pipe([prompt] * SAMPLES, generator=dice, **settings).images
        rows.append([(prompt if k == 0 else "", one) for k, one in enumerate(found)])
        bar.advance(task)
    bar.remove_task(task)
    pipe.set_progress_bar_config(disable=False)
    return grid(rows, points=max(10, min(side // 11, 24)))
