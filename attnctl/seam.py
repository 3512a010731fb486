"""The seam: the one file that knows the insides of diffusers' attention processors.

Every softmax processor of diffusers ends in `F.scaled_dot_product_attention` or `dispatch_attention_fn`. A `Seat` puts
a processor in place whose `__call__` is a private clone of the original's with those two names bound to us. Nothing
else differs, so projections, norms, rotary embeddings, LoRA and backends stay the model's own.

- The clone runs in a copy of its module's globals: nothing is patched process-wide, other pipelines see nothing.
- Its class is a subclass of the original's, sharing the original's `__dict__`, whose `__new__` returns a plain parent:
  scales set later reach it, `isinstance` holds, and diffusers' own `type(processor)()` gets what it expects.
- Dynamo guards a function by its code object, not its globals, so each clone gets a code object of its own.
"""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from . import opaque

SDPA, DISPATCH = F.scaled_dot_product_attention, dispatch_attention_fn
FRESH = itertools.count()


@dataclass(frozen=True)
class Core:
    """One attention call as a processor makes it, canonical: q, k, v are (batch, heads, tokens, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    scale: float | None
    index: int  # 0 for the first call of this processor in this forward
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]  # the kernel the site is set to use


def attentions(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of everything in the denoiser that attends through a processor, in module order."""
    return ((n, m) for n, m in denoiser.named_modules() if hasattr(m, "processor") and hasattr(m, "heads"))


def facts(attn: Any) -> tuple[int, int, bool, bool]:
    """(heads, head_dim, keys come from the text, keys of text and image are joined) of one attention module."""
    joint = attn.added_kv_proj_dim is not None
    return attn.heads, attn.inner_dim // attn.heads, bool(getattr(attn, "is_cross_attention", False)), joint


def reachable(attn: Any) -> bool:
    """True if the module's processor ends in one of the two names."""
    return bool(_calls(type(attn.processor).__call__))


def _calls(fn: Any) -> set[str]:
    """Names through which a function reaches fused attention, itself or by a helper of the same module."""
    if not isinstance(fn, types.FunctionType):
        return set()
    names, scope = set(fn.__code__.co_names), fn.__globals__
    found = {n for n in ("dispatch_attention_fn",) if n in names}
    if {"F", "scaled_dot_product_attention"} <= names and scope.get("F") is F:
        found.add("F")
    helpers = (n for n in names if isinstance(scope.get(n), types.FunctionType) and scope[n] is not fn)
    return found | {n for n in helpers if scope[n].__module__ == fn.__module__ and _calls(scope[n])}


def _rebind(fn: Any, sdpa: Callable[..., Tensor], dispatch: Callable[..., Tensor]) -> types.FunctionType:
    # Without "__name__" Dynamo takes the globals for what they are, not for those of the module they were copied from.
    scope = {k: v for k, v in fn.__globals__.items() if k != "__name__"}
    code = fn.__code__.replace(co_name=f"{fn.__name__}_{next(FRESH)}")
    for name in _calls(fn):
        if name == "F":
            used = {n: getattr(F, n) for n in fn.__code__.co_names if hasattr(F, n)}
            scope["F"] = types.SimpleNamespace(**used | {"scaled_dot_product_attention": sdpa})
        else:
            scope[name] = dispatch if name == "dispatch_attention_fn" else _rebind(scope[name], sdpa, dispatch)
    clone = types.FunctionType(code, scope, fn.__name__, fn.__defaults__, fn.__closure__)
    clone.__kwdefaults__ = fn.__kwdefaults__
    return clone


class _Cell:
    """Which seat is being called: the re-bound names get tensors only. One per program, so one per denoiser."""

    seat: Any = None
    calls: int = 0


def _program(cls: type) -> type:
    """The controlled subclass of one processor class."""
    cell = _Cell()

    def core(query, key, value, mask, dropout, causal, scale, gqa, options):  # options: None means SDPA and its layout
        seat, index = cell.seat, cell.calls
        cell.calls = index + 1
        if torch.compiler.is_compiling():
            call = (query, key, value, mask, dropout, causal, scale, gqa, options is not None, index, seat.handle)
            return opaque.attend(*call)
        return seat.attend(query, key, value, mask, dropout, causal, scale, gqa, options, index)

    def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        return core(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, None)

    def dispatch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
                 attention_kwargs=None, *, backend=None, parallel_config=None):  # fmt: skip
        options = {"attention_kwargs": attention_kwargs, "backend": backend, "parallel_config": parallel_config}
        return core(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, options)

    body = _rebind(cls.__call__, sdpa, dispatch)

    def __call__(self, attn, *args, **kwargs):
        cell.seat, cell.calls = self._attnctl_seat, 0
        out = body(self, attn, *args, **kwargs)
        cell.seat = None  # the program outlives the attachment; what it points to must not
        return out

    __call__.__signature__ = inspect.signature(cls.__call__)  # type: ignore[attr-defined]  # kwargs are filtered by it
    members = {
        "__slots__": ("_attnctl_seat",),  # not in the __dict__, which sites may share (SD3: attn and attn2)
        "__call__": __call__,
        "__new__": lambda _, *args, **kwargs: cls(*args, **kwargs),
        "__getstate__": lambda self: self.__dict__.copy(),  # a deep copy is a plain parent and has no slot
    }
    return type("Controlled" + cls.__name__, (cls,), members)


# By denoiser and processor class. Kept after release, so that attaching again recompiles nothing.
_PROGRAMS: WeakKeyDictionary[nn.Module, dict[type, type]] = WeakKeyDictionary()


class Seat:
    """One attention module under control, from construction until `restore`.

    Args:
        denoiser: the (uncompiled) model the module belongs to.
        attn: the attention module; its processor must be `reachable`.
        handler: gets each attention call of the site and returns its output, (batch, heads, queries, head_dim).
    """

    def __init__(self, denoiser: nn.Module, attn: Any, handler: Callable[[Core], Tensor]) -> None:
        self.attn, self.handler, self.original = attn, handler, attn.processor
        self.handle = opaque.register(self)
        cls, programs = type(self.original), _PROGRAMS.setdefault(denoiser, {})
        if cls not in programs:
            programs[cls] = _program(cls)
        self.ours: Any = object.__new__(programs[cls])
        object.__setattr__(self.ours, "__dict__", self.original.__dict__)
        object.__setattr__(self.ours, "_attnctl_seat", self)
        attn.processor = self.ours

    def in_place(self) -> bool:
        """False once somebody else has set another processor."""
        return self.attn.processor is self.ours

    def restore(self) -> None:
        """Put the original processor back, unless somebody else's has taken our place."""
        if self.in_place():
            self.attn.processor = self.original
        self.handler = lambda core: core.run(core.q, core.k, core.v, core.bias, core.scale)

    def compiled_options(self) -> dict[str, Any]:
        """What a processor hands to `dispatch_attention_fn`; compiled graphs do not carry it."""
        return {"backend": self.ours._attention_backend, "parallel_config": self.ours._parallel_config}

    def attend(self, query, key, value, mask, dropout, causal, scale, gqa, options, index):
        """Run the handler on a call as the processor made it: (B, H, S, D), or with options (B, S, H, D)."""

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
            if options is None or bias is not mask:  # many dispatch backends refuse a mask, the native one never does
                return SDPA(q, k, v, bias, dropout, causal, scale=scale, enable_gqa=gqa or q.shape[1] != k.shape[1])
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return DISPATCH(q, k, v, bias, dropout, causal, scale, gqa, **options).transpose(1, 2)

        if options is None:
            return self.handler(Core(query, key, value, mask, scale, index, run))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return self.handler(Core(q, k, v, mask, scale, index, run)).transpose(1, 2)
