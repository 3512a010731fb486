"""Say what a diffusion model's attention should do, on the diffusers pipeline you already have.

    import attnctl

    pipe = attnctl.load("glyph-sd")
    with attnctl.attach(pipe, attnctl.processors.Segregation("cat", "dog")) as run:
        picture = pipe("a cat and a dog").images[0]

`load`, `attach` and `sites` are functions, `processors` and `pipelines` hold the methods, and every error that is the
caller's to mend is an `AttnctlError`. Everything is imported at first use, so that `import attnctl` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnctl.engine.attachment import attach
    from attnctl.engine.control import Control, Lane
    from attnctl.engine.families.registry import discover as sites
    from attnctl.engine.families.registry import register
    from attnctl.engine.sites import select
    from attnctl.loading import load
    from attnctl.words.phrases import tokens

    from . import batch, pipelines, processors
    from .errors import AttnctlError

__version__ = "0.1.0"

__all__ = [
    "AttnctlError",
    "Control",
    "Lane",
    "__version__",
    "attach",
    "batch",
    "load",
    "pipelines",
    "processors",
    "register",
    "select",
    "sites",
    "tokens",
]

# public name -> (module, attribute; None = the module itself)
_HOMES: dict[str, tuple[str, str | None]] = {
    "AttnctlError": (".errors", "AttnctlError"),
    "Control": (".engine.control", "Control"),
    "Lane": (".engine.control", "Lane"),
    "attach": (".engine.attachment", "attach"),
    "batch": (".batch", None),
    "load": (".loading", "load"),
    "pipelines": (".pipelines", None),
    "processors": (".processors", None),
    "register": (".engine.families.registry", "register"),
    "select": (".engine.sites", "select"),
    "sites": (".engine.families.registry", "discover"),
    "tokens": (".words.phrases", "tokens"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    found = import_module(module, __name__)
    value = found if attribute is None else getattr(found, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
