"""Say what a diffusion model's attention should do, on the diffusers pipeline you already have.

    import attnctl

    pipe = attnctl.load("glyph-sd")
    with attnctl.attach(pipe, attnctl.processors.Segregation("cat", "dog")) as run:
        picture = pipe("a cat and a dog").images[0]

`load`, `attach` and `sites` are functions, `processors` and `pipelines` hold the methods, and every error that is the
caller's to mend is an `AttnctlError`. Everything is imported at first use, so that `import attnctl` costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import pipelines, processors
    from .attachment import attach
    from .errors import AttnctlError
    from .loading import load
    from .sites import discover as sites

__version__ = "0.1.0"

__all__ = ["AttnctlError", "__version__", "attach", "load", "pipelines", "processors", "sites"]

# public name -> (module, attribute; None = the module itself)
_HOMES: dict[str, tuple[str, str | None]] = {
    "AttnctlError": (".errors", "AttnctlError"),
    "attach": (".attachment", "attach"),
    "load": (".loading", "load"),
    "pipelines": (".pipelines", None),
    "processors": (".processors", None),
    "sites": (".sites", "discover"),
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


class _Surface(ModuleType):
    """Keeps `attnctl.sites` the function: importing the submodule of that name would otherwise put the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "sites" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Surface
