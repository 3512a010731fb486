"""benchmarks/effect.py compose: what is measured. Nothing is really drawn."""

import compose_effect
import compose_speed
import numpy as np
import pytest
import tiny
from compose_cases import PAIRS, composition, psnr
from PIL import Image

from attnctl.glyph.judge import Reading, Seen
from attnctl.pipelines import PrimeComposer


@pytest.fixture(scope="module")
def plan():
    return PrimeComposer(tiny.glyph()).plan([composition(PAIRS[0], 0)])


def test_decibels():
    one, where = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), bool)
    assert psnr(one, one + 255, where) == pytest.approx(0.0)
    assert psnr(one, one + 51, where) == pytest.approx(13.98, abs=0.01)


def test_one_site_is_infused_by_its_definition():
    found = compose_speed.one_site(2, 36, 8)
    assert found["gap"]["largest"] < 1e-5 and found["infused"]["seconds"] >= 0


def test_the_list_has_what_it_should():
    assert len(PAIRS) == len(set(PAIRS)) == 24
    kinds = [pair.kind for pair in PAIRS]
    assert kinds.count("new") == 8 - 1 and kinds.count("style") == 4 and sum(pair.covers for pair in PAIRS) == 4


def test_pasted_pixels_are_the_measure_of_all(plan):
    seen = Seen("car", "red", 0.9, np.zeros((32, 32), np.float32), (0, 0, 1, 1))
    other = Seen("dog", None, 0.9, np.zeros((32, 32), np.float32), (0, 0, 1, 1))
    pasted = Image.fromarray(plan.pasted[0].picture)
    row = compose_effect.measured(PAIRS[0], plan, 0, pasted, Reading((seen, other)))
    assert row["outside"] > 80 and row["known"] > 80 and row["rim"] > 80
    assert row["object"] and not row["thing"] and row["extra"] == 1
    row |= {"seconds": 2.0}
    table = compose_effect.summary([row, row | {"thing": True, "seconds": 4.0}])
    assert table["object"] == [2, 2] and table["thing"] == [1, 2] and table["extra"] == 2
    assert table["seconds"] == 3


def test_it_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """What is in the folder is not made again; a line that was cut off is."""
    made = []

    def composed(name, base, cases, eye):
        made.extend((name, *case) for case in cases)
        row = {"outside": 30.0, "known": 20.0, "thing": True, "extra": 0, "seconds": 1.0}
        return [Image.new("RGB", (8, 8))] * len(cases), [row] * len(cases)

    monkeypatch.setattr(compose_effect, "composed", composed)
    monkeypatch.setattr(compose_effect.judge, "load", lambda: None)
    monkeypatch.setattr(compose_effect.attnctl, "load", lambda name: tiny.glyph())
    monkeypatch.setattr(compose_effect, "sheet", lambda *which: [[("ours", Image.new("RGB", (8, 8)))]])
    compose_effect.main(["ours", "paper"], 2, 1, out=tmp_path)
    assert made == [("ours", 0, 0), ("ours", 1, 0), ("paper", 0, 0), ("paper", 1, 0)]
    lines = (tmp_path / "compose.jsonl").read_text()
    (tmp_path / "compose.jsonl").write_text(lines[:-20])
    made.clear()
    compose_effect.main(["ours", "paper"], 2, 2, out=tmp_path)
    assert made == [("ours", 0, 1), ("ours", 1, 1), ("paper", 1, 0), ("paper", 0, 1), ("paper", 1, 1)]
    made.clear()
    compose_effect.main(["ours", "paper"], 2, 2, out=tmp_path)
    assert made == []
    assert "ours" in capsys.readouterr().out and (tmp_path / "sheet.png").exists()
