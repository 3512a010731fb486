"""Errors that are the caller's to mend. Each message is one line that names what was asked and what exists."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TypeVar


def instead(name: str, known: Iterable[str], most: int = 200) -> str:
    """ "did you mean strength?" or, where nothing is near, "there are strength, maps, ...": the end of a message.

    most: letters of the list.
    """
    names = list(known)
    plain = {one.replace("_", "").lower(): one for one in names}
    if near := get_close_matches(name.replace("_", "").lower(), plain, 1, 0.7):
        return f"did you mean {plain[near[0]]}?"
    return f"there are {short(', '.join(names), most)}" if names else "there is none"


def short(text: str, most: int = 80) -> str:
    """The text, or its beginning and "..." where it is longer."""
    return text if len(text) <= most else text[: most - 3] + "..."


class AttnctlError(ValueError):
    """Base of every error attnctl raises on purpose."""


class AttnctlWarning(UserWarning):
    """Something works, but hardly as it was meant to."""


class NoSiteError(AttnctlError):
    """A selection matched no attention site, or a control named a site it may not touch."""


class PhraseError(AttnctlError):
    """A phrase is not in the prompt, or the tokenizer cut it off."""


class UnsupportedPipelineError(AttnctlError):
    """No family record describes this pipeline's denoiser."""


class UnsupportedProcessorError(AttnctlError):
    """A selected site runs a processor that never calls fused attention (eager, sliced, xformers, linear)."""


class ControlError(AttnctlError):
    """Controls that cannot be combined, or that were used outside their rules."""


class BusyError(AttnctlError):
    """One attached pipeline was called from two threads at once."""


class FamilyError(AttnctlError):
    """A family record does not describe the model it was checked against (see `attnctl.engine.verify`)."""


E = TypeVar("E", bound=AttnctlError)


def of_image(error: E, image: int, prompts: Sequence[str], everywhere: bool = False) -> E:
    """The same error, saying which picture of a batch it is about, or that it is about each of them."""
    if len(prompts) == 1:
        return error
    none = f"none of the {len(prompts)} prompts has it; " if everywhere else ""
    return type(error)(f"{none}{name_of(image, prompts[image])}: {error}")


def name_of(image: int, prompt: str) -> str:
    """ "image 1 ('a dog')": how messages speak of one picture of a batch."""
    return f"image {image} ({short(prompt, 60)!r})"
