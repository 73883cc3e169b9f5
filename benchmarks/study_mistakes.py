"""Evaluate the rules of `mmcot.evaluation.mistakes` on mistakes that code inserts into solutions of study problems.

    python -m benchmarks.study_mistakes --output benchmarks/results/mistakes/study.json

A mistake is inserted at a known place, so its kind is known: a wrong or missing fact is factual, the solution for
another picture commonsense, a wrong or missing step or a wrong conclusion logical. Each skill has at least one mistake
of the kind that `study.EXPECTED_MISTAKES` expects. Prints the confusion matrix, the agreement for each skill and
mistake, and the agreement on mistakes of the expected kind.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.mistakes import with_conclusion
from benchmarks.setting import report
from mmcot.evaluation.mistakes import KINDS, sort_mistake
from mmcot.problems.study import EXPECTED_MISTAKES, generate


class Mistake(NamedTuple):
    """A mistake in the solution of a problem: a key of `MISTAKES`, the wrong answer, the rationale, its kind."""

    name: str
    problem: dict
    answer: int
    rationale: str
    kind: str


def has_steps(row: dict) -> bool:
    return EXPECTED_MISTAKES[row["skill"]] == "logical"


def swapped(text: str, first: str, second: str) -> str:
    """Exchange two names in a text."""
    names = {first: second, second: first}
    return re.sub(rf"\b({re.escape(first)}|{re.escape(second)})\b", lambda match: names[match[0]], text)


def wrong_fact(row: dict, wrong: int, rows: list[dict]) -> str | None:
    """State another value of the attribute for the right animal."""
    if row["topic"] != "fact":
        return None
    return row["solution"].replace(row["choices"][row["answer"]], row["choices"][wrong])


def missing_fact(row: dict, wrong: int, rows: list[dict]) -> str | None:
    """Leave out the fact, and guess."""
    if row["topic"] != "fact":
        return None
    return with_conclusion(row["solution"].replace(f" {row['lecture']}", ""), row, row["choices"][wrong])


def other_picture(row: dict, wrong: int, rows: list[dict]) -> str | None:
    """Return the solution of a problem with another picture, the same question and this answer."""
    if not row["images"]:
        return None
    for other in rows:
        is_same = all(other[name] == row[name] for name in ("skill", "question", "context"))
        if is_same and other["choices"][other["answer"]] == row["choices"][wrong]:
            return other["solution"]
    return None


def wrong_step(row: dict, wrong: int, rows: list[dict]) -> str | None:
    """Keep the observation, and exchange right and wrong in the steps after it."""
    if not has_steps(row):
        return None
    right = row["choices"][row["answer"]]
    # In a story, the observation is already a step: the order of moves.
    observation = "" if row["skill"] == "text/moves" else row["observation"]
    steps = row["solution"].removeprefix(observation)
    if row["skill"] == "logic/count":
        steps = wrong_comparison(steps, row["choices"][wrong], row["question"])
    return observation + swapped(steps, right, row["choices"][wrong])


def missing_step(row: dict, wrong: int, rows: list[dict]) -> str | None:
    """Leave out the steps between the observation and a wrong conclusion."""
    text = wrong_conclusion(row, wrong, rows)
    short = f"{row['observation']} {text.rpartition('. ')[2]}"
    return short if has_steps(row) and short != text else None


def wrong_comparison(steps: str, wrong: str, question: str) -> str:
    """Compare the two numbers as the wrong answer does."""
    is_first = question.startswith(f"Are there {wrong} ")
    relation = "as many as" if wrong == "equally many" else "more than" if is_first else "less than"
    return re.sub("more than|less than|as many as", relation, steps)


def wrong_conclusion(row: dict, wrong: int, rows: list[dict]) -> str:
    """Keep all statements, and change the conclusion only."""
    return with_conclusion(row["solution"], row, row["choices"][wrong])


MISTAKES: dict[str, tuple[str, Callable]] = {
    "wrong fact": ("factual", wrong_fact),
    "missing fact": ("factual", missing_fact),
    "other picture": ("commonsense", other_picture),
    "wrong step": ("logical", wrong_step),
    "missing step": ("logical", missing_step),
    "wrong conclusion": ("logical", wrong_conclusion),
}


def insert_mistakes(rows: list[dict]) -> Iterator[Mistake]:
    """Insert every mistake that a problem allows, each with the first wrong answer for which there is one."""
    for row in rows:
        wrong_answers = [number for number in range(len(row["choices"])) if number != row["answer"]]
        for name, (kind, make) in MISTAKES.items():
            texts = ((answer, make(row, answer, rows)) for answer in wrong_answers)
            for answer, text in texts:
                if text is not None and text != row["solution"]:
                    yield Mistake(name, row, answer, text, kind)
                    break


def percentage(values: list[bool]) -> float:
    return round(100 * sum(values) / len(values), 1)


def measure(rows: list[dict]) -> dict:
    """Return the confusion matrix and the agreement (in percent) of the rules with the kinds of inserted mistakes."""
    pairs: Counter[tuple[str, str]] = Counter()
    by_skill: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    expected: dict[str, list[bool]] = defaultdict(list)
    for mistake in insert_mistakes(rows):
        prediction = {"answer": mistake.answer, "rationale": mistake.rationale}
        found = sort_mistake(mistake.problem, prediction).kind
        skill = mistake.problem["skill"]
        pairs[mistake.kind, found] += 1
        by_skill[skill][mistake.name].append(found == mistake.kind)
        if mistake.kind == EXPECTED_MISTAKES[skill]:
            expected[skill].append(found == mistake.kind)
    return {
        "n": pairs.total(),
        "confusion": {
            kind: {found: pairs[kind, found] for found in KINDS if pairs[kind, found]}
            for kind in dict.fromkeys(kind for kind, _ in MISTAKES.values())
        },
        "agreement": round(100 * sum(n for (kind, found), n in pairs.items() if kind == found) / pairs.total(), 1),
        "agreement_by_skill": {
            skill: {name: percentage(values) for name, values in found.items()} for skill, found in by_skill.items()
        },
        "agreement_on_expected_kind": {skill: percentage(values) for skill, values in expected.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to this file")
    arguments = parser.parse_args()
    report("mistakes study", measure(list(generate("test"))), arguments.output)


if __name__ == "__main__":
    main()
