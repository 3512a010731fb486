"""One operator that stands for a controlled attention call inside compiled graphs.

Tracing would bake the controls of the moment into the graph and recompile with every step. So Dynamo sees an operator
it cannot look into. When that runs, it finds the site by a number that travels as a tensor, which is data and not a
guard, and runs the controls as ordinary Python. No graph breaks, no recompiling, on any backend.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_handlers: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register(owner: Any) -> Tensor:
    """A handle for a `seam.Seat`; it is forgotten when the seat is gone."""
    number = next(_numbers)
    _handlers[number] = owner
    return torch.tensor(number)


# A recorded CUDA graph would replay the kernels and skip the controls, so it may not hold this operator.
@torch.library.custom_op("attnctl::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None,
    gqa: bool, dispatched: bool, index: int, handle: Tensor,
) -> Tensor:  # fmt: skip
    """A controlled attention call; arguments as the processor made it, plus the site's handle."""
    owner = _handlers[int(handle)]
    own = owner.ours
    options = {"backend": own._attention_backend, "parallel_config": own._parallel_config} if dispatched else None
    out = owner.attend(query, key, value, mask, dropout, causal, scale, gqa, options, index).contiguous()
    inputs = {x.untyped_storage().data_ptr() for x in (query, key, value)}
    return out.clone() if out.untyped_storage().data_ptr() in inputs else out  # an operator may not return its input


@attend.register_fake
def _(query, key, value, mask, dropout, causal, scale, gqa, dispatched, index, handle):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
