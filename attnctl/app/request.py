"""What is asked for, checked and made whole, and what is told of what was drawn; for command line and studio."""

import re
from typing import TYPE_CHECKING

from attnctl.app.asked import filled, glyph_things, read_things, with_phrases
from attnctl.app.command import UsageError, tell
from attnctl.app.limits import LARGEST, STEPS, THREADS
from attnctl.errors import short

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from attnctl.app.drawing import Drawing


def checked(
    prompt: str,
    seed: int,
    count: int,
    steps: int | None,
    guidance: float | None,
    size: str | None,
    threads: int | None,
) -> tuple[int, int] | None:
    """The size as numbers, once every plain setting makes sense."""
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    if not 0 <= seed < 2**63 - count:
        raise UsageError(f"--seed {seed}: a seed is a whole number from 0 to 2^63 - 1, also of the last picture")
    if count < 1:
        raise UsageError(f"--count {count}: at least 1")
    for name, value, most in (("--steps", steps, STEPS), ("--threads", threads, THREADS)):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"{name} {value}: from 1 to {most}")
    if guidance is not None and not 0 <= guidance < float("inf"):
        raise UsageError(f"--guidance {guidance}: a number from 0 up")
    return size_of(size)


def size_of(text: str | None) -> tuple[int, int] | None:
    """WIDTHxHEIGHT as numbers."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if match is None:
        raise UsageError(f"--size {short(text)}: write it as WIDTHxHEIGHT, such as 512x768")
    if any(len(side.lstrip("0")) > 5 or int(side) > LARGEST for side in match.groups()):
        raise UsageError(f"--size {short(text)}: a side has at most {LARGEST} pixels")
    return int(match[1]), int(match[2])


def control_texts(prompt: str, model: str, texts: list[str], subjects: str | None, compare: bool) -> list[str]:
    """The controls as text: those given, or segregation of the subjects, or of the glyph things in the prompt."""
    from attnctl.app.control_text import write_control
    from attnctl.loading import embedded

    if subjects is not None:
        if texts:
            raise UsageError("--subjects is short for one --control; give one of the two")
        if subjects.strip().lower() == "auto":
            return [filled("segregation", "", read_things(prompt), "--subjects auto")]
        phrases = [phrase.strip() for phrase in subjects.split(",")]
        if len(phrases) < 2 or not all(phrases):
            raise UsageError(f"--subjects {subjects!r}: at least two phrases of the prompt, with commas between them")
        return [write_control("segregation", *phrases)]
    if texts or not compare:
        return [with_phrases(text, prompt, model) for text in texts]
    things = glyph_things(prompt) if model in embedded() else []
    if len(things) < 2:
        raise UsageError("--compare has nothing to compare with: give --control, or --subjects 'PHRASE, PHRASE'")
    chosen = write_control("segregation", *things)
    tell(f"no control was given, so {chosen} is compared with none")
    return [chosen]


def mapped_words(pipe: "DiffusionPipeline", prompt: str) -> tuple[str, ...]:
    """The words that --maps shows; those it cannot show are told on stderr."""
    from attnctl.app.drawing import shown_words

    shown, left_out = shown_words(pipe, prompt)
    if left_out:
        tell(f"--maps leaves out what the tokenizer does not keep: {', '.join(left_out)}")
    if not shown:
        tell("--maps has no word of the prompt to show")
    return shown


def left_alone(drawings: "dict[str, Drawing]") -> list[str]:
    """Which pictures a control left as they were, one line each."""
    return [
        f"{kind:<10}  left alone by {', '.join(drawn.alone)}, which looked ahead and saw every phrase"
        for kind, drawn in drawings.items()
        if drawn.alone
    ]


def judged(model: str, drawings: "dict[str, Drawing]") -> list[str]:
    """What the judge sees in each picture, one line each; it knows the glyph world alone."""
    from attnctl.loading import embedded

    if model not in embedded():
        return []
    from attnctl.glyph import judge as judges

    readings = judges.load().read([drawn.picture for drawn in drawings.values()])
    return [f"{kind:<10}  the judge sees {reading}" for kind, reading in zip(drawings, readings, strict=True)]


def told(model: str, drawings: "dict[str, Drawing]") -> list[str]:
    """What became of each picture, in sentences: what controls did, what they left alone, what the judge sees."""
    found = []
    for kind, drawn in drawings.items():
        for one in drawn.trace.report["traces"] if drawn.trace is not None else ():
            if one.get("updates"):
                times = "once" if one["updates"] == 1 else f"{one['updates']} times"
                found.append(f"{kind:<10}  {one['control']} corrected the drawing {times} on its way")
    said = (line.split(maxsplit=1) for line in (*found, *left_alone(drawings), *judged(model, drawings)))
    return [f"{kind.capitalize()}: {rest}." for kind, rest in said]
