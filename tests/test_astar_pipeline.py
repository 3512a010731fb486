import pytest
import tiny
import torch

from attnctl import attach
from attnctl.errors import ControlError, PhraseError
from attnctl.pipelines import AStarPipeline
from attnctl.processors import AStar

TEXT = "a cat and a red dog"


def settings_of(family):
    more = {} if family in ("sd1", "sdxl") else {"max_sequence_length": 16}
    return {"num_inference_steps": 2, "height": 32, "width": 48, "output_type": "latent"} | more


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_draws_what_the_control_draws(family):
    pipe, settings = tiny.FAMILIES[family](), settings_of(family)
    plain = tiny.draw(pipe, TEXT)
    with attach(pipe, AStar("cat", "dog", bonds=(("red", "dog"),), relative=0.05)):
        want = tiny.draw(pipe, TEXT)
    astar = AStarPipeline.from_pipe(pipe, relative=0.05)
    assert astar.attachment is None
    generator = torch.Generator().manual_seed(0)
    output = astar(TEXT, ["cat", "dog"], {"dog": "red"}, maps=True, generator=[generator], **settings)
    assert torch.equal(output.images, want) and not torch.equal(want, plain)
    (trace,) = output.report.to_dict()["traces"]
    assert trace["updates"] == 2 and set(trace["steps"][1]["evaluations"][0]["losses"]) == {
        "segregation", "retention", "binding",
    }  # fmt: skip
    assert output.maps["dog"].shape[0] == 1 and torch.equal(tiny.draw(pipe, TEXT), plain)


def test_a_tuple_stays_a_tuple():
    astar = AStarPipeline(tiny.sd1())
    output = astar(TEXT, ["cat", "dog"], masks={"cat": (0, 0, 0.5, 1)}, return_dict=False, **settings_of("sd1"))
    assert isinstance(output, tuple) and astar.attachment.report.traces[0][0] == "AStar"


def test_errors_come_early_and_in_words():
    with pytest.raises(TypeError, match="no setting 'strenght'"):
        AStarPipeline(tiny.sd1(), strenght=1.0)
    astar = AStarPipeline.from_pipe(tiny.sd1())
    with pytest.raises(ControlError, match="AStar needs two phrases"):
        astar(TEXT, ["cat"], **settings_of("sd1"))
    with pytest.raises(PhraseError, match="'bird' is not in the prompt"):
        astar(TEXT, ["cat", "bird"], **settings_of("sd1"))


def test_from_pretrained_takes_an_embedded_name(monkeypatch):
    asked = {}
    monkeypatch.setattr("attnctl.pipelines.astar.load", lambda model, **options: asked.update(options, model=model))
    astar = AStarPipeline.from_pretrained("glyph-sd", device="cpu", look_ahead=2, seen=0.2)
    assert asked == {"model": "glyph-sd", "device": "cpu"} and astar.settings == {"look_ahead": 2, "seen": 0.2}
    asked.clear()
    with pytest.raises(ControlError, match="look_ahead needs to know"):
        AStarPipeline.from_pretrained("glyph-sd", look_ahead=2)
    assert not asked
