"""Classifies the mistakes of answers by explainable rules, without a model.

A mistake is factual, commonsense or logical (the first version of the paper counts factual mistakes, the last version
counts the other two), or a disagreement between answer and rationale.

The rules compare each sentence of the rationale with the problem's lecture, context and gold rationale. Their result is
a first guess with a confidence; a person decides.
"""

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = {
    "factual": "a fact of the lecture or the context is stated wrongly",
    "commonsense": "something visible, countable or known from everyday life is stated wrongly",
    "logical": "the statements are right, but do not lead to the answer, or contradict each other",
    "right_rationale": "the rationale supports the right choice, but the answer is another one",
    "no_rationale": "the rationale is absent, empty or only repeats itself",
    "wrong_rationale": "the answer is right, but the rationale supports another choice",
}

# Similarity of word lists: at ALIKE or above, two sentences make the same statement; below SAME, some words differ.
ALIKE, SAME = 0.6, 0.999

STOP_WORDS = set(
    "a an and are as at be by for from has have in is it its of on or so that the their there these they this to was "
    "were which will with you your so therefore".split()
)
NEGATIONS = {"not", "no", "never", "cannot", "isn't", "aren't", "doesn't", "don't", "neither", "nor"}
COMPARISONS = {
    "greater": 1, "more": 1, "higher": 1, "larger": 1, "taller": 1, "longer": 1, "heavier": 1, "warmer": 1, "hotter": 1,
    "less": -1, "fewer": -1, "lower": -1, "smaller": -1, "shorter": -1, "lighter": -1, "colder": -1, "cooler": -1,
}  # fmt: skip
EXTREMES = {"most": max, "greatest": max, "highest": max, "largest": max, "least": min, "fewest": min, "lowest": min}
NUMBER = r"(-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?)"  # 1,000 is one number, 4,7,9 are three
# Questions that ask to look at, count or sort something.
OBSERVED = re.compile(
    r"\b(map|picture|image|diagram|shown|color|colour|how many|which (?:of these )?(?:states?|countr|ocean|continent)|"
    r"labeled|look at|dictionary|alphabet|rhyme|sequence of|direction|highlighted|capital of)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Verdict:
    """
    Args:
        kind: a key of `KINDS`.
        confidence: the rule's confidence, from 0 to 1.
        reason: a sentence for a person that explains why the rule applies.
        picture_not_used: whether the answer is the same without the picture; None if unknown.
    """

    kind: str
    confidence: float
    reason: str
    picture_not_used: bool | None = None


def sort_mistake(
    problem: Mapping[str, Any], prediction: Mapping[str, Any], without_picture: Mapping[str, Any] | None = None
) -> Verdict | None:
    """
    Classify the mistake in a prediction.

    Args:
        problem: a problem with its gold columns.
        prediction: `answer` and optionally `rationale`.
        without_picture: the prediction for the problem without its picture.

    Returns:
        The verdict; None for a right answer that agrees with the rationale.
    """
    rationale = prediction.get("rationale", "")
    is_right = prediction["answer"] == problem["answer"]
    if is_right:
        verdict = judge_right_answer(problem, rationale)
    else:
        verdict = judge_wrong_answer(problem, rationale, prediction["answer"])
    if verdict is None or without_picture is None or not problem["images"]:
        return verdict
    unused = without_picture["answer"] == prediction["answer"]
    return Verdict(verdict.kind, verdict.confidence, verdict.reason, unused)


def judge_right_answer(problem: Mapping[str, Any], rationale: str) -> Verdict | None:
    supported = supported_choice(rationale, problem["choices"])
    if supported is not None and supported != problem["answer"]:
        return Verdict("wrong_rationale", 0.7, f"The rationale supports {problem['choices'][supported]!r}.")
    return None


def judge_wrong_answer(problem: Mapping[str, Any], rationale: str, answer: int) -> Verdict:
    statements = sentences(rationale)
    if is_empty_or_repetitive(statements):
        return Verdict("no_rationale", 0.8, "The rationale has almost no content words, or only repeats itself.")
    supported = supported_choice(rationale, problem["choices"])
    if supported == problem["answer"]:
        return Verdict(
            "right_rationale", 0.8, f"The rationale ends with the right choice, {problem['choices'][supported]!r}."
        )
    found = false_arithmetic(rationale) or contradiction(statements) or changed_statement(problem, statements)
    if found is not None:
        return found
    if supported is not None and supported != answer:
        chosen = problem["choices"][answer] if answer >= 0 else "nothing"
        reason = f"The rationale supports {problem['choices'][supported]!r}, but the answer is {chosen!r}."
        return Verdict("logical", 0.6, reason)
    if premises_are_gold(problem, statements):
        return missing_fact(problem, statements) or Verdict(
            "logical",
            0.7,
            "All sentences before the conclusion are in gold, lecture or context; the conclusion does not follow.",
        )
    if problem["images"] or OBSERVED.search(problem["question"]):
        return Verdict(
            "commonsense",
            0.4,
            "The question asks for observation, counting or everyday knowledge; no other rule applies.",
        )
    if repeats_the_lecture(problem, statements):
        return Verdict(
            "logical", 0.4, "The rationale repeats the lecture, so its application to the question is wrong."
        )
    return Verdict("factual", 0.3, "The question asks for knowledge; no other rule applies.")


def split_text(text: str) -> list[str]:
    """Split a text into lower-case sentences. (A T5 model writes a line break as a backslash and an n.)"""
    return re.split(r"(?<=[.!?])\s+|\\n|\n", text.removeprefix("Solution:").lower())


def sentences(text: str) -> list[list[str]]:
    """Return the words of each sentence in lower case."""
    return [words for words in (re.findall(r"[\w'.-]*[\w']", part) for part in split_text(text)) if words]


def content_words(words: list[str]) -> set[str]:
    return {word for word in words if word not in STOP_WORDS}


def similarity(first: list[str], second: list[str]) -> float:
    """Return the similarity of two sentences: 1 if they have the same words in the same order."""
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


def is_empty_or_repetitive(statements: list[list[str]]) -> bool:
    found = set().union(*map(content_words, statements)) if statements else set()
    distinct = {tuple(words) for words in statements}
    loops = len(statements) >= 4 and len(distinct) <= len(statements) / 2
    return len(found) < 3 or loops


def supported_choice(rationale: str, choices: list[str]) -> int | None:
    """Return the choice in the last sentence that names exactly one choice and contains no negation."""
    names = [" ".join(word for words in sentences(choice) for word in words) for choice in choices]
    names = [re.sub(r"^(a|an|the)\s+", "", name) for name in names]
    for words in reversed(sentences(rationale)):
        text = " ".join(words)
        named = [
            number for number, name in enumerate(names) if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)
        ]
        # "dark blue" contains "blue": only the longer name counts.
        named = [a for a in named if not any(a != b and names[a] in names[b] for b in named)]
        if len(named) == 1 and not NEGATIONS & set(words):
            return named[0]
    return None


def false_arithmetic(rationale: str) -> Verdict | None:
    """Find a false comparison, extreme or calculation of numbers."""
    numbers: list[float] = []
    for text in split_text(rationale):
        here = [number_of(number) for number in re.findall(NUMBER, text)]
        for first, between, word, second in re.findall(
            rf"{NUMBER}(\D*?)\b({'|'.join(COMPARISONS)}) than\D*?{NUMBER}", text
        ):
            # In "2 more than" the 2 is a difference; "not" and "no more than" make another statement.
            is_comparison = between.strip() and not NEGATIONS & set(between.split())
            if is_comparison and (number_of(first) - number_of(second)) * COMPARISONS[word] <= 0:
                return Verdict("logical", 0.9, f"{first} is not {word} than {second}.")
        for number, word in re.findall(rf"{NUMBER} is the ({'|'.join(EXTREMES)})\b", text):
            if numbers and number_of(number) != EXTREMES[word](numbers):
                return Verdict("logical", 0.9, f"{number} is not the {word} of {', '.join(f'{n:g}' for n in numbers)}.")
        for first, operation, second, result in re.findall(rf"{NUMBER} ?([-+*/x]) ?{NUMBER} ?= ?{NUMBER}", text):
            a, b = number_of(first), number_of(second)
            value = {"+": a + b, "-": a - b, "x": a * b, "*": a * b}
            if operation in value and abs(value[operation] - number_of(result)) > 1e-9:
                return Verdict("logical", 0.9, f"{first} {operation} {second} is not {result}.")
        numbers.extend(here)
    return None


def number_of(text: str) -> float:
    return float(text.replace(",", ""))


def contradiction(statements: list[list[str]]) -> Verdict | None:
    """Find two sentences that make the same statement, one of them negated."""
    for number, first in enumerate(statements):
        for second in statements[number + 1 :]:
            affirmed = [[word for word in words if word not in NEGATIONS] for words in (first, second)]
            is_negated = [bool(NEGATIONS & set(words)) for words in (first, second)]
            if (
                is_negated[0] != is_negated[1]
                and len(content_words(affirmed[0])) >= 2
                and content_words(affirmed[0]) == content_words(affirmed[1])
            ):
                return Verdict("logical", 0.8, f"{' '.join(first)!r} contradicts {' '.join(second)!r}.")
    return None


def changed_statement(problem: Mapping[str, Any], statements: list[list[str]]) -> Verdict | None:
    """Find the first sentence that resembles one of lecture, context or gold, but has other content words."""
    lecture, context = sentences(problem["lecture"]), sentences(problem["context"])
    gold, observation = sentences(problem["solution"]), sentences(problem["observation"])
    for words in statements:
        near = [(similarity(words, other), where, other) for where, texts in
                (("lecture", lecture), ("context", context), ("gold", gold)) for other in texts]  # fmt: skip
        if not near:
            return None
        best, where, other = max(near, key=lambda entry: entry[0])
        is_reworded = content_words(words) == content_words(other) and sorted(words) != sorted(other)
        if is_reworded and other in observation:
            is_changed = lists_other_things(words, other)
        else:
            is_changed = ALIKE <= best < SAME and not is_reworded
        if not is_changed:
            continue
        if where == "gold" and other == gold[-1]:
            continue  # the conclusion: it is wrong in every wrong answer
        reason = f"{' '.join(words)!r}, where {where} reads {' '.join(other)!r}."
        kind = kind_of_gold(problem, other, lecture) if where == "gold" else "factual"
        return Verdict(kind, 0.7, reason)
    return None


def lists_other_things(words: list[str], other: list[str]) -> bool:
    """Whether one of two sentences has a content word more often: "a red circle, a blue square and a blue circle"."""
    first, second = (Counter(word for word in sentence if word not in STOP_WORDS) for sentence in (words, other))
    return first != second


def kind_of_gold(problem: Mapping[str, Any], sentence: list[str], lecture: list[list[str]]) -> str:
    """Return the kind of a mistake in a sentence of the gold rationale: an observation, a rule or fact, or a step."""
    observation = sentences(problem["observation"])
    if problem["images"] and sentence in observation:
        return "commonsense"
    if is_general(sentence, lecture):
        return "factual"
    if observation:
        return "logical"
    # Observations and steps are not distinguished.
    return "commonsense" if problem["images"] or OBSERVED.search(problem["question"]) else "factual"


def is_general(sentence: list[str], lecture: list[list[str]]) -> bool:
    """Whether a gold sentence is a shortened rule of the lecture."""
    return any(
        len(content_words(sentence) & content_words(words)) >= 2
        and len(content_words(sentence) - content_words(words)) <= 1
        for words in lecture
    )


def missing_fact(problem: Mapping[str, Any], statements: list[list[str]]) -> Verdict | None:
    """Find a sentence of the lecture that the gold rationale repeats and the rationale omits."""
    lecture, found = sentences(problem["lecture"]), [content_words(words) for words in statements]
    for words in sentences(problem["solution"]):
        if words in lecture and content_words(words) not in found:
            return Verdict("factual", 0.6, f"The rationale omits {' '.join(words)!r}, which lecture and gold state.")
    return None


def premises_are_gold(problem: Mapping[str, Any], statements: list[list[str]]) -> bool:
    references = [*sentences(problem["lecture"]), *sentences(problem["solution"]), *sentences(problem["context"])]
    premises = statements[:-1]
    return bool(premises) and all(
        any(content_words(words) == content_words(other) for other in references) for words in premises
    )


def repeats_the_lecture(problem: Mapping[str, Any], statements: list[list[str]]) -> bool:
    """Whether at least one sentence of the rationale comes from the lecture or from gold."""
    references = [*sentences(problem["lecture"]), *sentences(problem["solution"])]
    return any(similarity(words, other) >= 0.8 for words in statements for other in references)
