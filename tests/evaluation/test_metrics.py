"""Scores of metrics.py: equal to those of the original's code on GPT-3's answers, and correct in edge cases."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mmcot.evaluation.metrics import CLASSES, accuracy, class_sizes, rationale_scores, score
from mmcot.evaluation.tables import format_table
from mmcot.problems.sources import load_problems

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
GPT3_SCORES = SHARED / "fixtures" / "reference_text" / "gpt3_test361.json"
SCIENCEQA = SHARED / "scienceqa"
NO_RATIONALE = {"bleu1": None, "bleu4": None, "rougeL": None}


def make_problem(id_="1", **columns):
    row = {"context": "", "images": [], "subject": "natural science", "grade": "grade4", "solution": "It is red."}
    return {"id": id_, "choices": ["a", "b"], "answer": 1} | row | columns


@pytest.fixture(scope="module")
def gpt3():
    if not GPT3_SCORES.is_file():
        pytest.skip(f"{GPT3_SCORES} is not on this machine: the reference scores cannot ship with the repository")
    return json.loads(GPT3_SCORES.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def scienceqa_test(gpt3):
    if not SCIENCEQA.is_dir():
        pytest.skip(f"{SCIENCEQA} is not on this machine: ScienceQA's problems cannot ship with the repository")
    return load_problems(str(SCIENCEQA), "test")


@pytest.fixture(scope="module")
def gpt3_scores(gpt3, scienceqa_test):
    return score(scienceqa_test, gpt3["predictions"])


def test_accuracies_of_gpt3_match_original(gpt3, gpt3_scores):
    expected = {name: entry["accuracy"] for name, entry in gpt3["accuracy"].items()}
    assert gpt3_scores["accuracy"] == pytest.approx(expected, abs=1e-3)


def test_class_sizes_of_scienceqa_match_original(gpt3, scienceqa_test):
    assert class_sizes(scienceqa_test) == {name: entry["n"] for name, entry in gpt3["accuracy"].items()}


def test_rationale_scores_of_gpt3_match_original(gpt3, gpt3_scores):
    expected = {name: gpt3["rationale"][name] for name in NO_RATIONALE}
    assert gpt3_scores["rationale"] == pytest.approx(expected, abs=0.01)


def test_scores_have_documented_keys():
    scores = score([make_problem()], {"1": {"answer": 1, "rationale": "It is red."}})
    assert list(scores)[:3] == ["accuracy", "rationale", "n"]
    assert " ".join(scores["accuracy"]) == " ".join(CLASSES) == "NAT SOC LAN TXT IMG NO G1-6 G7-12 Avg"
    assert scores["n"] == 1


def checked(answer, verdict="right", rejected=None):
    columns = {"answer": answer, "judgement": verdict, "judgement_score": 0.6}
    return columns if rejected is None else {**columns, "rejected": {"answer": rejected}}


def test_scores_answers_before_and_after_check():
    problems = [make_problem(str(number)) for number in range(5)]
    columns = [checked(1), checked(0), checked(1, "wrong", 0), checked(0, "wrong", 0), checked(0, "wrong", 1)]
    predictions = dict(zip("01234", columns, strict=True))
    scores = score(problems, predictions)
    expected = {"n": 5, "sent_back": 3, "accuracy_before": 40, "accuracy_after": 40, "verdict_accuracy": 60}
    assert scores["check"] == expected and scores["accuracy"]["Avg"] == 40
    line = "check 3 of 5 problems sent back accuracy before 40.00, after 40.00 right verdicts 60.00"
    assert line in [" ".join(line.split()) for line in format_table(scores).splitlines()]
    kept = score(problems, dict.fromkeys("01234", checked(1)))["check"]
    assert kept == {"n": 5, "sent_back": 0, "accuracy_before": 100, "accuracy_after": 100, "verdict_accuracy": 100}


def test_scores_no_check_without_verdicts_or_of_several_rationales():
    problem = make_problem()
    for columns in ({"answer": 1, "answer_text": "right"}, {**checked(1), "agreement": 0.8}):
        assert "check" not in score([problem], {"1": columns})


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({}, {"NAT", "NO", "G1-6", "Avg"}),
        ({"context": "Look."}, {"NAT", "TXT", "G1-6", "Avg"}),
        ({"images": [{"path": "x.png"}], "grade": "grade6"}, {"NAT", "IMG", "G1-6", "Avg"}),
        ({"images": [{"path": "x.png"}], "context": "Look."}, {"NAT", "IMG", "TXT", "G1-6", "Avg"}),
        ({"subject": "social science", "grade": "grade7"}, {"SOC", "NO", "G7-12", "Avg"}),
        ({"subject": "language science", "grade": "grade12"}, {"LAN", "NO", "G7-12", "Avg"}),
        ({"subject": "", "grade": ""}, {"NO", "Avg"}),
    ],
)
def test_classes_of_a_problem(columns, classes):
    assert {name for name, size in class_sizes([make_problem(**columns)]).items() if size} == classes


def test_accuracy_is_none_without_problems_and_zero_without_right_answers():
    percent = accuracy([make_problem("1"), make_problem("2", subject="social science")], {"1": 1, "2": 0})
    assert (percent["NAT"], percent["SOC"], percent["LAN"], percent["Avg"]) == (100, 0, None, 50)
    assert set(accuracy([], {}).values()) == {None}


def test_missing_answer_is_wrong_if_gold_answer_is_unknown():
    assert accuracy([make_problem(answer=-1)], {"1": -1})["Avg"] == 0


def test_rationale_equal_to_solution_scores_100_with_and_without_prefix():
    problems = [make_problem(solution="The ball is red. It is not blue.")]
    for rationale in ("The ball is red. It is not blue.", "Solution: The ball is red. It is not blue."):
        assert rationale_scores(problems, {"1": rationale}) == pytest.approx(dict.fromkeys(NO_RATIONALE, 100), abs=1e-4)


def test_ignores_pairs_with_an_empty_text():
    problems = [make_problem("1"), make_problem("2"), make_problem("3", solution=""), make_problem("4", solution="...")]
    alone = rationale_scores(problems[:1], {"1": "It is blue."})
    rationales = {"1": "It is blue.", "2": "Solution: .", "3": "It is red.", "4": "It is red."}
    assert rationale_scores(problems, rationales) == alone
    assert rationale_scores(problems[2:], rationales) == NO_RATIONALE


def test_rationale_scores_are_none_without_rationales():
    assert score([make_problem()], {"1": {"answer": 1}})["rationale"] == NO_RATIONALE


def test_scores_long_texts_without_changing_recursion_limit():
    limit = sys.getrecursionlimit()
    gold, generated = (" ".join(["The", *(f"{name}{i}" for i in range(600))]) for name in "ab")
    assert 0 < rationale_scores([make_problem(solution=gold)], {"1": generated})["rougeL"] < 1
    assert sys.getrecursionlimit() == limit


def test_pair_without_common_4_gram_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = rationale_scores([make_problem()], {"1": "It is blue and green now."})
    assert scores["bleu4"] == pytest.approx(0)


def test_unreadable_decoded_answer_is_wrong():
    problems = [make_problem("1"), make_problem("2")]
    predictions = {"1": {"answer": 1, "decoded_answer": 1}, "2": {"answer": 1, "decoded_answer": -1}}
    scores = score(problems, predictions)
    assert (scores["accuracy"]["NAT"], scores["decoded_accuracy"]["NAT"]) == (100, 50)
    assert scores["decoded_accuracy"]["SOC"] is None


def test_refuses_ids_that_differ_from_problems():
    problems = [make_problem(str(i)) for i in range(10, 20)]
    predictions = {str(i): {"answer": 1} for i in range(17, 22)}
    with pytest.raises(ValueError) as error:
        score(problems, predictions)
    assert "5 predictions, 10 problems" in str(error.value)
    assert "7 (10, 11, 12, 13, 14, …) without a prediction" in str(error.value)
    assert "2 (20, 21) without a problem" in str(error.value)


@pytest.mark.parametrize(
    ("prediction", "found"),
    [
        ({"answer": 2}, "'answer' is 2, expected an integer from 0 to 1"),
        ({"answer": -1}, "'answer' is -1"),
        ({"answer": "B"}, "'answer' is 'B'"),
        ({"answer": True}, "'answer' is True"),
        ({"rationale": "It is red."}, "'answer' is None"),
        ({"answer": 1, "decoded_answer": 2}, "'decoded_answer' is 2, expected an integer from -1 to 1"),
        ({"answer": 1, "rationale": None}, "'rationale' is None"),
    ],
)
def test_refuses_invalid_prediction(prediction, found):
    with pytest.raises(ValueError, match=f"prediction 1: {found}"):
        score([make_problem()], {"1": prediction})


def test_accepts_no_answer_to_problem_without_choices():
    assert score([make_problem(choices=[], answer=-1)], {"1": {"answer": -1}})["accuracy"]["Avg"] == 0


def test_metrics_import_no_model_code():
    modules = "{'torch', 'transformers', 'modeling_mmcot'}"
    program = f"import sys, mmcot.evaluation.metrics; print(sorted({modules} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
