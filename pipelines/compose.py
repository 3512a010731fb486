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

import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attnctl.engine.attachment import Report, attach
from attnctl.engine.control import Control
from attnctl.engine.families.registry import discover, family_of
from attnctl.errors import ControlError
from attnctl.pipelines.compose_settings import settings_of
from attnctl.pipelines.compositions import Composed, Composition, Plan, thing_of, words_of
from attnctl.pipelines.inversion import Path, Solver, decode, encode, invert, packed, redrawn, sampling
from attnctl.pipelines.inversion_cache import InversionCache
from attnctl.pipelines.object_masks import mask_from_words
from attnctl.pipelines.pasting import box_in, object_mask, opened, paste
from attnctl.processors.composition import Infusion, ObjectWords, object_cells, pasted

KEPT = 32
"""How many inversions a composer keeps for each composition of a group."""
OF_PROMPTS = ("negative_prompt", "negative_prompt_2", "negative_prompt_3", "true_cfg_scale", "generator")
"""Arguments of a pipeline that are for the composition alone, not for inversions."""


class PrimeComposer:
    """Composes on a diffusers pipeline that draws from words (SD 1/2, SDXL, SD 3, FLUX.1).

    Args:
        pipe: the pipeline. Whatever is done to it (LoRA, IP-Adapter, offload, devices) holds here.
        preset: "ours" or "paper"; see `compose_settings`.
        cache: inversions on the disk, see `inversion_cache`; None: they are kept in memory alone.
        settings: of `Settings`, instead of the preset's.

    Raises:
        ControlError: a setting is unknown or out of its range.
        UnsupportedPipelineError: no family record describes the pipeline.
    """

    def __init__(
        self, pipe: Any, preset: str = "ours", *, cache: InversionCache | None = None, **settings: Any
    ) -> None:
        self.family = family_of(pipe)[0]
        self.pipe, self.cache, self.settings = pipe, cache, settings_of(preset, **settings)
        self.paths: OrderedDict[str, list[Tensor]] = OrderedDict()

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
        of_inversion = {name: value for name, value in arguments.items() if name not in OF_PROMPTS}
        plan = self.plan(compositions, size, **of_inversion)
        grounds, wholes, calls = self.inverted(plan, of_inversion)
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
                box=plan.drawn(n),
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

    def in_turn(self, compositions: Sequence[Composition], **options: Any) -> list[Composed]:
        """Put several objects into one background, one after the other; each goes into the picture of the one before.

        Args:
            compositions: their prompts name all objects; the background is that of the first. Without `words`, the
                objects are the last things of the prompt, in their order.
            options: as for `batch`.

        Returns:
            What was made in each turn; the last has all objects.

        Raises:
            PhraseError: a prompt names fewer things than there are objects.
        """
        made: list[Composed] = []
        first = opened(compositions[0].background, "background") if compositions else None
        for number, one in enumerate(compositions):
            words = one.words if one.words is not None else thing_of(one.prompt, number - len(compositions))
            assert first is not None
            box = box_in(one.box, first.size)  # of the first background's pixels, whatever size is composed at
            ground = made[-1].picture if made else first
            made += self.batch([replace(one, background=ground, box=box, words=words)], **options)
        return made

    # --- before drawing -----------------------------------------------------------------------------------------------

    def plan(self, compositions: Sequence[Composition], size: tuple[int, int] | None = None, **arguments: Any) -> Plan:
        """Pictures, masks and words, made ready; nothing is run but for masks from words. See `batch`."""
        if not compositions or not all(isinstance(one, Composition) for one in compositions):
            raise ControlError("batch takes compositions, at least one")
        made, width_height = [], size
        if width_height is not None:
            unit = self._unit()
            if min(width_height) < unit or any(side % unit for side in width_height):
                raise ControlError(f"both sides of the size must be multiples of {unit} for this model, not {size}")
        named = [words_of(one) for one in compositions]
        for one, (words, _) in zip(compositions, named, strict=True):
            background, thing = opened(one.background, "background"), opened(one.thing, "object")
            width_height = width_height or self.fitting(background.size)
            where = box_in(one.box, background.size)
            mask = one.mask
            if isinstance(mask, str) and mask == "words":
                mask = mask_from_words(self.pipe, thing, self.fitting(thing.size), words, one.seed, **arguments)
            made.append(paste(background, thing, object_mask(thing, mask), where, width_height, self.settings.fit))
        assert width_height is not None
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
        patch = min((site.factor for site in discover(self.pipe) if site.kind == "joint" and site.factor), default=None)
        if patch is None:
            return math.lcm(self._factor(), 8)  # which pipelines around a UNet insist on
        return self._factor() * patch

    # --- inversion ----------------------------------------------------------------------------------------------------

    def inverted(self, plan: Plan, arguments: dict[str, Any] | None = None) -> tuple[Path, Path, int]:
        """Inversions of the backgrounds and of the objects' pictures, and the denoiser calls for each composition.

        Those that are known from an earlier call or from the cache, by picture and settings, cost nothing.
        """
        arguments = arguments or {}
        alone = self.settings.invert == "alone"
        pictures = [one.background for one in plan.pasted]
        pictures += [one.alone if alone else one.picture for one in plan.pasted]
        settings = self.settings.steps, self.settings.solver, self.settings.rounds
        told = told_of([settings, self._adapters(), dict(self.pipe.scheduler.config), arguments])
        names = [sha256(one.tobytes() + repr(one.shape).encode() + told.encode()).hexdigest() for one in pictures]
        made: dict[str, list[Tensor]] = {}
        for name in names:
            if self.cache and name not in self.paths and (found := self.cache.get(name)) is not None:
                self.paths[name] = [node.to(self.pipe.device) for node in found]
        missing = [n for n, name in enumerate(names) if name not in self.paths and name not in names[:n]]
        for n in missing:  # one by one: kernels round by the size of a batch, and what is kept must not tell its group
            latents = encode(self.pipe, [Image.fromarray(pictures[n])])
            path = invert(
                self.pipe, latents, plan.size, self.settings.steps, self.settings.solver, self.settings.rounds,
                **arguments,
            )  # fmt: skip
            made[names[n]] = [node.contiguous() for node in path]  # as on the disk; strides round, too
            if self.cache is not None:
                self.cache.put(names[n], made[names[n]])
        paths = [made[name] if name in made else self.paths[name] for name in names]
        self.paths.update(made)
        while len(self.paths) > KEPT * len(plan.asked):
            self.paths.popitem(last=False)
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


def told_of(value: Any) -> str:
    """What an argument says, as text: the same for what is the same, another for what is not."""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, (Tensor, np.ndarray)):
        array = value.detach().float().cpu().numpy() if isinstance(value, Tensor) else value
        return f"{array.dtype} {array.shape} {sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {told_of(one)}" for name, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(told_of, value)) + "]"
    return repr(value)


def _grown(box: Tensor, cells: int) -> Tensor:
    """A mask of (height, width) bool with so many cells more on each side."""
    if not cells:
        return box
    return F.max_pool2d(box.float()[None, None], 2 * cells + 1, 1, cells)[0, 0] > 0
