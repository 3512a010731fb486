"""What a control sees of a pipeline's first step."""

from __future__ import annotations

from dataclasses import dataclass, field

import tiny

from attnctl import attach
from attnctl.engine.control import Control


@dataclass(frozen=True, eq=False)
class _First(Control):
    """Keeps the conditional prediction of the first step, and a further pass's, if a name is given."""

    other: Control | None
    taken: list = field(default_factory=list)

    def after_denoise(self, step, output):
        if step.rows.cond is None or self.taken:
            return
        if self.other is None:
            self.taken.append(step.prediction[step.rows.cond].clone())
        else:
            self.taken.append(step.forward(step.run.state(self.other).name))


def weak_prediction(pipe, control, **settings):
    """The weak prediction of a `Perturb` at the first of two steps, by a whole forward; of None, the plain one."""
    first = _First(control)
    with attach(pipe, *([control] if control is not None else []), first):
        tiny.draw(pipe, steps=2, **settings)
    return first.taken[0]
