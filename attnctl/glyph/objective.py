"""How well pictures of the glyph world show what their prompts ask for, as one number: an objective."""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image

from attnctl.errors import ControlError
from attnctl.glyph import judge
from attnctl.glyph.words import CONCEPTS, benchmark, phrase

FLOOR = -4.0  # below it a thing is simply absent; unclipped, few hopeless pictures would outweigh all others


class Shown:
    """pictures, prompts -> the judge's mean log-probability of the things in the prompt, from FLOOR to 0."""

    def __init__(self, eye: judge.Judge | None = None) -> None:
        self.eye = eye or judge.load()

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        logits = torch.stack([presence for presence, _, _ in self.eye.logits(pictures)])
        sure = F.logsigmoid(logits).clamp(min=FLOOR)  # (pictures, 24)
        return [float(row[things(prompt)].mean()) for row, prompt in zip(sure, prompts, strict=True)]


def things(prompt: str) -> list[int]:
    """The numbers of the concepts that a prompt names.

    Raises:
        ControlError: it names none.
    """
    words = set(re.findall("[a-z]+", prompt.lower()))
    found = [k for k, concept in enumerate(CONCEPTS) if concept in words]
    if not found:
        raise ControlError(f"the judge knows nothing of {prompt!r}; it knows {', '.join(CONCEPTS)}")
    return found


def usual_prompts() -> list[str]:
    """Each of the 24 concepts alone, with a pair of the benchmark after each."""
    pairs = benchmark()
    return [text for k, one in enumerate(CONCEPTS) for text in (phrase(one), pairs[k * len(pairs) // 24].text)]
