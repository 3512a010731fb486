"""HeadHunter: the search on numbers whose best heads are known, the log, the file, and one whole search by drawing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from attnctl import attach
from attnctl.errors import ControlError
from attnctl.glyph.objective import FLOOR, Shown, things, usual_prompts
from attnctl.pipelines import HeadHunter
from attnctl.pipelines.head_bench import Item, LoggedBench, opened
from attnctl.pipelines.head_grid import HARMS, HELPS, INK, NOTHING, UNSURE, colour_of, head_grid
from attnctl.pipelines.head_hunter import Found
from attnctl.pipelines.head_race import UNSEEN, Case, Rank, _most_arms, cases, greedy, race, rank, together
from attnctl.processors import Perturb

SITES = {str(block): [f"{block}:{head}" for head in range(4)] for block in range(6)}
HEADS = [head for own in SITES.values() for head in own]
PROMPTS = ["one", "two", "three"]
BEST = {"2:1": 0.9, "2:3": 0.5, "4:0": 0.4}  # all others do nothing, or harm


def noise(*key) -> float:
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    return float(np.random.default_rng(seed).standard_normal())


class Known:
    """Scores with known gains: noise of the case that all sets share, and a little of the set's own."""

    def __init__(self, stop_after: int | None = None, inert: str = "015", best=BEST) -> None:
        self.inert, self.best = inert, best
        self.asked: list[list[Item]] = []
        self.stop_after = stop_after

    def price(self, heads, steps):
        return steps * (2 if heads else 1) if steps else 3

    def __call__(self, items):
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(list(items))
        return [self.one(item) for item in items]

    def one(self, item):
        own = [head for word in item.heads.split() for head in SITES.get(word, [word])]
        if not item.steps:
            return 0.001 if own[0][0] in self.inert else 0.1 + 0.01 * noise(item)
        gain = sum(self.best.get(head, -0.1) for head in own)
        return 3 * noise(item.prompt, item.seed) + gain + 0.3 * noise(item)


def hunt(measure, path=None, budget=6000, method="race", told=None):
    with opened(path, {"a": 1}) as log:
        bench = LoggedBench(measure, PROMPTS, log, budget, 16, told)
        if method == "race":
            heads, ranks = race(bench, SITES, budget, 5, 2, 2.0)
        else:
            heads, ranks = greedy(bench, HEADS, budget, 5, 2, 1)
    return heads, ranks, bench.spent


# --- the search -------------------------------------------------------------------------------------------------------


def test_the_best_heads_are_found_within_the_budget():
    measure = Known()
    heads, ranks, spent = hunt(measure)
    assert set(heads.split()) >= {"2:1", "2:3"}
    assert set(heads.split()) <= set(BEST)
    paid = [item for batch in measure.asked for item in batch]
    assert spent == sum(measure.price(item.heads, item.steps) for item in paid) <= 6000
    assert len(paid) == len(set(paid))
    assert ranks[0].heads == heads and ranks[0].stage == "confirm"
    assert ranks[0].gain == pytest.approx(sum(BEST[head] for head in heads.split()), abs=4 * ranks[0].error)


def test_inert_heads_are_not_drawn_and_the_confirmation_is_on_unseen_seeds():
    measure = Known()
    _, ranks, _ = hunt(measure)
    drawn = [item for batch in measure.asked for item in batch if item.steps]
    assert not any(item.heads[:1] in tuple("015") for item in drawn)
    assert {one.stage for one in ranks if one.heads[0] in "015" and ":" in one.heads} == {"prune"}
    unseen = {item.heads for item in drawn if item.seed >= UNSEEN}
    assert unseen == {"", *(one.heads for one in ranks if one.stage == "confirm")}


def test_a_head_that_nobody_would_see_is_left_out_though_it_is_of_the_larger_half():
    measure = Known(inert="01357")
    hunt(measure)
    assert {item.heads[:1] for batch in measure.asked for item in batch if item.steps} == {"", "2", "4"}


def test_every_round_draws_new_pictures():
    measure = Known(best={})  # all heads are alike, so they stay in the race until they are halved
    _, ranks, _ = hunt(measure, budget=12000)
    drawn = [item for batch in measure.asked for item in batch if item.steps == 5 and item.seed < UNSEEN]
    own = {one.heads: {item for item in drawn if item.heads == one.heads} for one in ranks}
    raced = [one for one in ranks if one.stage == "race"]
    assert all(len(own[one.heads]) == one.pictures for one in raced)
    assert len({one.pictures for one in raced}) > 1
    final = next(one for one in ranks if one.stage == "final" and " " not in one.heads)
    assert len(own[final.heads]) >= final.pictures + max(one.pictures for one in raced)


def test_sets_are_measured_on_the_same_pictures():
    measure = Known()
    _, ranks, _ = hunt(measure)
    of = {}
    for item in (item for batch in measure.asked for item in batch):
        of.setdefault(item.heads, set()).add(item[1:])
    assert all(own - {case for case in own if not case[2]} <= of[""] for own in of.values())


def test_a_larger_budget_has_smaller_errors():
    (_, few, _), (_, many, _) = hunt(Known(), budget=5000), hunt(Known(), budget=20000)
    assert many[0].error < few[0].error
    assert many[0].pictures > 3 * few[0].pictures


def test_standard_errors_are_those_of_paired_gains():
    measure = Known()
    _, ranks, _ = hunt(measure)
    scores = {item: measure.one(item) for batch in measure.asked for item in batch}
    best = ranks[0]
    own = [item for item in scores if item.heads == best.heads and item.seed >= UNSEEN]
    gains = np.array([scores[item] - scores[item._replace(heads="")] for item in own])
    assert best.pictures == len(gains)
    assert best.gain == pytest.approx(gains.mean())
    assert best.error == pytest.approx(gains.std(ddof=1) / len(gains) ** 0.5)
    assert best.error < 1 / len(gains) ** 0.5  # what all share, 3, is gone


def test_the_error_says_how_far_off_means_are():
    values = np.random.default_rng(0).standard_normal((400, 25))
    off = [abs(one.gain) > 2 * one.error for one in (rank("0", "race", row) for row in values)]
    assert 0.02 < np.mean(off) < 0.1
    assert rank("0", "race", values[0, :1]).to_dict()["error"] is None


def test_greedy_adds_the_best_of_each_round():
    measure = Known()
    heads, ranks, spent = hunt(measure, method="greedy")
    assert heads == "2:1 2:3"
    assert spent <= 6000 and ranks[0].stage == "confirm"
    second = [one for one in ranks if one.stage == "greedy 2" or one is ranks[0]]
    assert len(second) == len(HEADS) - 1
    assert all(one.heads.startswith("2:1 ") for one in second)


@pytest.mark.parametrize("method", ["race", "greedy"])
def test_a_budget_that_is_too_small_says_what_is_needed(method):
    with pytest.raises(ControlError, match="a budget of 50 forward passes is too small; here the least is") as error:
        hunt(Known(), budget=50, method=method)
    least = int(str(error.value).split()[-1])
    assert hunt(Known(), budget=least, method=method)[2] <= least
    with pytest.raises(ControlError, match="too small"):
        hunt(Known(), budget=least - 1, method=method)


def test_no_search_has_more_sets_in_its_race_than_the_least_budget_is_for():
    assert _most_arms([4]) == 3  # its half, and itself
    assert _most_arms([4] * 10) == 15  # five to ten sites stay; three are good, with all of their heads
    assert _most_arms([1]) == 2


def test_the_best_set_is_tried_with_those_of_other_sites():
    site_of = {"2": "2", "2:1": "2", "4:0": "4", "4:1": "4", "5": "5"}
    assert together("2", ["2", "4:0", "2:1", "4:1", "5"], site_of) == ["2 4:0", "2 4:0 5", "2:1 4:0"]
    assert together("2:1", ["2:1", "2"], site_of) == []
    assert together("2:1", ["2:1", "4:0"], site_of) == ["2:1 4:0"]


def test_cases_differ():
    assert cases(2, 3) == [Case(0, 0), Case(1, 1), Case(0, 2)]
    assert not set(cases(2, 5)) & set(cases(2, 5, first=5))


# --- the log ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", ["", '{"items": [["2:1", 0', "garbage\n"])
def test_a_search_that_was_stopped_goes_on_to_the_same_result(tmp_path, torn):
    whole, path = Known(), tmp_path / "scores.jsonl"
    wanted = hunt(whole)
    first = Known(stop_after=20)
    with pytest.raises(KeyboardInterrupt):
        hunt(first, path)
    path.write_text(path.read_text() + torn)
    second = Known()
    assert hunt(second, path) == wanted
    assert first.asked + second.asked == whole.asked
    third = Known()
    assert hunt(third, path) == wanted
    assert third.asked == []


def test_a_log_of_another_search_is_refused_and_so_is_a_second_process(tmp_path):
    path = tmp_path / "scores.jsonl"
    with opened(path, {"a": 1, "u": 1.0}) as log:
        with pytest.raises(ControlError, match="another process is searching"), opened(path, {"a": 1, "u": 1.0}):
            pass
        log.add([Item("0:1", 0, 0, 2)], [1.0])
    with pytest.raises(ControlError, match="a search with another u; move it away"), opened(path, {"a": 1, "u": 0.5}):
        pass


def test_a_search_that_cannot_begin_leaves_no_log(tmp_path):
    with pytest.raises(ControlError, match="too small"):
        hunt(Known(), tmp_path / "scores.jsonl", budget=10)
    assert list(tmp_path.iterdir()) == []


def test_a_log_cut_short_in_its_first_line_is_begun_anew(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"setting": {"a"')
    wanted = hunt(Known(), path)
    again = Known()
    assert hunt(again, path) == wanted and again.asked == []
    with pytest.raises(ControlError, match="another a"), opened(path, {"a": 2}):
        pass


def test_progress_tells_the_time_left():
    told = []
    _, _, spent = hunt(Known(), told=told.append)
    assert [one.stage for one in told] == sorted(
        [one.stage for one in told], key="prune screen race final confirm".split().index
    )
    assert told[-1].spent == spent and told[-1].budget == 6000
    assert all(one.seconds >= 0 for one in told)


# --- by drawing -------------------------------------------------------------------------------------------------------


def bright(pictures, prompts):
    return [float(np.asarray(picture).mean()) for picture in pictures]


def hunter(pipe, objective=bright, **settings):
    return HeadHunter(pipe, objective, ["cat", "dog"], heads="0 2", steps=2, batch=32, **settings)


def test_a_search_by_drawing_writes_a_file_that_perturb_reads(tmp_path):
    pipe = tiny.sd1()
    found = hunter(pipe).hunt(800, log=tmp_path / "scores.jsonl")
    assert found.spent <= 800
    path = found.save(tmp_path / "heads.json")
    written = json.loads(path.read_text())
    assert written["heads"] == found.heads and written["ranks"][0]["heads"] == found.heads
    assert {"model", "weights", "scope", "u", "scale", "settings", "shape"} <= set(written)

    def draw(heads):
        with attach(pipe, Perturb(heads, u=found.u, scale=found.scale)):
            return pipe("cat", num_inference_steps=2, output_type="pt", guidance_scale=1.0,
                        generator=torch.Generator().manual_seed(0)).images  # fmt: skip

    assert torch.equal(draw(str(path)), draw(found.heads))
    calls = []
    again = hunter(pipe, lambda *what: calls.append(what), objective_name="bright").hunt(
        800, log=tmp_path / "scores.jsonl"
    )
    assert again.to_dict() == found.to_dict() and calls == []


def test_a_score_is_that_of_the_picture_drawn_alone():
    pipe = tiny.sd1()
    drawer = hunter(pipe).drawer
    items = [Item("0:1", 0, 5, 2), Item("2", 1, 6, 2)]
    for item, score in zip(items, drawer(items), strict=True):
        with attach(pipe, Perturb(item.heads)) as run:
            images = pipe(["cat", "dog"][item.prompt], num_inference_steps=2, guidance_scale=1.0,
                          generator=torch.Generator().manual_seed(item.seed)).images  # fmt: skip
        assert score == pytest.approx(bright(images, [])[0], abs=0.05)
        assert sum(run.report.passes.values()) <= drawer.price(item.heads, 2)
    (size,) = drawer([items[0]._replace(steps=0)])
    assert 0 < size < 1


def test_a_dead_head_has_no_effect_and_stops_nothing():
    pipe = tiny.sd1()
    drawer = hunter(pipe).drawer
    attn = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    width = attn.to_v.out_features // attn.heads
    with torch.no_grad():
        attn.to_out[0].weight[:, :width] = 0
    dead, live = drawer([Item("0:0", 0, 0, 0), Item("0:1", 0, 0, 0)])
    assert dead == 0 < live
    plain, same, other = *drawer([Item("", 0, 0, 2)]), *drawer([Item("0:0", 0, 0, 2), Item("0:1", 0, 0, 2)])
    assert same == plain != other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "judge"}, "objective is a callable"),
        ({"scale": 0.0}, "scale = 0"),
        ({"kind": "skip"}, "whole blocks"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ControlError, match=message):
        hunter(tiny.sd1(), **settings)


def test_an_objective_without_numbers_is_refused_and_files_end_in_json(tmp_path):
    pipe = tiny.sd1()
    pipe.set_progress_bar_config(disable=False, desc="mine")
    with pytest.raises(ControlError, match="should be a number for each"):
        hunter(pipe, lambda pictures, prompts: [1.0]).hunt(800)
    with pytest.raises(ControlError, match="method is one of"):
        hunter(pipe).hunt(800, method="best")
    assert pipe._progress_bar_config == {"disable": False, "desc": "mine"}
    with pytest.raises(ControlError, match="end in .json"):
        Found("0:1", (), 0, "", {}).save(tmp_path / "heads.txt")


# --- the objective and the command line -------------------------------------------------------------------------------


def test_the_judge_scores_what_the_prompt_asks_for():
    from attnctl.glyph.judge import load

    eye = load()
    from PIL import Image

    blank = Image.new("RGB", (128, 128), "white")
    scores = Shown(eye)([blank, blank], ["a cat", "a cat and a red car"])
    assert all(FLOOR <= score < -1 for score in scores)
    assert len(things("a cat and a red car")) == 2
    assert all(things(prompt) for prompt in usual_prompts())
    with pytest.raises(ControlError, match="knows nothing of 'a house'"):
        things("a house")


def test_the_command_refuses_in_one_line(command):
    code, _, err = command("search", "heads", "--budget", "100", "--out", "heads.txt")
    assert code == 2 and "ends in .json" in err[0]
    code, _, err = command("search", "heads", "--budget", "100", "--out", "heads.json", "--model", "other")
    assert code == 2 and "needs --objective and --prompts" in err[0]
    code, _, err = command("search", "heads", "--budget", "100", "--out", "heads.json", "--objective", "json:nothing")
    assert code == 2 and "has no function 'nothing'" in err[0]
    assert not list(Path.cwd().iterdir())


def test_the_command_searches_by_a_function_of_ones_own_and_goes_on(command, tmp_path):
    tiny.sd1().save_pretrained(tmp_path / "model")
    Path("own.py").write_text(
        "def red(pictures, prompts):\n    return [float(p.getpixel((0, 0))[0]) for p in pictures]\n"
    )
    Path("prompts.txt").write_text("cat\n\ndog\n")
    words = ("search", "heads", "--model", "model", "--objective", "own:red", "--prompts", "prompts.txt")
    words += ("--heads", "0:0 0:1", "--steps", "1", "--batch", "64", "--out", "heads.json")
    code, _, err = command(*words, "--budget", "20")
    assert code == 2 and "too small" in err[-1]
    least = err[-1].split()[-1]
    code, out, _ = command(*words, "--budget", least)
    assert code == 0
    written = json.loads(Path("heads.json").read_text())
    assert out[0].startswith(written["heads"]) and "confirm" in out[0] and "+-" in out[0]
    assert written["settings"]["objective"] == "own:red" and written["settings"]["prompts"] == ["cat", "dog"]
    log = Path("heads.scores.jsonl").read_text()
    assert command(*words, "--budget", least)[:2] == (0, out)
    assert Path("heads.scores.jsonl").read_text() == log
    code, _, err = command(*words, "--budget", least, "-u", "0.5")
    assert code == 2 and "a search with another u; move it away" in err[-1]


# --- processes, cost, picture -----------------------------------------------------------------------------------------


@pytest.mark.slow  # three processes that import torch
def test_two_processes_find_what_one_finds(tmp_path):
    def hunt(log, devices=()):
        made = HeadHunter(tiny.sd1(), bright, ["cat", "dog"], heads="0", steps=1, batch=8)
        return made.hunt(250, log=tmp_path / log, devices=devices)

    one, two = hunt("one.jsonl"), hunt("two.jsonl", ["cpu", "cpu"])
    assert two.to_dict() == one.to_dict()
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


@pytest.mark.slow  # four processes that import torch
def test_a_search_that_is_killed_goes_on_to_the_same_result(command, tmp_path):
    tiny.sd1().save_pretrained(tmp_path / "model")
    (tmp_path / "own.py").write_text(
        "import time\n\ndef red(pictures, prompts):\n    time.sleep(0.2)\n"
        "    return [float(p.getpixel((0, 0))[0]) for p in pictures]\n"
    )
    (tmp_path / "prompts.txt").write_text("cat\ndog\n")

    words = ("search", "heads", "--model", "model", "--objective", "own:red", "--prompts", "prompts.txt")
    words += ("--heads", "0 2", "--steps", "1", "--batch", "8", "--budget", "600", "--out")

    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    assert command(*words, "whole.json")[0] == 0
    log, lines = tmp_path / "cut.scores.jsonl", []
    for number, more in enumerate([(), ("--device", "cpu,cpu")]):  # the second time with its processes
        run = [sys.executable, "-m", "attnctl", *words, "cut.json", *more]
        process = subprocess.Popen(run, cwd=tmp_path, env=environment)
        while process.poll() is None and len(lines) < 4 * number + 4:
            time.sleep(0.05)
            lines = log.read_text().splitlines() if log.exists() else []
        assert process.poll() is None
        process.kill()
        process.wait()
        assert not (tmp_path / "cut.json").exists()
    assert command(*words, "cut.json")[0] == 0
    assert (tmp_path / "cut.json").read_text() == (tmp_path / "whole.json").read_text()


def test_what_cannot_be_sent_to_a_process_is_said(tmp_path):
    with pytest.raises(ControlError, match="cannot be sent to other processes"):
        hunter(tiny.sd1(), lambda pictures, prompts: bright(pictures, prompts)).hunt(800, devices=["cpu", "cpu"])


def test_what_a_candidate_costs_is_told_against_full_passes():
    searched = hunter(tiny.sd1())
    assert searched.saved("2") is None
    searched.drawer([Item("6", 0, 0, 2), Item("6", 1, 1, 2)])
    spent = searched.drawer.cost
    assert (spent.steps, spent.full) == (4, 8) and 4 < spent.passes < 8
    alone = searched.drawer.alone([Item("6", 0, 0, 2)])
    assert (alone.steps, alone.passes, alone.full) == (2, 4, 4)
    saved = searched.saved("6")
    assert saved.passes == spent.passes / spent.full and 0 < saved.time
    assert f"passes {saved.passes:.2f}" in str(saved)


def test_the_picture_tells_gain_by_colour_and_certainty_by_its_strength():
    gain, loss, none = (Rank("0:0", "race", value, 0.001, 9) for value in (0.3, -0.3, 0.0))
    assert (colour_of(gain, 0.3), colour_of(loss, 0.3), colour_of(none, 0.3)) == (HELPS, HARMS, NOTHING)
    unsure = [sum(colour_of(Rank("0:0", "race", 0.2, error, 9), 0.3)) for error in (0.01, 0.2, 1.0, float("nan"))]
    assert unsure == sorted(set(unsure)) and unsure[-1] == sum(UNSURE)
    ranks = [
        gain,
        Rank("0", "screen", -0.3, 0.001, 9),
        Rank("1:1", "prune", 0.01, 0.0, 9),
        Rank("0:0 0:1", "final", 9.0, 0.1, 9),
    ]
    page = np.asarray(head_grid(ranks, "0:1"))
    seen = {tuple(pixel) for pixel in page.reshape(-1, 3).tolist()}
    assert {HELPS, HARMS, NOTHING, INK} <= seen
    wide = head_grid([Rank(f"{block}:{head}", "race", 0.1, 0.1, 9) for block in range(24) for head in range(24)], "3:1")
    assert wide.width > 24 * 24 and wide.height > 24 * 24
