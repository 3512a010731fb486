"""Errors about one picture of a batch say which."""

from dataclasses import dataclass

import pytest
import tiny

from attnctl.engine.attachment import attach
from attnctl.engine.control import Control
from attnctl.errors import AttnctlError, ControlError
from attnctl.maps.recorder import TokenMaps
from attnctl.processors import Excitation, Segregation
from attnctl.words.phrases import tokens


@dataclass(frozen=True)
class Words(Control):
    phrase: str

    def begin(self, run):
        return [tokens(run, self.phrase, image) for image in range(run.images)]


@pytest.mark.parametrize(
    ("control", "said"),
    [
        (Segregation("cat", "dog"), r"^image 1 \('a red cat and a cat'\): 'dog' is not in the prompt; its words are: "),
        (
            Segregation("red cat", "cat"),
            r"^image 1 \('a red cat and a cat'\): 'red cat' and 'cat' cannot be kept apart",
        ),
        (Excitation("dog"), r"^image 1 \('a red cat and a cat'\): 'dog' is not in the prompt"),
        (
            Excitation("bird"),
            r"^none of the 2 prompts has it; image 0 \('a cat and a dog'\): 'bird' is not in the prompt",
        ),
        (
            TokenMaps("bird"),
            r"^none of the 2 prompts has it; image 0 \('a cat and a dog'\): 'bird' is not in the prompt",
        ),
        (Words("dog"), r"^image 1 \('a red cat and a cat'\): 'dog' is not in the prompt"),
    ],
    ids=["missing", "shared", "excitation", "nowhere", "maps", "tokens"],
)
def test_an_error_in_a_batch_says_which_prompt_it_is_about(control, said):
    pipe = tiny.sd1()
    with attach(pipe, control), pytest.raises(AttnctlError, match=said):
        tiny.draw(pipe, ["a cat and a dog", "a red cat and a cat"], steps=1)
    with attach(pipe, Words("bird")), pytest.raises(AttnctlError, match="^'bird' is not"):
        tiny.draw(pipe, ["a cat"], steps=1)


def test_an_image_of_a_batch_without_latents_is_named():
    @dataclass(frozen=True)
    class Break(Control):
        def before_denoise(self, step):
            latents = step.latents.clone()
            latents[1] = float("nan")
            step.latents = latents

    pipe = tiny.sd1()
    with attach(pipe, Break()), pytest.raises(ControlError, match=r"not finite at step 0 of image 1 \('a dog'\)"):
        tiny.draw(pipe, ["a cat", "a dog"], steps=1)
