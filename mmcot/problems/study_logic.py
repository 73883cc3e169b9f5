"""Problems that need two steps of reasoning about a picture: transitivity, exclusion, counting and then comparing."""

from itertools import pairwise
from random import Random
from typing import NamedTuple

from mmcot.problems.drawing import COLORS, INK, LINE, SIZE, Canvas
from mmcot.problems.study_skill import (
    SHAPES,
    THING_NAMES,
    Level,
    Skill,
    Thing,
    Wording,
    draw_thing,
    jitter,
    listed,
    name_things,
    names_of,
)

# Balances: the order of weights that several balances imply.

CELL = SIZE // 2  # side of the space for one balance, px
TILT = 8  # px between the middle of a beam and each of its ends, in height


class Balances(NamedTuple):
    """
    Colors from the heaviest to the lightest, and the balances: each compares two neighbours in this order.

    Args:
        balances: for each, the rank of the heavier color, whether it is on the left, the cell, and the offset in px.
        form: the end of the order that the question asks for: `heaviest` or `lightest`.
    """

    colors: tuple[str, ...]
    balances: tuple[tuple[int, bool, int, tuple[int, int]], ...]
    form: str


def sample_balances(rng: Random, level: Level) -> Balances:
    colors = tuple(rng.sample(list(COLORS), level.num_objects))
    pairs = rng.sample(range(len(colors) - 1), len(colors) - 1)
    cells = sorted(rng.sample(range(4), len(pairs)))
    offsets = jitter(rng, len(pairs), most=2)
    balances = [
        (pair, rng.random() < 0.5, cell, offset) for pair, cell, offset in zip(pairs, cells, offsets, strict=True)
    ]
    return Balances(colors, tuple(balances), rng.choice(["heaviest", "lightest"]))


def ask_balances(rng: Random, scene: Balances) -> list[Wording]:
    colors = scene.colors
    answer = colors[0] if scene.form == "heaviest" else colors[-1]
    pairs = list(pairwise(colors))
    facts = [f"The {a} ball is heavier than the {b} ball." for a, b in (pairs[rank] for rank, *_ in scene.balances)]
    wording = Wording(
        question=f"Which ball is the {scene.form}?",
        answer=answer,
        others=[color for color in colors if color != answer],
        observation=" ".join(facts),
        reasoning=f"From the heaviest to the lightest: {listed(colors)}.",
        conclusion=f"the {answer} ball is the {scene.form}.",
    )
    return [wording]


def draw_balances(scene: Balances) -> list[Canvas]:
    canvas = Canvas()
    for rank, heavier_is_left, cell, (dx, dy) in scene.balances:
        x, y = CELL * (cell % 2) + CELL // 2 + dx, CELL * (cell // 2) + CELL // 2 - 2 + dy
        left, right = scene.colors[rank : rank + 2] if heavier_is_left else scene.colors[rank : rank + 2][::-1]
        slope = TILT if heavier_is_left else -TILT
        canvas.polygon([(x, y), (x - 6, y + 20), (x + 6, y + 20)], fill=LINE)
        canvas.polygon([(x - 15, y + slope - 1), (x + 15, y - slope - 1), (x + 15, y - slope + 1),
                        (x - 15, y + slope + 1)], fill=INK)  # fmt: skip
        canvas.shape("circle", (x - 14, y + slope), 8, COLORS[left])
        canvas.shape("circle", (x + 14, y - slope), 8, COLORS[right])
    return [canvas]


# Exclusion: the one thing of a row that two statements do not exclude.

ORDINALS = ("first", "second", "third", "fourth", "fifth")
PERSONS = ("Mia", "Tom", "Anna", "Ben", "Lily", "Sam")


class Row(NamedTuple):
    """Things from left to right, the color and the shape that are excluded, a person, and offsets in px."""

    things: tuple[Thing, ...]
    color: str
    shape: str
    person: str
    offsets: tuple


def sample_row(rng: Random, level: Level) -> Row:
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    other_colors = [name for name in COLORS if name != color]
    other_shapes = [name for name in SHAPES if name != shape]
    things = [Thing(rng.choice(other_colors), rng.choice(other_shapes))]
    number = max(3, level.num_objects)  # at least one thing is excluded by color, and one by shape
    while len(things) < number:
        by_color, by_shape = Thing(color, rng.choice(other_shapes)), Thing(rng.choice(other_colors), shape)
        things += [by_color, by_shape][: number - len(things)]
    rng.shuffle(things)
    return Row(tuple(things), color, shape, rng.choice(PERSONS), jitter(rng, len(things), most=3))


def ask_row(rng: Random, scene: Row) -> list[Wording]:
    things = list(zip(ORDINALS, scene.things, strict=False))
    by_color = [ordinal for ordinal, thing in things if thing.color == scene.color]
    by_shape = [ordinal for ordinal, thing in things if thing.shape == scene.shape]
    (answer,) = (ordinal for ordinal, _ in things if ordinal not in by_color + by_shape)
    wording = Wording(
        question=f"Which thing, counted from the left, does {scene.person} like?",
        context=f"The thing that {scene.person} likes is not {scene.color}. It is not a {scene.shape}.",
        answer=answer,
        others=[ordinal for ordinal, _ in things if ordinal != answer],
        observation=f"From left to right: {listed([f'a {thing.name}' for _, thing in things])}.",
        reasoning=f"Of color {scene.color}: the {listed(by_color)}. Of shape {scene.shape}: the {listed(by_shape)}.",
        conclusion=f"it is the {answer}.",
    )
    return [wording]


def draw_row(scene: Row) -> list[Canvas]:
    canvas = Canvas()
    width = SIZE / len(scene.things)
    for number, (thing, (_, dy)) in enumerate(zip(scene.things, scene.offsets, strict=True)):
        draw_thing(canvas, thing, (width * (number + 0.5), SIZE // 2 + dy), min(13, width / 2 - 2))
    return [canvas]


# Dots: counting two colors, and then comparing the numbers.

GRID = 5  # dots are in the cells of a grid of 5x5
MOST_DOTS = 5  # of one color; fewer if the level has few objects


class Dots(NamedTuple):
    """The numbers of dots by color, the two colors of the question, and the cells of all dots, color by color."""

    numbers: dict[str, int]
    asked: tuple[str, str]
    cells: tuple[int, ...]
    offsets: tuple


def sample_dots(rng: Random, level: Level) -> Dots:
    first, second, third = rng.sample(list(COLORS), 3)
    relation = rng.choice(["more", "less", "equal"])
    low, high = sorted(rng.sample(range(1, min(MOST_DOTS, level.num_objects + 1) + 1), 2))
    pair = {"more": (high, low), "less": (low, high), "equal": (low, low) if rng.random() < 0.5 else (high, high)}
    numbers = dict(zip((first, second), pair[relation], strict=True)) | {third: level.num_objects - 2}
    total = sum(numbers.values())
    return Dots(numbers, (first, second), tuple(rng.sample(range(GRID**2), total)), jitter(rng, total, most=1))


def ask_dots(rng: Random, scene: Dots) -> list[Wording]:
    first, second = scene.asked
    a, b = scene.numbers[first], scene.numbers[second]
    drawn = [(color, scene.numbers[color]) for color in COLORS if scene.numbers.get(color)]
    choices = [f"more {first} dots", f"more {second} dots", "equally many"]
    answer = choices[0 if a > b else 1 if a < b else 2]
    wording = Wording(
        question=f"Are there more {first} dots or more {second} dots?",
        answer=answer,
        others=[choice for choice in choices if choice != answer],
        observation=f"The dots are {listed([f'{number} {color}' for color, number in drawn])}.",
        reasoning=f"{a} {first} is {'more than' if a > b else 'less than' if a < b else 'as many as'} {b} {second}.",
        conclusion=f"there are {answer}.",
    )
    return [wording]


def draw_dots(scene: Dots) -> list[Canvas]:
    canvas = Canvas()
    side = SIZE / GRID
    colors = [color for color, number in scene.numbers.items() for _ in range(number)]
    for color, cell, (dx, dy) in zip(colors, scene.cells, scene.offsets, strict=True):
        center = (side * (cell % GRID + 0.5) + dx, side * (cell // GRID + 0.5) + dy)
        canvas.shape("circle", center, 7, COLORS[color])
    return [canvas]


def name_dots(scene: Dots) -> set[str]:
    return {*scene.numbers, *map(str, scene.numbers.values())}


SKILLS = {
    "logic/balance": Skill(
        subject="natural science",
        grade="grade4",
        category="Weights",
        share=7,
        mistake="logical",
        lecture="A balance goes down on the heavier side. If A is heavier than B and B than C, A is heavier than C.",
        sample=sample_balances,
        combination=lambda scene: (scene.colors, *(balance[:2] for balance in scene.balances)),
        ask=ask_balances,
        draw=draw_balances,
        named=lambda scene: set(scene.colors),
        vocabulary=frozenset(COLORS),
        caption=lambda scene: f"Balances with balls in {listed(sorted(scene.colors))}.",
    ),
    "logic/exclusion": Skill(
        subject="language science",
        grade="grade3",
        category="Exclusion",
        share=7,
        mistake="logical",
        lecture="When all things but one are excluded, the answer is the one that remains.",
        sample=sample_row,
        combination=lambda scene: scene[:3],
        ask=ask_row,
        draw=draw_row,
        named=lambda scene: names_of(scene.things),
        vocabulary=THING_NAMES,
        caption=lambda scene: f"A row with {name_things(scene.things)}.",
    ),
    "logic/count": Skill(
        subject="social science",
        grade="grade2",
        category="Numbers",
        share=7,
        mistake="logical",
        lecture="Count the dots of each color, then compare the numbers.",
        sample=sample_dots,
        combination=lambda scene: tuple(sorted(scene.numbers.items())),
        ask=ask_dots,
        draw=draw_dots,
        named=name_dots,
        vocabulary=frozenset({*COLORS, *map(str, range(10))}),
        caption=lambda scene: f"Dots in {listed(sorted(scene.numbers))}.",
    ),
}
