"""Pictures drawn together: which, that they are those drawn alone, and what happens when one cannot be drawn."""

from pathlib import Path

import numpy as np
import pytest
import tiny as pipelines

from attnctl.app import drawing, recipe
from attnctl.app.batch import jobs, planning, running

PROMPT = "a cat and a dog"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipelines.sd1().save_pretrained(folder)
    return str(folder)


def groups(rows, most=None):
    placed = jobs.check_jobs((f"row {number}", row) for number, row in enumerate(rows, 1))
    plan = planning.plan(placed, Path("nowhere"), group=most)
    return [[int(task.place.removeprefix("row ")) for task in group.tasks] for group in plan.groups]


def test_jobs_of_one_kind_are_grouped_in_the_order_of_the_file():
    plain = {"prompt": PROMPT}
    rows = [plain | {"seed": seed} for seed in range(3)]
    assert groups(rows, 2) == [[1, 2], [3]] and groups(rows) == [[1, 2, 3]] and groups(rows, 1) == [[1], [2], [3]]
    assert groups([plain, plain | {"steps": 3}, plain | {"seed": 1}, plain | {"prompt": "a lion", "seed": 2}], 3) == [
        [1, 3, 4],
        [2],
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 3}, {"guidance": 1.0}, {"size": "64x64"}, {"controls": "segregation"}, {"maps": ["cat"]},
        {"negative": "a bird"}, {"trace": True},
    ],
    ids=str,
)  # fmt: skip
def test_jobs_of_two_kinds_are_not(other):
    assert groups([{"prompt": PROMPT}, {"prompt": PROMPT} | other], 4) == [[1], [2]]


def test_prompts_share_a_group_unless_a_control_or_maps_speak_of_their_words():
    def two(**fields):
        return groups([fields | {"prompt": "a cat and a dog"}, fields | {"prompt": "a dog and a cat"}], 4)

    assert two() == two(controls="perturb(heads=7)") == [[1, 2]]
    for words in ({"controls": "excitation(cat, dog)"}, {"maps": ["cat"]}, {"maps": True}):
        assert two(**words) == [[1], [2]]
    assert two(controls="regions(masks={cat: (0, 0, .5, 1), dog: (.5, 0, 1, 1)})") == [[1], [2]]


def test_groups_are_the_same_whatever_is_there(tmp_path):
    placed = jobs.check_jobs((f"row {seed}", {"prompt": PROMPT, "seed": seed}) for seed in range(6))
    first = planning.plan(placed, tmp_path, group=4)
    first.groups[0].tasks[1].path.touch()
    second = planning.plan(placed, tmp_path, group=4)
    assert [group.tasks for group in second.groups] == [group.tasks for group in first.groups]
    assert len(second.groups[0].missing) == 3 and len(second.missing) == 5
    for task in second.missing[:3]:
        task.path.touch()
    assert len(planning.plan(placed, tmp_path, group=4).to_draw) == 1


def drawn(rows, out, most, **settings):
    results = list(running.run(rows, out, group=most, **settings))
    assert not [result.error for result in results if result.error]
    return {(result.job.prompt, result.job.seed): recipe.read(result.path) for result in results}


CONTROLS = ["none", "segregation(cat, dog)", "astar(cat, dog)", "perturb(heads=1)", "excitation(cat)"]


@pytest.mark.parametrize("control", CONTROLS)
def test_a_picture_of_a_group_is_that_drawn_alone(tiny, tmp_path, control):
    rows = [
        {"prompt": PROMPT, "negative": f"a {word}", "seed": seed, "steps": 2, "model": tiny, "controls": control}
        for seed, word in enumerate(("bird", "lion", "car"))
    ]
    alone, together = drawn(rows, tmp_path / "alone", 1), drawn(rows, tmp_path / "together", 3)
    for name, (picture, kept) in together.items():
        other, its = alone[name]
        assert np.abs(np.asarray(picture, int) - np.asarray(other, int)).max() <= 1
        assert (kept.together, its.together) == (3, 1) and kept.negative == its.negative
        assert (kept.prompt, kept.seed) == name


def test_pictures_of_a_group_differ_as_their_prompts_do(tiny, tmp_path):
    rows = [{"prompt": prompt, "seed": 1, "steps": 2, "model": tiny} for prompt in (PROMPT, "a lion", "a red car")]
    alone, together = drawn(rows, tmp_path / "alone", 1), drawn(rows, tmp_path / "together", 4)
    for name, (picture, _) in together.items():
        gaps = {
            one: np.abs(np.asarray(picture, int) - np.asarray(other, int)).max() for one, (other, _) in alone.items()
        }
        assert gaps.pop(name) <= 1 < min(gaps.values())


def test_maps_of_a_group_are_each_picture_s_own(tiny, tmp_path):
    rows = [{"prompt": PROMPT, "seed": seed, "steps": 1, "model": tiny, "maps": ["cat"]} for seed in (1, 2)]
    drawn(rows, tmp_path / "alone", 1), drawn(rows, tmp_path / "together", 2)
    one, other = (sorted((tmp_path / name).glob("*-maps.png")) for name in ("alone", "together"))
    assert len(one) == len(other) == 2
    for a, b in zip(one, other, strict=True):
        gap = np.asarray(recipe.read(a)[0], int) - np.asarray(recipe.read(b)[0], int)
        assert np.abs(gap).max() <= 2


def test_a_picture_of_a_group_is_drawn_again_bit_for_bit(tiny, tmp_path, command):
    rows = [{"prompt": PROMPT, "seed": seed, "steps": 2, "model": tiny} for seed in range(4)]
    for result in list(running.run(rows, tmp_path / "out", group=4))[:2]:
        assert command("reproduce", result.path)[:2] == (0, ["bit-identical"])


@pytest.fixture
def asked(monkeypatch):
    """The seeds of each drawing that is tried; `fails(seeds)` may raise."""
    own, found = drawing.draw_together, []

    def draw_together(pipe, recipes, *rest, **settings):
        found.append([one.seed for one in recipes])
        asked.fails(found[-1])
        return own(pipe, recipes, *rest, **settings)

    asked = type("Asked", (), {"found": found, "fails": staticmethod(lambda seeds: None)})
    monkeypatch.setattr(drawing, "draw_together", draw_together)
    return asked


def rows_of(model, count):
    return [{"prompt": PROMPT, "seed": seed, "steps": 1, "model": model} for seed in range(count)]


def test_out_of_memory_halves_the_groups_and_goes_on(tiny, tmp_path, asked):
    def fails(seeds):
        if len(seeds) > 2:
            raise drawing.OutOfMemoryError("out of memory")

    asked.fails = fails
    results = list(running.run(rows_of(tiny, 10), tmp_path / "out", group=5))
    assert all(result.drawn for result in results) and len(results) == 10
    # once it is known what fits, nothing larger is tried
    assert asked.found == [[0, 1, 2, 3, 4], [0, 1], [2], [3, 4], [5, 6], [7], [8, 9]]


def test_out_of_memory_for_one_picture_is_a_failure(tiny, tmp_path, asked):
    def fails(seeds):
        raise drawing.OutOfMemoryError("out of memory on cpu: try a smaller --size")

    asked.fails = fails
    errors = [result.error for result in running.run(rows_of(tiny, 2), tmp_path / "out", group=2)]
    assert errors == ["out of memory on cpu: try a smaller --size"] * 2


def test_a_picture_that_fails_takes_no_other_of_its_group_along(tiny, tmp_path, asked):
    def fails(seeds):
        if 1 in seeds:
            raise RuntimeError("no")

    asked.fails = fails
    results = list(running.run(rows_of(tiny, 3), tmp_path / "out", group=3))
    assert [(result.job.seed, result.error) for result in results] == [(0, None), (1, "RuntimeError: no"), (2, None)]
    assert asked.found == [[0, 1, 2], [0], [1], [2]]


def test_of_a_group_only_what_is_missing_is_written(tiny, tmp_path, asked):
    first = list(running.run(rows_of(tiny, 3), tmp_path / "out", group=3))
    times = {result.path: result.path.stat().st_mtime_ns for result in first}
    whole = first[1].path.read_bytes()
    first[1].path.unlink()
    again = list(running.run(rows_of(tiny, 3), tmp_path / "out", group=3))
    assert asked.found == [[0, 1, 2]] * 2 and [result.drawn for result in again] == [False, False, True]
    assert first[1].path.read_bytes() == whole
    assert [one.path.stat().st_mtime_ns == times[one.path] for one in first] == [True, False, True]


def test_traces_stand_beside_the_picture(tiny, tmp_path):
    row = {
        "prompt": PROMPT,
        "steps": 2,
        "model": tiny,
        "controls": "segregation(cat, dog, look_ahead=0)",
        "trace": True,
    }
    (result,) = running.run([row], tmp_path / "out")
    names = {path.name.removeprefix(result.path.stem) for path in (tmp_path / "out").glob(f"{result.path.stem}-*")}
    assert {"-trace.json", "-losses.png", "-steps.png"} <= names
