"""Training batches: forwards of the denoiser in a loop of one's own, in which controls act and nothing is sampled.

A pipeline call tells which rows are conditional, what they say and where in the schedule they are. A training loop
tells only its captions; so every row is conditional, has a caption of its own, and the scheduler is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from attnctl.engine import calls
from attnctl.engine.control import Control
from attnctl.engine.interception import Interception
from attnctl.engine.latents import Sample
from attnctl.engine.run import Rows, Run, Step
from attnctl.errors import ControlError


class Batch:
    """An open block of `Attachment.batch`.

    Attributes:
        prompts: one for each row.
        run: what the controls began with, from the first forward on; None before.
    """

    def __init__(self, texts: dict[str, list[str]], max_sequence_length: int | None) -> None:
        self.texts, self.max_sequence_length = texts, max_sequence_length
        self.prompts = texts["prompt"]
        self.run: Run | None = None

    def state(self, control: Control) -> Any:
        """What a control has made in this block, such as the maps of a `LiveMaps`.

        Raises:
            ControlError: there was no forward yet, or the control is not attached.
        """
        if self.run is None:
            raise ControlError("nothing was read yet: call the denoiser inside the batch first")
        return self.run.state(control)


@contextmanager
def batch(flow: Interception, texts: dict[str, Sequence[str]], max_sequence_length: int | None) -> Iterator[Batch]:
    """See `Attachment.batch`."""
    if flow.training is not None:
        raise ControlError("a training batch is open already; leave its block first")
    for name, each in texts.items():
        if isinstance(each, str) or not each or len(each) != len(texts["prompt"]):
            raise ControlError(f"a training batch has one {name} for each row, in a list; not {each!r}")
    for control in flow.target.controls():
        if _steps(type(control)):
            raise ControlError(f"{type(control).__name__} acts on the steps of a sampler; a training batch has none")
    flow.guard.begin(at_work=flow.passes.acting is not None or flow.passes.resting)
    flow.finish()
    flow.installed.refresh()
    flow.installed.reseat()
    block = Batch({name: list(each) for name, each in texts.items()}, max_sequence_length)
    flow.training = partial(forward, flow, block)
    try:
        yield block
    finally:
        flow.training = None
        flow.guard.done()


def _steps(kind: type[Control]) -> bool:
    """Whether controls of this kind do something around a denoising step."""
    return any(getattr(kind, name) is not getattr(Control, name) for name in ("before_denoise", "after_denoise"))


def forward(flow: Interception, block: Batch, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """One forward of the denoiser inside a batch."""
    target, family = flow.target, flow.target.family
    arguments = calls.named(target.model, args, kwargs)
    raw, text = arguments[family.sample], arguments.get(family.text)
    count = len(block.prompts)
    if raw.shape[0] != count:
        raise ControlError(f"the denoiser was called with {raw.shape[0]} rows in a batch of {count} prompts")
    size = family.latent_size(target.model, raw, arguments)
    if block.run is None:
        block.run = Run(
            family=family,
            pipe=target.pipe,
            images=count,
            guided=False,
            latent_size=size,
            steps=0,
            texts=block.texts,
            max_sequence_length=block.max_sequence_length,
        )
    elif block.run.latent_size != size:
        raise ControlError(f"one batch holds one size: latents of {block.run.latent_size}, then of {size}")
    run = block.run
    step = Step(
        run=run,
        index=run.calls,
        timestep=arguments.get("timestep"),
        rows=Rows(slice(0, count), None, count),
        scale=1.0,
        sigma=None,
        fraction=0.0,
        sample=Sample(raw, slice(0, count), family.latent_channels(target.model), family.channel_dim, 1.0),
        passes=flow.passes,
        arguments=arguments,
        text_rows=text.shape[1] if isinstance(text, Tensor) else None,
        positional=len(args),
        images=tuple(range(count)),
    )
    with flow.passes.rest():
        for attachment in target.attachments:
            attachment.latest = run
        for control in flow.target.controls():
            run.begin(control)
        for control in flow.target.controls():
            step.change(control.inputs(step))
    if step.changed:
        args, kwargs = calls.spread(step.arguments, len(args))
    run.calls += 1
    with flow.passes.again(step):
        output = original(*args, **kwargs)
    flow.passes.latest = step  # blocks under gradient checkpointing run again in the backward, as parts of this step
    return output
