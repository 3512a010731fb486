"""The training loop resumes exactly, its optimiser is what it says, and grounding speaks of the right tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attnctl.glyph.scenes import Scene, Thing
from attnctl.glyph.tokenizer import build_tokenizer
from attnctl.glyph.train.grounding import coverage, grounding_loss, map_test, owners
from attnctl.glyph.train.loop import Settings, train, warmth
from attnctl.glyph.train.muon import Muon, orthogonal


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
