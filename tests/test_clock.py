"""The clock of the benchmarks: it waits for a device, and asks it for its memory."""

import inspect
import os
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
    clock.watched(lambda: None, around(device))
    assert device == ["in", "out"] and clock.placed("pipe", "cpu") == "pipe"


def test_memory_of_a_cpu_is_what_the_run_adds_to_the_resident_set(device, monkeypatch):
    pages = 2**20 // os.sysconf("SC_PAGE_SIZE")
    now = [100 * pages]
    monkeypatch.setattr(clock, "_pages", lambda: now[0])
    sample = clock.watched(lambda: now.__setitem__(0, 160 * pages), around(device))
    assert sample.mebibytes == 60.0


def test_the_resident_set_is_read_in_pages(device):
    assert 10 * 2**20 < clock._pages() * os.sysconf("SC_PAGE_SIZE") < 2**40


@pytest.mark.parametrize(
    "name", ["speed", "effect", "perturb_effect", "heads_effect", "placing", "compose_effect", "regions_speed"]
)
def test_benchmarks_take_a_device(name):
    module = __import__(name)
    main = module.main if hasattr(module, "main") else module.measure
    assert inspect.signature(main).parameters["device"].default == "cpu"
