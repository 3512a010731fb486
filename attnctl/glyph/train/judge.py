"""The judge's training: on scenes of the renderer and on flawed pictures made of them, never on generated ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attnctl.glyph.judge import GRID, LOOKED_AT, SIDE, Judge, Network, Reading, load, pixels, shrunk
from attnctl.glyph.scenes import Thing
from attnctl.glyph.train.examples import KINDS, NONE, Easel, Example, jpeg
from attnctl.glyph.train.loop import Losses
from attnctl.glyph.words import COLOURS, CONCEPTS
from attnctl.loading import load_autoencoder

SLOTS = 4  # things in a picture, at most
WIDTH = 24
BATCH = 32
SHIFT = 2  # cells of the masks
THRESHOLD = 0.5  # of the probability that a concept is there; trained by cross-entropy, it needs no other
COLOUR_NAMES = list(COLOURS)
COUNTS = {kind: 4000 if kind == "scene" else 500 for kind in KINDS}  # test pictures


def picture(example: Example) -> Image.Image:
    """The example's picture, 128 x 128 RGB."""
    return Image.fromarray(example.image.clip(0, 255).astype(np.uint8))


def _coverage(thing: Thing) -> Tensor:
    """(32, 32) uint8: how much of each cell the thing covers, of 255."""
    cell = SIDE // GRID
    part = thing.mask.reshape(GRID, cell, GRID, cell).mean((1, 3))
    return torch.from_numpy((part * 255).astype(np.uint8))


def _packed(examples: Sequence[Example], seen: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Pictures as the network sees them and what there is to know about them.

    state (n, 24): 1 there, 0 not there, -1 there in part; colour (n, 24): its index, or -1; slots (n, 4): the concept
    of each mask (n, 4, 32, 32), or -1.
    """
    n = len(examples)
    state, colour = torch.zeros(n, len(CONCEPTS), dtype=torch.int8), torch.full((n, len(CONCEPTS)), -1).to(torch.int8)
    slots, masks = torch.full((n, SLOTS), -1).to(torch.int8), torch.zeros(n, SLOTS, GRID, GRID, dtype=torch.uint8)
    for row, example in enumerate(examples):
        for concept in example.in_part:
            state[row, CONCEPTS.index(concept)] = -1
        for slot, thing in enumerate(example.things):
            k = CONCEPTS.index(thing.concept)
            state[row, k], slots[row, slot], masks[row, slot] = 1, k, _coverage(thing)
            if thing.colour:
                colour[row, k] = COLOUR_NAMES.index(thing.colour)
    images = torch.from_numpy(np.stack([shrunk(image) for image in seen]))
    return {"images": images, "state": state, "colour": colour, "slots": slots, "masks": masks}


def _counts(total: int) -> dict[str, int]:
    whole = sum(KINDS.values())
    return {kind: round(total * share / whole) for kind, share in KINDS.items()}


class Judging:
    """Cross-entropies: of presence, of masks, and of the colours of tinted things."""

    def __init__(
        self, pictures: int, seed: int, device: str, cache: Path, vae: Path | None = None, batch: int = BATCH
    ) -> None:
        self.device, self.batch, self.seed, self.step, self.pictures = device, batch, seed, 0, pictures
        self.redrawn = vae is not None
        self.data = self._data(pictures, seed, cache, vae)
        easel = Easel(stream=6)
        wanted = _counts(1600).items()
        self.validation = [easel.draw(kind, k) for kind, count in wanted for k in range(count)]
        torch.manual_seed(seed)
        self.network: nn.Module = Network(WIDTH).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _data(self, pictures: int, seed: int, cache: Path, vae: Path | None) -> dict[str, Tensor]:
        """Everything to train on; kept on disk, as drawing takes minutes."""
        file = cache / f"pictures-{pictures}-{seed}{'-vae' if vae else ''}.safetensors"
        if not file.exists():
            easel, rng, parts = Easel(stream=5), np.random.default_rng(seed), []
            kinds = [(kind, k) for kind, count in _counts(pictures).items() for k in range(count)]
            for start in track(range(0, len(kinds), 64), description="drawing pictures"):
                examples = [easel.draw(kind, seed * 10_000_000 + k) for kind, k in kinds[start : start + 64]]
                seen = [picture(example) for example in examples]
                for row in range(len(seen)):
                    if rng.random() < 0.25:
                        worse = jpeg(examples[row].image, int(rng.integers(25, 85)))
                        seen[row] = Image.fromarray(worse.astype(np.uint8))
                parts.append(_packed(examples, _redrawn(seen, vae, self.device) if vae and start % 128 else seen))
            cache.mkdir(parents=True, exist_ok=True)
            save_file({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, file)
        return load_file(file)

    def _rows(self, rng: torch.Generator) -> dict[str, Tensor]:
        """A batch with dense masks (n, 24, 32, 32), mirrored or not and moved about by whole cells."""
        which = torch.randint(len(self.data["state"]), (self.batch,), generator=rng)
        rows = {key: value[which] for key, value in self.data.items()}
        dense = torch.zeros(self.batch, len(CONCEPTS) + 1, GRID, GRID, dtype=torch.uint8)  # the last: empty slots
        row = torch.arange(self.batch)[:, None]
        dense[row, rows["slots"].long() % (len(CONCEPTS) + 1)] = rows["masks"]
        shift = torch.randint(-SHIFT, SHIFT + 1, (2, self.batch, 1), generator=rng)
        y, x = (torch.arange(GRID) + shift).unbind()  # (n, 32) each
        outside = ((y < 0) | (y >= GRID))[:, :, None] | ((x < 0) | (x >= GRID))[:, None]
        y, x = y.clamp(0, GRID - 1), x.clamp(0, GRID - 1)
        masks = dense[:, :-1].movedim(1, -1)[row[..., None], y[:, :, None], x[:, None]]
        rows["masks"] = masks.movedim(-1, 1).masked_fill(outside[:, None], 0).float() / 255
        fine = LOOKED_AT // GRID
        y, x = (torch.arange(LOOKED_AT) + fine * shift).clamp(0, LOOKED_AT - 1).unbind()
        images = rows["images"][row[..., None], y[:, :, None], x[:, None]]
        turned = (torch.rand(self.batch, generator=rng) < 0.5)[:, None, None, None]
        rows["masks"] = torch.where(turned, rows["masks"].flip(-1), rows["masks"])
        images = images.movedim(-1, 1).float() / 127.5 - 1
        rows["images"] = self._worn(torch.where(turned, images.flip(-1), images), rng)
        return {key: value.to(self.device) for key, value in rows.items() if key != "slots"}

    def _worn(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """A third a little out of focus, all a little off in contrast, brightness and hue, half of them noisy."""

        def spread(*shape: int) -> Tensor:
            return torch.rand(self.batch, *shape, generator=rng) * 2 - 1

        side = int(torch.randint(24, 57, (), generator=rng))
        soft = F.interpolate(images[: self.batch // 3], size=(side, side), mode="bilinear", antialias=True)
        images[: self.batch // 3] = F.interpolate(soft, size=images.shape[-2:], mode="bicubic")
        noise = torch.randn(images.shape, generator=rng) * 0.08 * spread(1, 1, 1).clamp(min=0)
        return images * (1 + 0.08 * spread(1, 1, 1)) + 0.05 * spread(1, 1, 1) + 0.03 * spread(3, 1, 1) + noise

    def loss(self, step: int, rng: torch.Generator) -> Losses:
        rows = self._rows(rng)
        seen = rows["images"].contiguous(memory_format=torch.channels_last)
        presence, masks, colours = self.network(seen)
        there, whole = (rows["state"] == 1).float(), (rows["state"] >= 0).float()
        off = F.binary_cross_entropy_with_logits(masks, rows["masks"], reduction="none").mean((2, 3))
        target = rows["colour"].long()
        hues = F.cross_entropy(colours.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="sum")
        return {
            "presence": F.binary_cross_entropy_with_logits(presence, there, reduction="none").sum(1).mean(),
            "masks": 2 * (off * whole).sum(1).mean(),  # where a thing is in part, either mask is right
            "colours": hues / self.batch,
        }

    def _settled(self, network: nn.Module) -> nn.Module:
        """Averaged weights need statistics of their own: the normalisation is measured anew on a thousand pictures."""
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over what follows
            norm.train()
        for k in range(32):
            network(self._rows(torch.Generator().manual_seed(k))["images"])
        return network.eval()

    @torch.no_grad()
    def report(self, network: nn.Module, folder: Path, step: int) -> str:
        self.step = step
        judge = Judge(self._settled(network), THRESHOLD, self.device)
        score = scores(judge, self.validation)
        wrong_sheet(judge, self.validation).save(folder / f"report-{step:06d}.png")
        return score.line()

    @torch.no_grad()
    def export(self, network: nn.Module, folder: Path) -> None:
        """Writes FOLDER/judge with the scores on test pictures."""
        out = folder / "judge"
        out.mkdir(exist_ok=True)
        self._settled(network)
        # Matrices in half precision; scales and statistics, which are few, keep theirs.
        weights = {k: v.half() if v.ndim > 1 else v for k, v in network.state_dict().items()}
        save_file({name: value.cpu().contiguous() for name, value in weights.items()}, out / "judge.safetensors")
        config = {"width": WIDTH, "concepts": CONCEPTS, "colours": COLOUR_NAMES}
        (out / "config.json").write_text(json.dumps(config | {"threshold": THRESHOLD}, indent=2) + "\n")
        easel = Easel(stream=7)
        test = [easel.draw(kind, k) for kind, count in COUNTS.items() for k in track(range(count), f"drawing: {kind}")]
        score = scores(load(out, self.device), test)
        print(score.table())
        (out / "README.md").write_text(card(score, self))


@torch.no_grad()
def _redrawn(images: list[Image.Image], vae: Path, device: str) -> list[Image.Image]:
    """The pictures as the autoencoder gives them back."""
    model = load_autoencoder(vae).to(device).eval()
    values = pixels(np.stack([np.asarray(image) for image in images])).to(device)
    again = model.decode(model.encode(values).latent_dist.mode()).sample
    again = ((again.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in again]


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    both = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


@dataclass(frozen=True)
class Scores:
    """What the judge gets right.

    presence: (recall, precision) of each concept; colour: part of the tinted objects found that are named in their
    colour; box: mean intersection over union; these on whole scenes. right: for each kind of picture, the part in which
    all things are found and no other.
    """

    presence: dict[str, tuple[float, float]]
    colour: float
    box: float
    right: dict[str, float]

    def line(self) -> str:
        low = min(min(pair) for pair in self.presence.values())
        right = ", ".join(f"{kind} {part:.1%}" for kind, part in self.right.items())
        return f"worst presence {low:.1%}, colour {self.colour:.1%}, box {self.box:.3f}; pictures right: {right}"

    def table(self) -> str:
        """The scores as Markdown."""
        rows = [f"| {concept} | {pair[0]:.2%} | {pair[1]:.2%} |" for concept, pair in self.presence.items()]
        right = [f"| {kind} | {part:.1%} |" for kind, part in self.right.items()]
        head = ["| concept | recall | precision |", "|---|---|---|", *rows, ""]
        middle = [f"Colour of tinted objects: {self.colour:.2%}. Mean overlap of boxes: {self.box:.3f}.", ""]
        return "\n".join([*head, *middle, "| pictures | exactly right |", "|---|---|", *right]) + "\n"


def scores(judge: Judge, examples: Sequence[Example]) -> Scores:
    """How the judge reads pictures whose truth is known; 0 for what none of them shows."""
    readings = judge.read([picture(example) for example in examples])
    hits, said, true = (dict.fromkeys(CONCEPTS, 0) for _ in range(3))
    right: dict[str, list[bool]] = {}
    colours, boxes = [], []
    for example, reading in zip(examples, readings, strict=True):
        right.setdefault(example.kind, []).append(_is_right(example, reading))
        if example.kind != "scene":
            continue
        for seen in reading.things:
            said[seen.concept] += 1
        for thing in example.things:
            true[thing.concept] += 1
            found = next((seen for seen in reading.things if seen.concept == thing.concept), None)
            if found:
                hits[thing.concept] += 1
                boxes.append(_overlap(found.box, thing.box))
                if thing.colour:
                    colours.append(found.colour == thing.colour)
    presence = {c: (hits[c] / max(1, true[c]), hits[c] / max(1, said[c])) for c in CONCEPTS}
    parts = {kind: sum(flags) / len(flags) for kind, flags in right.items()}
    return Scores(presence, sum(colours) / max(1, len(colours)), sum(boxes) / max(1, len(boxes)), parts)


def _is_right(example: Example, reading: Reading) -> bool:
    return {seen.concept for seen in reading.things} == {thing.concept for thing in example.things}


def wrong_sheet(judge: Judge, examples: Sequence[Example], most: int = 40) -> Image.Image:
    """Pictures that the judge reads wrongly, or whose colours it does; true things above what it says, eight a row."""
    from PIL import ImageDraw

    wrong = []
    for example, reading in zip(examples, judge.read([picture(example) for example in examples]), strict=True):
        miscoloured = any(thing.colour and reading.colour_of(thing.concept) != thing.colour for thing in example.things)
        if not _is_right(example, reading) or miscoloured:
            wrong.append((example, reading))
    page = Image.new("RGB", (8 * 182, -(-max(1, len(wrong[:most])) // 8) * 166), "white")
    draw = ImageDraw.Draw(page)
    for k, (example, reading) in enumerate(wrong[:most]):
        x, y = k % 8 * 182, k // 8 * 166
        page.paste(picture(example), (x, y))
        truth = ", ".join(f"{thing.colour or ''} {thing.concept}".strip() for thing in example.things) or "-"
        answer = ", ".join(f"{one.colour or ''} {one.concept} {one.confidence:.2f}".strip() for one in reading.things)
        for line, text in enumerate((f"{example.kind}: {truth}", answer or "-")):
            draw.text((x, y + 130 + 12 * line), text[:34], fill="black" if line == 0 else "red")
    return page


def card(score: Scores, task: Judging) -> str:
    """The model card, in Markdown."""
    size = sum(p.numel() for p in task.network.parameters())
    low = min(min(pair) for pair in score.presence.values())
    none = ", ".join(f"{kind} {score.right[kind]:.1%}" for kind in NONE)
    option, half = (" --vae", ", half of them passed through the autoencoder") if task.redrawn else ("", "")
    return f"""# The judge of the glyph world

Reads a 128 x 128 picture: which of 24 concepts it shows, where (boxes and 32 x 32 masks), and which of 11 colours its
objects have.

- Use: `attnctl.glyph.judge.load().read(images)`, or `attnctl judge IMAGE...`. It knows this world alone.
- Network: convolutions on the picture at 64 x 64, {size:,} parameters, matrices in half precision.
- Training: `python -m attnctl.glyph.train judge{option}`, {task.step:,} steps of {task.batch} pictures,
  seed {task.seed}.
- Data: {task.pictures:,} pictures drawn by `attnctl.glyph.train.examples`, some worn by JPEG, blur, noise and small
  shifts of colour{half}. No generated picture.
- A thing counts from about 70 % of it on. It is present from a probability of {THRESHOLD:g} on.

## Scores

On pictures of other seeds: {COUNTS["scene"]:,} whole scenes and {COUNTS["blank"]:,} of each other kind.
Least recall or precision of a concept: {low:.2%}. Read as showing nothing, as they should be: {none}.

{score.table()}
| kind | what it shows |
|---|---|
| scene | one to three whole things; the concepts, colours and boxes above are of these |
| leaked | animals that took on a colour |
| hidden | a thing partly behind another, at least 70 % of it in sight |
| twice | one thing more, mostly of a concept that is there already |
| ghost | a faint second thing over the first, which counts |
| pale | a scene seen through a little fog or noise |
| cut | a part of one thing, and beyond a straight cut the rest of another one, or nothing |
| blend | two things, about half and half: neither counts |
| faded, smeared | half-drawn: less than 37 % scene and the rest background or noise; blurred beyond recognition |
| stranger | other emoji, alone or beside a thing that counts |

## Limits

- A concept is named once, however often it appears; its box is of its largest part.
- Objects in natural colours were left out of the colour loss: they are given the nearest of the 11 names.

## Licence

Apache-2.0. Trained on pictures rendered with Noto Color Emoji (noto-emoji project, copyright 2013-2017 Google Inc. and
Arjen Nienhuis; image sources under Apache-2.0, font under the SIL Open Font License 1.1), which is not contained.
"""
