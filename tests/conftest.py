"""What every test starts with and leaves as it was."""

import gc
import os
from collections.abc import Iterator

# Several processes run tests side by side; threads of torch that wait for each other would slow all of them down.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end: the garbage collector need not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def backend_of_the_process() -> Iterator[None]:
    """`set_attention_backend` also sets diffusers' process-wide default, and `reset_attention_backend` leaves that.

    With "_native_math" left behind, every model of a later test would run on the plain kernel, and two of them in two
    threads would leave torch's own switches there, too.
    """
    before = Registry._active_backend
    yield
    Registry.set_active_backend(before)


@pytest.fixture(autouse=True)
def cache_of_the_session(monkeypatch, tmp_path_factory) -> None:
    """Nothing of a test goes into the user's cache, and nothing comes from there."""
    monkeypatch.setenv("ATTNCTL_CACHE", str(tmp_path_factory.getbasetemp() / "attnctl-cache"))


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    """command("generate", ...) -> (exit code, lines of stdout, lines of stderr), in an empty folder."""
    from attnctl.app import cli

    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["attnctl", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return stop.value.code, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def write(tmp_path):
    """write(name, content) makes a file in the test's folder."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
