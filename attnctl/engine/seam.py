"""The seam: the one file that knows the insides of diffusers' attention processors.

Every softmax processor of diffusers ends in `F.scaled_dot_product_attention` or `dispatch_attention_fn`. A `Seat` puts
one in place whose `__call__` is a private clone of the original's with those two names bound to us; all else is kept.

- The clone runs in a copy of its module's globals: nothing is patched process-wide, other pipelines see nothing.
- Its class is a subclass of the original's, sharing the original's `__dict__`, whose `__new__` returns a plain parent:
  scales set later reach it, `isinstance` holds, and diffusers' own `type(processor)()` gets what it expects.
- Dynamo guards a function by its code object, not its globals, so each clone gets a code object of its own.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnctl.engine import compile_op as opaque

SDPA, FRESH = F.scaled_dot_product_attention, itertools.count()
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]  # (q, k, v, bias, scale) -> output


def attentions(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of everything in the denoiser that attends through a processor, in module order."""
    return ((n, m) for n, m in denoiser.named_modules() if hasattr(m, "processor") and hasattr(m, "heads"))


def facts(attn: Any) -> tuple[int, int, bool, bool]:
    """(heads, head_dim, keys come from the text, keys of text and image are joined) of one attention module."""
    cross = getattr(attn, "is_cross_attention", False)
    return attn.heads, attn.inner_dim // attn.heads, cross, getattr(attn, "added_kv_proj_dim", None) is not None


def reachable(attn: Any) -> bool:
    """True if the module's processor ends in one of the two names."""
    call = type(getattr(attn.processor, "_attnctl_original", attn.processor)).__call__
    return isinstance(call, types.FunctionType) and bool(_ends(call))


def _ends(fn: Any) -> set[str]:
    """Globals through which a function reaches fused attention: the two names, or helpers of its own module."""
    names, scope = set(fn.__code__.co_names), fn.__globals__
    uses_f = {"F", "scaled_dot_product_attention"} <= names and scope.get("F") is F
    found = {"dispatch_attention_fn", *(["F"] if uses_f else [])} & names
    helpers = (n for n in names if n in scope and scope[n] is not fn and isinstance(scope[n], types.FunctionType))
    return found | {n for n in helpers if scope[n].__module__ == fn.__module__ and _ends(scope[n])}


def _rebind(fn: Any, sdpa: Callable[..., Tensor], dispatch: Callable[..., Tensor]) -> types.FunctionType:
    # Without "__name__" Dynamo takes the globals for what they are, not for those of the module they were copied from.
    scope = {k: v for k, v in fn.__globals__.items() if k != "__name__"}
    for name in _ends(fn):
        if name == "F":
            used = {n: getattr(F, n) for n in fn.__code__.co_names if hasattr(F, n)}
            scope["F"] = types.SimpleNamespace(**used | {"scaled_dot_product_attention": sdpa})
        else:
            scope[name] = dispatch if name == "dispatch_attention_fn" else _rebind(scope[name], sdpa, dispatch)
    code = fn.__code__.replace(co_name=f"{fn.__name__}_{next(FRESH)}")
    clone = types.FunctionType(code, scope, fn.__name__, fn.__defaults__, fn.__closure__)
    clone.__kwdefaults__ = fn.__kwdefaults__
    return clone


def _program(cls: type) -> type:
    """The controlled subclass of one processor class."""
    cell: Any = type("Cell", (), {"seat": None, "index": 0})()  # who calls: the two names are handed tensors only

    def core(query, key, value, mask, dropout, causal, scale, gqa, options):  # options None: SDPA and its layout
        seat, index = cell.seat, cell.index
        cell.index = index + 1
        if torch.compiler.is_compiling():
            options = options is not None  # the operator reads them off the processor
            return opaque.attend(query, key, value, mask, dropout, causal, scale, gqa, options, index, seat.handle)
        return seat.attend(query, key, value, mask, dropout, causal, scale, gqa, options, index)

    def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        return core(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, None)

    def dispatch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
                 attention_kwargs=None, *, backend=None, parallel_config=None):  # fmt: skip
        own = {"attention_kwargs": attention_kwargs, "backend": backend, "parallel_config": parallel_config}
        return core(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, own)

    body = _rebind(cls.__call__, sdpa, dispatch)

    def __call__(self, attn, *args, **kwargs):
        cell.seat, cell.index = self._attnctl_seat, 0
        try:
            return body(self, attn, *args, **kwargs)
        finally:
            cell.seat = None  # the program outlives the attachment; what it points to must not

    __call__.__wrapped__ = cls.__call__  # type: ignore[attr-defined]  # callers filter kwargs by its signature
    members = {
        "__slots__": ("_attnctl_seat",),  # not in the __dict__, which sites may share (SD3: attn and attn2)
        "__call__": __call__,
        "__new__": lambda _, *args, **kwargs: cls(*args, **kwargs),
        "__reduce_ex__": lambda self, _: (object.__new__, (cls,), self.__dict__.copy()),  # a copy is a plain parent
        "_attnctl_original": property(lambda self: self._attnctl_seat.original),  # fusing keeps ours, to put back later
    }
    return type("Controlled" + cls.__name__, (cls,), members)


_PROGRAMS: WeakKeyDictionary[nn.Module, dict[type, type]] = WeakKeyDictionary()  # kept: attaching again compiles none


class Seat:
    """One attention module, its calls given to handler(q, k, v, bias, scale, index, kernel); q is (B, H, S, D)."""

    def __init__(self, denoiser: nn.Module, attn: Any, handler: Callable[..., Tensor]) -> None:
        self.attn, self.handler, self.handle = attn, handler, opaque.register(self)
        self.original = getattr(attn.processor, "_attnctl_original", attn.processor)
        cls, programs = type(self.original), _PROGRAMS.setdefault(denoiser, {})
        programs[cls] = programs.get(cls) or _program(cls)
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
        self.handler = lambda q, k, v, bias, scale, index, kernel: kernel(q, k, v, bias, scale)

    def attend(self, query, key, value, mask, dropout, causal, scale, gqa, options, index):
        """Hand over a call as the processor made it: (B, H, S, D), or with options of dispatch (B, S, H, D)."""

        def flip(x):
            return x if options is None else x.transpose(1, 2)

        def kernel(q, k, v, bias, scale):
            if options is None or bias is not mask:  # many dispatch backends refuse a mask, torch's own never does
                return SDPA(q, k, v, bias, dropout, causal, scale=scale, enable_gqa=gqa or q.shape[1] != k.shape[1])
            from diffusers.models.attention_dispatch import dispatch_attention_fn  # slow; who reads settings needs none

            return flip(dispatch_attention_fn(flip(q), flip(k), flip(v), bias, dropout, causal, scale, gqa, **options))

        return flip(self.handler(flip(query), flip(key), flip(value), mask, scale, index, kernel))
