"""Scores of pictures: what a judge sees of the prompt, and how near a CLIP model finds the two.

They lie in scores.jsonl, one line for each picture and kind, and can be made again of the pictures: see `report`.

- judge: for pictures of the glyph world. `score` says how many of the prompt's things are there, `things` what is seen.
- clip:FOLDER: 100 times the cosine between picture and prompt, not below 0, from a CLIP model in a folder of yours: the
  scale of torchmetrics' CLIPScore (which does not work with transformers 5); that of Hessel et al. 2021, arXiv
  2104.08718, is 2.5 times the cosine.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from attnctl.app.asked import glyph_things
from attnctl.app.batch.folder import SCORES, append
from attnctl.app.command import UsageError
from attnctl.errors import ControlError

Score = Callable[[Image.Image, str], Any]  # (picture, prompt) -> what JSON can hold


def check_scores(names: Iterable[str]) -> None:
    """Raise `UsageError` unless all of these can be made."""
    for name in names:
        kind, _, folder = name.partition(":")
        if name == "judge":
            continue
        if kind != "clip":
            raise UsageError(f"--score {name}: choose judge, or clip:FOLDER with a CLIP model in it")
        if not (Path(folder).expanduser() / "config.json").is_file():
            raise UsageError(f"--score {name}: {folder or 'the folder'} holds no CLIP model: there is no config.json")


@cache  # of a process: models are loaded once
def score_of(name: str) -> Score:
    """The function of a score."""
    return _judge() if name == "judge" else _clip(name.partition(":")[2])


def _judge() -> Score:
    from attnctl.glyph import judge as judges

    judge = judges.load()

    def score(picture: Image.Image, prompt: str) -> Any:
        (reading,) = judge.read([picture])
        asked = list(dict.fromkeys(phrase.partition("#")[0] for phrase in glyph_things(prompt)))
        there = sum(map(reading.has, asked))
        return {"score": round(there / len(asked), 4) if asked else None, **reading.to_dict()}

    return score


def _clip(folder: str) -> Score:
    from attnctl.pipelines.head_objectives import ClipScore

    try:
        clip = ClipScore(folder)
    except ControlError as error:
        raise UsageError(f"--score clip:{folder}: {error}") from error

    def score(picture: Image.Image, prompt: str) -> Any:
        return {"score": round(clip([picture], [prompt])[0], 4)}

    return score


def note_scores(out: Path, key: str, picture: Image.Image, prompt: str, names: Iterable[str]) -> None:
    """Add the scores of a picture to the folder's list."""
    for name in names:
        append(out / SCORES, json.dumps({"key": key, "name": name, **score_of(name)(picture, prompt)}))


def noted_scores(out: Path) -> dict[str, dict[str, Any]]:
    """What the folder's list holds, by key and name; of several, the last."""
    try:
        lines = (out / SCORES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # a line that was cut off
            one = json.loads(line)
            found.setdefault(one.pop("key"), {})[one.pop("name")] = one
    return found
