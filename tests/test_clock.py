"""The clock of the benchmarks: it waits for a device, and asks it for its memory."""

import inspect
from contextlib import contextmanager

import clock
import pytest
import torch


@pytest.fixture
def device(monkeypatch):
    """A stand-in for an accelerator: what it was told, in order."""
    told = []
    memory = iter([100 * 2**20])
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: told.append(f"wait for {device}"))
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda device: told.append("reset"))
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: next(memory))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 160 * 2**20)
    return told


@contextmanager
def around(told):
    told.append("in")
    yield
    told.append("out")


def test_a_device_is_waited_for(device):
    sample = clock.watched(lambda: device.append("run"), around(device), "cuda:0")
    assert device == ["reset", "wait for cuda:0", "in", "run", "out", "wait for cuda:0"]
    assert sample.mebibytes == 60.0 and 0 <= sample.seconds < 60


def test_a_cpu_is_not(device):
    held = []
    sample = clock.watched(lambda: held.append(torch.ones(2**23)), around(device))
    assert device == ["in", "out"] and 25 < sample.mebibytes < 80  # 32 MiB of ones
    assert clock.placed("pipe", "cpu") == "pipe"


@pytest.mark.parametrize(
    "name", ["speed", "effect", "perturb_effect", "heads_effect", "placing", "compose_effect", "regions_speed"]
)
def test_benchmarks_take_a_device(name):
    module = __import__(name)
    main = module.main if hasattr(module, "main") else module.measure
    assert inspect.signature(main).parameters["device"].default == "cpu"
