"""Problems without a picture: an order that several statements imply, and the last place of a thing."""

from random import Random
from typing import NamedTuple

from mmcot.problems.study_skill import Level, Skill, Wording, listed

PERSONS = ("Mia", "Tom", "Anna", "Ben", "Lily", "Sam", "Emma", "Jack", "Nina", "Paul", "Rosa", "Leo")

# Order: who is first or last in an order.

# The words for more, less, the most and the least.
COMPARISONS = (
    ("older", "younger", "oldest", "youngest"),
    ("taller", "shorter", "tallest", "shortest"),
    ("faster", "slower", "fastest", "slowest"),
)


class Order(NamedTuple):
    """
    Persons from the most to the least.

    Args:
        statements: each compares two neighbours: the rank of the greater person, whether that person is named first.
    """

    persons: tuple[str, ...]
    comparison: tuple[str, str, str, str]
    statements: tuple[tuple[int, bool], ...]
    asks_for_most: bool


def sample_order(rng: Random, level: Level) -> Order:
    persons = tuple(rng.sample(PERSONS, level.num_objects + 1))
    ranks = rng.sample(range(len(persons) - 1), len(persons) - 1)
    statements = tuple((rank, rng.random() < 0.5) for rank in ranks)
    return Order(persons, rng.choice(COMPARISONS), statements, rng.random() < 0.5)


def ask_order(rng: Random, scene: Order) -> list[Wording]:
    more, less, most, least = scene.comparison
    persons = scene.persons
    answer, superlative = (persons[0], most) if scene.asks_for_most else (persons[-1], least)
    statements = [
        f"{persons[rank]} is {more} than {persons[rank + 1]}."
        if greater_first
        else f"{persons[rank + 1]} is {less} than {persons[rank]}."
        for rank, greater_first in scene.statements
    ]
    wording = Wording(
        question=f"Who is the {superlative}?",
        context=" ".join(statements),
        answer=answer,
        others=[person for person in persons if person != answer],
        observation=" ".join(f"{persons[rank]} is {more} than {persons[rank + 1]}." for rank, _ in scene.statements),
        reasoning=f"In order: {listed(persons)}.",
        conclusion=f"{answer} is the {superlative}.",
    )
    return [wording]


# Moves: where a thing is at the end.

THINGS = ("key", "coin", "book", "ball", "cup", "hat")
LOCATIONS = ("park", "school", "lake", "shop", "beach", "farm", "river", "garden")


class Moves(NamedTuple):
    """The things that are moved (the question asks for the first one), and the moves: person, thing, location."""

    things: tuple[str, str]
    moves: tuple[tuple[str, str, str], ...]


def sample_moves(rng: Random, level: Level) -> Moves:
    things = tuple(rng.sample(THINGS, 2))
    locations = rng.sample(LOCATIONS, level.num_objects)
    moved = [things[0], things[1], *(rng.choice(things) for _ in locations[2:])]
    rng.shuffle(moved)
    return Moves(things, tuple((rng.choice(PERSONS), *move) for move in zip(moved, locations, strict=True)))


def ask_moves(rng: Random, scene: Moves) -> list[Wording]:
    thing = scene.things[0]
    path = [location for _, moved, location in scene.moves if moved == thing]
    wording = Wording(
        question=f"Where is the {thing} at the end?",
        context=" ".join(f"{person} takes the {moved} to the {location}." for person, moved, location in scene.moves),
        answer=path[-1],
        others=[location for _, _, location in scene.moves if location != path[-1]],
        observation=f"The {thing} goes to the {', then to the '.join(path)}.",
        conclusion=f"it is at the {path[-1]}.",
    )
    return [wording]


SKILLS = {
    "text/order": Skill(
        subject="social science",
        grade="grade5",
        category="Orders",
        share=7,
        mistake="logical",
        lecture="If A is older than B and B is older than C, then A is older than C.",
        sample=sample_order,
        combination=lambda scene: scene.persons,
        ask=ask_order,
    ),
    "text/moves": Skill(
        subject="language science",
        grade="grade7",
        category="Stories",
        share=7,
        mistake="logical",
        lecture="A thing is at the place of its last move.",
        sample=sample_moves,
        combination=lambda scene: (scene.things[0], *(move[1:] for move in scene.moves)),
        ask=ask_moves,
    ),
}
