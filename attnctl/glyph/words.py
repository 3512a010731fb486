"""The words of the glyph world: 24 concepts, 11 colours, and the 276 prompts of the Attend-and-Excite benchmark.

The prompts are those of Chefer et al., "Attend-and-Excite" (arXiv 2301.13826), with the article "a" throughout.
"""

from dataclasses import dataclass
from itertools import combinations

ANIMALS = ("cat", "dog", "bird", "bear", "lion", "horse", "elephant", "monkey", "frog", "turtle", "rabbit", "mouse")
OBJECTS = (
    "backpack", "glasses", "crown", "suitcase", "chair", "balloon", "bow", "car", "bowl", "bench", "clock", "apple",
)  # fmt: skip
CONCEPTS = ANIMALS + OBJECTS
WORN = ("glasses", "crown", "bow")
"""Objects an animal comes "with"; the benchmark leaves them uncoloured there."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "orange": (247, 134, 22),
    "yellow": (250, 214, 40),
    "green": (38, 152, 62),
    "blue": (34, 98, 222),
    "purple": (134, 52, 178),
    "pink": (246, 138, 190),
    "brown": (118, 70, 36),
    "gray": (134, 136, 140),
    "black": (38, 38, 42),
    "white": (234, 235, 239),
}
"""Colour name -> reference RGB, 0 to 255."""

Named = tuple[str, str | None]
"""A concept and its colour; None is an animal, or an object in its natural colours."""


@dataclass(frozen=True)
class Prompt:
    """One benchmark prompt: its text, its category ("animals", "animal-object" or "objects") and what it names."""

    text: str
    category: str
    things: tuple[Named, ...]


# The colour of an object beside an animal, a row per animal; the first row names the objects.
_BESIDE_ANIMALS = """
         backpack suitcase chair  balloon car    bowl   bench  clock  apple
cat      blue     black    black  yellow  yellow purple gray   green  red
dog      brown    green    orange blue    purple gray   pink   gray   black
bird     black    black    green  brown   yellow black  purple white  yellow
bear     orange   red      white  red     white  purple gray   blue   pink
lion     black    orange   white  brown   red    pink   white  yellow gray
horse    blue     green    pink   pink    white  brown  blue   yellow green
elephant pink     green    black  green   brown  green  green  yellow orange
monkey   yellow   orange   blue   green   red    green  brown  yellow orange
frog     yellow   red      black  purple  orange green  pink   green  black
turtle   gray     orange   blue   pink    yellow yellow white  blue   pink
rabbit   orange   yellow   gray   white   yellow blue   white  gray   orange
mouse    brown    pink     purple black   red    purple red    blue   pink
"""

# Two objects and their colours, the row's and then the column's. Each row goes on with the objects after its own.
_BESIDE_OBJECTS = """
backpack gray/yellow green/yellow green/brown yellow/purple black/pink black/green
         orange/purple red/yellow green/purple gray/green yellow/gray
glasses  green/black red/red green/yellow white/orange yellow/brown yellow/black
         yellow/gray green/black orange/pink white/gray
crown    purple/blue pink/red blue/red pink/purple black/red red/black purple/blue gray/white gray/purple
suitcase white/white blue/gray gray/brown yellow/yellow gray/black orange/brown brown/black red/blue
chair    white/gray purple/red green/purple purple/orange brown/white orange/blue pink/gray
balloon  blue/blue brown/pink green/pink blue/orange purple/white white/white
bow      white/white yellow/pink yellow/orange white/black pink/gray
car      white/black orange/red black/white purple/pink
bowl     purple/black brown/green orange/purple
bench    red/yellow green/red
clock    blue/blue
"""


def phrase(concept: str, colour: str | None = None) -> str:
    """The concept with its article, as in "a car" or "a red car"; the benchmark writes "a" before vowels too."""
    return f"a {colour} {concept}" if colour else f"a {concept}"


def benchmark() -> list[Prompt]:
    """The 276 prompts: 66 "animals", 144 "animal-object" and 66 "objects", in the order of the word lists."""
    head, *rows = (line.split() for line in _BESIDE_ANIMALS.strip().splitlines())
    beside = {(animal, thing): colour for animal, *colours in rows for thing, colour in zip(head, colours, strict=True)}

    def prompt(category: str, one: Named, two: Named, joint: str = "and") -> Prompt:
        return Prompt(f"{phrase(*one)} {joint} {phrase(*two)}", category, (one, two))

    prompts = [prompt("animals", (a, None), (b, None)) for a, b in combinations(ANIMALS, 2)]
    for animal in ANIMALS:
        for thing in OBJECTS:
            joint = "with" if thing in WORN else "and"
            prompts.append(prompt("animal-object", (animal, None), (thing, beside.get((animal, thing))), joint))
    pairs = (word.split("/") for word in _BESIDE_OBJECTS.split() if "/" in word)
    for (first, second), (one, two) in zip(combinations(OBJECTS, 2), pairs, strict=True):
        prompts.append(prompt("objects", (first, one), (second, two)))
    return prompts


def triples() -> list[Prompt]:
    """48 prompts of three things, ours, 12 of each kind: animals; two animals and an object; the reverse; objects.

    Their categories are those of the benchmark. Objects are coloured, no two of a prompt alike.
    """
    colours, prompts = list(COLOURS), list[Prompt]()
    for i in range(12):
        animals: list[Named] = [(ANIMALS[(i + step) % 12], None) for step in (0, 1, 4)]
        objects: list[Named] = [(OBJECTS[(i + step) % 12], colours[(i + 3 * step) % 11]) for step in (0, 1, 4)]
        for category, things in (
            ("animals", animals),
            ("animal-object", [*animals[:2], objects[0]]),
            ("animal-object", [animals[0], *objects[1:]]),
            ("objects", objects),
        ):
            *firsts, last = (phrase(*thing) for thing in things)
            prompts.append(Prompt(f"{', '.join(firsts)} and {last}", category, tuple(things)))
    return prompts


def _held_out() -> frozenset[frozenset[str]]:
    def ring(words: tuple[str, ...], *steps: int) -> set[frozenset[str]]:
        return {frozenset((word, words[(i + step) % 12])) for i, word in enumerate(words) for step in steps}

    mixed = {frozenset((animal, OBJECTS[(i + step) % 12])) for i, animal in enumerate(ANIMALS) for step in (3, 8)}
    return frozenset(ring(ANIMALS, 5, 6) | ring(OBJECTS, 5) | mixed)


HELD_OUT = _held_out()
"""54 of the 276 unordered pairs, never trained on. With each list laid on a ring: animals 5 or 6 apart (18 pairs),
objects 5 apart (12), an animal and the object 3 or 8 places further on (24). Each animal is in 5, each object in 4."""


def is_held_out(a: str, b: str) -> bool:
    """Whether training scenes never show concepts `a` and `b` together."""
    return frozenset((a, b)) in HELD_OUT
