"""Evaluate the rules of `mmcot.evaluation.mistakes` on artificial mistakes and on GPT-3's, which a reader labelled.

    python -m benchmarks.mistakes artificial         # 30 of each kind, in rationales of the demonstration
    python -m benchmarks.mistakes gpt3               # GPT-3's 92 wrong answers (benchmarks/gpt3_labels.jsonl)

The labels of GPT-3's mistakes are older than the rules. Prints the confusion matrix, agreement and Cohen's kappa.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from sklearn.metrics import cohen_kappa_score

from benchmarks.setting import DATASET, report
from mmcot.evaluation.mistakes import KINDS, sort_mistake
from mmcot.problems.sources import load_problems
from mmcot.storage.files import read_json

GPT3 = "../shared/fixtures/reference_text/gpt3_test361.json"
LABELS = Path(__file__).with_name("gpt3_labels.jsonl")
COUNT = 30

OPPOSITES = {
    "Like poles repel": "Like poles attract",
    "Opposite poles attract": "Opposite poles repel",
    "people buy more": "people buy less",
    "people buy less": "people buy more",
    "Bottom is south": "Bottom is north",
    "Top is north": "Top is south",
    "Left is west": "Left is east",
    "Right is east": "Right is west",
    "left is west": "left is east",
    "right is east": "right is west",
}


def factual(row: dict, wrong: str, generator: random.Random) -> str | None:
    """Invert a rule of the lecture, and change the conclusion to follow from it."""
    rules = [rule for rule in OPPOSITES if rule in row["solution"]]
    if not rules:
        return None
    rule = generator.choice(rules)
    return with_conclusion(row["solution"].replace(rule, OPPOSITES[rule]), row, wrong)


def commonsense(row: dict, wrong: str, generator: random.Random) -> str | None:
    """State a wrong observation, and change the conclusion to follow from it."""
    if row["skill"] == "thermometer":
        return row["solution"].replace(row["choices"][row["answer"]].split()[0], wrong.split()[0])
    if row["skill"] == "objects":
        right = row["choices"][row["answer"]]
        swapped = {right: wrong, wrong: right}
        return " ".join(
            swapped.get(word.strip("."), word.strip(".")) + "." * word.endswith(".") for word in row["solution"].split()
        )
    if row["skill"] == "map":
        sides = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
        first, rest = row["solution"].split(".", 1)
        words = first.split()
        place = next(index for index, word in enumerate(words) if word in sides)
        words[place] = sides[words[place]]
        return with_conclusion(" ".join(words) + "." + rest, row, wrong)
    return None


def logical(row: dict, wrong: str, generator: random.Random) -> str | None:
    """Keep the right statements, and change only the conclusion."""
    return with_conclusion(row["solution"], row, wrong)


def with_conclusion(solution: str, row: dict, wrong: str) -> str:
    head, _, conclusion = solution.rpartition(". ")
    return f"{head}. {conclusion.replace(row['choices'][row['answer']].removeprefix('it '), wrong.removeprefix('it '))}"


def artificial_mistakes() -> tuple[list[str], list[str]]:
    """Return the kinds of artificial mistakes, and the kinds that the rules give."""
    rows = load_problems("demo", "test").to_list()
    truths, found = [], []
    for kind, make in (("factual", factual), ("commonsense", commonsense), ("logical", logical)):
        generator, count = random.Random(kind), 0
        for row in generator.sample(rows, len(rows)):
            answer = generator.choice([number for number in range(len(row["choices"])) if number != row["answer"]])
            text = make(row, row["choices"][answer], generator)
            if text is None or text == row["solution"]:
                continue
            truths.append(kind)
            found.append(sort_mistake(row, {"answer": answer, "rationale": text}).kind)
            count += 1
            if count == COUNT:
                break
    return truths, found


def gpt3_mistakes() -> tuple[list[str], list[str]]:
    """Return the labels of GPT-3's mistakes, and the kinds that the rules give."""
    labels = {row["id"]: row["label"] for row in map(json.loads, LABELS.read_text().splitlines())}
    predictions = read_json(GPT3)["predictions"]
    problems = {row["id"]: row for row in load_problems(DATASET, "test", pictures=False) if row["id"] in labels}
    names = sorted(labels, key=int)
    return [labels[name] for name in names], [sort_mistake(problems[name], predictions[name]).kind for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=("artificial", "gpt3"))
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to this file")
    arguments = parser.parse_args()
    truths, found = artificial_mistakes() if arguments.source == "artificial" else gpt3_mistakes()
    pairs = Counter(zip(truths, found, strict=True))
    matrix = {truth: {kind: pairs[truth, kind] for kind in KINDS if pairs[truth, kind]} for truth in KINDS}
    result = {
        "n": len(truths),
        "confusion": {truth: row for truth, row in matrix.items() if row},
        "agreement": round(100 * sum(a == b for a, b in zip(truths, found, strict=True)) / len(truths), 1),
        "kappa": round(cohen_kappa_score(truths, found), 3),
    }
    report(f"mistakes {arguments.source}", result, arguments.output)


if __name__ == "__main__":
    main()
