"""Learning concepts on joint attention, SD 3 and FLUX.1: what is noised and predicted, what changes, and the files."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from attnctl import attach
from attnctl.comfy import FUSED, fused_keys
from attnctl.concepts import read_learnt
from attnctl.errors import ControlError, PhraseError, UnsupportedPipelineError
from attnctl.maps.self_maps import SelfMaps
from attnctl.pipelines import Personalizer
from attnctl.pipelines.personalize.keeping import LEVELS, gathered
from attnctl.pipelines.personalize.kinds import denoising_of
from attnctl.pipelines.personalize.masks import look
from attnctl.pipelines.personalize.trainer import StartApart

pytestmark = pytest.mark.filterwarnings("ignore::attnctl.errors.AttnctlWarning")  # random weights see no cat anywhere

FEW = {
    "steps": 3, "rows": 2, "regular_rows": 1, "regular": 2, "view_count": 3, "kv_rate": 0.05, "word_rate": 0.05,
    "masks": "none", "others": (),
}  # fmt: skip
PROMPT = "a <v1> cat and a <v2> dog"
RECIPES = ("ours", "paper")
ENDS = ("attn.add_k_proj.weight", "attn.add_v_proj.weight")


def sd3():
    return tiny.sd3(sample_size=8)


def without_t5():
    pipe = sd3()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    return pipe


def flux(**changes):
    pipe = tiny.flux(**changes)
    pipe.default_sample_size = 8
    return pipe


MODELS = {"sd3": sd3, "flux": flux}


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (40, 32, 3), np.uint8))


def learnt(pipe, picture, **settings):
    return Personalizer(pipe, "cat, dog", **FEW | settings).learn(picture)


def encoders(pipe):
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return [one for name in names if (one := getattr(pipe, name, None)) is not None]


# --- noise, target, denoiser ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_noised_on_straight_lines_and_the_target_is_the_velocity(name):
    pipe = MODELS[name]()
    denoising, seen = denoising_of(pipe), {}
    latents, shares = torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.5])
    text = denoising.text(["a cat", "a dog"], (16, 16))
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, given: seen.update(given, first=args[0]), with_kwargs=True
    )
    got, target = denoising.predict(latents, shares, torch.Generator().manual_seed(3), text)
    hook.remove()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    noisy = 0.75 * latents[0] + 0.25 * noise[0], 0.5 * latents[1] + 0.5 * noise[1]
    assert torch.allclose(target, noise - latents) and got.shape == latents.shape
    if name == "sd3":
        assert torch.allclose(seen["first"], torch.stack(noisy), atol=1e-6)
        assert seen["timestep"].tolist() == [250, 500]
    else:  # as the pipeline packs them
        assert torch.allclose(seen["first"], pipe._pack_latents(torch.stack(noisy), 2, 4, 8, 8), atol=1e-6)
        assert seen["img_ids"].equal(pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32))
        assert seen["timestep"].tolist() == [0.25, 0.5] and seen["guidance"] is None
        assert denoising.unpacked(seen["first"]).allclose(torch.stack(noisy), atol=1e-6)


def test_a_distilled_flux_is_told_a_guidance():
    pipe, seen = flux(guidance_embeds=True), []
    denoising = denoising_of(pipe)
    pipe.transformer.register_forward_pre_hook(lambda _, args, given: seen.append(given["guidance"]), with_kwargs=True)
    text = denoising.text(["a cat"] * 2, (16, 16))
    denoising.predict(torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.4]), torch.Generator(), text)
    assert seen[0].tolist() == [3.5, 3.5]


def test_models_that_read_more_than_the_picture_are_refused():
    for pipe in (flux(in_channels=24, out_channels=16), tiny.inpaint()):
        with pytest.raises(UnsupportedPipelineError, match="reads more than the picture"):
            Personalizer(pipe, "cat, dog")


def test_noise_levels_are_shifted_as_the_scheduler_shifts_them():
    shares = torch.tensor([0.1, 0.5, 0.9])
    pipe = sd3()
    pipe.scheduler = type(pipe.scheduler)(shift=3.0)
    assert torch.allclose(denoising_of(pipe).times(shares), torch.tensor([0.25, 0.75, 27 / 28]))
    pipe = flux()
    pipe.scheduler = type(pipe.scheduler)(use_dynamic_shifting=True)
    pipe.default_sample_size = 64  # 1024 tokens
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    want = pipe.scheduler.time_shift(mu, 1.0, shares)
    assert torch.allclose(denoising_of(pipe).times(shares), want)


def test_min_snr_weights_of_flow_matching():
    weight = denoising_of(sd3()).weight
    assert torch.allclose(weight(torch.tensor([0.5, 0.1]), 5.0), torch.tensor([0.25, 0.05]))
    assert torch.equal(weight(torch.tensor([0.5, 0.1]), None), torch.ones(2))


def test_latents_of_pictures_are_moved_and_scaled():
    from attnctl.pipelines.personalize.examples import encoded
    from attnctl.pipelines.personalize.views import pixels

    pipe, picture = sd3(), Image.new("RGB", (16, 16), (200, 30, 90))
    with torch.no_grad():
        want = (pipe.vae.encode(pixels([picture])).latent_dist.mode() - 0.06) * 1.5
    assert torch.allclose(encoded(pipe, [picture], lambda at: None), want)


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, trained", [("sd3", "full"), ("sd3", "lora"), ("flux", "full")])
def test_only_words_and_keys_and_values_of_the_text_change(picture, name, trained):
    pipe = MODELS[name]()
    tables = [one.get_input_embeddings().weight.detach().clone() for one in encoders(pipe)]
    known = [len(getattr(pipe, f"tokenizer{end}")) for end in ("", "_2", "_3")[: len(tables)]]
    kept = {n: p.detach().clone() for n, p in pipe.transformer.named_parameters()}
    others = [
        {n: p.detach().clone() for n, p in one.named_parameters() if p is not one.get_input_embeddings().weight}
        for one in encoders(pipe)
    ]
    found = learnt(pipe, picture, trained=trained, bind=0.1, separate=0.1)
    after = dict(pipe.transformer.named_parameters())
    for key, old in kept.items():
        new = after.get(key, after.get(".base_layer.".join(key.rsplit(".", 1))))
        assert torch.equal(old, new) != (trained == "full" and key.endswith(ENDS)), key
    blocks = {"sd3": 3, "flux": 2}[name]
    assert len(found.lora) == 2 * blocks and all(up.any() for _, up in found.lora.values())
    for encoder, table, count, frozen in zip(encoders(pipe), tables, known, others, strict=True):
        assert torch.equal(table[:count], encoder.get_input_embeddings().weight[:count])
        assert all(torch.equal(old, dict(encoder.named_parameters())[key]) for key, old in frozen.items())
        assert not any(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("make, widths", [(sd3, [32, 32, 64]), (without_t5, [32, 32]), (flux, [32, 64])])
def test_each_encoder_learns_a_row(picture, make, widths):
    still, moved = (learnt(make(), picture, steps=1, word_rate=rate) for rate in (0.0, 0.05))
    for one, other, width in zip(still.words["<v1>"], moved.words["<v1>"], widths, strict=True):
        assert one.shape == (width,) and not torch.equal(one, other)


def test_nothing_is_learnt_through_the_start_token():
    pipe = sd3()
    text = torch.randn(1, 333, 64, requires_grad=True)
    with attach(pipe, StartApart()) as attached, attached.batch(["a cat"], max_sequence_length=256):
        got = pipe.transformer(torch.randn(1, 4, 8, 8), text, torch.randn(1, 64), torch.tensor([5.0])).sample
    blocks = pipe.transformer.transformer_blocks
    (alone,) = torch.autograd.grad(got.sum(), blocks[0].attn.add_v_proj.bias, retain_graph=True)
    assert alone.any()
    # Only queries of the first row are left of its own; of the last block, which hands on no text, not even these.
    last = blocks[-1].attn
    heard = []
    last.register_forward_pre_hook(
        lambda _, args, given: heard.append(given["encoder_hidden_states"]), with_kwargs=True
    )
    with attach(pipe, StartApart()) as attached, attached.batch(["a cat"], max_sequence_length=256):
        got = pipe.transformer(torch.randn(1, 4, 8, 8), text, torch.randn(1, 64), torch.tensor([5.0])).sample
    (states,) = torch.autograd.grad(got.sum(), heard)
    assert not states[:, 0].any() and states[:, 1:].any(-1).all()


@pytest.mark.parametrize("name, trained", [("sd3", "full"), ("sd3", "lora"), ("flux", "full")])
def test_a_training_goes_on_to_the_same_weights(picture, tmp_path, name, trained):
    settings = FEW | {"steps": 6, "trained": trained, "levels": "logit-normal"}
    whole = Personalizer(MODELS[name](), "cat, dog", **settings).learn(picture)

    def stop(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Personalizer(MODELS[name](), "cat, dog", **settings).learn(picture, stop, folder=tmp_path, every=2)
    again = Personalizer(MODELS[name](), "cat, dog", **settings)
    found = again.learn(picture, folder=tmp_path, resume=True, every=2)
    for word, rows in whole.words.items():
        assert all(torch.equal(one, other) for one, other in zip(rows, found.words[word], strict=True))
    assert all(torch.equal(one[1], found.lora[key][1]) for key, one in whole.lora.items())


def test_gradient_checkpointing_learns_the_same(picture):
    plain, checkpointed = sd3(), sd3()
    checkpointed.transformer.enable_gradient_checkpointing()
    one, other = learnt(plain, picture), learnt(checkpointed, picture)
    assert all(torch.allclose(one.words[w][0], other.words[w][0], atol=1e-5) for w in one.words)


def test_levels_in_the_middle_are_met_more_often(picture):
    from attnctl.pipelines.personalize.concepts import Encoders
    from attnctl.pipelines.personalize.settings import settings_of
    from attnctl.pipelines.personalize.trainer import Trainer

    found = {}
    for levels in ("uniform", "logit-normal"):
        denoising, settings = denoising_of(sd3()), settings_of("ours", levels=levels)
        dice = torch.Generator().manual_seed(0)
        trainer = Trainer(denoising, (), Encoders([], (), settings, dice), settings, dice)
        found[levels] = trainer._times(4000)
    assert abs(found["uniform"].std() - 12**-0.5) < 0.01
    odds = torch.logit(found["logit-normal"])
    assert abs(odds.mean()) < 0.01 and abs(odds.std() - 1) < 0.01


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_states_are_gathered_where_they_enter_each_weight(name):
    """Against all states of two captions, of words and of padding, kept as they passed."""
    pipe = MODELS[name]()
    denoising, passed = denoising_of(pipe), []
    captions, latents = ["", "a cat and a dog"], torch.randn(3, 4, 8, 8)
    module = pipe.transformer.transformer_blocks[1].attn.add_k_proj
    module.register_forward_pre_hook(lambda _, args: passed.append(args[0].detach()))
    found = gathered(denoising, captions, latents, 0)
    assert len(found) == len(denoising.keys_and_values)
    states, padding = torch.cat(passed), denoising.padding(captions).repeat(LEVELS, 1)
    assert states.shape[:2] == padding.shape and 0 < (~padding[0]).sum() < (~padding[1]).sum()
    want = torch.stack([states[rows].T @ states[rows] / rows.sum() for rows in (~padding, padding)]).mean(0)
    key, value, other = (f"transformer_blocks.{k}.attn.add_{x}_proj.weight" for k, x in ((1, "k"), (1, "v"), (0, "k")))
    assert torch.allclose(found[key], want, rtol=1e-4, atol=1e-4) and torch.equal(found[key], found[value])
    assert not torch.allclose(found[other], want, atol=1e-2)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_self_maps_of_joint_attention_are_those_of_the_picture_alone(name):
    from attnctl import Control, Lane

    class Probe(Control):
        lane = Lane.MAPS

        def sites(self, available):
            return available

        def attend(self, call, proceed):
            seen.append(call)
            return proceed(call)

    pipe, seen, selves = MODELS[name](), [], SelfMaps()
    denoising = denoising_of(pipe)
    with attach(pipe, Probe(), selves) as attached, torch.no_grad():
        with attached.batch(["a cat"], max_sequence_length=denoising.rows) as batch:
            text = denoising.text(["a cat"], (16, 16))
            denoising.predict(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), torch.Generator(), text)
    maps = batch.state(selves).mean()
    want = []
    for call in seen:
        cells = slice(0, 16) if name == "sd3" else slice(-16, None)
        logits = call.q[0, :, cells] @ call.k[0, :, cells].mT * call.q.shape[-1] ** -0.5
        want.append(logits.softmax(-1).mean(0))
    assert maps.shape == (16, 16) and torch.allclose(maps, torch.stack(want).mean(0), atol=1e-5)


def test_masks_are_looked_for_in_joint_attention(picture):
    found = {recipe: look(denoising_of(sd3()), torch.randn(1, 4, 8, 8), ["cat", "dog"], recipe) for recipe in RECIPES}
    for relevant in found.values():
        assert relevant.shape == (3, 4, 4), relevant.shape
        assert relevant.amin((1, 2)).abs().max() < 1e-5 and (relevant.amax((1, 2)) - 1).abs().max() < 1e-3
    assert not found["ours"].allclose(found["paper"])
    with pytest.raises(PhraseError, match="has no start token"):  # FLUX has no CLIP in its blocks
        Personalizer(flux(), "cat, dog", **FEW | {"masks": "paper"}).learn(picture)


def test_given_masks_and_all_losses_on_maps(picture):
    masks = {name: Image.new("L", (32, 40)) for name in ("cat", "dog")}
    masks["cat"].paste(255, (2, 5, 14, 30))
    masks["dog"].paste(255, (18, 5, 30, 30))
    told = []
    Personalizer(sd3(), "cat, dog", **FEW | {"guide": 0.5}).learn(picture, told.append, masks=masks)
    assert told[0].losses.keys() == {"denoise", "binding", "apart", "guide", "keep"}


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sd3, without_t5, flux])
def test_concepts_are_added_to_another_pipeline(picture, tmp_path, make):
    pipe = make()
    folder = learnt(pipe, picture).save(tmp_path)
    other = make()
    read_learnt(folder).add_to(other)
    assert torch.allclose(tiny.draw(pipe, PROMPT), tiny.draw(other, PROMPT), atol=1e-4)
    with pytest.raises(ControlError, match="of another model"):
        read_learnt(folder).add_to(tiny.sd1())


@pytest.mark.parametrize("name, trained", [("sd3", "lora"), ("flux", "full")])
def test_stock_loaders_give_the_pictures_of_the_trained_pipeline(picture, tmp_path, name, trained):
    """SD 3 has no loader for words in diffusers; FLUX takes them encoder by encoder."""
    pipe = MODELS[name]()
    folder = learnt(pipe, picture, trained=trained).save(tmp_path)
    other = MODELS[name]()
    other.load_lora_weights(folder)
    for word in ("v1", "v2"):
        rows = load_file(folder / f"{word}.safetensors")
        if name == "flux":
            for key, end in (("clip_l", ""), ("t5xxl", "_2")):
                parts = {part: getattr(other, part + end) for part in ("tokenizer", "text_encoder")}
                other.load_textual_inversion({f"<{word}>": rows[key]}, token=f"<{word}>", **parts)
            continue
        assert not hasattr(other, "load_textual_inversion")
        for key, end in (("clip_l", ""), ("clip_g", "_2"), ("t5xxl", "_3")):
            tokenizer, encoder = getattr(other, f"tokenizer{end}"), getattr(other, f"text_encoder{end}")
            tokenizer.add_tokens([f"<{word}>"])
            encoder.resize_token_embeddings(max(len(tokenizer), encoder.get_input_embeddings().num_embeddings))
            with torch.no_grad():
                encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(f"<{word}>")] = rows[key][0]
    own, loaded = tiny.draw(pipe, PROMPT), tiny.draw(other, PROMPT)
    assert torch.allclose(own, loaded, atol=1e-4)
    assert not torch.allclose(own, tiny.draw(MODELS[name](), PROMPT), atol=1e-2)


def test_the_files_of_a_folder(picture, tmp_path):
    folder = learnt(without_t5(), picture).save(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "concepts.json", "pytorch_lora_weights.safetensors", "comfy_lora.safetensors",
        "v1.safetensors", "v2.safetensors",
    }  # fmt: skip
    assert load_file(folder / "v1.safetensors").keys() == {"clip_l", "clip_g"}
    keys = load_file(folder / "pytorch_lora_weights.safetensors").keys()
    assert all(key.startswith("transformer.transformer_blocks.") for key in keys)


def comfy_change(file, modules):
    """What ComfyUI adds to each weight, by its rule for plain names: `NAME.lora_B.weight @ NAME.lora_A.weight`."""
    return {name: file[f"{name}.lora_B.weight"] @ file[f"{name}.lora_A.weight"] for name in modules}


@pytest.mark.parametrize("family, rank", [("SD3", 3), ("SD3", 8), ("FLUX", 3), ("FLUX", 8)])
def test_comfyui_adds_the_same_to_its_fused_weights(family, rank):
    """To `qkv` of the text in each block: nothing to queries, below that keys, below that values."""
    torch.manual_seed(0)
    lora = {
        f"transformer_blocks.{block}.attn.add_{part}_proj": (torch.randn(rank, 10), torch.randn(10, rank))
        for block in (0, 11) for part in "vk"
    }  # fmt: skip
    names = {block: f"diffusion_model.{FUSED[family].format(block)}" for block in (0, 11)}
    file = fused_keys(lora, family)
    assert len(file) == 4
    if family == "SD3":
        assert names[11] == "diffusion_model.joint_blocks.11.context_block.attn.qkv"
    else:
        assert names[11] == "diffusion_model.double_blocks.11.txt_attn.qkv"
    for block, name in names.items():
        change = comfy_change(file, [name])[name]
        parts = [lora[f"transformer_blocks.{block}.attn.add_{part}_proj"] for part in "kv"]
        want = torch.cat([torch.zeros(10, 10), *(up @ down for down, up in parts)])
        assert change.shape == (30, 10) and torch.allclose(change, want, atol=1e-5)
        assert file[f"{name}.lora_A.weight"].shape[0] == min(2 * rank, 10)


def test_what_has_no_name_in_comfyui_is_told():
    pair = torch.zeros(2, 4), torch.zeros(4, 2)
    with pytest.raises(ControlError, match="to_out has no name|to_out makes no queries"):
        fused_keys({"transformer_blocks.0.attn.to_out": pair}, "SD3")


def test_a_folder_of_concepts_is_a_model(command, picture, tmp_path):
    """Learn, then draw with what was learnt, from the command line alone."""
    sd3().save_pretrained(tmp_path / "tiny")
    picture.save(tmp_path / "mine.png")
    few = [word for name, value in FEW.items() if name != "others" for word in ("--set", f"{name}={value}")]
    words = ["personalize", "mine.png", "--concepts", "cat, dog", "--model", "./tiny", "--out", "mine", *few]
    code, out, err = command(*words)
    assert code == 0 and "mine/comfy_lora.safetensors" in out and out[-1] == "mine/sample.png", err
    code, out, err = command("concepts", "info", "mine")
    assert code == 0 and out[1] == "<v1> cat  (32 + 32 + 64 numbers)"
    code, out, err = command("generate", PROMPT, "--model", "mine", "--steps", "2", "--maps")
    assert code == 0 and len(out) == 2
