"""A stage that checks: its target, its verdicts, and the problems that it sends back."""

import copy

import pytest
import torch
from conftest import tiny_model, word_tokenizer
from datasets import Dataset
from PIL import Image
from tokenizers.models import WordLevel
from transformers import ViTImageProcessor

from mmcot.prediction.columns import columns_after
from mmcot.prediction.predictor import predict
from mmcot.problems.schema import FEATURES
from mmcot.storage.journal import Journal
from modeling_mmcot import MMCoTProcessor, MultimodalCoTPipeline
from modeling_mmcot.inference_mmcot import encode, reply_text, run_stages
from modeling_mmcot.stage_mmcot import PAPER_TEMPLATES, Stage, Stages, verdict_target

STAGES = [
    {
        **{"name": "rationale", "reads": ["question", "images"], "writes": "rationale", "source": "{{ question }}"},
        "target": "",
    },
    {
        **{"name": "answer", "reads": ["choices", "rationale", "images"], "writes": "answer_text"},
        **{"source": "{{ rationale }} {{ choices | join(' ') }}", "target": "{{ choices[answer] }}"},
    },
    {
        **{"name": "check", "kind": "check", "reads": ["rationale", "answer_text"], "writes": "verdict"},
        "source": "{{ rationale }} {{ answer_text }}",
    },
]


@pytest.fixture(scope="module")
def processor():
    tokenizer = word_tokenizer()
    words = tokenizer.get_vocab()
    words["right"], words["wrong"] = words.pop("w59"), words.pop("w60")
    tokenizer.backend_tokenizer.model = WordLevel(words, unk_token="<unk>")
    return MMCoTProcessor(tokenizer, ViTImageProcessor(size={"height": 32, "width": 32}), STAGES)


@pytest.fixture(scope="module")
def models():
    return {stage["name"]: tiny_model(seed, initializer_factor=3.0) for seed, stage in enumerate(STAGES)}


PROBLEMS = [
    {"question": f"w{n} w{2 * n} w{3 * n}", "choices": [f"w{n + 10}", f"w{n + 20} w{n + 3}", f"w{n + 30}"]}
    for n in range(12)
]
IMAGES = [Image.new("RGB", (40, 40), color) if color else None for color in 3 * ("red", None, "blue", "#777")]


@pytest.fixture(scope="module")
def checked(models, processor):
    """The columns with the check stage."""
    return run_stages(models, processor, PROBLEMS, IMAGES)


@pytest.fixture(scope="module")
def unchecked(models, processor):
    """The columns without the check stage."""
    return run_stages(
        models, MMCoTProcessor(processor.tokenizer, processor.image_processor, STAGES[:2]), PROBLEMS, IMAGES
    )


def test_verdict_is_the_more_probable_word(models, processor, checked):
    assert {columns["verdict"] for columns in checked} == {"right", "wrong"}
    for columns in checked:
        read = columns.get("rejected", columns)
        inputs = processor({"question": "", **{name: read[name] for name in STAGES[2]["reads"]}}, stage="check")
        encoded = encode(models["check"], dict(inputs))
        labels = processor.tokenize_targets(["right", "wrong"])
        with torch.no_grad():
            losses = [models["check"](**encoded, labels=label[None]).loss * len(label) for label in labels]
        expected = torch.stack(losses).neg().softmax(dim=0)[0].item()
        assert columns["verdict_score"] == pytest.approx(expected, abs=1e-5)
        assert columns["verdict"] == ("right" if expected >= 0.5 else "wrong")


def test_answer_that_is_right_is_not_changed(checked, unchecked):
    for columns, before in zip(checked, unchecked, strict=True):
        if columns["verdict"] == "right":
            assert {name: columns[name] for name in before} == before and "rejected" not in columns


def test_wrong_answer_is_replaced_by_answer_of_next_best_rationale(models, processor, checked, unchecked):
    for problem, picture, columns, before in zip(PROBLEMS, IMAGES, checked, unchecked, strict=True):
        if columns["verdict"] == "right":
            continue
        assert columns["rejected"].keys() == before.keys()
        assert columns["rejected"]["rationale"] == before["rationale"]
        assert columns["rejected"]["answer_text"] == before["answer_text"]
        inputs = processor([problem], stage="rationale", images=[picture])
        beams = models["rationale"].generate(**inputs, num_beams=4, num_return_sequences=4)
        texts = processor.batch_decode(beams, skip_special_tokens=True)
        assert columns["rationale"] == next(text for text in texts if text != before["rationale"])
        given = {"rationale": columns["rationale"]}
        again = run_stages(models, processor, [problem], [picture], given=given)[0]
        assert (columns["answer"], columns["answer_text"]) == (again["answer"], again["answer_text"])
        assert columns["scores"] == pytest.approx(again["scores"], abs=1e-5)


def test_given_rationale_is_kept(models, processor, checked):
    for problem, picture, columns in zip(PROBLEMS, IMAGES, checked, strict=True):
        if columns["verdict"] == "wrong":
            given = {"rationale": columns["rejected"]["rationale"]}
            again = run_stages(models, processor, [problem], [picture], given=given)[0]
            assert again["verdict"] == "wrong" and again["rationale"] == given["rationale"] and "rejected" not in again


def test_pipeline_returns_verdict_and_reply_without_it(models, processor, checked, monkeypatch):
    monkeypatch.setattr("modeling_mmcot.pipeline_mmcot.load_stages", lambda *_: models)
    answer = MultimodalCoTPipeline(model=models["answer"], processor=processor)
    for problem, picture, expected in zip(PROBLEMS, IMAGES, checked, strict=True):
        result = answer({**problem, "image": picture})
        assert (result["verdict"], result["rationale"]) == (expected["verdict"], expected["rationale"])
        assert result.get("rejected", {}).keys() == expected.get("rejected", {}).keys()
        assert reply_text(processor, expected) == " ".join((expected["rationale"], expected["answer_text"])).strip()
    with pytest.raises(ValueError, match=r"texts for generated columns \(rationale\)"):
        answer(PROBLEMS[0], given={"verdict": "right"})


@pytest.mark.parametrize("target", [PAPER_TEMPLATES["QCMG-A"]["target"], "The answer is {{ choices[answer] }}. "])
def test_target_compares_answer_with_target_of_right_choice(target):
    answer = Stage("answer", ["choices"], "answer_text", "", target)
    check = Stage("check", ["answer_text"], "verdict", "", verdict_target(target), kind="check")
    problem = {"choices": ["red", "light  blue"], "answer": 1}
    texts = [answer.render_target({**problem, "answer": index}) for index in (0, 1)]
    assert [check.render_target({**problem, "answer_text": text}) for text in texts] == ["wrong", "right"]


def test_repeats_stages_from_last_text_that_check_and_answer_read():
    first = Stage("description", ["question"], "description", "", "x")
    rationale = Stage("rationale", ["description"], "rationale", "", "x")
    search = Stage("search", ["rationale"], "passages", "", kind="retrieve")
    answer = Stage("answer", ["description", "rationale", "passages"], "answer_text", "", "x")
    check = Stage("check", ["description", "rationale", "answer_text"], "verdict", "", "x", kind="check")
    stages = Stages([first, rationale, search, answer, check])
    assert stages.repeated_by(check) == [rationale, search, answer]
    check.reads = ["description", "answer_text"]
    assert stages.repeated_by(check) == [first, rationale, search, answer]
    assert stages.repeated_by(answer) == []
    for columns in (["answer_text"], ["passages", "answer_text"], ["rationale"]):
        check.reads = columns
        with pytest.raises(ValueError, match=r"'check' of kind 'check' reads .*; expected `answer_text`, and a column"):
            stages.repeated_by(check)


@pytest.fixture
def rows():
    empty = {"images": [], "caption": "", "context": "", "lecture": "", "solution": "", "subject": "", "grade": ""}
    empty |= {"topic": "", "category": "", "skill": "", "split": "test", "answer": 0, "observation": ""}
    empty |= {"rationales": [], "direct_answers": [], "gold_passages": []}
    return Dataset.from_list(
        [{**empty, "id": str(n), **problem} for n, problem in enumerate(PROBLEMS)], features=FEATURES
    )


def is_close(found, expected):
    scores = [[*columns.pop("scores"), columns.pop("verdict_score", 0.0)] for columns in (found, expected)]
    rejected = [columns.pop("rejected", None) for columns in (found, expected)]
    if None not in rejected:
        return found == expected and scores[0] == pytest.approx(scores[1], abs=1e-5) and is_close(*rejected)
    return (found, rejected[0]) == (expected, rejected[1]) and scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_split_is_predicted_as_by_pipeline_and_resumes(models, processor, rows, tmp_path):
    expected = run_stages(models, processor, PROBLEMS, [None] * len(PROBLEMS))
    assert {columns["verdict"] for columns in expected} == {"right", "wrong"}
    for problems in (rows, rows.select([n for n, row in enumerate(expected) if row["verdict"] == "wrong"])):
        output = tmp_path / str(len(problems))
        found = predict(processor, models, problems, journal=Journal(output, {}))
        resumed = predict(processor, models, problems, journal=Journal(output, {}))
        assert resumed == found
        for name, columns in found.items():
            assert is_close(copy.deepcopy(columns), copy.deepcopy(expected[int(name)]))


def test_later_check_does_not_change_what_earlier_stages_wrote(models, processor, rows):
    without = MMCoTProcessor(processor.tokenizer, processor.image_processor, STAGES[:2])
    found, expected = predict(processor, models, rows), predict(without, models, rows)
    for name, columns in columns_after(found, processor.stages[:2]).items():
        assert {key: columns[key] for key in expected[name]} == expected[name] and "rejected" not in columns
    assert columns_after(found, processor.stages) == found
