"""One denoiser call: its arguments, which run it belongs to, which rows are what, and what it predicts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.engine.families.record import Family
from attnctl.engine.run import Run, Step, Texts
from attnctl.errors import ControlError

WEIGHT = re.compile(r"\([^()]*\)[\d.+-]+|\([^()]*:[\d.]+\)|\w\+\+*(?=[\s,.]|$)|\w--+(?=[\s,.]|$)")  # of compel, A1111
PROMPTS = ("prompt", "prompt_2", "prompt_3")  # arguments of encode_prompt, where a pipeline has them


def named(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A denoiser call's arguments by name."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    return {name: _snapshot(value) for name, value in (dict(zip(names, args, strict=False)) | kwargs).items()}


def spread(arguments: dict[str, Any], positional: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name, as they were given: the first so many without their names, which hooks of others may read."""
    names = list(arguments)
    return tuple(arguments[name] for name in names[:positional]), {name: arguments[name] for name in names[positional:]}


def rows_kept(step: Step, keep: slice | list[int]) -> dict[str, Any]:
    """The call's arguments with only these rows of every batched tensor; containers are copied, not shared."""
    rows, shared = step.rows, step.run.family.shared

    def take(value: Any, batched: bool) -> Any:
        if isinstance(value, Tensor):
            if batched and value.ndim and value.shape[0] == rows.total:
                value = value[keep]
            return value.clone() if value.is_inference() else value  # an inference tensor cannot be saved for backward
        if isinstance(value, dict):
            return {k: take(v, batched) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(take(v, batched) for v in value)
        return value

    return {name: take(value, name not in shared) for name, value in step.arguments.items()}


def _snapshot(value: Any) -> Any:
    """The same tensors in containers of our own: denoisers take things out of those they are given."""
    if type(value) is dict:
        return {key: _snapshot(one) for key, one in value.items()}
    return type(value)(map(_snapshot, value)) if type(value) in (list, tuple) else value


def guided(pipe: Any, words: dict[str, Any] | None) -> bool:
    """True if the pipeline runs classifier-free guidance in this call, as it told `encode_prompt` or says itself."""
    if words is not None and words.get("do_classifier_free_guidance") is not None:
        return bool(words["do_classifier_free_guidance"])
    try:
        return bool(pipe.do_classifier_free_guidance)
    except AttributeError:  # no such property, or the pipeline was never called
        return False


def texts(words: Mapping[str, Any] | None, given: str | list[str] | None, images: int) -> Texts:
    """One text per image for each prompt argument.

    Args:
        words: arguments of `encode_prompt`, or None if it was not called.
        given: what the caller of `attach` said; counts only where the pipeline was given embeddings.
        images: how many pictures there are.

    Raises:
        ControlError: the number of texts does not divide the number of pictures.
    """
    found: dict[str, str | list[str] | None] = {name: (words or {}).get(name) for name in PROMPTS}
    if found["prompt"] is None:
        _check_plain(given)
        found["prompt"] = given
    result: Texts = {}
    for name, text in found.items():
        if text is None:
            continue
        each = [text] if isinstance(text, str) else list(text)
        if not each or images % len(each):
            raise ControlError(f"{len(each)} texts for {name} do not fit {images} images")
        result[name] = [one for one in each for _ in range(images // len(each))]
    return result


def negatives(words: Sequence[dict[str, Any]], halved: bool, images: int) -> Texts:
    """One negative text per image for each prompt argument; none where there is no guidance, or nobody told.

    Args:
        words: arguments of each call of `encode_prompt`. FLUX encodes its negative prompt in a second call.
        halved: the pipeline runs classifier-free guidance, see `guided`.
        images: how many pictures there are.
    """
    if len(words) > 1:
        own = words[1]
    elif words and halved and words[0].get("negative_prompt_embeds") is None:
        own = {name: words[0].get(f"negative_{name}") for name in PROMPTS}
        own["prompt"] = own["prompt"] or ""
    else:
        return {}
    try:
        return texts(own, None, images)
    except ControlError:  # a loop by hand has encoded something else
        return {}


def _check_plain(given: str | list[str] | None) -> None:
    """Raise if a text that was told for embeddings has weights, since their signs are no tokens of it."""
    for text in [given] if isinstance(given, str) else given or ():
        if weight := WEIGHT.search(text):
            raise ControlError(f"attach(prompt=...) has a weight, {weight[0]!r}; say the words as they were encoded")


def images_of(words: dict[str, Any] | None) -> int | None:
    """How many pictures the arguments of `encode_prompt` ask for."""
    if words is None:
        return None
    prompt, embeds = words.get("prompt"), words.get("prompt_embeds")
    if prompt is None and embeds is None:
        return None
    each = words.get("num_images_per_prompt") or 1
    if prompt is None:
        return int(embeds.shape[0]) * each  # type: ignore[union-attr]
    return each * (1 if isinstance(prompt, str) else len(prompt))


def cropped(pipe: Any, asked: dict[str, Any], picture: tuple[int, int]) -> dict[str, Any]:
    """The view of a run that `padding_mask_crop` gives it, as the pipeline itself works it out.

    Args:
        asked: arguments of the pipeline's `check_inputs`.
        picture: (height, width) of what is drawn, in pixels.
    """
    mask, pad = asked.get("mask_image"), asked.get("padding_mask_crop")
    if pad is None or mask is None:
        return {}
    height, width = picture
    left, top, right, bottom = pipe.mask_processor.get_crop_region(mask, width, height, pad=pad)
    whole = mask.size
    view = (left / whole[0], top / whole[1], right / whole[0], bottom / whole[1])
    return {"view": view, "uncropped": (whole[1], whole[0])}


def start_run(
    family: Family, pipe: Any, denoiser: Any, arguments: dict[str, Any], told: Sequence[dict[str, Any]], given: Any
) -> Run:
    """The run that a denoiser call opens.

    Args:
        told: arguments of each call of `encode_prompt`, in order.
        given: what the caller of `attach` said that embeddings mean.
    """
    words = told[0] if told else None  # the second, if any, is FLUX's negative prompt
    sample = arguments[family.sample]
    total = sample.shape[0]
    halved = guided(pipe, words)
    images = images_of(words) or total // (2 if family.branches == "batched" and halved and total % 2 == 0 else 1)
    scheduler = getattr(pipe, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    schedule = 0 if timesteps is None else len(timesteps)
    start = 0
    now = arguments.get("timestep")
    if schedule and now is not None:
        now = torch.as_tensor(now, dtype=torch.float32).flatten()[0].cpu() * family.time
        start = int((timesteps.float().cpu() - now).abs().argmin())  # type: ignore[union-attr]
    steps = (getattr(pipe, "num_timesteps", None) if words is not None else None) or schedule - start
    return Run(
        family=family,
        pipe=pipe,
        images=images,
        guided=halved,
        latent_size=family.latent_size(denoiser, sample, arguments),
        steps=steps,
        texts=texts(words, given, images),
        negatives=negatives(told, halved, images),
        max_sequence_length=(words or {}).get("max_sequence_length"),
        text_rows=text.shape[1] if isinstance(text := arguments.get(family.text), Tensor) else None,
        start=start,
        schedule=schedule,
    )


def tokens_drawn(run: Run, raw: Tensor) -> int | None:
    """How many tokens of packed latents are the picture that is drawn, if a reference picture follows them; or None."""
    packing = run.family.packing
    if packing == 1:
        return None
    height, width = run.latent_size
    cells = (height // packing) * (width // packing)
    return cells if raw.shape[1] > cells else None


def scale_of(family: Family, pipe: Any, timestep: Any) -> float:
    """The factor the scheduler puts on latents at this step, measured on a one: schedulers do not tell it."""
    if not family.scaled or not hasattr(getattr(pipe, "scheduler", None), "scale_model_input"):
        return 1.0
    return float(pipe.scheduler.scale_model_input(torch.ones(1), timestep))


def sigma_of(pipe: Any, position: int) -> float | None:
    """The noise level at a position of the schedule, if the scheduler keeps such a list."""
    sigmas = getattr(getattr(pipe, "scheduler", None), "sigmas", None)
    return float(sigmas[position]) if sigmas is not None and position < len(sigmas) else None


def prediction(output: Any) -> tuple[Tensor, Any]:
    """(the predicted tensor, a function that puts another in its place) of whatever a denoiser returns."""
    if isinstance(output, tuple):
        return output[0], lambda tensor: (tensor, *output[1:])
    if isinstance(output, Tensor):
        return output, lambda tensor: tensor
    return output.sample, lambda tensor: type(output)(sample=tensor)
