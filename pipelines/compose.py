"""PrimeComposer: an object is put into a picture, without training.

    composer = PrimeComposer(attnctl.load("glyph-sd"))
    made = composer(background="park.jpg", thing="car.png", box=(0.55, 0.4, 0.95, 0.8), prompt="a cat and a red car")
    made.picture.save("composed.png")

After PrimeComposer (Wang et al., ACM MM 2024, arXiv 2403.05053):

1. The object is pasted into the background's pixels; background and pasted picture are inverted, see `inversion`.
2. The start is the background's latents with the object's in its cells, at a node of the schedule.
3. The picture is drawn from there by a prompt that names both; `processors.composition` holds what acts in attention.
4. After each step, everything outside of the box comes from the background's inversion.

The preset "paper" follows the paper's figure; "ours" is what was best on glyph-sd, see docs/methods/composition.md.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attnctl.engine.attachment import Report, attach
from attnctl.engine.control import Control
from attnctl.engine.families.registry import discover, family_of
from attnctl.errors import ControlError
from attnctl.pipelines.compose_settings import settings_of
from attnctl.pipelines.inversion import Path, Solver, decode, encode, invert, packed, redrawn, sampling
from attnctl.pipelines.pasting import Pasted, box_in, object_mask, opened, paste
from attnctl.processors.composition import Infusion, ObjectWords, object_cells, pasted
from attnctl.words.subjects import SubjectsError, read_subjects

KEPT = 32
"""How many inversions a composer keeps."""
OF_PROMPTS = ("negative_prompt", "negative_prompt_2", "negative_prompt_3", "true_cfg_scale", "generator")
"""Arguments of a pipeline that are for the composition alone, not for inversions."""


@dataclass(frozen=True, eq=False)
class Composition:
    """What is to be composed.

    Attributes:
        background: a picture, or the path of one.
        thing: the object's picture, or the path of one.
        box: where it goes, (left, top, right, bottom): shares of the background, or its pixels.
        prompt: names the background's things and the object.
        mask: the object in its picture: anything a `Region` is made of. None: the picture's alpha channel.
        words: phrases of the prompt that mean the object. None: the last thing that the prompt names.
        others: phrases of the prompt that mean things of the background. None: all other things that the prompt names.
        seed: of what noise is drawn, if any.
    """

    background: Any
    thing: Any
    box: Any
    prompt: str
    mask: Any = None
    words: Sequence[str] | str | None = None
    others: Sequence[str] | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Composed:
    """What was made of a composition.

    Attributes:
        picture: the result.
        background, pasted: on the same pixels: the background, and it with the object's pixels pasted in.
        mask: of the object, (height, width) float32.
        box: (left, top, right, bottom) in pixels; outside of it the picture is the background's inversion.
        words, others: phrases that were taken for the object's and the background's.
        lost: how far the way back from its inversion is from the pasted picture's latents, relative to them, as a root
            mean square; None unless asked for.
        passes: forwards of the denoiser for this picture, by name; "inversion" are those of both pictures.
        seconds: for this picture, as a share of its group.
        kept: bytes that infusion kept at once, for the whole group.
    """

    picture: Image.Image
    background: Image.Image
    pasted: Image.Image
    mask: Any
    box: tuple[int, int, int, int]
    words: tuple[str, ...]
    others: tuple[str, ...]
    lost: float | None
    passes: dict[str, float]
    seconds: float
    kept: int = 0
    report: Report | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the pictures."""
        names = ("box", "words", "others", "lost", "passes", "seconds", "kept")
        return {name: getattr(self, name) for name in names}


@dataclass(eq=False)
class Plan:
    """A group of compositions on one grid.

    Attributes:
        size: (height, width) in pixels.
        cells: (images, height, width) bool, the object's latent cells.
        boxes: (images, height, width) bool, the cells that are drawn.
    """

    asked: Sequence[Composition]
    pasted: list[Pasted]
    words: list[tuple[str, ...]]
    others: list[tuple[str, ...]]
    size: tuple[int, int]
    cells: Tensor
    boxes: Tensor


class PrimeComposer:
    """Composes on a diffusers pipeline that draws from words (SD 1/2, SDXL, SD 3, FLUX.1).

    Args:
        pipe: the pipeline. Whatever is done to it (LoRA, IP-Adapter, offload, devices) holds here.
        preset: "ours" or "paper"; see `compose_settings`.
        settings: of `Settings`, instead of the preset's.

    Raises:
        ControlError: a setting is unknown or out of its range.
        UnsupportedPipelineError: no family record describes the pipeline.
    """

    def __init__(self, pipe: Any, preset: str = "ours", **settings: Any) -> None:
        self.family = family_of(pipe)[0]
        self.pipe, self.settings = pipe, settings_of(preset, **settings)
        self._paths: OrderedDict[str, list[Tensor]] = OrderedDict()

    def __call__(
        self, background: Any, thing: Any, box: Any, prompt: str, *, controls: Sequence[Control] = (),
        measure: bool = False, mask: Any = None, words: Any = None, others: Any = None, seed: int = 0,
        size: tuple[int, int] | None = None, **arguments: Any,
    ) -> Composed:  # fmt: skip
        """Compose one picture; see `Composition`, and `batch` for the rest."""
        asked = Composition(background, thing, box, prompt, mask, words, others, seed)
        return self.batch([asked], controls=controls, measure=measure, size=size, **arguments)[0]

    def batch(
        self,
        compositions: Sequence[Composition],
        *,
        controls: Sequence[Control] = (),
        measure: bool = False,
        size: tuple[int, int] | None = None,
        **arguments: Any,
    ) -> list[Composed]:
        """Compose several pictures together; they are made on one size.

        Args:
            compositions: what to compose.
            controls: further ones, which act while the pictures are drawn, not in inversions.
            measure: also draw the pasted picture from its inversion, for `lost`.
            size: (width, height) of the results. None: that of the first background, with about as many pixels as the
                model was made for.
            arguments: of the pipeline, such as `negative_prompt`.

        Raises:
            ControlError: a picture, mask or box is none.
            PhraseError: a phrase is not in its prompt.
            SubjectsError: a phrase is to be read from a prompt, and the tagger is not installed.
        """
        begun, settings = time.perf_counter(), self.settings
        plan = self.plan(compositions, size)
        of_inversion = {name: value for name, value in arguments.items() if name not in OF_PROMPTS}
        grounds, wholes, calls = self._inverted(plan, of_inversion)
        lost = self._lost(wholes, plan, of_inversion) if measure else [None] * len(compositions)
        latents, report, kept = self._drawn(plan, grounds, wholes, controls, arguments)
        pictures = decode(self.pipe, latents, plan.size)
        passes = {"inversion": float(calls)} | report.passes
        seconds = (time.perf_counter() - begun) / len(compositions)
        return [
            Composed(
                picture=pictures[n],
                background=Image.fromarray(one.background),
                pasted=Image.fromarray(one.picture),
                mask=one.mask,
                box=_pixels(plan.boxes[n], plan.size),
                words=plan.words[n],
                others=plan.others[n],
                lost=lost[n],
                passes=passes | ({"check": float(settings.steps)} if measure else {}),
                seconds=seconds,
                kept=kept,
                report=report,
            )
            for n, one in enumerate(plan.pasted)
        ]

    # --- before drawing -----------------------------------------------------------------------------------------------

    def plan(self, compositions: Sequence[Composition], size: tuple[int, int] | None = None) -> Plan:
        """Pictures, masks and words, made ready; nothing is run. See `batch`."""
        if not compositions or not all(isinstance(one, Composition) for one in compositions):
            raise ControlError("batch takes compositions, at least one")
        made, width_height = [], size
        if width_height is not None:
            unit = self._unit()
            if min(width_height) < unit or any(side % unit for side in width_height):
                raise ControlError(f"both sides of the size must be multiples of {unit} for this model, not {size}")
        for one in compositions:
            background, thing = opened(one.background, "background"), opened(one.thing, "object")
            width_height = width_height or self.fitting(background.size)
            where = box_in(one.box, background.size)
            made.append(paste(background, thing, object_mask(thing, one.mask), where, width_height, self.settings.fit))
        assert width_height is not None
        named = [_words_of(one) for one in compositions]
        factor = self._factor()
        cells, boxes = [], []
        for each in made:
            cover = F.avg_pool2d(torch.from_numpy(each.mask)[None, None], factor)[0, 0]
            cells.append(object_cells(cover, self.settings.least))
            left, top, right, bottom = (side / factor for side in each.box)
            box = torch.zeros_like(cells[-1])
            box[int(top) : -int(-bottom // 1), int(left) : -int(-right // 1)] = True
            boxes.append(_grown(box | cells[-1], self.settings.margin))
        return Plan(
            compositions, made, [words for words, _ in named], [others for _, others in named],
            (width_height[1], width_height[0]), torch.stack(cells), torch.stack(boxes),
        )  # fmt: skip

    def fitting(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) to compose at for a background of this one: its shape, the model's number of pixels."""
        native = getattr(self.pipe, "default_sample_size", None)
        if native is None:
            model = family_of(self.pipe)[1]
            native = getattr(model.config, "sample_size", None) or 64
        sides = native if isinstance(native, (list, tuple)) else (native, native)
        room = sides[0] * sides[1] * self._factor() ** 2
        scale, unit = (room / (size[0] * size[1])) ** 0.5, self._unit()
        width, height = (max(unit, round(side * scale / unit) * unit) for side in size)
        return width, height

    def _factor(self) -> int:
        return int(getattr(self.pipe, "vae_scale_factor", 8))

    def _unit(self) -> int:
        """What both sides of a picture must be multiples of."""
        patch = min((site.factor for site in discover(self.pipe) if site.kind == "joint" and site.factor), default=1)
        return self._factor() * patch

    # --- inversion ----------------------------------------------------------------------------------------------------

    def _inverted(self, plan: Plan, arguments: dict[str, Any]) -> tuple[Path, Path, int]:
        """Inversions of the backgrounds and of the objects' pictures, and the denoiser calls of each, or 0."""
        alone = self.settings.invert == "alone"
        pictures = [one.background for one in plan.pasted]
        pictures += [one.alone if alone else one.picture for one in plan.pasted]
        told = repr((self.settings.steps, self.settings.solver, self.settings.rounds, self._adapters(), arguments))
        names = [sha256(one.tobytes() + repr(one.shape).encode() + told.encode()).hexdigest() for one in pictures]
        missing = [n for n, name in enumerate(names) if name not in self._paths and name not in names[:n]]
        made: dict[str, list[Tensor]] = {}
        if missing:
            latents = encode(self.pipe, [Image.fromarray(pictures[n]) for n in missing])
            path = invert(
                self.pipe, latents, plan.size, self.settings.steps, self.settings.solver, self.settings.rounds,
                **arguments,
            )  # fmt: skip
            made = {names[n]: [node[i : i + 1] for node in path] for i, n in enumerate(missing)}
        paths = [made[name] if name in made else self._paths[name] for name in names]
        self._paths.update(made)
        while len(self._paths) > KEPT:
            self._paths.popitem(last=False)
        joined = [torch.cat(nodes) for nodes in zip(*paths, strict=True)]
        count = len(plan.asked)
        calls = len(missing) / count * self._calls() if missing else 0
        return [node[:count] for node in joined], [node[count:] for node in joined], round(calls)

    def _calls(self) -> int:
        """Denoiser calls of an inversion."""
        solver = Solver(
            self.pipe.scheduler, self.settings.steps, self.settings.solver, True, rounds=self.settings.rounds
        )
        return self.settings.steps if not solver.rounds else 1 + self.settings.steps * solver.rounds

    def _adapters(self) -> Any:
        """Which LoRAs are active: with others, an inversion is another."""
        try:
            return self.pipe.get_active_adapters()
        except (AttributeError, ValueError, ImportError):
            return None

    def _lost(self, path: Path, plan: Plan, arguments: dict[str, Any]) -> list[float | None]:
        back = redrawn(self.pipe, path, plan.size, self.settings.solver, **arguments)
        gap, whole = ((one.float() ** 2).flatten(1).mean(1) for one in (back - path[-1], path[-1]))
        return [float(one) for one in (gap / whole).sqrt()]

    # --- drawing ------------------------------------------------------------------------------------------------------

    def _drawn(
        self, plan: Plan, grounds: Path, wholes: Path, controls: Sequence[Control], arguments: dict[str, Any]
    ) -> tuple[Tensor, Report, int]:
        settings, pipe = self.settings, self.pipe
        first = settings.first()
        channels = self.family.latent_channels(family_of(pipe)[1]) if grounds[0].ndim == 4 else grounds[0].shape[2] // 4

        def spread(mask: Tensor) -> Tensor:
            """(images, height, width) as weights of the latents."""
            return packed(pipe, mask[:, None].float().repeat(1, channels, 1, 1)).to(grounds[0])

        things, boxes = spread(plan.cells), spread(plan.boxes)

        def composite(node: int) -> Tensor:
            return pasted(grounds[node], wholes[node], things)

        def after(latents: Tensor, node: int) -> Tensor:
            done = (node - 1) / settings.steps  # where the step began
            if done < settings.paste:
                latents = pasted(latents, composite(node).to(latents), things)
            return pasted(grounds[node].to(latents), latents, boxes) if done < settings.blend else latents

        start = composite(first)
        if settings.rim == "noise":
            start = pasted(start, self._noise(plan, start), boxes * (1 - things))
        own: list[Control] = []
        if settings.words != "none":
            others = plan.others if settings.words == "both" else [()] * len(plan.others)
            own.append(ObjectWords(objects=plan.cells, words=tuple(plan.words), others=tuple(others)))
        infusion = None
        if settings.infuse * settings.steps > first:
            infusion = Infusion(
                plan.cells, lambda index: composite(first + index), round(settings.infuse * settings.steps) - first,
                settings.rows, settings.extended,
            )  # fmt: skip
            own.append(infusion)
        common: dict[str, Any] = {"height": plan.size[0], "width": plan.size[1], "guidance_scale": settings.guidance}
        common |= {"num_inference_steps": settings.steps, "output_type": "latent"}
        solver = Solver(pipe.scheduler, settings.steps, settings.solver, start=first, after=after)
        with sampling(pipe, solver), attach(pipe, *controls, *own) as attached:
            pipe(prompt=[one.prompt for one in plan.asked], latents=start, **common | arguments)
        kept = 0 if infusion is None else attached.run.state(infusion).most
        return solver.path[settings.steps], attached.report, kept

    def _noise(self, plan: Plan, like: Tensor) -> Tensor:
        """Noise as at the first node of all, from the seed of each composition."""
        drawn = [torch.randn(like[:1].shape, generator=torch.Generator().manual_seed(one.seed)) for one in plan.asked]
        return torch.cat(drawn).to(like)


def _words_of(one: Composition) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the object's phrases, the background's)."""
    words = (one.words,) if isinstance(one.words, str) else one.words
    if words is not None and one.others is not None:
        return tuple(words), tuple(one.others)
    try:
        named = [subject.whole for subject in read_subjects(one.prompt)]
    except SubjectsError as error:
        raise SubjectsError(f"{error}; or name words= of the object and others= of the background") from None
    words = tuple(words) if words is not None else tuple(named[-1:])
    mine = {word for phrase in words for word in phrase.lower().split()}
    rest = tuple(phrase for phrase in named if not mine & set(phrase.lower().split()))
    return words, rest if one.others is None else tuple(one.others)


def _grown(box: Tensor, cells: int) -> Tensor:
    """A mask of (height, width) bool with so many cells more on each side."""
    if not cells:
        return box
    return F.max_pool2d(box.float()[None, None], 2 * cells + 1, 1, cells)[0, 0] > 0


def _pixels(box: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The rectangle around a mask of cells, in pixels of a picture of (height, width)."""
    rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
    down, across = size[0] / box.shape[0], size[1] / box.shape[1]
    left, right = int(columns[0]) * across, (int(columns[-1]) + 1) * across
    return round(left), round(int(rows[0]) * down), round(right), round((int(rows[-1]) + 1) * down)
