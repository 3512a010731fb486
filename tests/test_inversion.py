"""Inversion: the sampler runs both ways, on every family; its formulas on a denoiser whose answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image

from attnctl.errors import ControlError
from attnctl.pipelines.inversion import Schedule, Solver, decode, diffusion_schedule, encode, invert, redrawn

ARGUMENTS = dict.fromkeys(("sd3", "sd35", "flux"), {"max_sequence_length": 16})


def pictures(count=2):
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 4, 6, generator=generator)
    large = torch.nn.functional.interpolate(small, (32, 48), mode="bicubic").clamp(0, 1)
    return [Image.fromarray((one.permute(1, 2, 0) * 255).byte().numpy()) for one in large]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_picture_comes_back(family):
    pipe = tiny.FAMILIES[family]()
    own = pipe.scheduler
    latents = encode(pipe, pictures())
    path = invert(pipe, latents, (32, 48), steps=10, method="auto", **ARGUMENTS.get(family, {}))
    assert len(path) == 11 and torch.equal(path[10], latents) and pipe.scheduler is own
    back = redrawn(pipe, path, (32, 48), **ARGUMENTS.get(family, {}))
    gap = float((back - latents).norm() / latents.norm())
    assert back.isfinite().all() and back.shape == latents.shape
    if family not in ("sd1", "sdxl"):  # an untrained UNet blows small errors up; the trained one is below
        assert gap < 0.05 < float((path[0] - latents).norm() / latents.norm())
    assert decode(pipe, latents, (32, 48))[0].size == (48, 32)


def test_a_picture_comes_back_from_the_trained_model():
    pipe = tiny.glyph()
    latents = encode(pipe, [picture.resize((96, 64)) for picture in pictures(1)])
    path = invert(pipe, latents, (64, 96), steps=12)
    assert float((redrawn(pipe, path, (64, 96)) - latents).norm() / latents.norm()) < 0.2
    assert float((path[0] - latents).norm() / latents.norm()) > 0.5


def test_rounds_put_ddim_right():
    """Plain ddim backwards takes the noise of the wrong end of each step; each round makes it nearer."""
    pipe = tiny.glyph()
    latents, gaps = encode(pipe, [picture.resize((64, 64)) for picture in pictures(1)]), []
    for rounds in (0, 1, 3):
        path = invert(pipe, latents, (64, 64), steps=6, method="ddim", rounds=rounds)
        gaps.append(float((redrawn(pipe, path, (64, 64), "ddim") - latents).norm() / latents.norm()))
    assert gaps[2] < gaps[1] < gaps[0] and gaps[2] < 0.5 * gaps[0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_predictions_of_every_kind_are_split(kind):
    schedule = Schedule((0.0,), (0.8,), (0.6,) if kind != "flow" else (0.2,), kind)
    clean, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    z = schedule.noised(clean, noise, 0)
    said = {"epsilon": noise, "sample": clean, "v_prediction": 0.8 * noise - 0.6 * clean, "flow": noise - clean}[kind]
    for found, want in zip(schedule.split(said, z, 0), (clean, noise), strict=True):
        assert torch.allclose(found, want, atol=1e-5)


def scheduler(total=1000):
    alphas = torch.linspace(0.999, 0.01, total, dtype=torch.float64)
    return SimpleNamespace(alphas_cumprod=alphas, config={"prediction_type": "epsilon"})


def walk(solver, z, predict):
    solver.set_timesteps()
    for time in solver.timesteps:
        z = solver.step(predict(z, solver._plan[solver._done][0], solver.schedule), time, z)[0]
    return z


@pytest.mark.parametrize("method", ["dpm", "ddim"])
@pytest.mark.parametrize("backwards", [False, True])
def test_one_clean_picture_is_exact(method, backwards):
    """A denoiser that always sees the same clean latents makes the path a straight one: any step size is right."""
    clean, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    solver = Solver(scheduler(), 7, method, backwards=backwards, rounds=2)
    schedule = diffusion_schedule(scheduler().alphas_cumprod, "epsilon", 7)
    first, last = (7, 0) if backwards else (0, 7)

    def predict(z, node, known):
        return (z - known.a[node] * clean) / known.sigma[node]

    found = walk(solver, schedule.noised(clean, noise, first).float(), predict)
    assert torch.allclose(found, schedule.noised(clean, noise, last).float(), atol=2e-3)
    assert sorted(solver.path) == list(range(8)) and solver.timesteps.dtype == torch.long


def test_the_second_order_is_second_order():
    """For normal pictures with a spread of 0.5 the path is known: z over its spread stays what it is."""
    spread = 0.5

    def predict(z, node, known):  # the best guess
        a, sigma = known.a[node], known.sigma[node]
        clean = z * a * spread**2 / (a**2 * spread**2 + sigma**2)
        return (z - a * clean) / sigma

    def errors(method, steps):
        solver = Solver(scheduler(), steps, method)
        walk(solver, torch.ones(1, 1, 1, 1), predict)
        known = solver.schedule
        size = [(a**2 * spread**2 + sigma**2) ** 0.5 for a, sigma in zip(known.a, known.sigma, strict=True)]
        return abs(float(solver.path[steps // 2]) - size[steps // 2] / size[0])

    assert errors("dpm", 40) < 0.4 * errors("dpm", 20)
    assert 0.45 * errors("ddim", 20) < errors("ddim", 40)
    assert errors("dpm", 20) < 0.5 * errors("ddim", 20)


def test_a_schedule_of_pure_noise_has_no_infinite_logarithm():
    schedule = diffusion_schedule([0.9, 0.5, 0.0], "v_prediction", 3)
    assert schedule.times == (2, 1, 0, 0) and schedule.log_ratio(0) > -20


def test_what_cannot_be_run_backwards_is_named():
    with pytest.raises(ControlError, match="SimpleNamespace cannot be run backwards"):
        Solver(SimpleNamespace(config={}), 4)
    with pytest.raises(ControlError, match="dpm is for diffusion models"):
        Solver(tiny.sd3().scheduler, 4, "dpm")
