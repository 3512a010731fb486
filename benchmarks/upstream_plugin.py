"""A pytest plugin for diffusers' own tests: every pipeline call is made with controls attached.

Used by upstream_suites.py through three environment variables: ATTNCTL_WAY says what is attached, ATTNCTL_LOG is a file
of JSON lines for the outcomes, and ATTNCTL_STAND_INS has tokenizers and configurations that the tests fetch from a hub
be made here.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from attnctl import attach
from attnctl.engine.control import AttentionCall, Control, Proceed
from attnctl.engine.sites import Site, select
from attnctl.glyph.tokenizer import build_tokenizer
from attnctl.processors import TokenMaps


@dataclass(frozen=True)
class Identity(Control):
    """Sits at every site and does nothing."""

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return select(available, None)

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        return proceed(call)


WAYS: dict[str, Callable[[], Control] | None] = {"plain": None, "identity": Identity, "maps": TokenMaps}
CLIP, T5 = "hf-internal-testing/tiny-random-clip", "hf-internal-testing/tiny-random-t5"


def t5_tokenizer() -> T5Tokenizer:
    """Letters alone."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=512)


def t5_config() -> T5Config:
    """The width that the tests' models have."""
    return T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4)


MADE: dict[tuple[Any, str], Callable[[], Any]] = {
    (CLIPTokenizer, CLIP): build_tokenizer,
    (AutoTokenizer, T5): t5_tokenizer,
    (AutoConfig, T5): t5_config,
    (T5EncoderModel, T5): lambda: T5EncoderModel(t5_config()).eval(),
}


def stand_in(kind: Any) -> None:
    """Have `kind.from_pretrained` make what the tests fetch from a hub; everything else it still loads."""
    original = kind.from_pretrained

    def made(name: Any, *args: Any, **kwargs: Any) -> Any:
        make = MADE.get((kind, str(name)))
        return original(name, *args, **kwargs) if make is None else make()

    kind.from_pretrained = made


def attached(original: Callable[..., Any], make: Callable[[], Control]) -> Callable[..., Any]:
    """A pipeline's `__call__` under a control."""

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with attach(self, make()):
            return original(self, *args, **kwargs)

    call.controlled = True  # type: ignore[attr-defined]
    return call


def pipelines(kind: type = DiffusionPipeline) -> Iterator[type]:
    """All kinds of pipelines that have been imported."""
    subclasses: list[type] = kind.__subclasses__()
    for one in subclasses:
        yield one
        yield from pipelines(one)


def pytest_configure(config: pytest.Config) -> None:
    # Tests of UNets set eager attention, which attnctl refuses by name; fused attention is as good to them.
    UNet2DConditionModel.set_default_attn_processor = lambda unet: unet.set_attn_processor(AttnProcessor2_0())
    if os.environ["ATTNCTL_STAND_INS"] == "1":
        for kind in {kind for kind, _ in MADE}:
            stand_in(kind)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (make := WAYS[os.environ["ATTNCTL_WAY"]]) is None:
        return
    for kind in pipelines():
        original = vars(kind).get("__call__")
        if original is not None and not hasattr(original, "controlled"):
            setattr(kind, "__call__", attached(original, make))  # noqa: B010


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    said = re.sub(r"0x[0-9a-f]+", "0x", crash.message) if crash is not None else ""  # addresses differ each time
    line = " ".join(said.split())[:400]
    row = {"test": report.nodeid, "outcome": report.outcome, "line": line}
    with Path(os.environ["ATTNCTL_LOG"]).open("a") as file:
        file.write(json.dumps(row) + "\n")
