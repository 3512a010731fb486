"""The training loop: denoising loss on views of the picture and on regular pictures, and calibration of the maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.concepts import Concept
from attnctl.engine.attachment import attach
from attnctl.engine.control import AttentionCall, Control, Lane, Proceed
from attnctl.engine.families.registry import discover
from attnctl.engine.sites import Site, select
from attnctl.errors import ControlError
from attnctl.maps.live import LiveMaps
from attnctl.pipelines.personalize.accelerated import accelerated
from attnctl.pipelines.personalize.concepts import Encoders
from attnctl.pipelines.personalize.denoising import Denoising
from attnctl.pipelines.personalize.examples import Examples, Rows, remasked
from attnctl.pipelines.personalize.keeping import kept, spreads
from attnctl.pipelines.personalize.losses import Losses, losses_of
from attnctl.pipelines.personalize.masks import renewed
from attnctl.pipelines.personalize.settings import Settings

ATTENTION_GRID = 16  # cells along one side: where the papers read maps
EASED = 0.05  # of the rates is left at the last step
REMEMBERED = 0.9  # of the running mean of a loss, at each view


@dataclass(frozen=True)
class Progress:
    """One step, for whoever watches.

    Attributes:
        step: from 1 to `steps`.
        losses: "denoise", "binding" (mean over concepts), "apart" (mean over pairs), "contrast" and "guide" (mean over
            words and rows), unweighted; those on maps and words where they have a weight.
        coverage: of each noun's map, see `Calibrated`; as the losses.
        renewed: how often masks were renewed, and how often they were looked for again.
    """

    step: int
    steps: int
    losses: dict[str, float]
    coverage: tuple[float, ...]
    renewed: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class StartApart(Control):
    """Nothing is learnt through the start token: its keys and values have no gradient (Custom Diffusion)."""

    lane = Lane.QKV

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(site for site in available if site.kind in ("cross", "joint"))

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        at = call.text.start
        parts = ((x[:, :, :at], x[:, :, at : at + 1].detach(), x[:, :, at + 1 :]) for x in (call.k, call.v))
        k, v = (torch.cat(part, 2) for part in parts)
        return proceed(call.replace(k=k, v=v))


def calibrated_sites(denoising: Denoising, latent_side: int, factor: int | None) -> tuple[Site, ...]:
    """The cross-attention sites whose maps are calibrated: those of this factor, or nearest to 16 x 16."""
    cross = select(discover(denoising.pipe), denoising.reads)
    there = sorted({site.factor for site in cross if site.factor})
    if factor is None:
        factor = min(there, key=lambda one: abs(latent_side / one - ATTENTION_GRID))
    found = tuple(site for site in cross if site.factor == factor)
    if not found:
        raise ControlError(
            f"no {denoising.reads}-attention site has factor {factor}; there are {', '.join(map(str, there))}"
        )
    return found


class Trainer:
    """A personalisation under way: what is trained, its optimiser, and the dice.

    Attributes:
        step: steps done.
        tuned: name -> parameter of the keys and values that are trained.
        masks: (concepts, height, width) bool, of the square picture, once they were renewed.
    """

    def __init__(
        self,
        denoising: Denoising,
        concepts: Sequence[Concept],
        encoders: Encoders,
        settings: Settings,
        dice: torch.Generator,
    ) -> None:
        self.denoising, self.concepts, self.encoders = denoising, concepts, encoders
        self.settings, self.dice = settings, dice
        self.before = {name: p.detach().clone() for name, p in denoising.keys_and_values.items()}
        self.spread: dict[str, Tensor] | None = None
        self.model, self.step = denoising.model, 0
        self.running: dict[int, float] = {}  # subset of the concepts, by number -> mean loss of late
        self.scaler: dict[str, Any] | None = None  # how far losses are scaled, with precision fp16
        self.masks: Tensor | None = None
        self.renewed = (0, 0)
        self.tuned = _tuned(denoising, settings)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": encoders.parameters, "lr": settings.word_rate, "weight_decay": 0.0},
                {"params": list(self.tuned.values()), "lr": settings.kv_rate, "weight_decay": settings.decay},
            ]
        )

    def train(
        self,
        views: Examples,
        regular: Examples | None,
        until: int,
        watch: Callable[[Progress], None] | None = None,
    ) -> None:
        """The steps from where it stands to this one; then the pipeline knows the words as they are by now."""
        if self.masks is not None:
            views = remasked(views, self.masks, self.settings)
        refresh = self.settings.refresh
        while self.step < until:
            self._steps(
                views, regular, min(until, self.step + refresh - self.step % refresh) if refresh else until, watch
            )
            for encoder in self.encoders.all:
                encoder.write()
            if refresh and self.step % refresh == 0 and self.step < self.settings.steps:
                views = self._renewed(views)

    def _renewed(self, views: Examples) -> Examples:
        """The views with masks that the model finds by now, if they will do."""
        assert views.masks is not None
        masks = renewed(self.denoising, views.latents[:1], views.masks[0], self.concepts, self.settings)
        self.renewed = self.renewed[0] + (masks is not None), self.renewed[1] + 1
        if masks is None:
            return views
        self.masks = masks
        return remasked(views, masks, self.settings)

    def _steps(
        self, views: Examples, regular: Examples | None, until: int, watch: Callable[[Progress], None] | None
    ) -> None:
        settings = self.settings
        words, nouns = ([getattr(one, name) for one in self.concepts] for name in ("word", "noun"))
        where = calibrated_sites(self.denoising, views.latents.shape[-1], settings.factor)
        live = LiveMaps(*words, *nouns, where=list(where), absent=True)
        guided = settings.guide > 0 and views.masks is not None
        reads = settings.calibration.acts or settings.contrast > 0 or guided
        controls: list[Control] = [StartApart()] if self.denoising.starts else []
        controls += [live] if reads else []
        size = self.denoising.rows
        with (
            self.ready(),
            attach(self.denoising.pipe, *controls) as attached,
            accelerated(settings, self.model.device, self.scaler) as accelerator,
        ):
            optimizer = accelerator.prepare(self.optimizer)
            while self.step < until:
                self._ease()
                told, passes = list[Losses](), self._passes(views, regular)
                for rows in passes:
                    with accelerator.accumulate(self.model):
                        with (
                            accelerator.autocast(),
                            attached.batch(rows.captions, max_sequence_length=size) as batch,
                        ):
                            text = self.text(rows.latents, rows.captions)
                            errors = self.errors(rows, text)  # (rows,)
                        states = text["encoder_hidden_states"]
                        found = losses_of(settings, rows, errors, states, batch.state(live) if reads else None)
                        if rows is passes[-1] and self.spread is not None:  # once in a step
                            drift = kept(self.changes(), self.before, self.spread)
                            found.add("keep", drift, settings.keep * settings.accumulate)
                        accelerator.backward(found.total)
                        optimizer.step()  # both only after the last pass
                        optimizer.zero_grad()
                    told.append(found)
                    self._remember(rows.subset, errors.detach(), views.subsets)
                self.step += 1
                if accelerator.scaler is not None:
                    self.scaler = accelerator.scaler.state_dict()
                if watch is not None:
                    watch(Progress(self.step, settings.steps, *means(told), self.renewed))

    def _ease(self) -> None:
        """Set the rates of this step."""
        settings = self.settings
        share = 1 - (1 - EASED) * self.step / max(settings.steps - 1, 1) if settings.ease else 1.0
        for group, rate in zip(self.optimizer.param_groups, (settings.word_rate, settings.kv_rate), strict=True):
            group["lr"] = rate * share

    def changes(self) -> dict[str, Tensor]:
        """name -> change of each weight of keys and values, with its gradient."""
        if self.settings.trained == "full":
            return {name: weight - self.before[name] for name, weight in self.tuned.items()}
        parts = {name.rpartition(".lora_")[0]: {} for name in self.tuned}  # type: dict[str, dict[str, Tensor]]
        for name, weight in self.tuned.items():
            module, _, rest = name.rpartition(".lora_")
            parts[module][rest[0]] = weight
        return {f"{module}.weight": pair["B"] @ pair["A"] for module, pair in parts.items()}

    def prepare(self, views: Examples, regular: Examples | None) -> None:
        """What must be known of the model as it is before training, and before `restore`: what is to be kept."""
        if self.settings.keep > 0:
            nouns = [one.noun for one in self.concepts]
            things = [f"a {one}" for one in (*nouns, *self.settings.others)]
            captions = [*(regular.captions if regular else ()), *things]
            self.spread = spreads(self.denoising, captions, views.latents, self.settings.seed)

    def _passes(self, views: Examples, regular: Examples | None) -> list[Rows]:
        """What one step trains on, pass by pass; views come first."""
        settings, dice, parts = self.settings, self.dice, self.settings.accumulate
        count = settings.rows * parts
        some = torch.randint(len(views.captions), (count,), generator=dice)
        if views.subsets > 1:
            chances = torch.ones(views.subsets) if settings.subsets == "uniform" else self._chances(views.subsets)
            numbers = torch.multinomial(chances, count, replacement=True, generator=dice).tolist()
            members = [(views.subset == number).nonzero().flatten() for number in numbers]
            some = torch.stack([own[int(at) % len(own)] for at, own in zip(some, members, strict=True)])
        chosen = [(views, some)]
        if regular is not None and settings.regular_rows:
            size = settings.regular_rows * parts
            chosen.append((regular, torch.randint(len(regular.captions), (size,), generator=dice)))
        times = [self._times(len(rows)) for _, rows in chosen]
        named = [sum(one.word in views.captions[i] for one in self.concepts) for i in some.tolist()]
        found = []
        for part in range(parts):
            own = [(x, rows.chunk(parts)[part]) for x, rows in chosen]
            latents, valid = (torch.cat([getattr(x, name)[i] for x, i in own]) for name in ("latents", "valid"))
            captions = [x.captions[i] for x, rows in own for i in rows.tolist()]
            here = own[0][1]
            share = sum(named[part * settings.rows :][: settings.rows]) / max(sum(named), 1) * parts
            masks = None if views.masks is None else views.masks[here]
            when = torch.cat([every.chunk(parts)[part] for every in times])
            found.append(Rows(latents, valid, captions, when, views.subset[here].tolist(), masks, share))
        return found

    def _chances(self, count: int) -> Tensor:
        """Of each subset, in proportion to the running mean of its loss; one that was not met yet is as the highest."""
        known = [self.running.get(number) for number in range(count)]
        highest = max((one for one in known if one is not None), default=1.0)
        return torch.tensor([highest if one is None else one for one in known])

    def _remember(self, subset: list[int], errors: Tensor, count: int) -> None:
        """Take the losses of the step's views into the running means."""
        if count < 2 or self.settings.subsets != "loss":
            return
        for number, error in zip(subset, errors.tolist(), strict=False):  # regular pictures come after the views
            old = self.running.get(number, error)
            self.running[number] = REMEMBERED * old + (1 - REMEMBERED) * error

    def state(self) -> dict[str, Any]:
        """Everything that a later run needs to go on as if there had been no break."""
        return {
            "step": self.step,
            "rows": [rows.detach() for rows in self.encoders.parameters],
            "tuned": {name: parameter.detach() for name, parameter in self.tuned.items()},
            "optimizer": self.optimizer.state_dict(),
            "dice": self.dice.get_state(),
            "running": self.running,
            "scaler": self.scaler,
            "masks": self.masks,
            "renewed": self.renewed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        with torch.no_grad():
            for rows, kept in zip(self.encoders.parameters, state["rows"], strict=True):
                rows.copy_(kept)
            for name, parameter in self.tuned.items():
                parameter.copy_(state["tuned"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.dice.set_state(state["dice"])
        self.step, self.running = state["step"], state["running"]
        self.scaler = state["scaler"]
        self.masks, self.renewed = state["masks"], state["renewed"]

    @torch.no_grad()
    def look(self, views: Examples) -> Tensor:
        """(concepts, height, width): where the model sees the nouns in the picture, mean over six noise levels."""
        nouns = [one.noun for one in self.concepts]
        live = LiveMaps(
            *nouns, where=list(calibrated_sites(self.denoising, views.latents.shape[-1], self.settings.factor))
        )
        times = self.denoising.times(torch.arange(1, 7) / 10)
        latents, captions = views.latents[:1].repeat(6, 1, 1, 1), [views.captions[0]] * 6
        dice = torch.Generator().manual_seed(self.settings.seed)
        with (
            attach(self.denoising.pipe, live) as attached,
            attached.batch(captions, max_sequence_length=self.denoising.rows) as batch,
        ):
            self.denoising.predict(latents, times, dice, self.text(latents, captions))
        return batch.state(live).maps().mean(0).cpu()

    def text(self, latents: Tensor, captions: list[str]) -> dict[str, Any]:
        """See `Denoising.text`."""
        return self.denoising.text(captions, self.denoising.picture_size(latents))

    def errors(self, rows: Rows, text: dict[str, Any]) -> Tensor:
        """The denoising loss of each row, mean over what is valid: (rows,), with gradient."""
        got, target = self.denoising.predict(rows.latents, rows.times, self.dice, text)
        real = rows.valid[:, None].to(got.device)
        square = (got.float() - target).square() * real
        error = square.sum((1, 2, 3)) / (real.sum((1, 2, 3)).clamp_min(1e-6) * rows.latents.shape[1])
        return error * self.denoising.weight(rows.times, self.settings.snr).to(got.device)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """While it is open, only what is trained asks for gradients, and new words are looked up where they are."""
        models = [self.model, *(one.model for one in self.encoders.all)]
        asked = [p for model in models for p in model.parameters() if p.requires_grad]
        modes = [model.training for model in models]
        with ExitStack() as stack:
            for model in models:
                model.requires_grad_(False).train(model is self.model)  # where checkpointing acts; T5 would drop out
            for parameter in self.tuned.values():
                parameter.requires_grad_(True)
            stack.enter_context(self.encoders.trained())
            try:
                yield
            finally:
                for model, mode in zip(models, modes, strict=True):
                    model.requires_grad_(False).train(mode)
                for parameter in asked:
                    parameter.requires_grad_(True)

    def _times(self, count: int) -> Tensor:
        """Where rows of one kind are, as `Settings.levels` says, and spread over the schedule."""
        shares = (torch.arange(count) + torch.rand(count, generator=self.dice)) / count
        if self.settings.levels == "logit-normal":
            shares = torch.special.ndtri(shares.clamp(1e-4, 1 - 1e-4)).sigmoid()
        return self.denoising.times(shares)


def means(passes: Sequence[Losses]) -> tuple[dict[str, float], tuple[float, ...]]:
    """Mean losses of a step, without weights, and mean coverage."""
    names = dict.fromkeys(name for one in passes for name in one.told)
    losses = {name: [one.told[name].item() for one in passes if name in one.told] for name in names}
    coverage = [one.coverage for one in passes if one.coverage is not None]
    spread = torch.stack(coverage).mean(0).tolist() if coverage else []
    return {name: sum(found) / len(found) for name, found in losses.items()}, tuple(spread)


def _tuned(denoising: Denoising, settings: Settings) -> dict[str, nn.Parameter]:
    """Keys and values of the text: the weights themselves, or adapters that are put on them."""
    if settings.trained == "full":
        return denoising.keys_and_values
    from attnctl.pipelines.personalize.adapters import add_adapters

    return add_adapters(denoising.model, denoising.ends, settings.rank or 16, settings.seed)
