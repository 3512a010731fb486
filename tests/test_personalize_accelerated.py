"""Accumulated gradients, mixed precision, and the contrast of words, in a whole training."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from attnctl.errors import ControlError
from attnctl.maps.live import Live
from attnctl.pipelines import Personalizer
from attnctl.pipelines.personalize import trainer as trainer_file
from attnctl.pipelines.personalize.accelerated import accelerated, check_precision, peak_memory
from attnctl.pipelines.personalize.losses import of_phrases
from attnctl.pipelines.personalize.settings import settings_of

pytestmark = pytest.mark.filterwarnings("ignore::attnctl.errors.AttnctlWarning")  # random weights see no cat anywhere

FEW = {"steps": 2, "rows": 2, "view_count": 2, "kv_rate": 1e-3, "word_rate": 1e-3}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene():
    """A picture, and where its two things are."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    masks = {noun: Image.new("L", (32, 32)) for noun in ("cat", "dog")}
    for noun, box in (("cat", (4, 8, 14, 24)), ("dog", (18, 8, 30, 24))):
        masks[noun].paste(255, box)
    return {"picture": picture, "masks": masks}


def learnt(scene, pipe=None, **settings):
    told = []
    found = Personalizer(pipe or tiny.sd1(), "cat, dog", **FEW | settings).learn(**scene, watch=told.append)
    return found, told


@pytest.mark.parametrize("subsets", ["uniform", "loss"])
def test_two_passes_of_two_rows_are_one_of_four(scene, subsets):
    """All losses that add up over rows: denoising, binding, separation, guidance and keeping."""
    settings = {"bind": 0.1, "separate": 0.1, "guide": 0.5, "subsets": subsets}
    whole, whole_told = learnt(scene, rows=4, **settings)
    parts, parts_told = learnt(scene, rows=2, accumulate=2, **settings)
    other, _ = learnt(scene, rows=2, **settings)
    for word in whole.words:
        assert torch.allclose(whole.words[word][0], parts.words[word][0], atol=1e-6)
    for name, (down, up) in whole.lora.items():
        change, again = up @ down, parts.lora[name][1] @ parts.lora[name][0]
        assert (change - again).norm() < 1e-2 * change.norm(), name  # Adam makes signs of tiny gradients
    assert not torch.allclose(whole.words["<v1>"][0], other.words["<v1>"][0], atol=1e-4)
    for one, two in zip(whole_told, parts_told, strict=True):
        assert one.step == two.step and two.losses == pytest.approx(one.losses, rel=1e-3)


def test_accumulating_goes_on_from_the_middle_of_a_step_to_the_same_weights(scene, tmp_path, monkeypatch):
    settings = FEW | {"steps": 4, "accumulate": 2}
    whole, _ = learnt(scene, **settings)
    passes, old = [], trainer_file.losses_of

    def stop(*given):
        passes.append(given)
        if len(passes) == 6:  # the second pass of the third step
            raise KeyboardInterrupt
        return old(*given)

    monkeypatch.setattr(trainer_file, "losses_of", stop)
    with pytest.raises(KeyboardInterrupt):
        Personalizer(tiny.sd1(), "cat, dog", **settings).learn(**scene, folder=tmp_path, every=2)
    monkeypatch.setattr(trainer_file, "losses_of", old)
    steps = []
    again = Personalizer(tiny.sd1(), "cat, dog", **settings)
    found = again.learn(**scene, watch=lambda one: steps.append(one.step), folder=tmp_path, resume=True, every=2)
    assert steps == [3, 4] and all(torch.equal(found.words[word][0], whole.words[word][0]) for word in whole.words)
    with pytest.raises(ControlError, match="was begun with accumulate=2, not 1"):
        Personalizer(tiny.sd1(), "cat, dog", **settings | {"accumulate": 1}).learn(
            **scene, folder=tmp_path, resume=True
        )


def test_bfloat16_narrows_the_model_and_neither_maps_nor_losses_nor_weights(scene, monkeypatch):
    seen, old = [], trainer_file.losses_of

    def look(settings, rows, errors, states, live):
        seen.append((errors.dtype, live.maps().dtype, old(settings, rows, errors, states, live)))
        return seen[-1][-1]

    def keys(pipe):
        """What the keys of the pipeline's first cross-attention come in, call by call."""
        found = []
        module = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
        module.register_forward_hook(lambda module, args, output: found.append(output.dtype))
        return found

    monkeypatch.setattr(trainer_file, "losses_of", look)
    settings = {"bind": 0.1, "separate": 0.1, "guide": 0.5, "contrast": 0.1}
    pipe, other = tiny.sd1(), tiny.sd1()
    found, wide_found = keys(pipe), keys(other)
    narrow, _ = learnt(scene, pipe, precision="bf16", **settings)
    assert found[-1] == torch.bfloat16 and pipe.unet.dtype == torch.float32
    for errors, maps, losses in seen:
        assert errors == maps == losses.total.dtype == torch.float32
        assert {one.dtype for one in losses.told.values()} == {torch.float32}
    wide, _ = learnt(scene, other, **settings)
    assert set(wide_found) == {torch.float32}
    one, two = narrow.words["<v1>"][0], wide.words["<v1>"][0]
    assert one.dtype == torch.float32 and not torch.equal(one, two) and torch.allclose(one, two, atol=1e-2)


def test_another_accelerator_of_the_process_finds_its_state_as_it_was(scene):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kinds = (PartialState, AcceleratorState, GradientState)
    before = [dict(kind._shared_state) for kind in kinds]
    try:
        own = Accelerator(cpu=True, gradient_accumulation_steps=3)
        with accelerated(settings_of("ours", precision="bf16", accumulate=2), CPU, None) as inner:
            assert inner.mixed_precision == "bf16" and inner.gradient_accumulation_steps == 2
        assert own.mixed_precision == "no" and own.gradient_accumulation_steps == 3
        assert Accelerator(cpu=True).state.mixed_precision == "no"
    finally:
        for kind, kept in zip(kinds, before, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(kept)


def test_what_accelerate_cannot_do_is_told(monkeypatch):
    with pytest.raises(ControlError, match="precision fp16 needs a GPU; on the processor take bf16"):
        Personalizer(tiny.sd1(), "cat", precision="fp16")
    check_precision(settings_of("ours", precision="fp16"), torch.device("cuda"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ControlError, match="concepts are learnt by one process"):
        Personalizer(tiny.sd1(), "cat")


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"accumulate": 0}, "accumulate is a whole number from 1"),
        ({"precision": "half"}, "precision is one of no, bf16, fp16"),
        ({"contrast": -1.0}, "contrast"),
        ({"contrast": 1.0, "rows": 1}, "contrast compares the rows of a pass; set rows to 2"),
        ({"temperature": 0}, "temperature is a number above 0"),
    ],
)
def test_settings_that_make_no_sense_are_told(settings, told):
    with pytest.raises(ControlError, match=told):
        settings_of("ours", **settings)


def test_the_most_memory_is_told_in_bytes():
    assert 2**26 < peak_memory(CPU) < 2**40


# --- the contrast of words --------------------------------------------------------------------------------------------


def test_states_of_phrases_are_means_over_their_tokens():
    states = torch.arange(2 * 5 * 3, dtype=torch.float32).view(2, 5, 3)
    found = of_phrases(states, Live.of([[[1], [2, 3]], [[4], []]]))
    assert torch.equal(found[0], torch.stack([states[0, 1], states[0, 2:4].mean(0)]))
    assert torch.equal(found[1], torch.stack([states[1, 4], torch.zeros(3)]))


def test_contrast_is_told_and_keeps_words_apart(scene):
    settings = {"steps": 6, "word_rate": 0.02, "bind": 0.0, "separate": 0.0, "subsets": "all", "keep": 0.0}
    plain, plain_told = learnt(scene, **settings)
    kept, told = learnt(scene, contrast=1.0, **settings)
    assert "contrast" not in plain_told[0].losses and told[-1].losses["contrast"] < told[0].losses["contrast"]
    assert not torch.equal(plain.words["<v1>"][0], kept.words["<v1>"][0])


def test_contrast_of_one_concept_is_told():
    with pytest.raises(ControlError, match="contrast keeps concepts apart, and there is one"):
        Personalizer(tiny.sd1(), "cat", contrast=0.1)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_takes_them_and_tells_the_memory(command, scene, monkeypatch, tmp_path):
    monkeypatch.setattr("attnctl.app.personalize_command.Samples.save", lambda self, path: path)  # takes long
    tiny.sd1().save_pretrained(tmp_path / "model")
    scene["picture"].save("mine.png")
    words = ["personalize", "mine.png", "--concepts", "cat", "--model", "model", "--threads", "1", "--set", "steps=1"]
    words += ["--set", "rows=1", "--set", "view_count=2", "--set", "regular_rows=0"]
    code, out, _ = command(*words, "--accumulate", "2", "--precision", "bf16", "--out", "mine")
    assert code == 0 and out[0].startswith("1 steps; in the last one: denoise ") and out[0].endswith(" MiB of memory")
    shown = command("concepts", "info", "mine")[1][-1]
    assert "accumulate=2" in shown and "precision=bf16" in shown


@pytest.mark.parametrize(
    "words, told",
    [
        (["--accumulate", "0"], "accumulate is a whole number from 1"),
        (["--precision", "half"], "precision is one of no, bf16, fp16"),
        (["--accumulate", "2", "--set", "accumulate=3"], "--accumulate 2 and --set accumulate=3: give one"),
    ],
)
def test_the_command_refuses_in_one_line(command, scene, words, told):
    scene["picture"].save("mine.png")
    code, out, err = command("personalize", "mine.png", "--concepts", "cat", *words)
    assert code == 2 and out == [] and len(err) == 1 and told in err[0]
