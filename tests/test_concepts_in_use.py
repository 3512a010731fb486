"""Concepts that were learnt, in use: other pipelines, other LoRAs, and controls on their words."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from attnctl import attach
from attnctl.concepts import read_learnt
from attnctl.errors import PhraseError
from attnctl.pipelines import Personalizer
from attnctl.processors import AStar, Calibrate, Regions, TokenMaps

pytestmark = pytest.mark.filterwarnings("ignore::attnctl.errors.AttnctlWarning")  # random weights see no cat anywhere

FEW = {"steps": 3, "rows": 2, "regular": 2, "view_count": 3, "kv_rate": 0.05, "word_rate": 0.05, "masks": "none"}
PROMPT = "a <v1> cat and a <v2> dog"
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    return Personalizer(tiny.sd1(), "cat, dog", **FEW).learn(picture).save(tmp_path_factory.mktemp("concepts"))


@pytest.fixture
def pipe(folder):
    made = tiny.sd1()
    read_learnt(folder).add_to(made)
    return made


def drawn(pipe, prompt=PROMPT, **arguments):
    settings = {"num_inference_steps": 4, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipe(prompt, **settings | arguments).images


def picture(pipe):
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (side, side, 3), np.uint8))


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_repainting_with_a_word_and_its_maps(pipe, kind):
    other = kind.from_pipe(pipe)
    given = {"image": picture(pipe), "strength": 0.9}
    if kind is StableDiffusionInpaintPipeline:
        mask = Image.new("L", given["image"].size)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        given["mask_image"] = mask
        given |= {"height": mask.height, "width": mask.width}
    with attach(other, TokenMaps("<v1>", "<v2> dog")) as run:
        own = drawn(other, **given)
    assert run.maps["<v1>"].shape[0] == 1 and torch.isfinite(own).all()
    assert not torch.allclose(own, drawn(other, "a cat and a dog", **given), atol=1e-3)


def test_beside_a_second_lora_each_does_its_part(folder, tmp_path):
    """The concepts' files and another LoRA, by stock loaders: taking the other one off gives the concepts alone."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    torch.manual_seed(0)
    save_file({name: torch.randn_like(x) * 0.3 for name, x in tensors.items()}, tmp_path / "other.safetensors")
    pipe = tiny.sd1()
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name="mine")
    for word in ("v1", "v2"):
        pipe.load_textual_inversion(folder / f"{word}.safetensors")
    mine = drawn(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="other.safetensors", adapter_name="other")
    pipe.set_adapters(["mine", "other"], [1.0, 0.7])
    with attach(pipe, Regions({"<v1> cat": LEFT, "<v2> dog": RIGHT})):
        both = drawn(pipe)
    assert torch.isfinite(both).all() and not torch.allclose(mine, both, atol=1e-3)
    pipe.set_adapters(["mine"], [1.0])
    assert torch.equal(drawn(pipe), mine)


@pytest.mark.parametrize(
    "controls",
    [
        [Regions({"<v1> cat": LEFT, "<v2> dog": RIGHT})],
        [AStar("<v1> cat", "<v2> dog", relative=0.1, window=(0, 1))],
        [Calibrate("<v1> cat", "<v2> dog", relative=0.1, window=(0, 1))],
        [Regions({"<v1>": LEFT, "<v2>": RIGHT}), AStar("<v1>", "<v2>", relative=0.1, window=(0, 1))],
    ],
    ids=["regions", "astar", "calibrate", "both"],
)
def test_controls_act_on_the_words(pipe, controls):
    plain = drawn(pipe)
    with attach(pipe, *controls):
        held = drawn(pipe)
    assert torch.isfinite(held).all() and not torch.equal(plain, held)
    assert torch.equal(plain, drawn(pipe))


def test_a_word_that_nobody_learnt_is_told(pipe):
    with attach(pipe, Calibrate("<v3> cat")), pytest.raises(PhraseError, match="'<v3> cat' is not in the prompt"):
        drawn(pipe)
