"""A whole pipeline of what was learnt: stock diffusers opens it, it draws the same, and it is whole or not there."""

import resource
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import attnctl
from attnctl.errors import ControlError
from attnctl.fusing import fuse, without_adapters
from attnctl.pipelines import Personalizer

pytestmark = pytest.mark.filterwarnings("ignore::attnctl.errors.AttnctlWarning")  # random weights see no cat anywhere

FEW = {"steps": 3, "rows": 2, "regular_rows": 0, "view_count": 3, "kv_rate": 0.05, "word_rate": 0.05, "masks": "none"}
PROMPT = "a <v1> cat and a <v2> dog"


def sdxl():
    pipe = tiny.sdxl()
    pipe.scheduler = tiny.ddim()
    return pipe


MAKE = {"sd1": tiny.sd1, "sdxl": sdxl, "sd3": tiny.sd3, "flux": tiny.flux}


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))


def learnt(pipe, picture, **settings):
    return Personalizer(pipe, "cat, dog", **FEW | settings).learn(picture)


def opened(folder):
    return tiny.quiet(DiffusionPipeline.from_pretrained(folder, local_files_only=True))


@pytest.mark.parametrize(
    "family, trained",
    [("sd1", "full"), ("sd1", "lora"), ("sdxl", "full"), ("sdxl", "lora"), ("sd3", "lora"), ("flux", "full")],
)
def test_stock_diffusers_opens_it_and_draws_what_the_trained_pipeline_draws(picture, tmp_path, family, trained):
    pipe = MAKE[family]()
    learnt(pipe, picture, trained=trained)
    model = tiny.denoiser(pipe)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    other = opened(fuse(pipe, tmp_path / "whole"))
    assert type(other) is type(pipe) and not any("lora" in name for name in tiny.denoiser(other).state_dict())
    own = tiny.draw(pipe, PROMPT)
    assert torch.allclose(own, tiny.draw(other, PROMPT), atol=1e-5 if trained == "full" else 1e-4)
    assert not torch.allclose(own, tiny.draw(MAKE[family](), PROMPT), atol=1e-2)
    assert tiny.denoiser(pipe) is model
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(one, after[name]) for name, one in before.items())
    with attnctl.attach(other, attnctl.processors.Segregation("<v1> cat", "<v2> dog")):
        assert torch.isfinite(tiny.draw(other, PROMPT)).all()


def test_another_lora_is_left_out(picture, tmp_path):
    """What `load_lora_weights` put beside the learnt weights is no part of the whole."""
    folder = learnt(tiny.sd1(), picture).save(tmp_path / "other")
    pipe = tiny.sd1()
    learnt(pipe, picture, seed=1, trained="lora")
    wanted = without_adapters(pipe.unet).state_dict()
    pipe.load_lora_weights(folder, adapter_name="other")
    got = without_adapters(pipe.unet).state_dict()
    assert wanted.keys() == got.keys() and all(torch.equal(one, got[name]) for name, one in wanted.items())


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    pipe = tiny.sd1()
    (tmp_path / "mine").mkdir()
    fuse(pipe, tmp_path / "mine")  # an empty one will do
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(ControlError, match="mine is there already: name a new folder"):
        fuse(pipe, tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ControlError, match="file is there already"):
        fuse(pipe, tmp_path / "file")
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "file") == before


@contextmanager
def little_room(size):
    """No file can become longer: what a full disk does, to the libraries below us as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(tmp_path, size):
    pipe = tiny.sd1()
    unet = pipe.unet
    with little_room(size), pytest.raises(ControlError, match=r"^cannot write \S+/whole: File too large"):
        fuse(pipe, tmp_path / "whole")
    assert list(tmp_path.iterdir()) == [] and pipe.unet is unet


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.sd1().save_pretrained(folder)
    return folder


def test_personalize_and_concepts_fuse_write_the_same_whole(command, picture, model, tmp_path, monkeypatch):
    monkeypatch.setattr("attnctl.app.personalize_command.Samples.save", lambda self, path: path)  # takes long
    picture.save("mine.png")
    few = [word for name, value in FEW.items() for word in ("--set", f"{name}={value}")]
    words = ["personalize", "mine.png", "--concepts", "cat, dog", "--model", model, "--out", "mine", "--fused"]
    words += ["--threads", "1", *few]
    code, out, _ = command(*words)
    assert code == 0 and out[-2:] == ["mine/sample.png", "mine/fused"]
    code, out, err = command(*words)
    assert code == 2 and out == [] and len(err) == 1 and "mine/fused is there already" in err[0]
    assert command("concepts", "fuse", "mine", "--out", "again") == (0, ["again"], [])
    one, other = (tiny.draw(opened(tmp_path / folder), PROMPT) for folder in ("mine/fused", "again"))
    assert torch.allclose(one, other, atol=1e-4)
    code, out, err = command("generate", PROMPT, "--model", "again", "--steps", "2", "--threads", "1")
    assert code == 0 and len(out) == 1, err


def test_what_was_stopped_while_samples_are_drawn_is_finished_by_resume(command, picture, model, tmp_path, monkeypatch):
    def stopped(self, path):
        raise KeyboardInterrupt

    picture.save("mine.png")
    few = [word for name, value in FEW.items() for word in ("--set", f"{name}={value}")]
    words = ["personalize", "mine.png", "--concepts", "cat, dog", "--model", model, "--out", "mine", "--fused"]
    words += ["--threads", "1", *few]
    monkeypatch.setattr("attnctl.app.personalize_command.Samples.save", stopped)
    assert command(*words)[0] != 0
    learnt = load_file(tmp_path / "mine" / "pytorch_lora_weights.safetensors")
    monkeypatch.setattr("attnctl.app.personalize_command.Samples.save", lambda self, path: path)
    code, out, err = command(*words, "--resume")
    assert code == 0 and out[0] == "nothing was left to train" and out[-1] == "mine/fused", err
    again = load_file(tmp_path / "mine" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in learnt.items())
    assert not (tmp_path / "mine" / "training").exists()


@pytest.mark.parametrize(
    "words, told",
    [
        (["nowhere", "--out", "new"], "nowhere holds no concepts"),
        (["mine", "--out", "mine"], "mine is there already"),
        (["mine", "--out", "file/new"], "file is a file, not a folder"),
    ],
)
def test_fusing_refuses_in_one_line(command, tmp_path, words, told):
    from attnctl.concepts import Concept, Learnt

    Learnt((Concept("<v1>", "cat"),), {"<v1>": (torch.zeros(3),)}, {}, {}, "glyph-sd").save(tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    code, out, err = command("concepts", "fuse", *words)
    assert code == 2 and out == [] and len(err) == 1 and told in err[0]
