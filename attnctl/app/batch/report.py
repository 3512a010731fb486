"""What is derived from the folder of a batch and can be made again at any time: manifest, contact sheets, a summary."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from attnctl.app.batch.contact_sheets import Axes, Shown, sheets
from attnctl.app.batch.folder import FAILURES, MANIFEST, PICTURE, SUMMARY, failures, png, write_whole
from attnctl.app.batch.scores import note_scores, noted_scores
from attnctl.app.command import tell
from attnctl.errors import short

_SHEET = "sheet*.png"


def write_report(out: Path, scores: Iterable[str] = (), axes: Axes | None = None) -> list[Path]:
    """Write manifest.jsonl, summary.md and the contact sheets of a folder; their paths.

    What cannot be read is told and left out.

    Args:
        out: the folder.
        scores: that every picture shall have; what is missing of them is made.
        axes: of the sheets; default: one row for each prompt and seed, its pictures side by side.
    """
    from attnctl.app.recipe import RecipeError, read

    found, scores = list[Shown](), tuple(scores)
    known = noted_scores(out)
    for path in sorted(out.iterdir()):
        if not (match := PICTURE.fullmatch(path.name)):
            continue
        try:
            picture, recipe = read(path)
        except RecipeError as error:
            tell(str(error))
            continue
        lacking = [name for name in scores if name not in known.get(match[1], {})]
        note_scores(out, match[1], picture, recipe.prompt, lacking)
        found.append(Shown.of(path.name, match[1], recipe, picture))
    known = noted_scores(out)
    files = {out / MANIFEST: "".join(_line(one, known) for one in found).encode()}
    for number, page in enumerate(sheets(found, axes), 1):
        files[out / f"sheet{f'-{number}' if number > 1 else ''}.png"] = png(page)
    files[out / SUMMARY] = _summary(found, known, len(failures(out))).encode()
    for old in out.glob(_SHEET):
        if old not in files and old.stem.removeprefix("sheet").removeprefix("-").isdigit():
            old.unlink()
    for path, content in files.items():
        write_whole(path, content)
    return list(files)


def _line(one: Shown, scores: dict[str, dict[str, object]]) -> str:
    told = {"file": one.name, "key": one.key, **asdict(one.recipe)} | {"scores": scores.get(one.key, {})}
    return json.dumps(told, ensure_ascii=False) + "\n"


def _summary(found: list[Shown], known: dict[str, dict[str, dict[str, float | None]]], failed: int) -> str:
    """A table of the pictures and their mean scores, by model and controls."""
    names = sorted({name for one in found for name in known.get(one.key, {})})
    rows: dict[tuple[str, tuple[str, ...]], list[Shown]] = {}
    for one in found:
        what = ("compose",) * (one.recipe.compose is not None) + tuple(map(_named, one.recipe.controls))
        rows.setdefault((one.recipe.model, what), []).append(one)
    head = ["model", "controls", "pictures", *names]
    lines = [f"{len(found)} pictures" + (f", {failed} failed, see {FAILURES}" if failed else ""), ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (model, controls), ones in sorted(rows.items()):
        cells = [model, " + ".join(controls) or "none", str(len(ones))]
        for name in names:
            values = [known.get(one.key, {}).get(name, {}).get("score") for one in ones]
            numbers = [value for value in values if value is not None]
            cells.append(f"{mean(numbers):.3f}" if numbers else "")
        lines.append(f"| {' | '.join(short(cell, 60).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _named(control: str) -> str:
    """A control without its phrases, which are others in each prompt, but with its settings."""
    name, _, body = control.partition("(")
    settings = body[body.rfind(",", 0, body.find("=")) + 1 :].strip() if "=" in body else ")"
    return f"{name}({settings}" if body else name
