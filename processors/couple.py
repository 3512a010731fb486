"""Couple: each region has a prompt of its own.

With the share w_r(i) of place i that belongs to region r (0 is what no region covers, and belongs to the base prompt),

    out_i = sum_r w'_r(i) Attention(q_i; text_r and picture)      w'_r = (1 - base) w_r,  w'_0 = w_0 + base sum_r w_r

as in Attention Couple and the Regional Prompter for Stable Diffusion, and Regional-Prompting-FLUX for joint attention.

How the prompts get in: each is encoded by the pipeline's own `encode_prompt`, and its rows are put behind those of the
base prompt in the text the denoiser is given. So one rule serves all families: at cross-attention they are more keys,
and at joint attention they are text rows that pass through all blocks as any prompt does. Nothing is done to a model's
projections, so LoRA, fused projections and quantised weights need no thought. At joint sites the padding behind a T5
prompt is left out of a region's rows, as it would make the sequence longer for nothing; the rows of CLIP stay whole.

Who sees whom at joint sites: a place of region r sees the text of r and all of the picture; the text of r sees itself
and the places of r; the base text sees itself and all of the picture. Attention within the picture stays free:
isolating it draws pictures that do not belong together (`Isolation` closes it). There is no mask, see `row_groups`.
The pooled embedding, where a model has one, stays that of the base prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.areas import shares
from attnctl.engine.control import AttentionCall, Control, Lane, Proceed, check_window, check_window_in_run
from attnctl.engine.run import Run, Step
from attnctl.engine.sites import Selection, Site, select
from attnctl.errors import ControlError, NoSiteError, PhraseError, short
from attnctl.regions import Region
from attnctl.words.phrases import TextStream, layout

from .regions import check_neighbours
from .row_groups import Group, Part, RowGroups, alike, joined

# --- maths ------------------------------------------------------------------------------------------------------------


def mixed(part: Tensor, base: Sequence[float]) -> Tensor:
    """Shares (1 + regions, cells) after each region gave `base` of its own to the base prompt."""
    own = torch.tensor([0.0, *base])[:, None]
    given = part * own
    part = part - given
    part[0] += given.sum(0)
    return part


def coupled(
    part: Tensor,
    texts: Sequence[Tensor],
    owner: Sequence[int],
    image: slice,
    size: int | None,
    unread: Tensor | None = None,
) -> tuple[Group, ...]:
    """The row groups of one attention call.

    Args:
        part: (1 + regions, cells), shares of each cell; the first is of the base prompt.
        texts: the keys of each text, the base prompt first.
        owner: for each region, which text it reads; several may read one.
        image: which queries are the picture's cells.
        size: length of the sequence at a joint site; None at a cross site, where text is keys alone.
        unread: text rows that nobody reads; at joint sites they see themselves.
    """
    weights = torch.zeros(len(texts), part.shape[1])
    weights[0] = part[0]
    for number, text in enumerate(owner):
        weights[text] += part[number + 1]
    groups = []
    if size is None:
        for own, weight in zip(texts, weights, strict=True):
            cells = weight.nonzero().flatten()
            if len(cells):
                groups.append(Group(image.start + cells, own, _unless_whole(weight[cells])))
        return tuple(groups)
    places = torch.arange(image.start, image.stop)
    free = torch.ones(size, dtype=torch.bool)  # a reference picture, for one
    free[torch.cat([places, *texts, *([] if unread is None else [unread])])] = False
    rest = free.nonzero().flatten()
    if unread is not None and len(unread):
        groups.append(Group(unread, unread))
    for number, (own, weight) in enumerate(zip(texts, weights, strict=True)):
        cells = image.start + weight.nonzero().flatten()
        mine = weight[cells - image.start]
        if number == 0:
            rows, order = torch.cat([own, rest, cells]).sort()
            share = torch.cat([torch.ones(len(own) + len(rest)), mine])[order]
            groups.append(Group(rows, joined(own, places, rest), _unless_whole(share)))
            continue
        if not len(own):
            continue  # a region without a negative prompt of its own
        if len(cells):
            groups.append(Group(cells, joined(own, places, rest), _unless_whole(mine)))
        groups.append(Group(own, joined(own, cells)))
    return tuple(groups)


def _unless_whole(weight: Tensor) -> Tensor | None:
    return None if bool((weight == 1).all()) else weight


# --- text -------------------------------------------------------------------------------------------------------------


def encoded(run: Run, prompts: Sequence[str]) -> list[Tensor]:
    """The text rows of each prompt, (rows, channels), as the run's pipeline encodes a prompt.

    Raises:
        PhraseError: no text encoder reads a prompt to its end.
    """
    pipe, family = run.pipe, run.family
    streams = [
        (stream, getattr(pipe, stream.tokenizer))
        for stream in family.streams
        if getattr(pipe, stream.tokenizer, None) is not None
    ]
    options = getattr(pipe, "joint_attention_kwargs", None) or getattr(pipe, "cross_attention_kwargs", None) or {}
    given = {
        "prompt_2": None, "prompt_3": None, "device": pipe._execution_device, "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False, "clip_skip": getattr(pipe, "clip_skip", None),
        "lora_scale": options.get("scale"),
    }  # fmt: skip
    if run.max_sequence_length is not None:
        given["max_sequence_length"] = run.max_sequence_length
    known = inspect.signature(type(pipe).encode_prompt).parameters
    settings = {name: value for name, value in given.items() if name in known}
    embeds = type(pipe).encode_prompt(pipe, prompt=list(prompts), **settings)[0]  # past the patch on the instance
    found = []
    for prompt, rows in zip(prompts, embeds, strict=True):
        kept, whole = 0, False
        for stream, tokenizer in streams:
            length = (run.max_sequence_length if isinstance(stream.rows, str) else stream.rows) or 77
            own = layout(tokenizer, prompt, length)
            whole |= len(TextStream(tokenizer, prompt, 0, length).spans) <= length
            clip = len(own.start) > 0  # its padding is part of what models are used to, and there is little of it
            kept = max(kept, stream.offset + (length if clip else own.end.stop))
        if not whole:
            raise PhraseError(f"the prompt {short(prompt, 60)!r} is too long for the text encoders")
        found.append(rows[:kept])
    return found


# --- the control ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Coupled:
    """What `Couple` knows of one run."""

    prompts: list[Tensor]  # the rows of each region's prompt, (rows, channels)
    negatives: list[Tensor | None]  # and of its negative prompt, if it has one
    picture: tuple[int, int]  # (height, width) of the whole picture, in pixels
    view: tuple[float, float, float, float]  # what is drawn of it
    base: int = 0  # rows of the base prompt
    groups: dict[Any, RowGroups] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """How many rows each region has: those of its prompt or of its negative prompt, whichever is longer."""
        pairs = zip(self.prompts, self.negatives, strict=True)
        return [max(len(own), 0 if negative is None else len(negative)) for own, negative in pairs]

    def texts(self) -> list[Tensor]:
        """Where the rows of each text are among all text rows, the base prompt first."""
        ends = torch.tensor([self.base, *self.lengths]).cumsum(0).tolist()
        return [torch.arange(end - size, end) for end, size in zip(ends, [self.base, *self.lengths], strict=True)]


@dataclass(frozen=True)
class Couple(Control):
    """Each region has a prompt of its own; what no region covers belongs to the prompt of the picture.

    Settings:
        masks: regions by their own prompts, as a dict or pairs: a box (left, top, right, bottom) in shares of the
            picture or in pixels, a mask, a picture, a painted layer; see `attnctl.regions.Region`. Where two overlap,
            the smaller lies on top.
        base: how much of each region's output comes from the prompt of the picture, from 0 to 1; one number, or one for
            each region. At joint attention any number above 0 costs a second attention for the region's places.
        negatives: negative prompts by the region's own prompt, as a dict or pairs. A region without one uses that of
            the picture. It acts where the pipeline guides by a negative prompt.
        feather: width of the soft edge between regions, as a share of the picture's shorter side, from 0 to 1.
        window: part of the schedule to act in, from 0 (noise) to 1 (picture).
        where: sites to act at. None: all where the picture attends to text. At the others only the base prompt is seen.

    Raises:
        ControlError: a setting is out of its range, or a region is none; at the pipeline call, if two of these controls
            are attached, or the text carries a mask of its own.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if a region's prompt is too long for the text encoders.
    """

    masks: tuple[tuple[str, Any], ...]
    base: float | tuple[float, ...] = 0.0
    negatives: tuple[tuple[str, str], ...] = ()
    feather: float = 0.0
    window: tuple[float, float] = (0.0, 1.0)
    where: Selection = None

    lane: ClassVar[Lane] = Lane.BIAS

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", _regions(self.masks))
        prompts = [prompt for prompt, _ in self.masks]
        pairs = self.negatives.items() if isinstance(self.negatives, Mapping) else self.negatives
        object.__setattr__(self, "negatives", tuple((str(own), str(negative)) for own, negative in pairs))
        for own, _ in self.negatives:
            if own not in prompts:
                raise ControlError(f"a negative prompt for {short(own, 60)!r}, which is no region's prompt")
        if not isinstance(self.base, (int, float)):
            object.__setattr__(self, "base", tuple(self.base))
        if len(self.bases) != len(prompts):
            raise ControlError(f"base has {len(self.bases)} numbers for {len(prompts)} regions")
        if not all(0 <= one <= 1 for one in self.bases) or not 0 <= self.feather <= 1:
            raise ControlError(f"base and feather are from 0 to 1; not {self.base!r} and {self.feather!r}")
        check_window(self.window)

    @property
    def bases(self) -> tuple[float, ...]:
        """The share of the base prompt in each region."""
        return self.base if isinstance(self.base, tuple) else (float(self.base),) * len(self.masks)

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        chosen = select(available, ("cross", "joint"))
        select(chosen, self.where)  # says what there is
        return chosen

    def begin(self, run: Run) -> Coupled:
        if min(self.bases) < 1:
            check_window_in_run(self.window, run)
        negatives = dict(self.negatives)
        texts = list(dict.fromkeys([*(prompt for prompt, _ in self.masks), *negatives.values()]))
        rows = dict(zip(texts, encoded(run, texts), strict=True))
        prompts = [prompt for prompt, _ in self.masks]
        against = [rows[negatives[one]] if one in negatives else None for one in prompts]
        return Coupled([rows[one] for one in prompts], against, run.whole, run.view)

    def inputs(self, step: Step) -> Mapping[str, Any]:
        check_neighbours(step)
        state: Coupled = step.run.state(self)
        name = step.run.family.text
        text = step.arguments.get(name)
        if not self._acts(step) or not isinstance(text, Tensor):
            return {}
        if step.changed:
            raise ControlError("one Couple at a time, and no Nag: only one control adds text")
        if step.arguments.get("encoder_attention_mask") is not None:
            raise ControlError("Couple does not work beside an encoder_attention_mask")
        state.base = text.shape[1]
        longer = text.new_zeros(text.shape[0], sum(state.lengths), text.shape[2])
        for rows, sources in ((step.rows.cond, state.prompts), (step.rows.uncond, state.negatives)):
            start = 0
            for own, length in zip(sources, state.lengths, strict=True):
                if rows is not None and own is not None:
                    longer[rows, start : start + len(own)] = own.to(longer)
                start += length
        changed: dict[str, Any] = {name: torch.cat([text, longer], 1)}
        ids = step.arguments.get("txt_ids")
        if isinstance(ids, Tensor):  # FLUX numbers all text alike
            more = ids[..., -1:, :].expand(*ids.shape[:-2], longer.shape[1], ids.shape[-1])
            changed["txt_ids"] = torch.cat([ids, more], -2)
        return changed

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        if not self._acts(call.step):
            return proceed(call)
        state: Coupled = call.step.run.state(self)
        rows, chosen = call.step.rows, self._chosen(call.site)
        known = call.grid, call.q.shape[2], call.k.shape[2], call.text.start, str(rows), chosen
        if known not in state.groups:
            state.groups[known] = self._groups(call, state, chosen)
        return proceed(call.add_groups(state.groups[known]))

    def _acts(self, step: Step) -> bool:
        guided = step.rows.cond is not None or bool(self.negatives)
        return guided and min(self.bases) < 1 and self.window[0] <= step.fraction < self.window[1]

    def _chosen(self, site: Site) -> bool:
        try:
            return bool(select((site,), self.where))
        except NoSiteError:
            return False

    def _groups(self, call: AttentionCall, state: Coupled, chosen: bool) -> RowGroups:
        size = call.q.shape[2] if call.site.kind == "joint" else None
        part = shares([region for _, region in self.masks], call.grid, state.picture, self.feather, state.view)
        if not chosen:
            part = torch.cat([torch.ones_like(part[:1]), torch.zeros_like(part[1:])])
        part = mixed(part, self.bases)
        all_rows = [call.text.start + rows for rows in state.texts()]
        halves: list[tuple[slice | None, Sequence[Tensor | None]]] = [
            (call.step.rows.uncond, state.negatives), (call.step.rows.cond, state.prompts)
        ]  # fmt: skip
        parts = []
        for batch, sources in halves:
            if batch is None:
                continue
            lengths = [0 if own is None else len(own) for own in sources]
            texts = [all_rows[0], *(rows[:size] for rows, size in zip(all_rows[1:], lengths, strict=True))]
            owner = [number + 1 if own is not None else 0 for number, own in enumerate(sources)]
            unread = torch.cat([rows[size:] for rows, size in zip(all_rows[1:], lengths, strict=True)])
            parts.append(Part(batch, coupled(part, texts, owner, call.image, size, unread)))
        return RowGroups(alike(parts, call.step.rows.total), call.q.shape[2], call.k.shape[2])


def _regions(masks: Any) -> tuple[tuple[str, Region], ...]:
    """Regions by their prompts; two regions may have the same."""
    pairs = masks.items() if isinstance(masks, Mapping) else masks
    try:
        found = tuple((prompt, Region(what)) for prompt, what in pairs)
    except (TypeError, ValueError) as error:
        if isinstance(error, ControlError):
            raise
        raise ControlError(f"masks are pairs (prompt, region) or a dict of them, not {masks!r}") from None
    if not found:
        raise ControlError("Couple takes at least one region, such as {'a red car': (0, 0, 0.5, 1)}")
    if any(not isinstance(prompt, str) or not prompt.strip() for prompt, _ in found):
        raise ControlError("each region of Couple has a prompt of its own, as text")
    return found
