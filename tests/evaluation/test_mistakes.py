"""The rules that sort mistakes, each on a case that it matches and on one that it does not match."""

import itertools

import pytest

from benchmarks.study_mistakes import measure
from mmcot.evaluation.mistakes import KINDS, sentences, sort_mistake, supported_choice
from mmcot.problems.study import EXPECTED_MISTAKES, generate

PROBLEM = {
    "question": "Will these magnets attract or repel each other?",
    "choices": ["attract", "repel"],
    "context": "",
    "images": [],
    "observation": "",
    "answer": 1,
    "lecture": "Every magnet has a north pole and a south pole. Opposite poles attract and like poles repel.",
    "solution": "The poles that face each other are south and south. Like poles repel. So, the magnets will repel.",
}
HEIGHTS = {
    "question": "Which tower is the tallest?",
    "choices": ["the red tower", "the blue tower", "the green tower"],
    "context": "",
    "images": [],
    "observation": "",
    "answer": 0,
    "lecture": "",
    "solution": "The red tower is 9 high, the blue one 5 and the green one 7. So, the red tower is the tallest.",
}


WEIGHTS = {
    "question": "Which ball is the heaviest?",
    "choices": ["red", "blue", "green"],
    "context": "",
    "images": [object()],
    "observation": "The red ball is heavier than the blue ball. The blue ball is heavier than the green ball.",
    "answer": 0,
    "lecture": "A balance goes down on the heavier side.",
}
WEIGHTS["solution"] = f"{WEIGHTS['observation']} In order: red, blue and green. So, the red ball is the heaviest."


def kind(problem, answer, rationale, **others):
    verdict = sort_mistake({**problem, **others}, {"answer": answer, "rationale": rationale})
    assert verdict is None or (verdict.kind in KINDS and 0 < verdict.confidence < 1 and verdict.reason)
    return verdict and verdict.kind


def reason(problem, answer, rationale, **others):
    return sort_mistake({**problem, **others}, {"answer": answer, "rationale": rationale}).reason


def test_right_answer_with_matching_or_empty_rationale_is_no_mistake():
    assert kind(PROBLEM, 1, PROBLEM["solution"]) is None
    assert kind(PROBLEM, 1, "") is None


def test_right_answer_against_its_rationale():
    assert kind(PROBLEM, 1, "The poles are south and south. So, the magnets will attract.") == "wrong_rationale"


def test_wrong_answer_against_right_rationale():
    assert kind(PROBLEM, 0, PROBLEM["solution"]) == "right_rationale"


@pytest.mark.parametrize("text", ["", "Solution:", "Attract.", "It is so. It is so. It is so. It is so. It is so."])
def test_rationale_without_content(text):
    assert kind(PROBLEM, 0, text) == "no_rationale"


def test_inverted_rule_of_lecture_is_factual():
    text = "The poles that face each other are south and south. Like poles attract. So, the magnets will attract."
    assert kind(PROBLEM, 0, text) == kind(PROBLEM, 0, text, images=[object()]) == "factual"
    assert "'like poles attract', where gold reads 'like poles repel'" in reason(PROBLEM, 0, text)


def test_misread_context_is_factual():
    problem = {
        "question": "What did Ann eat?",
        "context": "On Monday Ann ate a green apple at the lake.",
        "solution": "",
    }
    assert kind(PROBLEM, 0, "On Monday Ann ate a green pear at the lake. So it is a pear.", **problem) == "factual"


def test_false_statement_about_picture_is_commonsense():
    text = "The poles that face each other are south and north. So, they attract."
    assert kind(PROBLEM, 0, text, images=[object()]) == "commonsense"


def test_conclusion_that_does_not_follow_is_logical():
    text = PROBLEM["solution"].replace("will repel", "will attract")
    assert kind(PROBLEM, 0, text) == "logical" and "does not follow" in reason(PROBLEM, 0, text)


def test_changed_observation_is_commonsense_and_changed_step_logical():
    answer = "So, the blue ball is the heaviest."
    observed = f"The blue ball is heavier than the red ball. In order: blue, red and green. {answer}"
    assert kind(WEIGHTS, 1, observed) == "commonsense"
    concluded = f"{WEIGHTS['observation']} In order: blue, red and green. {answer}"
    assert kind(WEIGHTS, 1, concluded) == "logical"
    assert "'in order blue red and green', where gold reads 'in order red blue" in reason(WEIGHTS, 1, concluded)
    assert kind(WEIGHTS, 1, concluded, observation="") == "commonsense"  # unknown


def test_changed_observation_that_contains_words_of_the_lecture_is_commonsense():
    lecture = "The blue ball is heavier than any other."
    observed = "The blue ball is heavier than the red ball. So, the blue ball is the heaviest."
    assert kind(WEIGHTS, 1, observed, lecture=lecture) == "commonsense"


def test_omitted_fact_is_factual_and_omitted_step_logical():
    omitted = f"{WEIGHTS['observation']} So, the blue ball is the heaviest."
    assert kind(WEIGHTS, 1, omitted) == "logical"
    assert kind(WEIGHTS, 1, omitted, lecture="In order: red, blue and green.") == "factual"
    assert "omits 'in order red blue and green'" in reason(
        WEIGHTS, 1, omitted, lecture="In order: red, blue and green."
    )


def test_reworded_fact_is_not_omitted():
    lecture = "In order: red, blue and green."
    reworded = f"{WEIGHTS['observation']} In the order: red, blue, green. So, the blue ball is the heaviest."
    assert kind(WEIGHTS, 1, reworded, lecture=lecture) == "logical"
    assert "does not follow" in reason(WEIGHTS, 1, reworded, lecture=lecture)


def test_mistakes_in_study_problems_have_the_expected_kind():
    found = measure(list(itertools.islice(generate("test"), 300)))["agreement_on_expected_kind"]
    assert found.keys() == EXPECTED_MISTAKES.keys() and min(found.values()) > 90, found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "The blue tower is 5 and the red tower is 9. 5 is greater than 9. So, the blue tower is the tallest.",
            "5 is not greater than 9",
        ),
        ("There are 9, 5 and 7. 5 is the most. So, the blue tower is the tallest.", "5 is not the most of 9, 5, 7"),
        ("Its parts are 3 and 1, and 3 + 1 = 5. So, the blue tower is the tallest.", "3 + 1 is not 5"),
        (
            "The red tower is made of stone. The red tower is not made of stone. So, the blue tower is the tallest.",
            "contradicts",
        ),
    ],
)
def test_wrong_arithmetic_or_contradiction_is_logical(text, found):
    assert kind(HEIGHTS, 1, text) == "logical" and found in reason(HEIGHTS, 1, text)


def test_right_arithmetic_is_no_logical_mistake():
    text = "Blue has 9 stones of glass. 9 is greater than 5, and 4 + 5 = 9. The blue tower is the tallest."
    verdict = sort_mistake(HEIGHTS, {"answer": 1, "rationale": text})
    assert "greater" not in verdict.reason and "+" not in verdict.reason


def test_answer_that_rationale_does_not_support_is_logical():
    text = "One tower was built of marble long ago by masons. So, the green tower is the tallest."
    assert kind(HEIGHTS, 1, text) == "logical"
    assert "supports 'the green tower', but the answer is 'the blue tower'" in reason(HEIGHTS, 1, text)


def test_picture_not_used_needs_picture_and_prediction_without_it():
    problem = {**PROBLEM, "images": [object()]}
    prediction = {"answer": 0, "rationale": "The poles that face each other are south and north. So, they attract."}
    assert sort_mistake(problem, prediction).picture_not_used is None
    assert sort_mistake(problem, prediction, {"answer": 0}).picture_not_used is True
    assert sort_mistake(problem, prediction, {"answer": 1}).picture_not_used is False
    assert sort_mistake(PROBLEM, prediction, {"answer": 0}).picture_not_used is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is blue. So it is dark blue.", 1),
        ("It is not blue.", None),
        ("It is dark blue or red.", None),
        ("The red one is here. It is large.", 2),
        ("Nothing of it.", None),
        ("Das ist dunkelblau.", None),
    ],
)
def test_finds_choice_that_rationale_supports(text, expected):
    assert supported_choice(text, ["blue", "dark blue", "red"]) == expected


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("The city is Juneau, Alaska.", ["Juneau, Alaska", "Alaska"], 0),
        ("It is 1/2 of it.", ["1/2", "2"], 0),
        ("Es ist Größe.", ["Größe", "Gr"], 0),
        ("It is 20°C here.", ["20°C", "30°C"], 0),
        ("What?", ["…", "?"], None),
    ],
)
def test_normalizes_choices_like_rationales(text, choices, expected):
    assert supported_choice(text, choices) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Blue is not tall: 5 is not greater than 7. The blue tower is the tallest.",
        "Blue is tall, because 7 is 2 more than 5. The blue tower is the tallest.",
        "Blue has 1,000 stones, and 1,000 is greater than 500. The blue tower is the tallest.",
        "Blue has 3, and 3 is no more than 5. The blue tower is the tallest.",
        "The masses are 4,7,9, and blue has 9. 9 is the highest. The blue tower is the tallest.",
    ],
)
def test_true_statement_about_numbers_is_no_logical_mistake(text):
    verdict = sort_mistake(HEIGHTS, {"answer": 1, "rationale": text})
    assert " than " not in verdict.reason and "highest" not in verdict.reason, verdict


def test_splits_sentences_at_lines_but_not_in_decimal_numbers():
    assert sentences("Solution: It is 3.5 m high.\\nSo it's tall!") == [
        ["it", "is", "3.5", "m", "high"],
        ["so", "it's", "tall"],
    ]
