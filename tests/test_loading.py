"""`load`: what it takes, and how a model that is not whole or not there is named."""

import json
import shutil

import pytest
import tiny
import torch

import attnctl
from attnctl.errors import AttnctlError
from attnctl.loading import MODELS, ModelError, check_folder, embedded


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.sd1().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "tiny")


def test_folder_loads_in_the_type_asked_for(whole):
    pipe = attnctl.load(whole, dtype="bfloat16", device="cpu")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    assert attnctl.load(str(whole)).unet.dtype == torch.float32


def test_loading_is_silent_and_leaves_the_loggers_as_they_were(whole, capfd):
    from diffusers.utils import logging

    attnctl.load(whole)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize("name", embedded())
def test_embedded_model_loads_whole(name):
    check_folder(MODELS / name)
    assert attnctl.load(name).dtype == torch.float32


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model_index.json", "is missing: it is no diffusers pipeline folder"),
        ("unet/config.json", "holds none of config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "holds none of .*safetensors"),
        ("tokenizer/tokenizer.json", "holds none of tokenizer.json"),
        ("scheduler/scheduler_config.json", "holds none of config.json, scheduler_config.json"),
        ("text_encoder", "text_encoder is missing"),
    ],
)
def test_missing_file_is_named(folder, file, said):
    path = folder / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelError, match=f"{folder}.*{said}") as caught:
        attnctl.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_file_cut_short_is_named(folder, file, kept):
    path = folder / file
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ModelError, match=f"{path} (is cut short|cannot be read)"):
        attnctl.load(folder)


def test_shard_that_is_missing_is_named(folder):
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model-00001-of-00002.safetensors")
    shards = {
        "a": "diffusion_pytorch_model-00001-of-00002.safetensors",
        "b": "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ModelError, match="holds no diffusion_pytorch_model-00002-of-00002.safetensors"):
        attnctl.load(folder)


def test_a_component_the_pipeline_does_without_need_not_be_there(whole):
    assert json.loads((whole / "model_index.json").read_text())["safety_checker"] == [None, None]
    check_folder(whole)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nonesuch", "unknown model 'nonesuch': it is neither an embedded model nor a folder; embedded models: "),
        ("./nonesuch", "unknown model './nonesuch': it is no folder"),
        ("a/b/c", "unknown model 'a/b/c': it is no folder"),
        (__file__, "is a file: a model is a folder"),
    ],
)
def test_unknown_model(model, said):
    with pytest.raises(ModelError, match=said):
        attnctl.load(model)


def test_hub_id_out_of_reach_is_named(monkeypatch, capfd):
    from diffusers import DiffusionPipeline

    def from_pretrained(model, **options):
        assert (model, options["revision"], options["dtype"]) == ("org/name", "main", torch.float32)
        assert "local_files_only" not in options
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match=r"cannot load 'org/name' from the hub: .* \(no route to the hub\)$"):
        attnctl.load("org/name", revision="main")


def test_wrong_device_and_dtype(whole):
    with pytest.raises(AttnctlError, match="device 'quantum' cannot be used here: torch knows no such device; names"):
        attnctl.load(whole, device="quantum")
    with pytest.raises(AttnctlError, match="unknown dtype 'float8': choose from float32, float16, bfloat16"):
        attnctl.load(whole, dtype="float8")
