"""What the command lines of attnctl have in common: how they refuse, in one line, and what they check first."""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NoReturn

import typer

from attnctl.errors import AttnctlError, AttnctlWarning

MODEL_HELP = "An embedded model, a folder written by save_pretrained or by attnctl personalize, or a hub id."
DEVICE_HELP = "cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu."


class UsageError(AttnctlError):
    """An option that makes no sense, alone or with the others."""


def run(app: typer.Typer, name: str, words: list[str] | None = None) -> NoReturn:
    """Run a command line: one clear line on stderr and exit code 2 for everything that is the caller's to mend.

    Args:
        app: what is run.
        name: how it is called, for messages.
        words: of the command line; None for those of the process.
    """
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **how: Any) -> None:
        if issubclass(category, AttnctlWarning):
            _complain(name, str(message))
        else:
            shown(message, category, *where, **how)

    warnings.simplefilter("always", AttnctlWarning)
    warnings.showwarning = show
    try:
        code = app(words, standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            interrupted(name)
    except (AttnctlError, OSError) as error:
        code = _complain(name, str(error))
    except (typer.Abort, KeyboardInterrupt):
        code = interrupted(name)
    except Exception as error:
        if was_interrupted(error):
            sys.exit(interrupted(name))
        if not hasattr(error, "format_message"):
            raise  # a bug: its traceback is wanted
        said = error.format_message()  # nothing where the help has been shown instead
        code = _complain(name, f"{said} ({_command(name, error)} --help shows how)") if said else 2
    sys.exit(code or 0)


def _command(name: str, error: Exception) -> str:
    """The command that a usage error is about: `attnctl generate`, or `attnctl` itself."""
    context = getattr(error, "ctx", None)
    return " ".join([name, *([context.info_name] if context is not None and context.parent else [])])


def _complain(name: str, text: str) -> int:
    tell(text, name)
    return 2


def interrupted(name: str) -> int:
    """Say that the user stopped it; the exit code of that."""
    tell("interrupted", name)
    return 130


def was_interrupted(error: BaseException | None) -> bool:
    """Ctrl-C is behind it: some libraries, while they are imported, make another error of that."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or was_interrupted(error.__context__))


def tell(text: str, name: str = "attnctl") -> None:
    """One line on stderr."""
    print(f"{name}: {plain(text)}", file=sys.stderr)


def plain(text: object) -> str:
    """Text as one line that a terminal only shows: what would command it, as escape codes do, is written out."""
    line = " ".join(str(text).split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def check_writable(folder: Path, option: str = "--out") -> None:
    """Refuse a folder that cannot be written or made, before any work and without leaving anything behind."""
    above = (folder, *folder.absolute().parents)
    if broken := next((path for path in above if path.is_symlink() and not path.exists()), None):
        raise UsageError(f"{option} {folder}: {broken} is a link to nowhere")
    nearest = next(path for path in above if path.exists())
    if not nearest.is_dir():
        raise UsageError(f"{option} {folder}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {folder}: {nearest} cannot be written")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:  # a file system that takes no files, such as /proc
        raise UsageError(f"{option} {folder}: {nearest} cannot be written: {error.strerror}") from None
