"""Several processes draw into one folder: those of --devices, and those of a launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
import tiny as pipelines

from attnctl.app import recipe
from attnctl.app.batch import folder, jobs, planning, process_worker, processes, running
from attnctl.app.batch.results import How
from attnctl.app.batch.shares import Share
from attnctl.app.command import UsageError

ROOT = Path(__file__).parent.parent
PROMPT = "a cat and a dog"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipelines.sd1().save_pretrained(folder)
    return str(folder)


def pictures(out):
    return {path.name: recipe.read(path)[1].pixels for path in out.glob("*-????????????.png")}


def rows_of(model, count, **fields):
    axes = {"seed": list(range(count)), "controls": ["none", "segregation(cat, dog)"]}
    return [{"prompt": PROMPT, "steps": 2, "model": model, "product": axes} | fields]


def test_a_group_is_sent_and_read_as_it_is(tmp_path):
    row = {"prompt": "a café", "controls": ["pag(heads=7)"], "maps": ["café"], "size": "64x64", "seed": 2**62}
    (group,) = planning.plan(jobs.check_jobs([("row 1", row)]), tmp_path).groups
    assert processes.read(json.loads(json.dumps(processes.written(group)))) == group


def test_a_worker_tells_of_what_it_is_sent(tiny, tmp_path):
    row = {"prompt": PROMPT, "steps": 1, "model": tiny, "product": {"seed": [1, 2, 3]}}
    plan = planning.plan(jobs.check_jobs([("row 1", row)]), tmp_path, group=2)
    lines = StringIO("".join(json.dumps(processes.written(group)) + "\n" for group in plan.groups))
    told = []
    process_worker.work(asdict(How("cpu")), lines, told.append)
    assert [one for one in told if "ready" in one] == [{"ready": True}] * 3
    assert [one for one in told if "key" in one] == [{"key": task.key, "error": None} for task in plan.missing]
    assert len(pictures(tmp_path)) == 3
    told.clear()
    process_worker.work(asdict(How("cuda:97")), lines, told.append)
    assert len(told) == 1 and "device 'cuda:97' cannot be used here" in told[0]["halt"]


@pytest.mark.slow
def test_two_processes_draw_what_one_draws_and_tell_of_a_failure(tiny, tmp_path):
    one = list(running.run(rows_of(tiny, 5), tmp_path / "one", group=2))
    rows = [*rows_of(tiny, 5), {"prompt": PROMPT, "steps": 1, "model": tiny, "controls": "excitation(lion)"}]
    *two, wrong = sorted(
        running.run(rows, tmp_path / "two", group=2, device="cpu, cpu", scores=["judge"]), key=lambda told: told.place
    )
    assert len(two) == 10 and all(result.drawn for result in two)
    assert {result.key for result in two} == {result.key for result in one}
    assert "'lion' is not in the prompt" in wrong.error and list(folder.failures(tmp_path / "two")) == [wrong.key]
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two")
    assert len((tmp_path / "two" / "scores.jsonl").read_text().splitlines()) == 10
    again = list(running.run(rows_of(tiny, 5), tmp_path / "two", group=2, device="cpu,cpu"))
    assert not any(result.drawn for result in again)


@pytest.mark.slow
def test_a_device_that_is_none_is_one_line(tiny, tmp_path):
    with pytest.raises(UsageError, match="device 'cuda:9[78]' cannot be used here"):
        list(running.run(rows_of(tiny, 1), tmp_path, device="cuda:97,cuda:98"))


KILLER = """
import os, sys
from attnctl.app import drawing
from attnctl.app.batch import process_worker

own = drawing.draw_together

def draw_together(pipe, recipes, *rest, **settings):
    once = {once!r}
    if any(one.seed == 2 for one in recipes) and not (once and os.path.exists(once)):
        if once:
            open(once, "w").close()
        os.kill(os.getpid(), 9)
    return own(pipe, recipes, *rest, **settings)

drawing.draw_together = draw_together
process_worker.main()
"""


@pytest.fixture
def killer(tmp_path, monkeypatch):
    """Workers that kill themselves over seed 2: once, if it is given a file, or each time."""

    def killer(once=""):
        file = tmp_path / "killer.py"
        file.write_text(KILLER.format(once=str(once)))
        own = subprocess.Popen

        def popen(words, **settings):
            return own([words[0], str(file), *words[3:]], **settings)

        monkeypatch.setattr(processes.subprocess, "Popen", popen)

    return killer


@pytest.mark.slow
def test_what_a_process_that_died_had_is_drawn_by_another(tiny, tmp_path, killer):
    killer(tmp_path / "once")
    results = list(running.run(rows_of(tiny, 4), tmp_path / "out", group=2, device="cpu,cpu"))
    assert (tmp_path / "once").exists() and len(results) == 8 and all(result.drawn for result in results)
    assert pictures(tmp_path / "out").keys() == {result.path.name for result in results}


@pytest.mark.slow
def test_what_kills_two_processes_has_failed_and_the_rest_is_drawn(tiny, tmp_path, killer):
    killer()
    rows = [{"prompt": PROMPT, "steps": 1, "model": tiny, "seed": seed} for seed in range(4)]
    results = sorted(running.run(rows, tmp_path / "out", group=1, device="cpu,cpu"), key=lambda one: one.job.seed)
    assert [result.error for result in results] == [None, None, "its process on cpu died, twice: signal 9", None]
    assert list(folder.failures(tmp_path / "out")) == [results[2].key]


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tiny, tmp_path):
    (tmp_path / "jobs.json").write_text(json.dumps(rows_of(tiny, 400)))
    script = f"""
import json, attnctl.batch
for result in attnctl.batch.run(json.load(open({str(tmp_path / "jobs.json")!r})), {str(tmp_path / "out")!r},
                                device="cpu,cpu", group=2):
    print(result.key, flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ATTNCTL_TEST": str(tmp_path)}
    words = [sys.executable, "-c", script]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()  # they are at work

    def workers():
        found = []
        for one in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"ATTNCTL_TEST={tmp_path}".encode() in one.read_bytes():
                    found.append(one)
            except OSError:
                continue
        return found

    assert len(workers()) == 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 60
    while workers() and time.monotonic() < until:
        time.sleep(0.1)
    assert not workers() and pictures(tmp_path / "out")


# --- launchers --------------------------------------------------------------------------------------------------------


def test_shares_are_disjoint_and_all_of_it(tmp_path):
    row = {"prompt": PROMPT, "product": {"seed": list(range(11))}}
    plan = planning.plan(jobs.check_jobs([("row 1", row)]), tmp_path)
    parts = [Share(rank, 2).part_of(plan) for rank in range(2)]
    keys = [[task.key for task in part.missing] for part in parts]
    assert sorted(keys[0] + keys[1]) == sorted(task.key for task in plan.missing) and len(keys[0]) == 7
    assert Share().part_of(plan) is plan


def test_a_launcher_tells_by_the_environment():
    assert Share.of({}) == Share() and Share.of({"RANK": "0"}) == Share()
    assert Share.of({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Share(3, 8, 1)
    for wrong in ({"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with pytest.raises(UsageError, match="no launcher would"):
            Share.of(wrong)


def test_processes_of_a_launcher_share_the_folder_with_nobody_else(tmp_path):
    with folder.held(tmp_path, shared=True) as first, folder.held(tmp_path, shared=True) as second:
        assert first.first and not second.first
        with pytest.raises(UsageError, match="another batch"), folder.held(tmp_path):
            pass
        assert not first.last() and second.last()
    with folder.held(tmp_path), pytest.raises(UsageError), folder.held(tmp_path, shared=True, patience=0.1):
        pass


@pytest.mark.slow
def test_torchrun(tiny, tmp_path):
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(tiny, 5)))
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "attnctl.batch",
    ]
    words += ["jobs.jsonl", "--out", "two", "--group", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    list(running.run(rows_of(tiny, 5), tmp_path / "one", group=2))
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two") and len(pictures(tmp_path / "one")) == 10
    assert len((tmp_path / "two" / "manifest.jsonl").read_text().splitlines()) == 10
