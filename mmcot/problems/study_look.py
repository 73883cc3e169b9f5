"""Problems that need a look at the right place: the value of a bar, the relation of two things, a missing thing."""

from random import Random
from typing import NamedTuple

from mmcot.problems.drawing import COLORS, INK, LINE, SIZE, Canvas
from mmcot.problems.study_skill import (
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
    sample_things,
)

# Value: the height of the bar that the question names.

LETTERS = "KLMNPR"  # no letter is a word
HEIGHTS = range(1, 7)
UNIT = 12  # px
FLOOR = 82  # y of the axis, px


class Bars(NamedTuple):
    """The heights of the bars K, L, … from left to right, their color, and the letter of the question."""

    heights: tuple[int, ...]
    color: str
    asked: str


def sample_bars(rng: Random, level: Level) -> Bars:
    heights = tuple(rng.choice(HEIGHTS) for _ in LETTERS[: level.num_objects + 1])
    return Bars(heights, rng.choice(list(COLORS)), rng.choice(LETTERS[: len(heights)]))


def ask_bars(rng: Random, scene: Bars) -> list[Wording]:
    bars = list(zip(LETTERS, scene.heights, strict=False))
    height = dict(bars)[scene.asked]
    wording = Wording(
        question=f"Which number does bar {scene.asked} show?",
        answer=str(height),
        others=rng.sample([str(other) for other in HEIGHTS if other != height], 3),
        observation=f"Bar {', bar '.join(f'{letter} ends at {value}' for letter, value in bars)}.",
        conclusion=f"it shows {height}.",
    )
    return [wording]


def draw_bars(scene: Bars) -> list[Canvas]:
    canvas = Canvas()
    for number in HEIGHTS:
        y = FLOOR - UNIT * number
        canvas.line((10, y), (SIZE, y), LINE)
        canvas.text((5, y), str(number), 9, INK)
    width = (SIZE - 12) / len(scene.heights)
    for number, height in enumerate(scene.heights):
        middle = 12 + width * (number + 0.5)
        canvas.rectangle((middle - 5, FLOOR - UNIT * height, middle + 5, FLOOR), fill=COLORS[scene.color])
        canvas.text((middle, FLOOR + 7), LETTERS[number], 11, INK)
    canvas.line((10, FLOOR), (SIZE, FLOOR), INK)
    return [canvas]


def name_bars(scene: Bars) -> set[str]:
    return {*LETTERS[: len(scene.heights)], *map(str, scene.heights), scene.color}


# Things in the cells of a 3x3 grid.

SIDE = SIZE // 3  # of a cell, px
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")


class Grid(NamedTuple):
    """Things, their cells and their offsets in px."""

    things: tuple[Thing, ...]
    cells: tuple[int, ...]
    offsets: tuple


def sample_grid(rng: Random, things: list[Thing]) -> Grid:
    return Grid(tuple(things), tuple(rng.sample(range(9), len(things))), jitter(rng, len(things), most=3))


def draw_grid(grid: Grid) -> Canvas:
    canvas = Canvas()
    for thing, cell, (dx, dy) in zip(*grid, strict=True):
        draw_thing(canvas, thing, (SIDE * (cell % 3 + 0.5) + dx, SIDE * (cell // 3 + 0.5) + dy), 11)
    return canvas


# Relation: where the first thing of the grid is, seen from the second one. Both are in one row or one column.

RELATIONS = ("to the left", "to the right", "above", "below")


def sample_relation(rng: Random, level: Level) -> Grid:
    while True:
        grid = sample_grid(rng, sample_things(rng, level.num_objects))
        first, second = grid.cells[:2]
        if (first % 3 == second % 3) != (first // 3 == second // 3):
            return grid


def ask_relation(rng: Random, scene: Grid) -> list[Wording]:
    (first, second), (a, b) = scene.things[:2], scene.cells[:2]
    before, after = RELATIONS[:2] if a // 3 == b // 3 else RELATIONS[2:]
    answer = before if a < b else after
    placed = sorted(zip(scene.cells, scene.things, strict=True))
    wording = Wording(
        question=f"Where is the {first.color} thing, seen from the {second.color} thing?",
        answer=answer,
        others=[other for other in RELATIONS if other != answer],
        observation=" ".join(f"The {thing.name} is at the {PLACES[cell]}." for cell, thing in placed),
        reasoning=f"The {first.color} thing is at the {PLACES[a]}, the {second.color} thing is at the {PLACES[b]}.",
        conclusion=f"it is {answer}.",
    )
    return [wording]


# Change: the thing of the first picture that is missing in the second one.


class Change(NamedTuple):
    """The grids before and after; the second one lacks the last thing of the first one."""

    before: Grid
    after: Grid


def sample_change(rng: Random, level: Level) -> Change:
    things = sample_things(rng, level.num_objects)
    return Change(sample_grid(rng, things), sample_grid(rng, things[:-1]))


def ask_change(rng: Random, scene: Change) -> list[Wording]:
    kept, missing = scene.after.things, scene.before.things[-1]
    before = sorted(scene.before.things, key=lambda thing: thing.name)
    first, second = (listed([f"a {thing.name}" for thing in before if thing in part]) for part in (before, kept))
    wording = Wording(
        question="Which thing of the first picture is missing in the second picture?",
        answer=f"the {missing.name}",
        others=[f"the {thing.name}" for thing in kept],
        observation=f"The first picture shows {first}. The second picture shows {second}.",
        conclusion=f"the {missing.name} is missing.",
    )
    return [wording]


SKILLS = {
    "look/value": Skill(
        subject="social science",
        grade="grade5",
        category="Charts",
        share=7,
        mistake="commonsense",
        lecture="The number that a bar shows is the line at which the bar ends.",
        sample=sample_bars,
        combination=lambda scene: (scene.heights, scene.asked),
        ask=ask_bars,
        draw=draw_bars,
        named=name_bars,
        vocabulary=frozenset({*LETTERS, *map(str, HEIGHTS), *COLORS}),
        caption=lambda scene: f"A chart with {scene.color} bars.",
    ),
    "look/relation": Skill(
        subject="language science",
        grade="grade1",
        category="Places",
        share=7,
        mistake="commonsense",
        lecture="Two things in one row are to the left or to the right of each other, in one column above or below.",
        sample=sample_relation,
        combination=lambda scene: (scene.things[:2], scene.cells[:2]),
        ask=ask_relation,
        draw=lambda scene: [draw_grid(scene)],
        named=lambda scene: names_of(scene.things),
        vocabulary=THING_NAMES,
        caption=lambda scene: f"A picture with {name_things(scene.things)}.",
    ),
    "look/change": Skill(
        subject="natural science",
        grade="grade2",
        category="Before and after",
        share=7,
        mistake="commonsense",
        lecture="A thing is missing if the first picture shows it and the second picture does not.",
        sample=sample_change,
        combination=lambda scene: tuple(sorted(scene.before.things)),
        ask=ask_change,
        draw=lambda scene: [draw_grid(scene.before), draw_grid(scene.after)],
        named=lambda scene: names_of(scene.before.things),
        vocabulary=THING_NAMES,
        caption=lambda scene: "Two pictures with colored shapes.",
    ),
}
