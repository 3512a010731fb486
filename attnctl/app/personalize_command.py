"""attnctl personalize: learn new things from one picture, write their files, and draw with them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctl.app.command import DEVICE_HELP, MODEL_HELP, UsageError, check_writable, plain, tell
from attnctl.errors import instead, short

if TYPE_CHECKING:
    from PIL import Image
    from rich.progress import Progress as Bars

    from attnctl.concepts import Concept, Learnt
    from attnctl.pipelines.personalize.trainer import Progress

SAMPLES = 4  # pictures of each prompt on the sheet
EVERY = 50  # steps between two checkpoints
MASKS, FUSED = "masks.png", "fused"
LITTLE = 64  # side in pixels at which masks are checked before the model says which side it wants


def personalize(
    picture: Annotated[Path, typer.Argument(help="One picture with all the things in it.", show_default=False)],
    concepts: Annotated[
        str,
        typer.Option(
            help="The things by their class nouns, with commas: 'cat, car'. Their words are `<v1>`, `<v2>`, ..., or "
            "your own: `'<rex>=dog, <kit>=cat'`.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files; made if need be.")] = Path("concepts"),
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "glyph-sd",
    preset: Annotated[
        str | None,
        typer.Option(help="ours (found on glyph-sd) or paper (DisenDiff's); default: paper but for embedded models."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, as name=value; may be given several times.")
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a thing is, as noun=file: white on black, in the shape of the picture. One for each thing; "
            "without any the model looks for them itself."
        ),
    ] = None,
    fused: Annotated[
        bool,
        typer.Option(
            "--fused",
            help="Also write OUT/fused, a whole pipeline with words and weights merged, as large as the model.",
        ),
    ] = False,
    sample: Annotated[str | None, typer.Option(help="One more prompt to draw at the end.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was interrupted.")] = False,
    preview: Annotated[int, typer.Option(help="Draw a sheet of samples every so many steps; 0: at the end only.")] = 0,
    accumulate: Annotated[
        int | None,
        typer.Option(help="Passes in each step: --set rows=1 --accumulate 4 learns as rows=4, in less memory."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="no, bf16 or fp16 (on a GPU); weights, losses and maps stay in float32.")
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the processor; default: as for generate.")] = None,
) -> None:
    """Learn several new things from one picture without mixing them, and draw with them (DisenDiff).

    - attnctl personalize mine.png --concepts 'cat, car' --out mine
    - `attnctl personalize mine.png --concepts '<rex>=dog, <kit>=cat' --model ./my-sd15 --set steps=300`
    - attnctl personalize mine.png --concepts 'cat, car' --mask cat=cat.png --mask car=car.png
    - attnctl personalize mine.png --concepts 'cat, car' --model ./my-sd15 --set rows=1 --accumulate 4 --precision bf16

    SD 1, SD 2, SDXL, SD 3 and FLUX.1 learn. Writes a LoRA and an embedding for each word, which stock diffusers and
    ComfyUI load, and a sheet of samples. Draw more with `attnctl generate 'a <v1> cat' --model mine`. A training that
    was stopped, in whatever way, goes on with --resume. For programs that take whole models only, --fused writes one
    (later: `attnctl concepts fuse mine --out DIR`).

    The places of the things are looked for first; OUT/masks.png shows what was found, unless
    you give masks. The sheet is drawn last, and with
    `--preset paper` pictures of the class nouns are drawn first, so even few steps take a while.
    """
    from attnctl import loading
    from attnctl.app.asked import open_model
    from attnctl.app.bars import bars, paused
    from attnctl.app.recipe import open_picture
    from attnctl.fusing import check_new, fuse
    from attnctl.pipelines.personalize.concepts import read_concepts
    from attnctl.pipelines.personalize.settings import settings_of

    small = model in loading.embedded()
    chosen = preset or ("ours" if small else "paper")
    asked = settings_in(set_ or [])
    for name, value in (("accumulate", accumulate), ("precision", precision)):
        if value is not None and asked.setdefault(name, value) != value:
            raise UsageError(f"--{name} {short(str(value))} and --set {name}={short(str(asked[name]))}: give one")
    settings_of(chosen, **asked)  # a wrong one fails before anything is loaded, as all that follows
    named = read_concepts(concepts)
    if preview < 0:
        raise UsageError(f"--preview {preview}: from 0 up")
    source = open_picture(picture)
    masks = masks_in(mask or [])
    check_writable(out)
    if fused:
        check_new(out / FUSED)
    if resume and not (out / "training").is_dir():
        tell(f"nothing to resume in {plain(out)}: a new training begins")

    from attnctl.pipelines.personalize.accelerated import peak_memory
    from attnctl.pipelines.personalize.checkpoint import end_training
    from attnctl.pipelines.personalize.masks import MaskError, given_masks
    from attnctl.pipelines.personalizer import Personalizer

    if masks:
        given_masks(masks, named, LITTLE, source.size)

    with bars() as bar:
        pipe = open_model(model, device, "float32", bar, 2 if threads is None and small else threads)
        personalizer = Personalizer(pipe, concepts, chosen, **asked)
        shown = Shown(bar)
        samples = Samples(pipe, personalizer.concepts, source, personalizer.side, sample, loading.usual(model), bar)
        try:
            learnt = personalizer.learn(
                source,
                shown.step,
                shown.stage,
                folder=out,
                resume=resume,
                every=preview or EVERY,
                preview=(lambda step: samples.save(out / f"preview-{step:04d}.png")) if preview else None,
                masks=masks or None,
                found=lambda found: _keep(found.picture, out),
            )
        except MaskError as error:
            raise UsageError(f"{error}; see {plain(_keep(error.picture, out))}") from None
        folder = replace(learnt, base=loading.written(model)).save(out)
        with paused(bar):
            for line in shown.warnings(learnt):
                tell(line)
        path = samples.save(folder / "sample.png")
        with paused(bar):
            print(
                shown.summary(peak_memory(pipe.device)),
                *(plain(folder / name) for name in learnt.files),
                plain(path),
                sep="\n",
                flush=True,
            )
        if fused:
            whole = fuse(pipe, folder / FUSED)
            with paused(bar):
                print(plain(whole), flush=True)
        end_training(folder)  # until all is written, --resume has what it needs


def _keep(picture: Image.Image, out: Path) -> Path:
    """Save the picture of the masks."""
    out.mkdir(parents=True, exist_ok=True)
    picture.save(out / MASKS)
    return out / MASKS


def masks_in(given: list[str]) -> dict[str, Image.Image]:
    """noun -> the picture of `--mask noun=file`."""
    from attnctl.app.recipe import open_picture

    found = dict[str, Any]()
    for one in given:
        name, equals, file = (part.strip() for part in one.partition("="))
        if not equals or not name or not file:
            raise UsageError(f"--mask {short(one)}: write it as noun=file, such as cat=cat.png")
        if name in found:
            raise UsageError(f"--mask {short(one)}: {name!r} has a mask already")
        found[name] = open_picture(Path(file))
    return found


def settings_in(changes: list[str]) -> dict[str, Any]:
    """The settings of `--set name=value`; values are numbers, true, false, none or words."""
    from attnctl.pipelines.personalize.settings import CHOICES, Settings

    known, found = [one.name for one in fields(Settings)], dict[str, Any]()
    for change in changes:
        name, equals, value = (part.strip() for part in change.partition("="))
        if not equals or not value:
            raise UsageError(f"--set {short(change)}: write it as name=value, such as steps=100")
        if name not in known:
            raise UsageError(f"--set {short(change)}: there is no setting {name!r}; {instead(name, known, 800)}")
        found[name] = value if name in (*CHOICES, "others") else _value(value)
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
            if self.bar.disable:  # no terminal: a line for each stage, since there are no bars
                tell(f"{label}, {total} in all" if total else label)
        self.bar.update(self.task, completed=done, description=text or label)

    def summary(self, memory: int | None = None) -> str:
        """The losses of the last step, and the most bytes that were held, one line."""
        if self.latest is None:
            return "nothing was left to train"
        told = ", ".join(f"{name} {value:.3f}" for name, value in self.latest.losses.items())
        kept, tried = self.latest.renewed
        masks = f"; masks renewed {kept} of {tried} times" if tried else ""
        most = f"; at most {memory / 2**20:.0f} MiB of memory" if memory else ""
        return f"{self.latest.step} steps; in the last one: {told}{masks}{most}"

    def warnings(self, learnt: Learnt) -> list[str]:
        """What went wrong in the maps, one line each."""
        if self.latest is None:
            return []
        return [
            f"the map of {concept.noun!r} covers the background ({spread:.0%} of the picture): "
            "lower the weights of the calibration, such as --set separate=0.0002"
            for concept, spread in zip(learnt.concepts, self.latest.coverage, strict=False)
            if spread > FLOODED
        ]


FLOODED = 0.5  # mean of a noun's min-max map; that of a thing is about the share of the picture it fills


@dataclass
class Samples:
    """Draws sheets: the picture that was given, each concept alone, all together, and a prompt of the caller's."""

    pipe: Any
    concepts: Sequence[Concept]
    source: Image.Image
    side: int
    prompt: str | None
    usual: dict[str, Any]
    bar: Bars

    def save(self, path: Path) -> Path:
        """Draw a sheet with the words as they are now."""
        import torch

        from attnctl.sheets import grid

        prompts = [f"a {one.phrase}" for one in self.concepts]
        if len(prompts) > 1:
            prompts.append(" and ".join(prompts))
        prompts += [self.prompt] if self.prompt else []
        small = self.source.convert("RGB")
        small.thumbnail((self.side, self.side))
        rows: list[Any] = [[("the picture", small)]]
        task = self.bar.add_task("samples", total=len(prompts))
        if self.bar.disable:
            tell(f"drawing samples of {len(prompts)} prompts")
        self.pipe.set_progress_bar_config(disable=True)
        names = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
        settings = {name: self.usual[own] for name, own in names.items() if own in self.usual}
        for prompt in prompts:
            dice = [torch.Generator("cpu").manual_seed(k) for k in range(SAMPLES)]
            found = self.pipe([prompt] * SAMPLES, generator=dice, **settings).images
            rows.append([(prompt if k == 0 else "", one) for k, one in enumerate(found)])
            self.bar.advance(task)
        self.bar.remove_task(task)
        self.pipe.set_progress_bar_config(disable=False)
        grid(rows, points=max(10, min(self.side // 11, 24))).save(path)
        return path
