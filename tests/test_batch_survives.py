"""A batch that is killed again and again, at any moment, gives what it gives undisturbed.

40 pictures and two kills; with ATTNCTL_WHOLE=1 in the environment 200 pictures and ten kills, a quarter of an hour.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnctl.app import recipe

ROOT = Path(__file__).parent.parent
WHOLE = os.environ.get("ATTNCTL_WHOLE") == "1"
PICTURES, KILLS = (200, 10) if WHOLE else (40, 2)
PAIRS = [
    f"a {one} and a {two}"
    for one in "cat lion bear horse frog".split()[: 5 if WHOLE else 1]
    for two in "dog mouse car bird crown".split()
]
JOBS = f"""
model: glyph-sd
steps: 2
product:
  prompt: [{", ".join(PAIRS)}]
  controls: [none, segregation]
  seed: [1, 2, 3, 4]
"""


class Batch:
    """The command in a folder, and its workers."""

    def __init__(self, folder, out, devices):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ATTNCTL_TEST": str(out)}
        words = [sys.executable, "-m", "attnctl", "batch", "jobs.yaml", "--out", str(out), "--devices", devices]
        self.mark = f"ATTNCTL_TEST={out}".encode()
        self.log = (folder / "log").open("ab")
        self.process = subprocess.Popen(words, env=environment, cwd=folder, stdout=self.log, stderr=self.log)

    def alive(self):
        """The processes of this batch: itself and its workers."""
        found = []
        for one in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (one / "environ").read_bytes():
                    found.append(int(one.name))
            except OSError:
                continue
        return found

    def kill(self, chance):
        """End one of its processes; if it was a worker, the batch a little later."""
        victim = chance.choice(sorted(self.alive()) or [self.process.pid])
        os.kill(victim, signal.SIGKILL)
        if victim != self.process.pid:
            time.sleep(chance.random() * 3)
            self.process.kill()
        self.process.wait()
        self.log.close()


def names(out):
    return [path.name for path in out.glob("*-????????????.png")]


def hashes(out):
    return {path.name: recipe.pixel_hash(recipe.read(path)[0]) for path in out.glob("*-????????????.png")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "jobs.yaml").write_text(JOBS)
    batch = Batch(folder, folder / "out", "cpu")
    assert batch.process.wait(600) == 0, (folder / "log").read_text()
    return hashes(folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_killed_many_times(undisturbed, tmp_path, devices):
    assert len(undisturbed) == PICTURES
    (tmp_path / "jobs.yaml").write_text(JOBS)
    out, chance, kept = tmp_path / "out", random.Random(22), {}
    for _ in range(KILLS):
        wanted = len(names(out)) + chance.randrange(8)
        batch = Batch(tmp_path, out, devices)
        until = time.monotonic() + 120
        while len(names(out)) < wanted and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(chance.random())
        assert batch.process.poll() is None, (tmp_path / "log").read_text()
        batch.kill(chance)
        now = hashes(out)  # reads each: a broken one would raise
        assert kept.items() <= now.items()
        kept = now
    assert 0 < len(kept) < PICTURES
    batch = Batch(tmp_path, out, devices)
    assert batch.process.wait(600) == 0, (tmp_path / "log").read_text()
    assert hashes(out) == undisturbed
    assert not list(out.glob(".*.part")) and len((out / "manifest.jsonl").read_text().splitlines()) == PICTURES
