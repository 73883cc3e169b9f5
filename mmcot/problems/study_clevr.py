"""Sort-of-CLEVR: six colored squares and circles, with relational and non-relational questions.

Santoro et al. 2017, "A simple neural network module for relational reasoning" (arXiv 1706.01427), describe the dataset
but did not release it. The details follow a public generator (github.com/kimhc6028/relational-networks).

The same as in that generator: one object of each of six colors, each a square or a circle with equal probability, at a
random place without overlap; three kinds of non-relational questions (shape, left or right, top or bottom) and three of
relational questions (shape of the closest object, shape of the furthest object, number of objects of the same shape,
itself included), each about a random color; ten questions of each group for each picture of val and test.

Different: questions are sentences in place of vectors; no picture has a question twice; the choices are the possible
answers of the question's kind; pictures have 96 px in place of 75 px, with objects of 14 px in place of 10 px; no
object is near a middle line, and the closest and the furthest object are unambiguous; a training picture has one
question of each group in place of ten, so that a small training split has many pictures. There are far fewer training
pictures than the 9,800 of the public generator, so published accuracies are a reference, not a baseline.

Published accuracies: the paper reports above 94 % for a CNN with a relation network on both groups of questions, and
about 63 % for a CNN with an MLP on the relational ones.
"""

from collections.abc import Callable
from math import dist
from random import Random
from typing import NamedTuple

from mmcot.problems.drawing import COLORS, SIZE, Canvas
from mmcot.problems.study_skill import Level, Skill, Thing, Wording, listed, names_of

CLEVR_COLORS = {name: COLORS[name] for name in ("red", "green", "blue", "yellow")}
CLEVR_COLORS |= {"orange": (255, 140, 0), "gray": (128, 128, 128)}
CLEVR_SHAPES = ("square", "circle")
RADIUS = 7  # px
MARGIN = 3  # px between the center of an object and a middle line
CLEAR = 2  # px between the distances of the closest and the second closest object; for the furthest likewise
QUESTIONS_PER_PICTURE = 10  # of each group


class Placed(NamedTuple):
    """An object and its center in px."""

    thing: Thing
    center: tuple[int, int]


Scene = tuple[Placed, ...]


def sample(rng: Random, _level: Level) -> Scene:
    while True:
        scene: list[Placed] = []
        for color in CLEVR_COLORS:
            scene.append(Placed(Thing(color, rng.choice(CLEVR_SHAPES)), free_center(rng, scene)))
        if all(is_clear(placed, scene) for placed in scene):
            return tuple(scene)


def free_center(rng: Random, scene: list[Placed]) -> tuple[int, int]:
    """Return a random center that is not near a middle line, nor near an object of the scene."""
    places = [place for place in range(RADIUS + 1, SIZE - RADIUS) if abs(place - SIZE // 2) >= MARGIN]
    while True:
        x, y = rng.choice(places), rng.choice(places)
        if all(max(abs(x - other[0]), abs(y - other[1])) > 2 * RADIUS for _, other in scene):
            return x, y


def by_distance(placed: Placed, scene: Scene | list[Placed]) -> list[Placed]:
    """Return the other objects, the closest first."""
    others = [other for other in scene if other != placed]
    return sorted(others, key=lambda other: dist(other.center, placed.center))


def is_clear(placed: Placed, scene: list[Placed]) -> bool:
    """Whether it is clear which objects are the closest to and the furthest from an object."""
    closest, second, *_, last_but_one, furthest = (
        dist(other.center, placed.center) for other in by_distance(placed, scene)
    )
    return second - closest >= CLEAR and furthest - last_but_one >= CLEAR


def combination(scene: Scene) -> tuple:
    """Return the shape of each object and its cell in a 3x3 grid."""
    return tuple((thing.shape, 3 * x // SIZE, 3 * y // SIZE) for thing, (x, y) in scene)


def draw(scene: Scene) -> list[Canvas]:
    canvas = Canvas()
    for thing, center in scene:
        canvas.shape(thing.shape, center, RADIUS, CLEVR_COLORS[thing.color])
    return [canvas]


def shape_question(question: str, reasoning: str, thing: Thing, scene: Scene) -> Wording:
    (other,) = (shape for shape in CLEVR_SHAPES if shape != thing.shape)
    return Wording(question, thing.shape, [other], describe(scene), f"it is a {thing.shape}.", reasoning)


def place_question(placed: Placed, axis: int, scene: Scene) -> Wording:
    first = ("on the left", "at the top")[axis]
    is_first = placed.center[axis] < SIZE // 2
    return Wording(
        question=f"Is the {placed.thing.color} object {first} of the picture?",
        answer="yes" if is_first else "no",
        others=["no" if is_first else "yes"],
        observation=describe(scene),
        reasoning=f"The {placed.thing.color} object is at the {place_of(placed.center)}.",
        conclusion=f"the answer is {'yes' if is_first else 'no'}.",
    )


def describe(scene: Scene) -> str:
    """Return the shape and the place of each object, in the order of the colors."""
    return " ".join(f"The {thing.name} is at the {place_of(center)}." for thing, center in scene)


def place_of(center: tuple[int, int]) -> str:
    x, y = center
    return f"{'top' if y < SIZE // 2 else 'bottom'} {'left' if x < SIZE // 2 else 'right'}"


def count_question(placed: Placed, scene: Scene) -> Wording:
    color, shape = placed.thing
    same = [other.thing.color for other in scene if other.thing.shape == shape]
    return Wording(
        question=f"How many objects have the same shape as the {color} object?",
        answer=str(len(same)),
        others=[str(number) for number in range(1, len(scene) + 1) if number != len(same)],
        observation=describe(scene),
        reasoning=f"The {color} object is a {shape}. The {shape}s are {listed(same)}.",
        conclusion=f"the number is {len(same)}.",
    )


def non_relational(rng: Random, scene: Scene) -> list[Wording]:
    questions = []
    for placed in scene:
        color = placed.thing.color
        question = f"What is the shape of the {color} object?"
        shape = shape_question(question, f"The {color} object is a {placed.thing.shape}.", placed.thing, scene)
        questions += [shape, place_question(placed, 0, scene), place_question(placed, 1, scene)]
    return rng.sample(questions, QUESTIONS_PER_PICTURE)


def relational(rng: Random, scene: Scene) -> list[Wording]:
    questions = []
    for placed in scene:
        others = by_distance(placed, scene)
        for relation, (thing, _) in (("closest to", others[0]), ("furthest from", others[-1])):
            of = f"the object that is {relation} the {placed.thing.color} object"
            reasoning = f"T{of[1:]} is the {thing.name}."
            questions.append(shape_question(f"What is the shape of {of}?", reasoning, thing, scene))
        questions.append(count_question(placed, scene))
    return rng.sample(questions, QUESTIONS_PER_PICTURE)


def clevr_skill(category: str, lecture: str, ask: Callable[[Random, Scene], list[Wording]]) -> Skill:
    return Skill(
        subject="natural science",
        grade="grade3",
        category=category,
        share=12,
        mistake="commonsense",
        lecture=lecture,
        sample=sample,
        combination=combination,
        ask=ask,
        draw=draw,
        named=lambda scene: names_of(thing for thing, _ in scene),
        vocabulary=frozenset(names_of(Thing(color, shape) for color in CLEVR_COLORS for shape in CLEVR_SHAPES)),
        caption=lambda scene: "Six colored squares and circles.",
        scenes="sort_of_clevr",
        per_scene=QUESTIONS_PER_PICTURE,
    )


SKILLS = {
    "sort_of_clevr/non_relational": clevr_skill(
        "Properties of objects", "Every object has a color, a shape and a place.", non_relational
    ),
    "sort_of_clevr/relational": clevr_skill(
        "Relations of objects",
        "Compare an object with all others to find the closest, the furthest or equal ones.",
        relational,
    ),
}
