"""Hallucination in descriptions of study problems: names of things or values that the pictures do not show.

The shares are CHAIR-i and CHAIR-s of Rohrbach et al. 2018 (arXiv 1809.02156), with the drawn scene in place of human
annotations. A name is a word or phrase that pictures of the skill may show: a color, a shape, a colored shape, a
number, a letter, an animal. The longest name counts: "red circle" is one name. It is hallucinated if the picture
shows only a red square and a blue circle. A name of a thing that is drawn at another place is not hallucinated.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from mmcot.problems.study import drawn_names, vocabulary


def hallucination(problems: Iterable[Mapping[str, Any]], descriptions: Mapping[str, str]) -> dict[str, Any] | None:
    """
    Measure hallucination in the descriptions (by id) of study problems.

    Returns:
        `names`, the percentage of the names in descriptions that are hallucinated (None if there are no names);
        `descriptions`, the percentage of descriptions with a hallucinated name; `n`, the number of descriptions of
        problems with a picture; `num_names`, the number of names in these descriptions. None in place of the dict if no
        problem with a picture has a description.

    Raises:
        ValueError: a problem is not a study problem.
    """
    described = [problem["id"] for problem in problems if problem["images"] and problem["id"] in descriptions]
    if not described:
        return None
    hallucinated = {id_: hallucinated_names(id_, descriptions[id_]) for id_ in described}
    num_names = sum(len(named_in(descriptions[id_], vocabulary(id_))) for id_ in described)
    num_hallucinated = sum(map(len, hallucinated.values()))
    return {
        "names": 100 * num_hallucinated / num_names if num_names else None,
        "descriptions": 100 * sum(map(bool, hallucinated.values())) / len(described),
        "n": len(described),
        "num_names": num_names,
    }


def hallucinated_names(problem_id: str, description: str) -> list[str]:
    """Return the names in the description of a study problem that its pictures do not show, in order."""
    drawn = drawn_names(problem_id)
    return [name for name in named_in(description, vocabulary(problem_id)) if name not in drawn]


def named_in(text: str, names: frozenset[str]) -> list[str]:
    """Return the names that a text contains, in order. Plurals count as singulars, overlapping names as the longest."""
    return pattern_of(names).findall(text) if names else []


@cache
def pattern_of(names: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})s?\b")
