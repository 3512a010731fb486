"""Step caches, weights that are moved or kept in another precision: methods act, and the caches hold what they held."""

from __future__ import annotations

import diffusers.hooks as hooks
import pytest
import tiny
import torch
from contract_table import differs
from diffusers.hooks import apply_group_offloading

from attnctl.engine.attachment import attach
from attnctl.errors import ControlError
from attnctl.processors import AStar, Regions, Segregation, TokenMaps

BLOCKS = ("transformer_blocks", "single_transformer_blocks")
CACHES = {
    "first block": lambda pipe: hooks.FirstBlockCacheConfig(threshold=1e9),
    "attention broadcast": lambda pipe: hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500, spatial_attention_block_identifiers=BLOCKS,
    ),
    "taylor": lambda pipe: hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    "magnitude": lambda pipe: hooks.MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4)),
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
def test_own_passes_go_around_step_caches(cache):
    pipe = tiny.flux()
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    plain = tiny.draw(pipe, steps=4)
    with attach(pipe, TokenMaps("cat")):
        assert torch.equal(tiny.draw(pipe, steps=4), plain)
    with attach(pipe, AStar("cat", "dog", window=(0, 0.5))) as run:
        drawn = tiny.draw(pipe, steps=4)
    assert drawn.isfinite().all() and run.report.to_dict()["traces"][0]["forwards"] >= 0
    with attach(pipe, Segregation("cat", "dog", look_ahead=0, relative=0.1, window=(0, 0.5))):
        assert differs(tiny.draw(pipe, steps=4), plain)
    assert torch.equal(tiny.draw(pipe, steps=4), plain)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_double_precision(family):
    pipe = tiny.FAMILIES[family]().to(torch.float64)
    astar = AStar("cat", "dog", bonds=(("and", "cat"),), look_ahead=0)
    with attach(pipe, astar, Regions({"cat": (0, 0, 0.5, 1)}), TokenMaps()) as run:
        drawn = tiny.draw(pipe)
    assert drawn.isfinite().all() and float(run.maps["cat"].mean()) > 0


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_weights_kept_in_eight_bits(family):
    pipe = tiny.FAMILIES[family]()
    tiny.denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = tiny.draw(pipe)
    with attach(pipe, Segregation("cat", "dog", look_ahead=0, relative=0.1), TokenMaps()) as run:
        assert differs(tiny.draw(pipe), plain)
    assert float(run.maps["cat"].mean()) > 0 and torch.equal(tiny.draw(pipe), plain)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_weights_moved_in_groups(family):
    pipe = tiny.FAMILIES[family]()
    control = Segregation("cat", "dog", look_ahead=0, relative=0.1)
    with attach(pipe, control):
        want = tiny.draw(pipe)
    cpu = torch.device("cpu")
    apply_group_offloading(
        tiny.denoiser(pipe), onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    with attach(pipe, control, TokenMaps()):
        assert torch.equal(tiny.draw(pipe), want)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_weights_that_are_gone_after_their_forward(family, level, tmp_path, monkeypatch):
    """Offloaded to disk, a weight holds no numbers outside of its forward: a backward that read it would read these."""
    pipe, cpu = tiny.FAMILIES[family](), torch.device("cpu")
    settings = {"look_ahead": 0, "relative": 0.1}
    with attach(pipe, Segregation("cat", "dog", **settings)):
        want = tiny.draw(pipe)
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: torch.full_like(like, torch.nan))
    apply_group_offloading(
        tiny.denoiser(pipe), onload_device=cpu, offload_device=cpu, offload_type=level,
        num_blocks_per_group=1 if level == "block_level" else None, offload_to_disk_path=str(tmp_path),
    )  # fmt: skip
    assert any(weight.isnan().any() for weight in tiny.denoiser(pipe).parameters())
    with attach(pipe, Segregation("cat", "dog", **settings), TokenMaps()):
        assert torch.equal(tiny.draw(pipe), want)
    with attach(pipe, Segregation("cat", "dog", checkpoint=True, **settings)):
        with pytest.raises(ControlError, match="checkpoint=True does not go with group offloading"):
            tiny.draw(pipe)
