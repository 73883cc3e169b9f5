"""What kind of mistake an answer is: factual, commonsense or logical (the paper's first version counts the first, its
last one the other two), or one of answer and rationale against each other. By rules that can be explained, not by a
model.

The rules read the rationale sentence by sentence beside the problem's lecture, context and gold rationale. What they
say is a first guess with a confidence; a person decides. Nothing here predicts, or knows the model.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = {
    "factual": "a fact of the lecture or the context is stated wrongly",
    "commonsense": "something that is to be seen, counted or known from everyday life is stated wrongly",
    "logical": "what is stated is right, and does not lead to the answer, or contradicts itself",
    "right_rationale": "the rationale supports the right choice, and another one is answered",
    "no_rationale": "there is no rationale, or it says nothing of the question",
    "wrong_rationale": "the answer is right, and the rationale is not",
}

# Of word lists: a sentence that is as near as ALIKE to another says the same thing, with words changed below SAME.
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
NUMBER = r"(-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?)"  # 1,000 is one, 4,7,9 are three
# What a question asks to look at, count or sort.
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
        confidence: from 0 to 1, of the rule.
        reason: the rule's words for what it found, to be read by a person.
        picture_not_used: the answer is the same with the picture withheld; None where that is not known.
    """

    kind: str
    confidence: float
    reason: str
    picture_not_used: bool | None = None


def sort_mistake(
    problem: Mapping[str, Any], prediction: Mapping[str, Any], without_picture: Mapping[str, Any] | None = None
) -> Verdict | None:
    """
    Args:
        problem: with its gold columns.
        prediction: `answer` and, where there is one, `rationale`.
        without_picture: what is predicted for the problem with its picture withheld.

    Returns:
        None for a right answer with which the rationale agrees.
    """
    rationale = prediction.get("rationale", "")
    is_right = prediction["answer"] == problem["answer"]
    verdict = (
        of_right_answer(problem, rationale) if is_right else of_wrong_answer(problem, rationale, prediction["answer"])
    )
    if verdict is None or without_picture is None or not problem["images"]:
        return verdict
    unused = without_picture["answer"] == prediction["answer"]
    return Verdict(verdict.kind, verdict.confidence, verdict.reason, unused)


def of_right_answer(problem: Mapping[str, Any], rationale: str) -> Verdict | None:
    supported = supported_choice(rationale, problem["choices"])
    if supported is not None and supported != problem["answer"]:
        return Verdict("wrong_rationale", 0.7, f"The rationale supports {problem['choices'][supported]!r}.")
    return None


def of_wrong_answer(problem: Mapping[str, Any], rationale: str, answer: int) -> Verdict:
    said = sentences(rationale)
    if says_nothing(said):
        return Verdict("no_rationale", 0.8, "The rationale has no words of its own, or only repeats them.")
    supported = supported_choice(rationale, problem["choices"])
    if supported == problem["answer"]:
        return Verdict(
            "right_rationale", 0.8, f"The rationale ends with the right choice, {problem['choices'][supported]!r}."
        )
    found = false_arithmetic(rationale) or contradiction(said) or changed_statement(problem, said)
    if found is not None:
        return found
    if supported is not None and supported != answer:
        chosen = problem["choices"][answer] if answer >= 0 else "nothing"
        reason = f"The rationale supports {problem['choices'][supported]!r}, and {chosen!r} is answered."
        return Verdict("logical", 0.6, reason)
    if premises_are_gold(problem, said):
        return Verdict(
            "logical",
            0.7,
            "What comes before the conclusion stands in gold or lecture; the conclusion does not follow.",
        )
    if problem["images"] or OBSERVED.search(problem["question"]):
        return Verdict(
            "commonsense", 0.4, "The question asks to look, count or know from everyday life; no other rule applies."
        )
    if knows_the_lecture(problem, said):
        return Verdict("logical", 0.4, "The lecture's statements stand there; their use on the question must be wrong.")
    return Verdict("factual", 0.3, "The question asks for knowledge, and no other rule applies.")


def parts(text: str) -> list[str]:
    """The sentences, in lower case. (A line's end is a backslash and an n in what a T5 writes.)"""
    return re.split(r"(?<=[.!?])\s+|\\n|\n", text.removeprefix("Solution:").lower())


def sentences(text: str) -> list[list[str]]:
    """Each sentence's words in lower case."""
    return [words for words in (re.findall(r"[\w'.-]*[\w']", part) for part in parts(text)) if words]


def content(words: list[str]) -> set[str]:
    return {word for word in words if word not in STOP_WORDS}


def likeness(first: list[str], second: list[str]) -> float:
    """Of two sentences: 1 where they have the same words in the same order."""
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


def says_nothing(said: list[list[str]]) -> bool:
    found = set().union(*map(content, said)) if said else set()
    distinct = {tuple(words) for words in said}
    loops = len(said) >= 4 and len(distinct) <= len(said) / 2
    return len(found) < 3 or loops


def supported_choice(rationale: str, choices: list[str]) -> int | None:
    """The choice that the last sentence which names just one of them, and does not deny it, names."""
    names = [" ".join(word for words in sentences(choice) for word in words) for choice in choices]
    names = [re.sub(r"^(a|an|the)\s+", "", name) for name in names]
    for words in reversed(sentences(rationale)):
        text = " ".join(words)
        named = [
            number for number, name in enumerate(names) if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)
        ]
        # Of "blue" and "dark blue", the longer one is meant.
        named = [a for a in named if not any(a != b and names[a] in names[b] for b in named)]
        if len(named) == 1 and not NEGATIONS & set(words):
            return named[0]
    return None


def false_arithmetic(rationale: str) -> Verdict | None:
    """A comparison, an extreme or a sum of numbers that are stated, and it is not so."""
    numbers: list[float] = []
    for text in parts(rationale):
        here = [number_of(number) for number in re.findall(NUMBER, text)]
        for first, between, word, second in re.findall(
            rf"{NUMBER}(\D*?)\b({'|'.join(COMPARISONS)}) than\D*?{NUMBER}", text
        ):
            # Of "2 more than" the 2 is a difference, and "not" or "no more than" says something else.
            is_said = between.strip() and not NEGATIONS & set(between.split())
            if is_said and (number_of(first) - number_of(second)) * COMPARISONS[word] <= 0:
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


def contradiction(said: list[list[str]]) -> Verdict | None:
    """Two sentences that say the same, and one of them denies it."""
    for number, first in enumerate(said):
        for second in said[number + 1 :]:
            plain = [[word for word in words if word not in NEGATIONS] for words in (first, second)]
            denies = [bool(NEGATIONS & set(words)) for words in (first, second)]
            if denies[0] != denies[1] and len(content(plain[0])) >= 2 and content(plain[0]) == content(plain[1]):
                return Verdict("logical", 0.8, f"{' '.join(first)!r} contradicts {' '.join(second)!r}.")
    return None


def changed_statement(problem: Mapping[str, Any], said: list[list[str]]) -> Verdict | None:
    """The first sentence that says what lecture, context or gold say, with content words changed."""
    lecture, context = sentences(problem["lecture"]), sentences(problem["context"])
    gold = sentences(problem["solution"])
    for words in said:
        near = [(likeness(words, other), where, other) for where, texts in
                (("lecture", lecture), ("context", context), ("gold", gold)) for other in texts]  # fmt: skip
        if not near:
            return None
        best, where, other = max(near, key=lambda entry: entry[0])
        is_reworded = content(words) == content(other) and sorted(words) != sorted(other)
        if best < ALIKE or best >= SAME or is_reworded:
            continue
        if where == "gold" and other == gold[-1]:
            continue  # the conclusion, which is wrong in every wrong answer
        reason = f"{' '.join(words)!r}, where {where} says {' '.join(other)!r}."
        is_rule = where == "lecture" or is_general(other, lecture)
        if where == "gold" and not is_rule:
            return Verdict(
                "commonsense" if problem["images"] or OBSERVED.search(problem["question"]) else "factual", 0.7, reason
            )
        return Verdict("factual", 0.7, reason)
    return None


def is_general(sentence: list[str], lecture: list[list[str]]) -> bool:
    """Whether a sentence of gold is a rule that the lecture gives, in short."""
    return any(
        len(content(sentence) & content(words)) >= 2 and len(content(sentence) - content(words)) <= 1
        for words in lecture
    )


def premises_are_gold(problem: Mapping[str, Any], said: list[list[str]]) -> bool:
    known = [*sentences(problem["lecture"]), *sentences(problem["solution"]), *sentences(problem["context"])]
    premises = said[:-1]
    return bool(premises) and all(any(content(words) == content(other) for other in known) for words in premises)


def knows_the_lecture(problem: Mapping[str, Any], said: list[list[str]]) -> bool:
    """At least one sentence of the rationale is one of the lecture's or of gold's."""
    known = [*sentences(problem["lecture"]), *sentences(problem["solution"])]
    return any(likeness(words, other) >= 0.8 for words in said for other in known)
