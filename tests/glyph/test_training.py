"""The training loop resumes exactly, its optimiser is what it says, grounding speaks of the right tokens, and misuse
is told in one line before anything is drawn."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attnctl.glyph import scenes
from attnctl.glyph.scenes import Renderer, Scene, Thing
from attnctl.glyph.tokenizer import build_tokenizer
from attnctl.glyph.train import __main__ as program
from attnctl.glyph.train import autoencoder
from attnctl.glyph.train.grounding import coverage, grounding_loss, map_test, owners
from attnctl.glyph.train.loop import CheckpointError, Settings, train, warmth
from attnctl.glyph.train.muon import Muon, orthogonal
from attnctl.loading import MODELS


class Line:
    """Fits a small network to a function; its loss depends on the step's random numbers alone, as `Task` asks."""

    def __init__(self, blow_up: int = -1) -> None:
        torch.manual_seed(0)
        self.network: nn.Module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
        self.exported: list[Path] = []
        self.blow_up = blow_up

    def loss(self, step: int, rng: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(16, 3, generator=rng)
        loss = (self.network(x) - x.sum(1, keepdim=True)).square().mean()
        return {"squared": loss * float("nan") if step == self.blow_up else loss}

    def report(self, network: nn.Module, folder: Path, step: int) -> str:
        return "fine"

    def export(self, network: nn.Module, folder: Path) -> None:
        self.exported.append(folder)


def trained(out: Path, **changes: object) -> dict[str, Tensor]:
    settings = replace(Settings(out, steps=12, rate=0.02, small_rate=0.01, every=5), **changes)  # type: ignore[arg-type]
    return train(Line(), settings).state_dict()


def test_a_run_cut_in_two_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    line = Line(blow_up=7)
    with pytest.raises(FloatingPointError, match="step 7"):  # dies behind the checkpoint of step 5
        train(line, Settings(tmp_path / "cut", steps=12, rate=0.02, small_rate=0.01, every=5))
    assert not line.exported
    again = trained(tmp_path / "cut", resume=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_that_is_there_is_neither_overwritten_nor_invented(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        trained(tmp_path, resume=True)
    trained(tmp_path)
    with pytest.raises(FileExistsError, match="--resume"):
        trained(tmp_path)


def test_a_run_goes_on_with_its_own_settings_alone(tmp_path: Path) -> None:
    task: dict[str, object] = {"scenes": 4, "vae": None}
    trained(tmp_path, task=task)
    told = r"checkpoint\.pt was made with scenes 4, not 5; seed 0, not 1; rate 0\.02, not 0\.03: --resume"
    with pytest.raises(CheckpointError, match=told):
        trained(tmp_path, resume=True, seed=1, rate=0.03, task=task | {"scenes": 5})
    trained(tmp_path, resume=True, steps=14, minutes=5, every=7, task=task)
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 14


def test_an_older_checkpoint_without_settings_is_taken_and_gets_them(tmp_path: Path) -> None:
    trained(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt")
    del state["made_with"]
    torch.save(state, tmp_path / "checkpoint.pt")
    trained(tmp_path, resume=True, steps=13, task={"scenes": 4})
    assert torch.load(tmp_path / "checkpoint.pt")["made_with"]["scenes"] == 4


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    other = Line()
    other.network = nn.Sequential(nn.Linear(3, 1))
    with pytest.raises(CheckpointError, match="of another network"):
        train(other, Settings(tmp_path, steps=13, rate=0.02, small_rate=0.01, resume=True))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_broken_checkpoint_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="cut short or no checkpoint"):
        trained(tmp_path, resume=True)


def test_the_rate_rises_stays_and_falls() -> None:
    settings = Settings(Path(), steps=1000, rate=1.0, ease=0.3)
    assert warmth(0, settings) == pytest.approx(0.01)
    assert warmth(99, settings) == warmth(699, settings) == 1.0
    assert warmth(850, settings) == pytest.approx(0.5)
    assert warmth(999, settings) == pytest.approx(0.02)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_updates_are_near_orthogonal_and_keep_their_directions(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert torch.allclose(u.mT @ found @ vh.mT, torch.diag((u.mT @ found @ vh.mT).diag()), atol=1e-4)


def test_muon_moves_kernels_by_its_rate() -> None:
    kernel = nn.Parameter(torch.zeros(8, 4, 3, 3))
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0)) * 1e-6  # scale does not matter
    Muon([kernel], lr=0.1).step()
    values = torch.linalg.svdvals(kernel.detach().flatten(1))
    assert 0.05 < values.min() <= values.max() < 0.13


def test_tokens_belong_to_the_things_they_speak_of() -> None:
    tokenizer = build_tokenizer()
    ids, owner = owners(tokenizer, ["a red car, a backpack and a cat", "a cat"])
    names = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    said = [(name.removesuffix("</w>"), int(thing)) for name, thing in zip(names, owner[0], strict=True) if thing >= 0]
    assert said == [("red", 0), ("car", 0), ("back", 1), ("pack", 1), ("cat", 2)]
    assert owner[1].tolist() == [-1, -1, 0] + [-1] * 74


def scene(*corners: tuple[int, int]) -> Scene:
    """Things that cover 64 x 64 pixels from these corners (row, column)."""
    things = []
    for row, column in corners:
        mask = torch.zeros(128, 128, dtype=torch.bool)
        mask[row : row + 64, column : column + 64] = True
        things.append(Thing("cat", None, (0, 0, 1, 1), mask.numpy(), 1.0))
    return Scene(torch.zeros(128, 128, 3, dtype=torch.uint8).numpy(), "", tuple(things))


def test_coverage_is_the_part_of_each_cell_and_not_transposed() -> None:
    masks = coverage(scene((0, 60)))
    assert masks.shape == (3, 16, 16)
    assert masks[0, 0, 7] == pytest.approx(0.5)  # pixels 60 to 63 of cell 7
    assert masks[0, 7, 8] == 1
    assert masks[0, 8, 8] == 0
    assert masks[1:].sum() == 0


def one_word(cells: Tensor) -> Tensor:
    """Maps (1, 256, 77) whose second token has this map (16, 16)."""
    maps = torch.zeros(1, 256, 77)
    maps[0, :, 1] = cells.flatten()
    return maps


def test_grounding_loss_is_the_square_of_what_falls_outside() -> None:
    masks = coverage(scene((0, 0), (64, 64)))[None]
    owner = torch.full((1, 77), -1)
    owner[0, 1] = 0
    inside, even = torch.zeros(16, 16), torch.ones(16, 16)
    inside[2:4, 2:4] = 0.3
    one = torch.ones(1)
    assert grounding_loss({16: [one_word(inside)]}, owner, masks, one) == 0
    assert grounding_loss({16: [one_word(even)]}, owner, masks, one) == pytest.approx(0.75**2)
    assert grounding_loss({16: [one_word(even)]}, owner, masks, one / 2) == pytest.approx(0.75**2 / 2)
    assert grounding_loss({16: [one_word(inside), one_word(even)]}, owner, masks, one) == pytest.approx(0.75**2 / 2)


def test_the_map_test_tells_own_from_other() -> None:
    masks = coverage(scene((0, 0), (64, 64)))[None]
    owner, nouns = torch.full((1, 77), -1), torch.zeros(1, 77, dtype=torch.bool)
    owner[0, 1], owner[0, 2] = 0, 1
    nouns[0, 1:3] = True
    maps = torch.zeros(1, 256, 77)
    first, second = masks[0, 0].flatten(), masks[0, 1].flatten()
    maps[0, :, 1], maps[0, :, 2] = first, 0.9 * first + 0.3 * second  # the second word looks at the first thing, mostly
    found = map_test([maps], owner, nouns, masks)
    assert found.pointing == 0.5
    assert found.share == pytest.approx((1 + 0.25) / 2)


# --- misuse of the command line ---------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
VAE = MODELS / "glyph-sd" / "vae"
Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """refused("sd", "--scenes", 0) -> the one line on stderr; nothing may be drawn or trained."""

    def work(*args: object, **options: object) -> None:
        raise AssertionError("work has begun")

    for owner, name in ((Renderer, "scene"), (Renderer, "render"), (autoencoder, "strangers"), (program, "train")):
        monkeypatch.setattr(owner, name, work)

    def refused(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            program.main()
        out, err = capfd.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1), err
        return err

    return refused


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a misuse, with things that are not what is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    for name in ("empty", "started", "broken", "other", "pipeline", "glyph"):
        (tmp_path / name).mkdir()
    for name in ("started", "broken"):
        (tmp_path / name / "checkpoint.pt").write_text("no archive")
    made_with = {"model": "sd", "scenes": 8, "grounding": 0.5, "batch": 32, "vae": "0" * 12, "seed": 3, "rate": 0.01}
    other = {"network": {}, "average": {}, "optimisers": [], "step": 5, "made_with": made_with}
    torch.save(other, tmp_path / "other" / "checkpoint.pt")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "glyph" / "model_index.json").write_text("{}")
    (tmp_path / "glyph" / "training.json").write_text(json.dumps({"steps": 1}))
    return tmp_path


MISUSES = {
    "paint": "No such command 'paint'",
    "autoencoder --minutes -1": "'--minutes'",
    "sd --minutes inf": "'--minutes': inf is no finite number",
    "sd --scenes 0": "'--scenes'",
    "autoencoder --scenes -4": "'--scenes'",
    "judge --pictures 1": "'--pictures'",
    "judge --steps 0": "'--steps'",
    "judge --seed -1": "'--seed'",
    f"judge --seed {2**63}": "'--seed'",
    "sd --rate 0": "'--rate': 0 is not above 0",
    "sd --rate nan": "'--rate': nan is no finite number",
    "sd --grounding -0.1": "'--grounding'",
    "score --scale -1": "'--scale'",
    "score --scale 3 --scale inf": "'--scale': inf is no finite number",
    "autoencoder --device foo": "device 'foo' cannot be used here",
    "autoencoder --device meta": "device 'meta' cannot be used here",
    "judge --device cuda:99": "device 'cuda:99' cannot be used here",
    "autoencoder --out file": "--out file: file is a file, not a folder",
    "judge --out file/deep": "file is a file, not a folder",
    "judge --out /proc/nothing": "--out /proc/nothing: /proc cannot be written",
    "autoencoder --out empty --resume": "nothing to resume: empty/checkpoint.pt does not exist",
    "autoencoder --out nowhere --resume": "nothing to resume: nowhere/checkpoint.pt does not exist",
    "judge --out started": "started/checkpoint.pt exists: pass --resume to go on with it, or another --out",
    "judge --out broken --resume": "broken/checkpoint.pt is cut short or no checkpoint of a training",
    "sd --vae nowhere/vae": "--vae: nowhere/vae is no folder",
    "sd --vae stabilityai/sd-vae-ft-mse": "--vae: stabilityai/sd-vae-ft-mse is no folder",
    "sd --vae file": "--vae: file is no folder",
    "judge --vae empty": "--vae: empty holds no autoencoder",
    "sd --vae {vae}/../unet": "holds no autoencoder",
    "sd --vae {vae} --device foo": "device 'foo' cannot be used here",
    "sd --vae {vae} --often unicorn=2": "--often unicorn=2: 'unicorn' is no concept; there are cat, dog",
    "sd3 --vae {vae} --often mouse": "--often mouse: CONCEPT=WEIGHT with a weight from 0.01 to 100, as --often mouse=2",
    "sd --vae {vae} --often mouse=0": "--often mouse=0: CONCEPT=WEIGHT with a weight from 0.01 to 100",
    "sd --vae {vae} --often mouse=nan": "--often mouse=nan: CONCEPT=WEIGHT with a weight from 0.01",
    "sd --vae {vae} --often mouse=1e39": "--often mouse=1e39: CONCEPT=WEIGHT with a weight from 0.01 to 100",
    "sd --vae {vae} --often mouse=2 --often mouse=3": "--often mouse=3: mouse has a weight already, 2",
    "sd --vae {vae} --start nowhere": "--start: nowhere is no folder: a glyph pipeline is wanted",
    "sd3 --vae {vae} --start glyph": "--start: glyph is no glyph pipeline",
    "score nowhere": "nowhere is no folder",
    "score file": "file is no folder",
    "score glyph-sd": "glyph-sd is no folder",
    "score empty": "empty/model_index.json is missing",
    "score pipeline": "pipeline is no glyph pipeline: its training.json is missing",
    "score glyph": "glyph is no glyph pipeline: its training.json is missing or was not written by this training",
}


@pytest.mark.parametrize("words", MISUSES)
def test_misuse_is_told_in_one_line_before_any_work(refused: Refused, places: Path, words: str) -> None:
    assert MISUSES[words] in refused(*words.format(vae=VAE).split())
    assert not (places / "nowhere").exists()


def test_resuming_with_other_settings_names_each(refused: Refused, places: Path) -> None:
    line = refused("sd", "--vae", VAE, "--out", "other", "--resume", "--scenes", 9, "--seed", 3, "--rate", 0.01)
    assert "other/checkpoint.pt was made with scenes 8, not 9; grounding 0.5, not 0.05; vae 000000000000, not " in line
    assert "seed" not in line
    state = torch.load("other/checkpoint.pt")
    state["made_with"] |= {"start": "new", "weights": {"mouse": 2.0}}
    torch.save(state, "other/checkpoint.pt")
    line = refused("sd", "--vae", VAE, "--out", "other", "--resume", "--start", "glyph-sd")
    assert "weights {'mouse': 2.0}, not {}; start new, not " in line
    assert "model sd, not judge" in refused("judge", "--out", "other", "--resume")


def test_a_missing_font_is_told_before_training(
    refused: Refused, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "_FONT_PLACES", ())
    monkeypatch.setattr(scenes.shutil, "which", lambda _: None)
    for words in (["autoencoder"], ["judge"], ["sd", "--vae", VAE], ["score", VAE.parent]):
        assert "apt-get install fonts-noto-color-emoji" in refused(*words)


def test_the_module_is_the_program() -> None:
    command = [sys.executable, "-m", "attnctl.glyph.train", "sd", "--vae", VAE, "--device", "foo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("python -m attnctl.glyph.train: device 'foo' cannot be used here")
