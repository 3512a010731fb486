import string
import unicodedata
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from attnctl import attach
from attnctl.errors import ControlError, PhraseError
from attnctl.processors import TokenMaps
from attnctl.words.phrases import TextStream, find, layout, positions, streams, text_rows
from attnctl.words.spelling import occurrences, words


@pytest.fixture(scope="module")
def clip():
    """cat, dog and red are whole; backpack is back|pack; everything else is spelled out."""
    letters = string.ascii_lowercase + string.digits + ",.-'()#"
    vocab = {entry: i for i, entry in enumerate([*letters, *(c + "</w>" for c in letters)])}
    merges = []
    for whole in ("cat</w>", "dog</w>", "red</w>", "back", "pack</w>"):
        symbols = [*whole.removesuffix("</w>")]
        if whole.endswith("</w>"):
            symbols[-1] += "</w>"
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
            symbols[:2] = ["".join(pair)]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


@pytest.fixture(scope="module")
def t5():
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase, "▁cat", "▁dog", "▁a"]
    scores = [0.0, 0.0, 0.0, -2.0, *[-3.0] * 26, -1.0, -1.0, -1.0]
    return T5Tokenizer(vocab=list(zip(pieces, scores, strict=True)), extra_ids=0, additional_special_tokens=[])


class Slow:
    """A tokenizer without character offsets, as transformers' Python ones are."""

    is_fast = False

    def __init__(self, fast):
        self.fast = fast

    def __call__(self, text, return_offsets_mapping=False, **kwargs):
        assert not return_offsets_mapping
        return self.fast(text, **kwargs)

    def __getattr__(self, name):
        return getattr(self.fast, name)


def pieces(tokenizer, prompt, found):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    return [tokens[i].removesuffix("</w>").removeprefix("▁") for i in found]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("family", ["clip", "t5"])
@pytest.mark.parametrize(
    ("prompt", "phrase", "expected"),
    [
        ("a cat and a dog", "dog", ["dog"]),
        ("a red backpack", "backpack", ["back", "pack"]),
        ("a red backpack", "Red  backpack", ["red", "back", "pack"]),
        ("A CAT, and a Dog.", "cat", ["cat"]),
        ("a catalog and a cat", "cat", ["cat"]),
        ("(cat)", "cat", ["cat"]),
        ("  a   cat  ", "a cat", ["a", "cat"]),
        ("cat\nand dog", "cat and dog", ["cat", *"and", "dog"]),
        ("a cat's dog", "cat", ["cat"]),
        ("a cat-dog and a cat", "cat", ["cat"]),
        ("a cat and a cat", "cat", ["cat", "cat"]),
        ("a red_cat", "cat", ["cat"]),
    ],
)
def test_a_phrase_is_found_in_any_tokenizer(request, slow, family, prompt, phrase, expected):
    tokenizer = request.getfixturevalue(family)
    if family == "t5":  # spells out more, has no signs and knows small letters only
        prompt = prompt.lower()
        expected = [c for piece in expected for c in ([piece] if piece in ("cat", "dog", "a") else piece)]
    found = find(Slow(tokenizer) if slow else tokenizer, prompt, phrase, 77)
    if family == "t5" and prompt[prompt.index(phrase.split()[0].lower()) - 1] in "_(":
        expected = [*"cat"]  # not the beginning of a word to SentencePiece
    assert pieces(tokenizer, prompt, found) == expected


def test_known_positions(clip, t5):
    assert find(clip, "a cat and a dog", "cat") == [2]  # the start token is 0
    assert find(t5, "a cat and a dog", "cat") == [1]  # T5 has none
    assert find(clip, "a cat and a cat", "cat") == [2, 7]  # and is spelled out
    assert find(clip, "a cat and a cat", "cat#1") == [2]
    assert find(clip, "a cat and a cat", "Cat #2") == [7]
    assert find(clip, "a cat and a cat", "a cat#2") == [6, 7]
    assert find(clip, "cat, dog", "cat#1") == [1]
    assert find(clip, "red cat #2, red cat #2", "cat #2") == [2, 3, 4, 7, 8, 9]  # as written comes first


def test_a_letter_of_several_bytes_keeps_all_its_tokens():
    from attnctl.glyph.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    for one in (tokenizer, Slow(tokenizer)):
        assert len(find(one, "a 😀 cat", "cat")) == 1
        assert find(one, "a 😀 cat", "cat") == [6]
        assert find(one, "a cat 😀", "cat") == [2]
    assert find(tokenizer, "a cat 😀", "😀") == [3, 4, 5, 6]
    assert find(tokenizer, "a backpack", "backpack") == [2, 3]


def test_words_are_what_may_be_named(clip):
    assert words("A cat's red_car, a t-shirt & a “Cat's”!") == (
        "a#1", "cat's#1", "red", "car", "a#2", "t-shirt", "a#3", "cat's#2",
    )  # fmt: skip
    assert words(" ,. ") == ()
    prompt = "a cat and a red backpack, a dog"
    for word in words(prompt):
        assert find(clip, prompt, word)


def test_what_is_not_there_is_named(clip):
    with pytest.raises(PhraseError, match="'horse' is not in the prompt; its words are: a#1, cat, and, a#2, dog"):
        find(clip, "a cat and a dog", "horse")
    with pytest.raises(PhraseError, match="no 'cat#3': 'cat' is in the prompt 2 times"):
        find(clip, "a cat and a cat", "cat#3")
    with pytest.raises(PhraseError, match="no 'cat#0'"):
        find(clip, "a cat", "cat#0")
    with pytest.raises(PhraseError, match="'cat' is not in the prompt"):
        find(clip, "a catalog", "cat")
    with pytest.raises(PhraseError, match="no words"):
        find(clip, "", "cat")
    with pytest.raises(PhraseError, match="empty phrase"):
        find(clip, "a cat", " ")


def test_a_phrase_that_is_cut_off_is_an_error(clip, t5):
    prompt = "cat " * 10 + "dog"  # start + 10 + 1 + end = 13
    assert find(clip, prompt, "dog", 13) == [11]
    with pytest.raises(PhraseError, match="'dog' is cut off.*first 12 tokens.*cat#9, cat#10$"):
        find(clip, prompt, "dog", 12)
    assert find(t5, prompt, "dog", 12) == [10]
    with pytest.raises(PhraseError, match="cut off"):
        find(t5, prompt, "dog", 11)
    with pytest.raises(PhraseError, match="cut off"):
        find(clip, "a backpack", "backpack", 4)  # half of it would be left
    with pytest.raises(PhraseError, match="cut off.*no whole word"):
        find(clip, "cat", "cat", 2)


@pytest.mark.parametrize("length", [2, 5, 6, 7, 20])
def test_positions_agree_with_what_the_pipeline_feeds(clip, t5, length):
    for tokenizer in (clip, t5):
        prompt = "a cat a dog"
        ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=length).input_ids
        rows = layout(tokenizer, prompt, length)
        assert [*rows.start, *rows.text, *rows.end, *rows.padding] == list(range(length))
        kinds = [tokenizer.bos_token_id] * len(rows.start), [tokenizer.eos_token_id] * len(rows.end)
        assert ([ids[i] for i in rows.start], [ids[i] for i in rows.end]) == kinds
        assert all(ids[i] == tokenizer.pad_token_id for i in rows.padding)
        own = tokenizer.convert_ids_to_tokens([ids[i] for i in rows.text])
        assert [piece.removeprefix("▁")[0] for piece in own] == [*"acad"][: len(rows.text)]


def test_several_tokenizers(clip, t5):
    both = (TextStream(clip, "a cat and a dog"), TextStream(t5, "a cat and a dog", 77, 16))
    assert positions(both, "cat") == [2, 78]
    assert text_rows(both) == [*range(1, 8), *range(77, 84)]  # "and" takes three and, with its mark, four
    missing = (TextStream(clip, "a cat"), TextStream(t5, "a dog", 77, 16))
    assert positions(missing, "cat") == [2] and positions(missing, "dog") == [78]
    with pytest.raises(PhraseError, match="its words are: a, cat"):
        positions(missing, "horse")
    cut = (TextStream(clip, "cat " * 80 + "dog"), TextStream(t5, "cat " * 80 + "dog", 77, 128))
    assert positions(cut, "dog") == [77 + 80]
    with pytest.raises(PhraseError, match="CLIPTokenizer keeps the first 77"):
        positions(cut[:1], "dog")
    twice = (TextStream(clip, "a cat"), TextStream(clip, "red cat"))  # SDXL: two texts on the same rows
    assert positions(twice, "cat") == [2]
    with pytest.raises(
        PhraseError, match="'red' shares text row 1 with another word: one encoder reads 'red cat', anoth"
    ):
        positions(twice, "red")
    assert positions((TextStream(clip, "a cat"), TextStream(clip, "a cat and a dog")), "dog") == [7]  # beside padding
    with pytest.raises(PhraseError, match="no tokenizer"):
        positions((), "cat")


def test_streams_of_a_run(clip, t5):
    record = SimpleNamespace(
        reads=lambda pipe, prompt: prompt,
        streams=(
            SimpleNamespace(tokenizer="tokenizer", prompt="prompt", offset=0, rows=77),
            SimpleNamespace(tokenizer="tokenizer_2", prompt="prompt_2", offset=0, rows=77),
            SimpleNamespace(tokenizer="tokenizer_3", prompt="prompt_3", offset=77, rows="max_sequence_length"),
        ),
    )
    pipe = SimpleNamespace(tokenizer=clip, tokenizer_2=None, tokenizer_3=t5)
    texts = {"prompt": ["a cat", "a dog"], "prompt_3": ["red", "red"]}
    run = SimpleNamespace(
        family=record, pipe=pipe, texts=texts, prompts=texts["prompt"], max_sequence_length=32, text_rows=None
    )
    assert streams(run, 1) == (TextStream(clip, "a dog", 0, 77), TextStream(t5, "red", 77, 32))


# --- spelling and special tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a caf\u00e9 and a dog", "a cafe\u0301 and a dog"], ids=["composed", "decomposed"])
@pytest.mark.parametrize("phrase", ["caf\u00e9", "cafe\u0301"], ids=["composed", "decomposed"])
def test_accents_are_found_however_they_are_written(prompt, phrase):
    (span,) = occurrences(prompt, phrase)
    assert unicodedata.normalize("NFC", prompt[slice(*span)]) == "caf\u00e9"
    assert occurrences(prompt, "cafe") == []
    assert [unicodedata.normalize("NFC", word) for word in words(prompt)][1] == "caf\u00e9"


def test_words_of_scripts_without_spaces_are_found_inside_a_run():
    assert occurrences("一只猫和一只狗", "猫") == [(2, 3)] and occurrences("一只猫和一只狗", "一只") == [(0, 2), (4, 6)]
    assert occurrences("catalog", "cat") == []


def test_start_and_end_tokens(clip, t5):
    both = (TextStream(clip, "a cat"), TextStream(t5, "a cat", 77, 16))
    assert positions(both, "<start>") == [0] and positions(both, "<end>") == [3, 79]
    with pytest.raises(PhraseError, match="T5Tokenizer has no start token"):
        positions(both[1:], "<start>")


def test_long_embeddings_are_made_of_chunks(clip):
    """As prompt tools make them: start, 75 tokens, end; and again."""
    long = TextStream(clip, "cat " * 74 + "red dog and a cat", 0, 77, chunks=2)
    assert positions((long,), "red") == [75] and positions((long,), "dog") == [77 + 1]
    assert positions((long,), "cat")[-1] == 77 + 6 and positions((long,), "<start>") == [0, 77]
    assert positions((long,), "<end>") == [76, 153] and text_rows((long,)) == [*range(1, 76), *range(78, 84)]


def test_long_embeddings_in_a_pipeline():
    pipe = tiny.sd1()
    text = "cat " * 74 + "red dog and a cat"
    parts = [pipe.encode_prompt(part, "cpu", 1, True) for part in ("cat " * 74 + "red", "dog and a cat")]
    embeds, negative = (torch.cat([part[side] for part in parts], 1) for side in (0, 1))
    with attach(pipe, TokenMaps("dog", "cat"), prompt=text) as run:
        tiny.draw(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert run.maps._rows[0] == [*range(1, 75), 78, 81] and float(run.maps["dog"].mean()) > 0


@pytest.mark.parametrize("weighted", ["a (cat)1.5 and a dog", "a (cat:1.3)", "a cat++ and a dog", "a (red cat)-"])
def test_weights_in_told_prompts_are_refused(weighted):
    pipe = tiny.sd1()
    positive, negative = pipe.encode_prompt(tiny.TEXT, "cpu", 1, True)
    with attach(pipe, TokenMaps("cat"), prompt=weighted), pytest.raises(ControlError, match="has a weight, "):
        tiny.draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)


def test_an_empty_prompt_draws_and_has_no_maps():
    pipe = tiny.sd1()
    plain = tiny.draw(pipe, "")
    with attach(pipe, TokenMaps()) as run:
        assert torch.equal(tiny.draw(pipe, ""), plain)
    assert run.maps.words == ()


def test_two_prompts_on_the_same_rows_are_refused_for_words_that_differ():
    pipe = tiny.sdxl()
    with attach(pipe, TokenMaps("cat")), pytest.raises(PhraseError, match="'cat' shares text row 2 with another word"):
        tiny.draw(pipe, "a cat", prompt_2="a dog")
    with attach(pipe, TokenMaps()) as run:
        tiny.draw(pipe, "a cat", prompt_2="a dog")
    assert run.maps.words == ("a",)
