"""One drawing: the pipeline call a recipe describes, its word maps, and the sheet of two drawings side by side."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from PIL import Image

from attnctl.app.preview import previewed
from attnctl.app.region_text import outlined
from attnctl.errors import AttnctlError, PhraseError, UnsupportedPipelineError, instead, short
from attnctl.sheets import Cell, grid
from attnctl.words.phrases import positions, streams
from attnctl.words.spelling import unlearned, words

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from rich.progress import Progress

    from attnctl.app.recipe import Recipe
    from attnctl.engine.attachment import Attachment
    from attnctl.engine.control import Control

_PLAIN_WORDS = frozenset("a an the and or with in on at of to by from is are its his her their".split())

_CELL, _GAP, _POINTS = 384, 16, 16  # of the sheet: width of a picture, room between them, size of captions


class DrawingError(AttnctlError):
    """The pipeline cannot draw what it was asked to draw."""


class OutOfMemoryError(DrawingError):
    """It does not fit into memory."""


@dataclass(frozen=True)
class LossTrace:
    """What the controls of a drawing did: plain data, and pictures of it by what they show."""

    report: dict[str, Any]
    pictures: dict[str, Image.Image]


@dataclass(frozen=True)
class Drawing:
    """A picture, the heat map of each word over it, and, if asked for, what the controls did.

    `alone` names the controls that looked ahead and left the picture as it was; `regions` are those of the controls.
    """

    picture: Image.Image
    maps: dict[str, Image.Image]
    trace: LossTrace | None = None
    alone: tuple[str, ...] = ()
    regions: tuple[tuple[str, Any], ...] = ()


def content_words(prompt: str) -> tuple[str, ...]:
    """The words of a prompt that mean a thing or a look, as phrases: a repeated word is told apart by its number."""
    return tuple(word for word in words(prompt) if word.partition("#")[0] not in _PLAIN_WORDS)


def shown_words(pipe: "DiffusionPipeline", prompt: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The content words that have a map, and those that have none, e.g. because the tokenizer cuts them off."""
    from attnctl.engine.families.registry import family_of

    family = family_of(pipe)[0]
    default = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    run: Any = SimpleNamespace(
        pipe=pipe,
        family=family,
        texts={},
        prompts=(prompt,),
        text_rows=None,
        max_sequence_length=None if default is None else default.default,
    )
    text, seen, unseen = streams(run, 0), list[str](), list[str]()
    for word in content_words(prompt):
        try:
            positions(text, word)
        except PhraseError:
            unseen.append(word)
        else:
            seen.append(word)
    return tuple(seen), tuple(unseen)


def check_size(pipe: "DiffusionPipeline", width: int, height: int) -> None:
    """Raise unless the pipeline can draw this size exactly."""
    from attnctl.engine.families.registry import discover

    try:
        patch = min((site.factor for site in discover(pipe) if site.kind == "joint" and site.factor), default=1)
    except UnsupportedPipelineError:
        patch = 1  # drawing without controls needs no record
    factor = getattr(pipe, "vae_scale_factor", 8) * patch
    if width <= 0 or height <= 0 or width % factor or height % factor:
        raise DrawingError(f"size {width}x{height}: both sides must be positive multiples of {factor} for this model")


def draw(
    pipe: "DiffusionPipeline",
    recipe: "Recipe",
    controls: Sequence["Control"],
    label: str = "",
    bar: "Progress | None" = None,
    trace: bool = False,
    preview: Callable[[Image.Image], None] | None = None,
) -> Drawing:
    """Draw one picture as `recipe` says, under these controls.

    Args:
        pipe: the pipeline.
        recipe: what to draw; its controls are not read.
        controls: of this drawing.
        label: of the bar.
        bar: shows the steps.
        trace: also note what the controls do, for `Drawing.trace`.
        preview: is shown, after some of the steps, what the picture looks like so far.
    """
    # Kernels round by the size of a batch, not by what else is in it: so many copies give the picture of the group.
    return draw_together(pipe, [recipe] * recipe.together, controls, label, bar, trace, preview)[0]


def draw_together(
    pipe: "DiffusionPipeline",
    recipes: Sequence["Recipe"],
    controls: Sequence["Control"],
    label: str = "",
    bar: "Progress | None" = None,
    trace: bool = False,
    preview: Callable[[Image.Image], None] | None = None,
) -> list[Drawing]:
    """Draw pictures in one call of the pipeline, each from its own seed and prompt.

    Args:
        pipe: the pipeline.
        recipes: what to draw. They differ in prompt, negative and seed alone; maps are of one prompt.
        controls, label, bar: as for `draw`.
        trace, preview: as for `draw`; of one picture.

    Raises:
        OutOfMemoryError: fewer at once may fit.
        DrawingError: the pipeline cannot draw this.
    """
    import torch

    from attnctl.engine.attachment import attach

    first = recipes[0]
    check_learned(pipe, recipes)
    settings = _call_settings(pipe, recipes)
    # On the CPU whatever the device, so that a seed means the same noise everywhere.
    noise = [torch.Generator("cpu").manual_seed(recipe.seed) for recipe in recipes]
    settings["generator"] = noise if len(noise) > 1 else noise[0]
    if preview is not None:
        size = (first.width, first.height) if first.width and first.height else None
        settings |= previewed(pipe, size, preview)
    watch = _maps_control(first.maps)
    by_step = _maps_control(_named(controls) or first.maps, keep="step") if trace else ()
    try:
        with ExitStack() as stack:
            stack.enter_context(steps_shown(pipe, bar, label))
            stack.enter_context(_finite_alone(pipe, controls))
            run = stack.enter_context(attach(pipe, *controls, *watch, *by_step)) if controls or watch else None
            drawn = pipe(**settings).images
            told = _told(run, len(controls), by_step) if run and trace else None
            alone = [_left_alone(run, controls, image) if run else () for image in range(len(recipes))]
            maps = [
                {word: run.maps.overlay(word, picture, image) for word in first.maps} if run else {}
                for image, picture in enumerate(drawn)
            ]
    except AttnctlError:
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"out of memory on {first.device}: try a smaller --size or --dtype float16") from error
    except (RuntimeError, MemoryError) as error:  # the CPU's out of memory has no class of its own
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(f"out of memory on {first.device}: try a smaller --size") from error
    except ValueError as error:  # the pipeline's own check of its inputs
        raise DrawingError(" ".join(str(error).split())) from error
    regions = tuple(pair for control in controls for pair in getattr(control, "masks", ()))
    together = zip(drawn, maps, alone, strict=True)
    return [Drawing(picture, over, told, left, regions) for picture, over, left in together]


@contextmanager
def _finite_alone(pipe: "DiffusionPipeline", controls: Sequence["Control"]) -> Iterator[None]:
    """While it is open, a picture that holds infinity or no number is an error; diffusers would paint it black."""
    processor = getattr(pipe, "image_processor", None)
    if processor is None:
        yield
        return
    own = processor.postprocess

    def postprocess(image: Any, *args: Any, **kwargs: Any) -> Any:
        if not image.isfinite().all():
            names = ", ".join(type(control).__name__ for control in controls)
            why = f"a setting of {names} is too large" if controls else "try --dtype float32"
            raise DrawingError(f"the picture is not finite, so there is nothing to save; {why}")
        return own(image, *args, **kwargs)

    processor.postprocess = postprocess
    try:
        yield
    finally:
        del processor.postprocess


def needed(recipe: "Recipe") -> tuple[str, ...]:
    """Which drawings the picture of this recipe is made of."""
    if recipe.shows == "comparison":
        return ("plain", "controlled")
    return (recipe.shows,) if recipe.shows != "maps" else ("controlled" if recipe.controls else "plain",)


def pictures(drawings: dict[str, Drawing], recipe: "Recipe") -> dict[str, Image.Image]:
    """Every picture that these drawings give, by what it shows; the most telling one last."""
    titles = {"plain": "plain", "controlled": "; ".join(short(text, 200) for text in recipe.controls)}
    columns = [
        _column(drawing, "left alone: " * bool(drawing.alone) + titles[kind]) for kind, drawing in drawings.items()
    ]
    sheet = grid([[("", column) for column in columns]], _POINTS, _GAP)
    found = {kind: drawing.picture for kind, drawing in drawings.items()}
    if len(columns) > 1:
        found["comparison"] = sheet
    elif recipe.maps:
        found["maps"] = sheet
    return found


def _maps_control(phrases: tuple[str, ...], keep: Any = ()) -> "tuple[Control, ...]":
    if not phrases:
        return ()
    from attnctl.maps.recorder import TokenMaps

    return (TokenMaps(*phrases, keep=keep),)


def _named(controls: Iterable["Control"]) -> tuple[str, ...]:
    """The phrases that controls speak of, each once."""
    found: dict[str, None] = {}
    for control in controls:
        for phrase in getattr(control, "phrases", ()):
            found |= dict.fromkeys([phrase] if isinstance(phrase, str) else phrase)
    return tuple(found)


def _told(run: "Attachment", own: int, by_step: "tuple[Control, ...]") -> LossTrace:
    """What the first `own` controls of an attachment did; the others are its recorders."""
    from attnctl.app.trace_pictures import loss_curves, map_sequence

    report = run.report.to_dict()
    report["sites"] = report["sites"][:own]
    shown = {"losses": loss_curves(report["traces"])}
    for recorder in by_step:
        shown["steps"] = map_sequence(run.run.state(recorder))
    return LossTrace(report, {name: picture for name, picture in shown.items() if picture is not None})


def _left_alone(run: "Attachment", controls: Sequence["Control"], image: int) -> tuple[str, ...]:
    """The controls that left a picture alone."""
    found = [(control, getattr(state, "foreseen", None)) for control, state in run.run.states(controls)]
    return tuple(type(control).__name__ for control, ahead in found if ahead is not None and image in ahead.alone)


def check_learned(pipe: "DiffusionPipeline", recipes: Iterable["Recipe"]) -> None:
    """Raise if a prompt has a word in angle brackets that the model was never taught."""
    found = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
    tokenizers: list[Any] = [one for one in found if hasattr(one, "get_added_vocab")]
    for text in {text for recipe in recipes for text in (recipe.prompt, recipe.negative) if text and tokenizers}:
        for word in unlearned(text, tokenizers):
            special = {word for one in tokenizers for word in one.all_special_tokens}
            known = sorted({word for one in tokenizers for word in one.get_added_vocab()} - special)
            raise DrawingError(
                f"the model has learned no word {short(word)!r}, {instead(word, known) if known else 'nor any other'}; "
                "name a folder of concepts as the model, or write it without brackets"
            )


def _call_settings(pipe: "DiffusionPipeline", recipes: Sequence["Recipe"]) -> dict[str, Any]:
    first = recipes[0]
    settings: dict[str, Any] = {
        "prompt": first.prompt,
        "negative_prompt": first.negative,
        "num_inference_steps": first.steps,
        "guidance_scale": first.guidance,
        "width": first.width,
        "height": first.height,
    }
    if len(recipes) > 1:
        settings["prompt"] = [recipe.prompt for recipe in recipes]
        settings["negative_prompt"] = None if first.negative is None else [recipe.negative for recipe in recipes]
    settings = {name: value for name, value in settings.items() if value is not None}
    unknown = settings.keys() - inspect.signature(pipe.__call__).parameters.keys()
    if unknown:
        raise DrawingError(f"{type(pipe).__name__} takes no {', '.join(sorted(unknown))}")
    return settings


def default_setting(pipe: "DiffusionPipeline", name: str) -> Any:
    """What the pipeline itself uses for an argument that is not given; None if it has no such argument."""
    parameter = inspect.signature(pipe.__call__).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


# --- progress ---------------------------------------------------------------------------------------------------------


class _Steps:
    """What diffusers uses of a tqdm bar."""

    def __init__(self, bar: "Progress", label: str, iterable: Iterable[Any] | None, total: int | None):
        self.bar, self.iterable = bar, iterable
        known = total if total is not None or not hasattr(iterable, "__len__") else len(iterable)  # type: ignore[arg-type]
        self.task = bar.add_task(label, total=known)

    def __enter__(self) -> "_Steps":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop_task(self.task)

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable or ():
            yield item
            self.update()

    def update(self, steps: int = 1) -> None:
        self.bar.advance(self.task, steps)


@contextmanager
def steps_shown(pipe: "DiffusionPipeline", bar: "Progress | None", label: str) -> Iterator[None]:
    """Send the pipeline's own step bar to `bar`, or nowhere; every pipeline has one, only some have step callbacks."""
    if bar is None:
        from rich.progress import Progress

        bar = Progress(disable=True)
    shown = bar

    def progress_bar(iterable: Iterable[Any] | None = None, total: int | None = None) -> _Steps:
        return _Steps(shown, label, iterable, total)

    before = vars(pipe).get("progress_bar")
    pipe.progress_bar = progress_bar
    try:
        yield
    finally:
        if before is None:
            del pipe.progress_bar
        else:
            pipe.progress_bar = before


# --- pictures ---------------------------------------------------------------------------------------------------------


def _column(drawing: Drawing, title: str) -> Image.Image:
    """Title, picture, and the maps in rows of up to three under it."""
    per_row = min(3, max(1, len(drawing.maps)))
    small = (_CELL - _GAP * (per_row - 1)) // per_row
    cells: list[Cell] = [(word, _fitted(picture, small)) for word, picture in drawing.maps.items()]
    main = _fitted(drawing.picture, _CELL)
    if drawing.regions:
        main = outlined(main, drawing.regions)
    rows: list[list[Cell]] = [[(title, main)]]
    if cells:
        below = [cells[start : start + per_row] for start in range(0, len(cells), per_row)]
        rows.append([("", grid(below, _POINTS, _GAP, border=False))])
    return grid(rows, _POINTS, _GAP, border=False)


def _fitted(picture: Image.Image, width: int) -> Image.Image:
    height = max(1, round(picture.height * width / picture.width))
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
