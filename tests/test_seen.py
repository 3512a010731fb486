"""What `seen` measures: word by word, whatever pieces a tokenizer makes of words."""

import tiny
import torch

from attnctl.processors.map_gradient import Wanted, least_seen, wanted, words_of
from attnctl.prompts import TextStream, positions


def text(prompt):
    return (TextStream(tiny.sd1().tokenizer, prompt),)


def test_pieces_of_a_word_are_summed_and_words_averaged():
    maps = torch.tensor([[0.1, 0.0, 0.3, 0.2], [0.2, 0.1, 0.0, 0.0], [0.5, 0.0, 0.0, 0.1]]).view(1, 3, 2, 2)
    one = torch.ones(1, 1, 3)
    split = torch.tensor([[[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]])  # a word of two tokens, a word of one
    rows = torch.arange(3)[None]
    found = least_seen(maps, Wanted(rows, rows >= 0, one, split))
    torch.testing.assert_close(found, torch.tensor([(0.3 + 0.5) / 2]))
    whole = least_seen(maps, Wanted(rows, rows >= 0, one, one[:, :, None]))
    torch.testing.assert_close(whole, torch.tensor([0.8]))


def test_the_phrase_worst_off_counts_unless_it_is_part_of_a_longer_one():
    found = wanted([text("a red car and a dog")], ["red car", "car", "dog"], "phrases")
    assert found.whole().tolist() == [[True, False, True]] and found.present.all()
    red, car = found.words[0, 0]
    dog = found.words[0, 2, 0]
    assert torch.equal(car, found.words[0, 1, 0]) and not (red * car).any()
    maps = (0.5 * red / red.sum() + 0.1 * car / car.sum() + 0.4 * dog / dog.sum()).view(1, -1, 1, 1)
    torch.testing.assert_close(least_seen(maps, found), torch.tensor([0.3]))


def test_words_of_a_phrase():
    prompt = text("a red car, a red bow and a blue car")
    red, car, blue = (positions(prompt, word) for word in ("red", "car", "blue"))
    first, second = positions(prompt, "red car"), positions(prompt, "blue car")
    for phrase, parts in (
        ("red car", [[row for row in red if row in first], [row for row in car if row in first]]),
        ("blue car", [blue, [row for row in car if row in second]]),
        ("car", [car]),
        ("car#2", [[row for row in car if row in second]]),
    ):
        assert all(parts) and words_of(prompt, phrase, positions(prompt, phrase)) == parts
