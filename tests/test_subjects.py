import pytest
import tiny

from attnctl.errors import PhraseError
from attnctl.glyph.words import benchmark
from attnctl.pipelines import AStarPipeline
from attnctl.words import subjects
from attnctl.words.spelling import words
from attnctl.words.subjects import SubjectsError, read_subjects


@pytest.mark.parametrize(
    ("prompt", "things"),
    [
        ("a cat and a dog", [("cat",), ("dog",)]),
        ("A red car and a white bowl", [("car", "red"), ("bowl", "white")]),
        ("a photo of a cat sitting on a wooden bench, oil painting", [("cat",), ("bench", "wooden")]),
        ("portrait of a woman wearing a purple hat, highly detailed", [("woman",), ("hat", "purple")]),
        ("two old men in the park", [("men", "old"), ("park",)]),
        ("a teddy bear with a very big blue bow tie", [("teddy bear",), ("bow tie", "big", "blue")]),
        ("cat and dog", [("cat",), ("dog",)]),
        ("a red car and a cat, a red car", [("car#1", "red#1"), ("cat",), ("car#2", "red#2")]),
        ("the painting on the wall", [("painting",), ("wall",)]),
    ],
)
def test_things_and_their_modifiers(prompt, things):
    assert [(one.phrase, *one.modifiers) for one in read_subjects(prompt)] == things


def test_every_prompt_of_the_benchmark_is_read_right():
    for prompt in benchmark():
        found = [(one.phrase, *(m.partition("#")[0] for m in one.modifiers)) for one in read_subjects(prompt.text)]
        assert found == [(concept, colour) if colour else (concept,) for concept, colour in prompt.things]


def test_a_numbered_subject_is_a_word_of_the_prompt():
    prompt = "a cat, a dog and a cat"
    assert {one.phrase for one in read_subjects(prompt)} <= set(words(prompt))


def test_errors(monkeypatch):
    with pytest.raises(PhraseError, match="no noun was found in the prompt 'and of'"):
        read_subjects("and of")
    subjects._tagger.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "HanTa.HanoverTagger", None)
    with pytest.raises(SubjectsError, match=r"pip install attnctl\[subjects\]"):
        read_subjects("a cat")


def test_the_pipeline_reads_subjects_and_says_which():
    astar = AStarPipeline(tiny.sd1())
    settings = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "latent"}
    output = astar(["a red cat and a dog", "a bird and a dog"], **settings)
    assert output.subjects == ("red cat", "dog", "bird")
    assert {"red | cat"} == set(output.report.to_dict()["traces"][0]["steps"][0]["evaluations"][0]["losses"]["binding"])
    assert astar("a cat and a dog", ["cat", "dog"], **settings).subjects == ("cat", "dog")
