import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from attnctl.glyph.tokenizer import SPLIT, build_tokenizer
from attnctl.glyph.words import COLOURS, CONCEPTS, benchmark

TEXTS = ["zebra", "a Photo of 2 zebras, isn't it?", "café, 日本 😀 — #1!", *(prompt.text for prompt in benchmark())]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


def test_words_of_the_world_are_whole_but_for_those_that_split(tokenizer):
    for word in ("a", "and", "with", *COLOURS, *CONCEPTS):
        pieces = [piece.removesuffix("</w>") for piece in tokenizer.tokenize(word)]
        assert pieces == list(SPLIT.get(word, (word,)))
    assert SPLIT["backpack"] == ("back", "pack") and len(SPLIT["suitcase"]) == len(SPLIT["elephant"]) == 2


def test_a_prompt_is_framed_and_padded_as_in_stable_diffusion_1(tokenizer):
    ids = tokenizer("a red backpack", padding="max_length").input_ids
    assert len(ids) == tokenizer.model_max_length == 77
    assert tokenizer.convert_ids_to_tokens(ids[:7]) == [
        "<|startoftext|>", "a</w>", "red</w>", "back", "pack</w>", "<|endoftext|>", "<|endoftext|>",
    ]  # fmt: skip
    assert set(ids[5:]) == {tokenizer.eos_token_id} == {tokenizer.pad_token_id}
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # CLIPTextModel may look for the end by the highest id
    assert len(tokenizer("cat " * 100, truncation=True).input_ids) == 77


@pytest.mark.parametrize("text", TEXTS[:3])
def test_any_text_comes_back_without_unknown_tokens(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


def test_every_printable_letter_has_a_token_inside_and_at_the_end_of_a_word(tokenizer):
    vocab = tokenizer.get_vocab()
    assert all({chr(code), chr(code) + "</w>"} <= vocab.keys() for code in range(33, 127))
    assert len(vocab) < 1000 and sorted(vocab.values()) == list(range(len(vocab)))


def test_offsets_find_the_words(tokenizer):
    text = "a elephant and a zebra"
    offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping
    assert [text[start:end] for start, end in offsets[1:-1]] == [
        "a", "ele", "phant", "and", "a", "z", "e", "b", "r", "a",
    ]  # fmt: skip


@pytest.mark.parametrize("loader", [CLIPTokenizer, AutoTokenizer])
def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path, loader):
    tokenizer.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    assert type(again) is CLIPTokenizer and again.model_max_length == 77
    for text in TEXTS:
        old = tokenizer(text, padding="max_length", return_offsets_mapping=True)
        assert again(text, padding="max_length", return_offsets_mapping=True).data == old.data
