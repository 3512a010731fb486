from collections import Counter
from itertools import combinations

from attnctl.glyph.words import ANIMALS, COLOURS, CONCEPTS, HELD_OUT, OBJECTS, benchmark, is_held_out, phrase, triples


def test_the_benchmark_has_276_prompts_in_three_categories():
    prompts = benchmark()
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 276
    assert Counter(prompt.category for prompt in prompts) == {"animals": 66, "animal-object": 144, "objects": 66}


def test_every_pair_of_concepts_comes_once():
    pairs = Counter(frozenset(concept for concept, _ in prompt.things) for prompt in benchmark())
    assert pairs == Counter(frozenset(pair) for pair in combinations(CONCEPTS, 2))


def test_prompts_as_published():
    texts = {prompt.text: prompt for prompt in benchmark()}
    for text in (
        "a cat and a dog",
        "a elephant and a monkey",
        "a rabbit and a mouse",
        "a cat with a glasses",
        "a mouse with a bow",
        "a bird and a white clock",
        "a bear and a orange backpack",
        "a turtle and a white bench",
        "a mouse and a pink apple",
        "a gray backpack and a yellow glasses",
        "a yellow backpack and a gray apple",
        "a yellow glasses and a brown bow",
        "a orange glasses and a pink clock",
        "a brown suitcase and a black clock",
        "a white balloon and a white apple",
        "a blue clock and a blue apple",
    ):
        assert text in texts
    assert texts["a bear and a orange backpack"].things == (("bear", None), ("backpack", "orange"))
    assert texts["a cat with a glasses"].things == (("cat", None), ("glasses", None))


def test_a_prompt_says_what_it_names_and_nothing_else():
    for prompt in benchmark():
        one, two = (phrase(*thing) for thing in prompt.things)
        assert prompt.text in (f"{one} and {two}", f"{one} with {two}")
        for concept, colour in prompt.things:
            assert colour is None if concept in ANIMALS else concept in OBJECTS
            assert colour is None or colour in COLOURS
    # Only what animals wear goes uncoloured.
    plain = Counter(thing for prompt in benchmark() for thing, colour in prompt.things if not colour)
    assert {thing for thing in plain if thing in OBJECTS} == {"glasses", "crown", "bow"}
    assert sum(" with " in prompt.text for prompt in benchmark()) == 36


def test_triples_name_three_things_in_colours_of_their_own():
    prompts = triples()
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 48
    assert Counter(prompt.category for prompt in prompts) == {"animals": 12, "animal-object": 24, "objects": 12}
    assert prompts[0].text == "a cat, a dog and a lion" and prompts[1].text == "a cat, a dog and a red backpack"
    for prompt in prompts:
        colours = [colour for concept, colour in prompt.things if concept in OBJECTS]
        assert len({concept for concept, _ in prompt.things}) == 3 and len(set(colours)) == len(colours)
        assert all(phrase(*thing) in prompt.text for thing in prompt.things) and None not in colours


def test_held_out_pairs_are_a_fifth_and_spread_over_all_concepts():
    assert all(len(pair) == 2 for pair in HELD_OUT)
    assert 0.18 < len(HELD_OUT) / 276 < 0.22
    assert sum(pair <= set(ANIMALS) for pair in HELD_OUT) == 18
    partners = Counter(concept for pair in HELD_OUT for concept in pair)
    assert all(4 <= partners[concept] <= 5 for concept in CONCEPTS)


def test_held_out_does_not_depend_on_order():
    assert is_held_out("cat", "elephant") and is_held_out("elephant", "cat")
    assert not is_held_out("cat", "dog")
    assert all(is_held_out(a, b) == is_held_out(b, a) for a, b in combinations(CONCEPTS, 2))
