import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image

from attnctl.engine.control import AttentionCall
from attnctl.engine.sites import Site, with_text
from attnctl.errors import ControlError, NoSiteError, PhraseError
from attnctl.maps import pictures as heatmaps
from attnctl.maps import probabilities
from attnctl.maps.probabilities import Listener, call_maps, direct, known, one_hot, token_maps
from attnctl.maps.reader import Maps, join_grids
from attnctl.maps.recorder import TokenMaps
from attnctl.sheets import GAP, grid
from attnctl.words.phrases import TextStream

CROSS = Site("mid.attn2", "cross", 4, 8, 1, 1)
JOINT = Site("blocks.0.attn", "joint", 4, 8, 0, 2, "image-first")


def tensors(batch=2, heads=4, queries=15, keys=21, dim=8, kv_heads=None, dtype=torch.float64, seed=0):
    """q and k as attention modules make them: heads are a view of the channels."""
    torch.manual_seed(seed)
    q = torch.randn(batch, queries, heads, dim, dtype=dtype).transpose(1, 2)
    k = torch.randn(batch, keys, kv_heads or heads, dim, dtype=dtype).transpose(1, 2)
    return q, k


def biases(batch, heads, queries, keys, dtype):
    mask = torch.rand(batch, 1, queries, keys) > 0.3
    mask[..., 0] = True
    return {
        "none": None,
        "bool": mask,
        "keys": torch.randn(batch, 1, 1, keys, dtype=dtype),
        "full": torch.randn(batch, heads, queries, keys, dtype=dtype),
        "two-dimensional": torch.randn(queries, keys, dtype=dtype),
        "queries only": torch.randn(1, 1, queries, 1, dtype=dtype),
        "closed keys": torch.zeros(1, 1, 1, keys, dtype=dtype).index_fill(3, torch.tensor([2]), float("-inf")),
    }


def reference(q, k, tokens, scale=None, bias=None):
    """The whole matrix, then its columns."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = torch.where(bias, logits, -torch.inf) if bias.dtype == torch.bool else logits + bias
    p = logits.softmax(-1)
    rows = tokens.expand(q.shape[0], -1) if tokens.ndim == 1 else tokens
    return torch.stack([p[i][..., row] for i, row in enumerate(rows)]), logits.logsumexp(-1)


# --- token probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", biases(1, 1, 1, 3, torch.float64))
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_every_route_equals_the_columns_of_the_matrix(name, kv_heads, scale):
    q, k = tensors(kv_heads=kv_heads)
    bias = biases(2, 4, 15, 21, q.dtype)[name]
    tokens = torch.tensor([[2, 5, 20, 2], [0, 1, 7, 3]])  # of each image its own; one may be named twice
    want, lse = reference(q, k, tokens, scale, bias)
    factor = 8**-0.5 if scale is None else scale
    for got in (
        direct(q, k, tokens, factor, bias),
        known(q, k, tokens, factor, bias, lse),
        one_hot(q, k, tokens, factor, bias),
        token_maps(q, k, tokens, scale, bias),
        token_maps(q, k, tokens, scale, bias, lse),
    ):
        assert got.shape == (2, 4, 15, 4) and got.dtype == torch.float64
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_more_tokens_than_a_head_has_channels():
    q, k = tensors(keys=30)
    tokens = torch.arange(20)
    torch.testing.assert_close(one_hot(q, k, tokens.expand(2, -1), 0.3, None), reference(q, k, tokens, 0.3)[0])


def test_many_keys_take_the_fused_route(monkeypatch):
    q, k = tensors(keys=600)
    monkeypatch.setattr("attnctl.maps.probabilities.direct", None)
    tokens = torch.tensor([3, 599])
    torch.testing.assert_close(token_maps(q, k, tokens), reference(q, k, tokens)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype):
    q, k = tensors(dtype=torch.float32)
    q, k, tokens = q.to(dtype), k.to(dtype), torch.tensor([1, 4])
    want, lse = reference(q.double(), k.double(), tokens)
    for got in (token_maps(q, k, tokens), token_maps(q, k, tokens, lse=lse.float())):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), atol=1e-6, rtol=1e-5)
    fused = one_hot(q, k, tokens.expand(2, -1), 8**-0.5, None)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, want.float(), atol=2 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("route", [direct, one_hot])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_gradients(route, kv_heads):
    q, k = tensors(1, 2, 5, 7, 4, kv_heads=kv_heads)
    tokens = torch.tensor([[1, 6]])
    q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: route(q, k, tokens, 0.5, None), (q, k))


# --- the kernel's own log-sum-exp -------------------------------------------------------------------------------------


def call_of(q, k, bias=None, scale=None, site=CROSS, grid=(3, 5), text=None, image=None, step=None):
    text = text or slice(0, k.shape[2])
    return AttentionCall(q, k, k, bias, scale, site, step, 0, grid, text, image or slice(0, q.shape[2]))


def attend(call):
    gqa = call.k.shape[1] != call.q.shape[1]
    return F.scaled_dot_product_attention(call.q, call.k, call.v, call.bias, scale=call.scale, enable_gqa=gqa)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ["none", "full", "keys"])
def test_listening_changes_no_bit_and_hears_the_row_sums(inference, dtype, kv_heads, name):
    q, k = tensors(kv_heads=kv_heads, dtype=dtype, queries=70, keys=150)
    call = call_of(q, k, biases(2, 4, 70, 150, dtype)[name], 0.4)
    with torch.inference_mode(inference):
        plain = attend(call)
        with Listener(call) as kernel:
            out = attend(call)
    assert torch.equal(out, plain)
    want = reference(q.double(), k.double(), torch.tensor([0]), 0.4, call.bias)[1]
    assert kernel.lse is not None
    torch.testing.assert_close(kernel.lse.double(), want, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0)


@pytest.fixture
def silent(monkeypatch):
    """Kernels of CUDA, made for the CPU, that tell row sums only when asked to: (name, what they tell) -> installed."""
    monkeypatch.setattr(probabilities, "_true", {})
    with torch.library._scoped_library("aten", "IMPL") as library:

        def install(name, told):
            def kernel(q, k, v, bias, compute_log_sumexp, *rest, scale=None):
                lse = told(q @ k.mT * scale + (0 if bias is None else bias)) if compute_log_sumexp else q.new_empty(0)
                out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
                more = [torch.tensor(0)] * 2 if "efficient" in name else [torch.tensor(0)] * 2 + [0, 0] + [q[:0]] * 3
                return out, lse, *more

            library.impl(name, kernel, "CPU")
            return getattr(torch.ops.aten, name)

        yield install


ROUNDED = ("_scaled_dot_product_efficient_attention", lambda logits: F.pad(logits.logsumexp(-1), (0, 26)))
DEEPER = ("_scaled_dot_product_cudnn_attention", lambda logits: logits.logsumexp(-1, keepdim=True))
OTHER = ("_scaled_dot_product_cudnn_attention", lambda logits: logits.logsumexp(-1, keepdim=True) / math.log(2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kernel", "told"), [ROUNDED, DEEPER, OTHER], ids=["efficient", "cudnn", "in another unit"])
def test_kernels_that_must_be_asked_for_the_row_sums(silent, kernel, told, masked):
    run = silent(kernel, told)
    q, k = tensors(dtype=torch.float32, queries=70, keys=150)
    bias = torch.randn(1, 1, 70, 150) if masked else None
    call = call_of(q, k, bias, 0.4)
    plain = run(q, k, k, bias, False, scale=0.4)
    assert plain[1].numel() == 0
    for _ in range(2):
        with Listener(call) as listener:
            out = run(q, k, k, bias, False, scale=0.4)
        assert torch.equal(out[0], plain[0])
        if told is OTHER[1]:
            assert listener.lse is None
        else:
            torch.testing.assert_close(listener.lse, reference(q, k, torch.tensor([0]), 0.4, bias)[1])
    with Listener(call) as listener:
        assert run(q + 0, k, k, bias, False, scale=0.4)[1].numel() == 0
    assert listener.lse is None


def test_what_ran_on_something_else_is_not_heard():
    q, k = tensors(dtype=torch.float32)
    mask = torch.ones(15, 21, dtype=torch.bool)
    for call, ran in (
        (call_of(q, k), call_of(q + 0, k)),
        (call_of(q, k), call_of(q, k + 0)),
        (call_of(q, k), call_of(q, k, torch.zeros(15, 21))),
        (call_of(q, k), call_of(q, k, scale=0.1)),
        (call_of(q, k), call_of(q[:1], k[:1])),
        (call_of(q, k, mask), call_of(q, k, mask)),  # the kernel is given an additive copy of it
    ):
        with Listener(call) as kernel:
            attend(ran)
        assert kernel.lse is None


def test_a_query_that_may_attend_to_nothing_has_no_map():
    q, k = tensors(dtype=torch.float32)
    closed = torch.zeros(15, 21).index_fill(0, torch.tensor([4]), float("-inf"))
    call = call_of(q, k, closed)
    with Listener(call) as kernel:
        attend(call)
    maps = token_maps(q, k, torch.tensor([0, 1]), bias=closed, lse=kernel.lse)
    assert maps[:, :, 4].eq(0).all() and maps.isfinite().all()


@pytest.mark.parametrize("name", biases(1, 1, 1, 3, torch.float64))
@pytest.mark.parametrize("text_first", [False, True])
def test_a_joint_call_is_read_from_image_queries_to_text_keys(name, text_first):
    q, k = tensors(3, 4, 21, 21)
    bias = biases(3, 4, 21, 21, q.dtype)[name]
    text, image = (slice(0, 6), slice(6, 21)) if text_first else (slice(15, 21), slice(0, 15))
    call = call_of(q, k, bias, site=JOINT, text=text, image=image)
    tokens = torch.tensor([[0, 2], [5, 1]])
    every, lse = reference(q, k, torch.arange(21), bias=bias)
    want = torch.stack([every[row][:, image][..., text][..., tokens[row - 1]] for row in (1, 2)])
    torch.testing.assert_close(call_maps(call, slice(1, 3), tokens), want)
    torch.testing.assert_close(call_maps(call, slice(1, 3), tokens, lse), want)


# --- Maps -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.clip_tokenizer()


def texts(tokenizer, *prompts):
    return [(TextStream(tokenizer, prompt),) for prompt in prompts]


def step(index=0):
    return SimpleNamespace(index=index)


def blob(maps, row, place, grid, heads=2, site=CROSS, index=0, images=1):
    """Record a call whose queries attend to one text row at one place of the grid, and to row 0 elsewhere."""
    cells = grid[0] * grid[1]
    q = torch.zeros(images, heads, cells, 8)
    k = torch.zeros(images, heads, 77, 8)
    k[:, :, 0, 0], k[:, :, row, 1] = 40.0, 40.0
    q[..., 0] = 40.0
    q[:, :, place[0] * grid[1] + place[1]] = torch.tensor([0.0, 40.0, 0, 0, 0, 0, 0, 0])
    maps.add(call_of(q, k, site=site, grid=grid, step=step(index)), slice(0, images), None)


def test_a_blob_is_where_it_was_put_on_a_grid_that_is_not_square(tokenizer):
    maps = Maps(texts(tokenizer, "a cat and a dog"), None, ())
    blob(maps, 2, (1, 4), (3, 5))
    cat = maps["cat"]
    assert cat.shape == (1, 3, 5) and cat.dtype == torch.float32
    assert cat[0, 1, 4] == pytest.approx(1, abs=1e-5) and cat.sum() == pytest.approx(1, abs=1e-4)
    assert maps["dog"].sum() == pytest.approx(0, abs=1e-4)
    assert maps.words == ("a#1", "cat", "and", "a#2", "dog")


def test_sites_are_averaged_on_the_finest_grid(tokenizer):
    maps = Maps(texts(tokenizer, "a cat"), None, ())
    blob(maps, 2, (2, 3), (6, 10))
    blob(maps, 2, (2, 3), (6, 10), index=1)
    blob(maps, 2, (1, 1), (3, 5))
    assert maps["cat"].shape == (1, 6, 10)
    assert maps["cat"].sum() == pytest.approx((1 + 1 + 4) / 3, abs=1e-3)  # of four fine cells each coarse one is made
    one = torch.arange(15.0).view(1, 3, 5)
    torch.testing.assert_close(join_grids({(3, 5): one, (6, 10): torch.zeros(1, 6, 10)}).mean(), one.mean())
    assert torch.equal(join_grids({(3, 5): one[:, None]}), one[:, None])


def test_a_phrase_is_the_sum_of_its_tokens(tokenizer):
    maps = Maps(texts(tokenizer, "a red cat"), None, ())
    blob(maps, 2, (0, 0), (3, 5))
    blob(maps, 3, (2, 1), (3, 5))
    red, cat, both = maps["red"], maps["cat"], maps["red cat"]
    torch.testing.assert_close(both, red + cat)
    assert both[0, 0, 0] == pytest.approx(0.5, abs=1e-4) and both[0, 2, 1] == pytest.approx(0.5, abs=1e-4)
    assert maps.get("red cat", "sum").sum() == pytest.approx(1)
    assert maps.get("red cat", "max").max() == pytest.approx(1)
    with pytest.raises(ControlError, match="'max' or 'sum'"):
        maps.get("cat", "mean")  # type: ignore[arg-type]


def test_prompts_of_a_batch_have_maps_of_their_own(tokenizer):
    maps = Maps(texts(tokenizer, "a cat", "a red dog", "a cat"), None, ())
    blob(maps, 2, (0, 1), (3, 5), images=3)  # row 2 is cat, red, cat
    assert maps["cat"].amax((1, 2)).tolist() == pytest.approx([1, 0, 1], abs=1e-4)
    assert maps["red"].amax((1, 2)).tolist() == pytest.approx([0, 1, 0], abs=1e-4)
    assert maps.words == ("a", "cat", "red", "dog")
    picture = Image.new("RGB", (40, 24))
    assert maps.picture([picture] * 3).height > 3 * 192


def test_what_was_kept_apart_can_be_asked_for(tokenizer):
    other = Site("up.attn2", "cross", 2, 8, 5, 1)
    maps = Maps(texts(tokenizer, "a cat"), ("cat",), ("step", "layer", "head"))
    blob(maps, 2, (0, 0), (3, 5), heads=4, index=0)
    blob(maps, 2, (2, 2), (3, 5), heads=2, index=0, site=other)
    blob(maps, 2, (1, 1), (3, 5), heads=4, index=1)

    def peaks(**chosen):
        return [divmod(int(i), 5) for i in (maps.get("cat", **chosen)[0].flatten() > 0.3).nonzero()]

    assert maps.steps == (0, 1) and maps.layers == (1, 5) and maps.words == ("cat",)
    assert peaks(step=1) == [(1, 1)]
    assert peaks(step=0) == [(0, 0), (2, 2)]
    assert peaks(step=0, layer=5) == peaks(step=0, layer="up.attn2") == [(2, 2)]
    assert peaks(head=3) == [(0, 0), (1, 1)]  # only one site has so many heads
    assert peaks(head=1, layer=1, step=0) == [(0, 0)]
    with pytest.raises(ControlError, match="step 2 was not recorded; there are 0, 1"):
        maps.get("cat", step=2)
    with pytest.raises(NoSiteError, match="layers 1, 5"):
        maps.get("cat", layer=3)
    with pytest.raises(NoSiteError, match="'down.attn2' was not recorded"):
        maps.get("cat", layer="down.attn2")
    with pytest.raises(ControlError, match="heads 0 to 3"):
        maps.get("cat", head=4)


def test_what_was_averaged_cannot(tokenizer):
    maps = Maps(texts(tokenizer, "a cat"), None, ())
    with pytest.raises(ControlError, match="no map was recorded"):
        maps["cat"]
    blob(maps, 2, (0, 0), (3, 5))
    for name in ("step", "layer", "head"):
        with pytest.raises(ControlError, match=f"every {name}.*keep=\\('{name}',\\)"):
            maps.get("cat", **{name: 0})  # type: ignore[arg-type]


def test_words_that_are_not_there(tokenizer):
    with pytest.raises(PhraseError, match="'horse' is not in the prompt; its words are: a#1, cat, and, a#2, dog"):
        Maps(texts(tokenizer, "a cat and a dog"), ("cat", "horse"), ())
    maps = Maps(texts(tokenizer, "a cat and a dog"), ("cat",), ())
    blob(maps, 2, (0, 0), (3, 5))
    with pytest.raises(PhraseError, match="'dog' was not recorded; recorded are: cat"):
        maps["dog"]
    with pytest.raises(PhraseError, match="'bird' is not in the prompt"):
        maps["bird"]
    empty = Maps(texts(tokenizer, ""), None, ())
    assert empty.words == ()
    with pytest.raises(PhraseError, match="no words"):
        empty["cat"]
    long = Maps(texts(tokenizer, "cat " * 80), None, ())
    assert long.words[-1] == "cat#75"
    q, k = tensors(1, 2, 15, 40, dtype=torch.float32)
    with pytest.raises(PhraseError, match="mid.attn2 has 40 text rows"):
        long.add(call_of(q, k, step=step()), slice(0, 1), None)


def test_settings_out_of_range():
    with pytest.raises(ControlError, match="cannot keep 'word'"):
        TokenMaps(keep=("word",))  # type: ignore[arg-type]
    for window in ((0.5, 0.5), (-0.1, 1), (0, 1.5), (1, 0)):
        with pytest.raises(ControlError, match="window is"):
            TokenMaps(window=window)
    with pytest.raises(ControlError, match=r"one after the other, as TokenMaps\('cat', 'dog'\); not \('cat',"):
        TokenMaps(("cat", "dog"))  # type: ignore[arg-type]
    assert TokenMaps("cat", "dog").phrases == ("cat", "dog") and TokenMaps(keep="step").keep == ("step",)
    own = Site("mid.attn1", "self", 4, 8, 0, 1)
    assert with_text((own, CROSS), None) == (CROSS,)
    with pytest.raises(NoSiteError, match="selected are only self"):
        with_text((own, CROSS), "self")


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [torch.zeros(3, 5), torch.rand(3, 5) * 1e-5, torch.full((3, 5), math.nan)])
def test_pictures_take_any_map(values):
    picture = Image.effect_mandelbrot((50, 30), (-2, -1, 1, 1), 50)
    assert heatmaps.overlay(picture, values).size == (50, 30)
    assert heatmaps.heat(values, (50, 30)).mode == "RGB"


def test_heat_glows_where_the_map_is_high():
    values = torch.zeros(3, 5)
    values[2, 0] = 1
    over = heatmaps.overlay(Image.new("RGB", (50, 30), (90, 90, 90)), values).convert("L")
    y, x = divmod(int(torch.frombuffer(bytearray(over.tobytes()), dtype=torch.uint8).argmax()), 50)
    assert x < 10 and y >= 20


def test_heat_has_the_colours_of_matplotlib():
    from matplotlib import colormaps

    values = torch.tensor([[0.0, 1.0]])
    drawn = np.asarray(heatmaps.heat(values, (2, 1)))
    assert (drawn[0] == colormaps["inferno"]([0.0, 1.0], bytes=True)[:, :3]).all()


def test_a_sheet_has_one_titled_picture_per_map():
    picture = Image.new("RGB", (60, 40), (200, 40, 40))
    words = {"cat": torch.rand(4, 6), "a very long phrase that cannot fit" * 3: torch.rand(4, 6)}
    page = grid([heatmaps.cells(picture, words)])
    assert page.width == 3 * (60 * 5 + GAP) + GAP and page.height > 200
    assert page.getpixel((GAP + 5, page.height // 2)) == (200, 40, 40)
