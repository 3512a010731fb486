"""Word maps of whole pipelines, against attention written out."""

import math
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from eager import written_out
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnctl
from attnctl import attach
from attnctl.engine.run import NO_WORDS
from attnctl.errors import ControlError, PhraseError
from attnctl.maps.recorder import TokenMaps
from attnctl.processors import Excitation, Regions

TEXTS = ["a cat and a red dog", "a dog and a backpack"]
T5_OFFSET = {"sd3": 77, "sd35": 77, "flux": 0}


@pytest.fixture(scope="module")
def pipes():
    return {name: make() for name, make in tiny.FAMILIES.items()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("cfg", "few"), [(True, 0), (False, 512)])
def test_maps_equal_those_of_attention_written_out(pipes, family, cfg, few, monkeypatch):
    monkeypatch.setattr("attnctl.maps.probabilities.FEW", few)  # 0: the route of large models, by the kernel's row sums
    pipe, sites = pipes[family], attnctl.sites(pipes[family])
    settings: dict[str, Any] = {} if cfg else {"guidance_scale": 1.0 if family == "flux" else 0.0}
    if cfg and family == "flux":
        settings = {"true_cfg_scale": 4.0, "negative_prompt": "a bird"}
    with written_out(tiny.denoiser(pipe)) as forwards:
        want = tiny.draw(pipe, TEXTS, **settings)
    with attach(pipe, TokenMaps(keep=("step", "layer", "head"))) as run:
        got = tiny.draw(pipe, TEXTS, **settings)
    torch.testing.assert_close(got, want, atol=5e-3, rtol=0.05)  # the same picture, but for rounding
    with attach(pipe, TokenMaps()) as mean:
        tiny.draw(pipe, TEXTS, **settings)

    assert [len(one) for one in forwards] == [len(sites)] * len(forwards)
    if family == "flux" and cfg:
        forwards = forwards[::2]  # conditional first
    first = 2 if cfg and family != "flux" else 0
    assert len(forwards) == 2 and run.maps.steps == (0, 1)
    for phrase in ("dog", "backpack", "red dog"):
        rows = [positions_by_hand(pipe, family, text, phrase) for text in TEXTS]
        every = []
        for step, calls in enumerate(forwards):
            for site, p in zip(sites, calls, strict=True):
                if site.kind not in ("cross", "joint"):
                    continue
                h, w = site.grid(16, 24)
                one = p[first : first + 2]
                if site.kind == "joint":
                    text = one.shape[-1] - h * w
                    one = one[:, :, text:, :text] if site.order == "text-first" else one[:, :, : h * w, h * w :]
                one = torch.stack([one[i][..., rows[i]].sum(-1) for i in range(2)]).unflatten(-1, (h, w))
                for head in range(site.heads):
                    kept = run.maps.get(phrase, step=step, layer=site.name, head=head)
                    torch.testing.assert_close(kept, one[:, head], atol=2e-5, rtol=1e-3)
                every.append(one.mean(1))
        finest = max((one.shape[-2:] for one in every), key=math.prod)
        fitted = [F.interpolate(one[:, None], finest, mode="bilinear", align_corners=False)[:, 0] for one in every]
        average = torch.stack(fitted).mean(0)
        torch.testing.assert_close(mean.maps[phrase], average, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(run.maps[phrase], average, atol=2e-5, rtol=1e-3)


def positions_by_hand(pipe, family, text, phrase):
    """Rows of a phrase, spelled out: what each tokenizer makes of the words before and including it."""
    head, found, _ = text.partition(phrase)
    if not found:
        return []
    rows = []
    if family != "flux":
        before = len(pipe.tokenizer(head, add_special_tokens=False).input_ids)
        count = len(pipe.tokenizer(phrase, add_special_tokens=False).input_ids)
        rows += range(1 + before, 1 + before + count)
    if family in T5_OFFSET:
        tokenizer = pipe.tokenizer_3 if family != "flux" else pipe.tokenizer_2
        before = len(tokenizer(head.strip(), add_special_tokens=False).input_ids)
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(phrase, add_special_tokens=False).input_ids)
        rows += [T5_OFFSET[family] + before + i for i, piece in enumerate(pieces) if piece != "▁"]
    return rows


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("keep", "few"), [((), 0), ((), 512), (("step", "layer", "head"), 0)])
def test_recording_changes_no_bit_of_the_picture(pipes, family, inference, keep, few, monkeypatch):
    monkeypatch.setattr("attnctl.maps.probabilities.FEW", few)
    pipe = pipes[family]
    with torch.inference_mode(inference):
        plain = tiny.draw(pipe, TEXTS)
        with attach(pipe, TokenMaps(keep=keep)) as run:
            assert torch.equal(tiny.draw(pipe, TEXTS), plain)
    assert run.maps["dog"].shape[0] == 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_row_sums_are_heard_at_every_site(pipes, family, monkeypatch):
    monkeypatch.setattr("attnctl.maps.probabilities.FEW", 0)
    monkeypatch.setattr("attnctl.maps.probabilities.one_hot", None)
    with attach(pipes[family], TokenMaps()) as run:
        tiny.draw(pipes[family], TEXTS)
    assert run.maps["dog"].min() > 0


@pytest.mark.parametrize("family", ["sd1", "sd35", "flux"])
@pytest.mark.parametrize("few", [0, 512])
def test_a_kernel_that_tells_no_row_sums_gives_the_same_maps(pipes, family, few, monkeypatch):
    pipe = pipes[family]
    with attach(pipe, TokenMaps()) as run:
        tiny.draw(pipe, TEXTS)
        plain = run.maps["dog"]
        monkeypatch.setattr("attnctl.maps.probabilities.FEW", few)
        with sdpa_kernel(SDPBackend.MATH):
            tiny.draw(pipe, TEXTS)
        torch.testing.assert_close(run.maps["dog"], plain, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_maps_of_a_batch_are_those_of_single_runs(pipes, family):
    pipe = pipes[family]
    with attach(pipe, TokenMaps()) as run:
        tiny.draw(pipe, TEXTS, num_images_per_prompt=2)
        batch = {phrase: run.maps[phrase] for phrase in ("dog", "red dog", "backpack")}
        for i in range(4):
            tiny.draw(pipe, TEXTS[i // 2], seed=i)
            for phrase, maps in batch.items():
                if phrase in TEXTS[i // 2]:
                    torch.testing.assert_close(run.maps[phrase][0], maps[i], atol=1e-5, rtol=1e-3)
                else:
                    assert maps[i].eq(0).all()


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_maps_under_a_compiled_denoiser(family, monkeypatch):
    monkeypatch.setattr("attnctl.maps.probabilities.FEW", 0)
    torch.compiler.reset()
    pipe = tiny.small(family)
    plain = tiny.draw(pipe, TEXTS)
    with attach(pipe, TokenMaps()) as run:
        tiny.draw(pipe, TEXTS)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, part, torch.compile(getattr(pipe, part), fullgraph=True, backend="aot_eager"))
    with attach(pipe, TokenMaps()) as compiled:
        assert torch.equal(tiny.draw(pipe, TEXTS), plain)
    torch.testing.assert_close(compiled.maps["dog"], run.maps["dog"], atol=1e-5, rtol=1e-3)


def test_the_window_is_a_part_of_the_schedule(pipes):
    pipe = pipes["sd1"]
    early, late = TokenMaps(window=(0, 0.5), keep="step"), TokenMaps("dog", window=(0.5, 1), keep="step")
    with attach(pipe, early), attach(pipe, late) as run:
        tiny.draw(pipe, steps=4)
    assert run.run.state(early).steps == (0, 1) and run.run.state(late).steps == (2, 3)
    with attach(pipe, TokenMaps(window=(0.9, 1))) as run:
        tiny.draw(pipe, steps=2)
        with pytest.raises(ControlError, match="no step was inside the window"):
            run.maps["cat"]


def test_placed_last_it_sees_what_the_others_did(pipes):
    from toys import Bias

    pipe, first, last = pipes["flux"], TokenMaps(), TokenMaps()
    with attach(pipe, TokenMaps()) as run:
        tiny.draw(pipe, steps=1)
        plain = run.maps["cat"]
    with attach(pipe, first, Bias(), last) as run:
        tiny.draw(pipe, steps=1)
    before, after = run.run.state(first)["cat"], run.run.state(last)["cat"]
    assert after[:, 0].mean() > 3 * before[:, 0].mean()  # Bias draws the top of the picture to the first words
    assert (before - plain).abs().max() < (after - plain).abs().max()


def test_words_of_embeddings_must_be_told(pipes):
    pipe = pipes["sd1"]
    embeds, negative = pipe.encode_prompt("a cat and a dog", "cpu", 1, True)
    settings = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with attach(pipe, TokenMaps("cat"), prompt="a cat and a dog") as run:
        tiny.draw(pipe, None, **settings)
    told = run.maps["cat"]
    with attach(pipe, TokenMaps("cat")) as run:
        tiny.draw(pipe, "a cat and a dog")
    assert torch.equal(told, run.maps["cat"])
    with attach(pipe, TokenMaps("bird")), pytest.raises(PhraseError, match="'bird' is not in the prompt"):
        tiny.draw(pipe, "a cat and a dog")


def test_the_picture_of_maps(pipes):
    with attach(pipes["sd1"], TokenMaps()) as run:
        pictures = tiny.draw(pipes["sd1"], TEXTS, output_type="pil")
    assert run.maps.overlay("dog", pictures[1], image=1).size == pictures[1].size == (48, 32)
    wide, narrow = run.maps.picture(pictures), run.maps.picture(pictures, ["dog"])
    assert wide.height == narrow.height and wide.width > 2 * narrow.width


NEGATIVES = {**tiny.FAMILIES, "pixart": tiny.pixart, "chroma": tiny.chroma}


def guided(family: str, negative: Any) -> dict[str, Any]:
    scale = "true_cfg_scale" if family == "flux" else "guidance_scale"
    return {scale: 4.0, "negative_prompt": negative, "steps": 1}


@pytest.mark.parametrize("family", NEGATIVES)
@pytest.mark.parametrize("few", [0, 512])
def test_maps_of_the_negative_prompt(family, few, monkeypatch):
    """At the first step, negative and prompt give the maps that they give in each other's place."""
    monkeypatch.setattr("attnctl.maps.probabilities.FEW", few)
    pipe, other = NEGATIVES[family](), ["a blue cat", "a red and blue dog"]
    with attach(pipe, TokenMaps("cat", "red", "dog")) as swapped:
        tiny.draw(pipe, TEXTS, **guided(family, other))
    with attach(pipe, TokenMaps("blue", "negative:cat", "negative:red dog", keep=("step", "layer"))) as run:
        tiny.draw(pipe, other, **guided(family, TEXTS))
    assert run.maps.words == ("blue", "negative:cat", "negative:red dog") and run.maps.steps == (0,)
    want = swapped.maps
    torch.testing.assert_close(run.maps["negative:cat"], want["cat"], atol=1e-5, rtol=1e-3)
    assert not run.maps["negative:cat"][1].any() and run.maps["negative:cat"][0].any()
    torch.testing.assert_close(run.maps["negative:red dog"][0], (want["red"] + want["dog"])[0], atol=1e-5, rtol=1e-3)
    layer = run.maps.layers[-1]
    assert run.maps.get("negative:cat", "max", step=0, layer=layer)[0].max() == 1.0
    with attach(pipe, TokenMaps("negative:cat")) as alone:
        tiny.draw(pipe, other, **guided(family, TEXTS))
    torch.testing.assert_close(alone.maps["negative:cat"], want["cat"], atol=1e-5, rtol=1e-3)


def test_phrases_of_a_negative_prompt_that_is_not_there(pipes):
    pipe = pipes["sd1"]
    for settings, said in (
        ({"negative_prompt": "a dog"}, "negative prompt: 'cat' is not in the prompt; its words are: a, dog"),
        ({}, "negative prompt: 'cat' is not in the prompt; the prompt has no words"),
        ({"negative_prompt": "a cat", "guidance_scale": 1.0}, "no negative prompt in words"),
    ):
        with attach(pipe, TokenMaps("negative:cat")), pytest.raises(PhraseError, match=said):
            tiny.draw(pipe, **settings)
    with attach(pipes["flux"], TokenMaps("negative:cat")), pytest.raises(PhraseError, match="no negative prompt"):
        tiny.draw(pipes["flux"])
    with attach(pipe, TokenMaps("cat")) as run:
        tiny.draw(pipe, negative_prompt="a dog")
    with pytest.raises(PhraseError, match=r"name it, as TokenMaps\('negative:dog'\)"):
        run.maps["negative:dog"]
    with attach(pipe, Regions({"negative:cat": (0, 0, 0.5, 1)})), pytest.raises(PhraseError, match="TokenMaps records"):
        tiny.draw(pipe, negative_prompt="a cat")
    with attach(pipe, Excitation("negative:cat")), pytest.raises(PhraseError, match="TokenMaps records"):
        tiny.draw(pipe, negative_prompt="a cat")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_maps_of_embeddings_whose_words_nobody_told(pipes, family, monkeypatch):
    """The picture is drawn, with a warning and no maps; phrases that were named are an error."""
    pipe = pipes[family]
    limit = {} if hasattr(pipe, "unet") else {"max_sequence_length": 16}
    encoded = pipe.encode_prompt(tiny.TEXT, prompt_2=None, **limit) if family == "flux" else None
    if family == "flux":
        embeds = {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[1]}
    else:
        more = {"prompt_2": None} if family != "sd1" else {"num_images_per_prompt": 1, "device": "cpu"}
        more |= {"prompt_3": None, **limit} if family.startswith("sd3") else {}
        encoded = pipe.encode_prompt(tiny.TEXT, do_classifier_free_guidance=True, **more)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        embeds = dict(zip(names, encoded, strict=False))
    plain = tiny.draw(pipe)
    told: list[str] = []
    monkeypatch.setattr(
        "attnctl.maps.recorder.warnings.warn", lambda text, kind, **_: told.append(f"{kind.__name__} {text}")
    )
    with attach(pipe, TokenMaps()) as run:
        assert torch.equal(tiny.draw(pipe, None, **embeds), plain)
    assert told == [f"AttnctlWarning there are no maps: {NO_WORDS}"]
    assert run.maps.words == ()
    with pytest.raises(PhraseError, match=r"say what they mean: attach\(\.\.\., prompt=\.\.\.\)"):
        run.maps["cat"]
    with attach(pipe, TokenMaps("cat")), pytest.raises(PhraseError, match="say what they mean"):
        tiny.draw(pipe, None, **embeds)
