"""Maps of phrases, word by word and differentiable, and the step of the latents: from formulas, without a pipeline."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from attnctl.engine.sites import Site
from attnctl.errors import NoSiteError, PhraseError
from attnctl.processors import Segregation
from attnctl.processors.latents.map_gradient import (
    PhraseTokens,
    blur,
    coarsest,
    default_sites,
    descend,
    gradients,
    lowest_peak,
    phrase_maps,
    phrase_tokens,
    step_size,
    words_of,
)
from attnctl.processors.segregation import segregation_loss
from attnctl.words.phrases import TextStream, positions


def fields(*rows, seed=0):
    torch.manual_seed(seed)
    return torch.rand(*rows, dtype=torch.float64)


# --- preparation of maps ----------------------------------------------------------------------------------------------


def request_for(*images, phrases=2):
    """PhraseTokens of images given as tuples of token counts per phrase, after two tokens of no phrase."""
    most = max(2 + sum(image) for image in images)
    members, real = torch.zeros(len(images), phrases, most), torch.zeros(len(images), most, dtype=torch.bool)
    for i, image in enumerate(images):
        at = 2
        for j, count in enumerate(image):
            members[i, j, at : at + count] = 1
            at += count
        real[i, :at] = True
    return SimpleNamespace(members=members.double(), real=real)


def test_the_kernel_of_attend_and_excite():
    one = torch.zeros(1, 1, 5, 7)
    one[0, 0, 2, 3] = 1
    out = blur(one)[0, 0]
    assert out.sum() == pytest.approx(1)
    assert [round(float(out[2 + i, 3 + j]), 3) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))] == [
        0.332,
        0.122,
        0.122,
        0.045,
    ]
    torch.testing.assert_close(blur(torch.ones(2, 3, 4, 6)), torch.ones(2, 3, 4, 6))  # nothing is lost at the borders


def test_attend_and_excite_lets_the_prompts_tokens_compete():
    p = torch.full((1, 75, 4, 4), 0.2 / 74)
    p[:, 0] = 0.05
    request = SimpleNamespace(members=torch.zeros(1, 1, 75), real=torch.ones(1, 75, dtype=torch.bool))
    request.members[0, 0, 0] = 1
    got = phrase_maps(p, request, "attend-and-excite")
    want = math.exp(5) / (math.exp(5) + 74 * math.exp(20 / 74))
    torch.testing.assert_close(got, torch.full_like(got, want))
    assert 0.58 < want < 0.63


@pytest.mark.parametrize("preparation", ["attend-and-excite", "attend-and-excite-padded", "share", "mean"])
def test_tokens_of_a_phrase_are_summed_and_fillers_ignored(preparation):
    p = fields(2, 5, 4, 5) * 0.1
    request = request_for((2, 1), (1, 1))
    both = phrase_maps(p, request, preparation)
    assert both.shape == (2, 2, 4, 5)
    alone = request_for((1, 1))
    torch.testing.assert_close(phrase_maps(p[1:, :4], alone, preparation), both[1:])
    if preparation == "mean":
        torch.testing.assert_close(both[0, 0], p[0, 2] + p[0, 3])
    if preparation == "share":
        torch.testing.assert_close(both.sum((-2, -1)), torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("preparation", ["attend-and-excite", "share", "mean"])
def test_gradients_equal_finite_differences(preparation):
    p = (fields(2, 5, 4, 3) * 0.1).requires_grad_()
    request = request_for((2, 1), (1, 1))
    assert torch.autograd.gradcheck(
        lambda p: segregation_loss(phrase_maps(p, request, preparation), [(0, 1)], request.members.any(-1)), p
    )


def test_a_phrase_an_image_does_not_have_is_no_obstacle():
    p = fields(1, 3, 4, 4).requires_grad_()
    request = request_for((1, 0))
    for preparation in ("attend-and-excite", "share", "mean"):
        maps = phrase_maps(p, request, preparation)
        assert maps.isfinite().all() and maps[0, 1].eq(0).all()
        loss = segregation_loss(maps, [(0, 1)], request.members.any(-1))
        assert loss.eq(0).all() and torch.autograd.grad(loss.sum(), p)[0].isfinite().all()


# --- the step ---------------------------------------------------------------------------------------------------------


def test_the_schedule_of_attend_and_excite():
    assert [round(step_size(i, 50), 2) for i in (0, 10, 20, 24, 49)] == [20.0, 18.95, 17.84, 17.38, 14.14]
    assert step_size(0, 1) == step_size(0, 0) == 20


def test_each_image_gets_its_own_gradient_and_a_bad_one_is_dropped():
    z = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 6.0]], requires_grad=True)
    losses = torch.stack([z[0].square().sum(), (z[1] / 0).sum(), 3 * z[2].sum()])
    gradient, finite = gradients(losses, z, torch.tensor([4096.0, 1.0, 0.25]))
    assert finite.tolist() == [True, False, True]
    assert gradient.tolist() == [[2.0, 4.0], [0.0, 0.0], [3.0, 3.0]]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_a_step_down(relative, keep_norm):
    z, g = fields(3, 4, 5, 5), fields(3, 4, 5, 5, seed=1)
    g[1] = 0
    moved = descend(z, g, 0.1, relative, keep_norm)
    assert torch.equal(moved[1], z[1])
    lengths = [one.flatten(1).norm(dim=1) for one in (z, g, moved, moved - z)]
    if keep_norm:
        torch.testing.assert_close(lengths[2], lengths[0])
    else:
        torch.testing.assert_close(lengths[3][[0, 2]], 0.1 * (lengths[0] if relative else lengths[1])[[0, 2]])
    torch.testing.assert_close(descend(z[2:], g[2:], 0.1, relative, keep_norm), moved[2:])


# --- which sites, which tokens ----------------------------------------------------------------------------------------


def cross(*factors):
    return tuple(Site(f"attn{i}", "cross", 8, 40, i, factor) for i, factor in enumerate(factors))


@pytest.mark.parametrize(
    ("latent", "factor"),
    [
        ((64, 64), 4),
        ((96, 96), 4),
        ((64, 96), 4),
        ((48, 64), 4),
        ((16, 16), 1),
        ((16, 24), 1),
        ((8, 8), 1),
        ((40, 40), 2),
    ],
)
def test_the_default_is_the_coarsest_grid_that_still_shows_things(latent, factor):
    sites = cross(1, 2, 4, 8, 4, 2, 1)
    assert {site.factor for site in coarsest(sites, latent)} == {factor}


def test_joint_models_are_read_in_the_middle():
    def joint(n):
        return tuple(Site(f"blocks.{i}", "joint", 24, 64, i, 2, "image-first") for i in range(n))

    for count, middle in ((3, [1]), (4, [1, 2]), (24, [*range(8, 16)]), (1, [0]), (2, [0, 1])):
        assert [site.layer for site in default_sites(joint(count))] == middle
    own = Site("own", "self", 8, 40, 9, 1)
    assert default_sites((own, *cross(1))) == cross(1)
    with pytest.raises(NoSiteError):
        Segregation("cat", "dog").sites((own,))


def test_phrases_of_each_prompt():
    tokenizer = tiny.clip_tokenizer()
    texts = [(TextStream(tokenizer, prompt),) for prompt in ("a cat and a dog", "a red cat", "a dog and a dog")]
    some = phrase_tokens(texts, ["cat", "dog"], columns="phrases")
    assert some.present.tolist() == [[True, True], [True, False], [False, True]]
    assert some.tokens.tolist() == [[2, 5], [3, 0], [2, 5]]
    assert some.real.tolist() == [[True, True], [True, False], [True, True]]
    assert some.members.tolist() == [[[1, 0], [0, 1]], [[1, 0], [0, 0]], [[0, 0], [1, 1]]]
    every = phrase_tokens(texts, ["cat", "dog"], columns="prompt")
    assert every.tokens.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert every.members[0].tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    padded = phrase_tokens(texts, ["cat", "dog"], columns="padded")
    assert padded.tokens.tolist() == [[*range(1, 76)]] * 3 and padded.real.all()
    assert padded.members[1].nonzero().tolist() == [[0, 2]]
    two = [(TextStream(tokenizer, "a cat"), TextStream(tokenizer, "a cat", 77, 16))]
    assert phrase_tokens(two, ["cat"], columns="padded").tokens.tolist() == [[*range(1, 76), *range(78, 92)]]
    with pytest.raises(PhraseError, match="'bird' is not in the prompt; its words are"):
        phrase_tokens(texts, ["cat", "bird"], columns="phrases")


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)])
def test_blur_of_a_single_row_keeps_what_is_flat(shape):
    torch.testing.assert_close(blur(torch.ones(1, 2, *shape)), torch.ones(1, 2, *shape))


# --- what is seen -----------------------------------------------------------------------------------------------------


def text(prompt):
    return (TextStream(tiny.sd1().tokenizer, prompt),)


def test_pieces_of_a_word_are_summed_and_words_averaged():
    maps = torch.tensor([[0.1, 0.0, 0.3, 0.2], [0.2, 0.1, 0.0, 0.0], [0.5, 0.0, 0.0, 0.1]]).view(1, 3, 2, 2)
    one = torch.ones(1, 1, 3)
    split = torch.tensor([[[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]])  # a word of two tokens, a word of one
    rows = torch.arange(3)[None]
    found = lowest_peak(maps, PhraseTokens(rows, rows >= 0, one, split))
    torch.testing.assert_close(found, torch.tensor([(0.3 + 0.5) / 2]))
    whole = lowest_peak(maps, PhraseTokens(rows, rows >= 0, one, one[:, :, None]))
    torch.testing.assert_close(whole, torch.tensor([0.8]))


def test_the_phrase_worst_off_counts_unless_it_is_part_of_a_longer_one():
    found = phrase_tokens([text("a red car and a dog")], ["red car", "car", "dog"], "phrases")
    assert found.whole().tolist() == [[True, False, True]] and found.present.all()
    red, car = found.words[0, 0]
    dog = found.words[0, 2, 0]
    assert torch.equal(car, found.words[0, 1, 0]) and not (red * car).any()
    maps = (0.5 * red / red.sum() + 0.1 * car / car.sum() + 0.4 * dog / dog.sum()).view(1, -1, 1, 1)
    torch.testing.assert_close(lowest_peak(maps, found), torch.tensor([0.3]))


def test_words_of_a_phrase():
    prompt = text("a red car, a red bow and a blue car")
    red, car, blue = (positions(prompt, word) for word in ("red", "car", "blue"))
    first, second = positions(prompt, "red car"), positions(prompt, "blue car")
    for phrase, parts in (
        ("red car", [[row for row in red if row in first], [row for row in car if row in first]]),
        ("blue car", [blue, [row for row in car if row in second]]),
        ("car", [car]),
        ("car#2", [[row for row in car if row in second]]),
    ):
        assert all(parts) and words_of(prompt, phrase, positions(prompt, phrase)) == parts
