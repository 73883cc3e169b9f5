"""The processor: the paper's prompts byte for byte, shortening, targets, pictures, saving and loading."""

import json

import pytest
import torch
from conftest import shared
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, ViTImageProcessor

from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.stage_mmcot import PAPER_TEMPLATES, Stage, read_answer

PROBLEM = {
    "question": "Which bar is the tallest?",
    "choices": ["red", "blue"],
    "context": "Look at the chart.",
    "caption": "A chart.",
    "answer": 1,
    "lecture": "Bars show numbers.",
    "solution": "The blue bar shows 5. So, it is blue.",
}


def stage(name="rationale", template="QCM-E", reads=("question", "context", "choices", "images"), **settings):
    writes = "answer_text" if name == "answer" else name
    return Stage(name=name, reads=list(reads), writes=writes, **PAPER_TEMPLATES[template], **settings)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shared("t5_tokenizer"))


@pytest.fixture
def processor(tokenizer):
    answer = stage("answer", "QCMG-A", ("question", "context", "choices", "rationale"))
    return MMCoTProcessor(tokenizer, ViTImageProcessor(size={"height": 32, "width": 32}), [stage(), answer])


def picture(size=(40, 20), mode="RGB"):
    return Image.new(mode, size, color=120)


def test_renders_the_papers_prompts_byte_for_byte():
    cases = json.loads(shared("fixtures/reference_text/prompts.json").read_text())
    problems = json.loads(shared("scienceqa/problems.json").read_text())
    captions = json.loads(shared("scienceqa/captions.json").read_text())["captions"]
    assert len(cases) == 840
    for case in cases:
        problem = problems[case["pid"]]
        row = {**problem, "context": problem["hint"], "caption": captions.get(case["pid"], "")}
        reads = ["question", "context", "choices"] + ["caption"] * case["use_caption"]
        if case["generated_rationale"] is not None:
            row["rationale"] = case["generated_rationale"]
            reads.append("rationale")
        elif case["format"] == "QCMG-A":
            reads += ["lecture", "solution"]
        stage = Stage(name="stage", reads=reads, writes="text", **PAPER_TEMPLATES[case["format"]])
        assert stage.render_source(row) == case["source"]
        assert stage.render_target(row) == case["target"]


def test_source_template_sees_only_columns_that_its_stage_reads(processor):
    assert "A chart." not in processor.stage("rationale").render_source(PROBLEM)
    with_gold = {**PROBLEM, "rationale": "Solution: blue."}
    source = processor.stage("answer").render_source(with_gold)
    assert source.endswith("Solution: blue. Answer:")
    assert "Bars show" not in source and "shows 5" not in source


def test_raises_for_a_missing_column():
    no_rationale = stage("answer", "QCMG-A", ("question", "context", "choices"))
    with pytest.raises(Exception, match="'lecture' is undefined"):
        no_rationale.render_source({"question": "Why?", "choices": ["a"], "context": ""})


def test_converts_problems_to_the_inputs_of_forward(processor, tokenizer):
    other = {**PROBLEM, "question": "Why?", "solution": "So."}
    batch = processor([PROBLEM, other], stage="rationale", images=[picture(), None], with_targets=True)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "pixel_mask", "labels"}
    assert batch["pixel_values"].shape == (2, 1, 3, 32, 32)
    assert batch["pixel_mask"].flatten(1).all(dim=1).tolist() == [True, False]
    assert not batch["pixel_values"][1].any()
    for index, problem in enumerate((PROBLEM, other)):
        source = batch["input_ids"][index][batch["attention_mask"][index] == 1]
        assert tokenizer.decode(source) == processor.stage("rationale").render_source(problem) + "</s>"
        target = batch["labels"][index][batch["labels"][index] != -100]
        assert tokenizer.decode(target) == processor.stage("rationale").render_target(problem) + "</s>"
    assert (batch["labels"][1] == -100).any()


def test_accepts_one_problem_with_several_pictures(processor):
    batch = processor(PROBLEM, stage="rationale", images=[[picture(), picture((8, 8), "L")]])
    assert batch["pixel_values"].shape == (1, 2, 3, 32, 32)
    assert "labels" not in batch


def test_accepts_text_and_images_like_other_processors(processor, tokenizer):
    batch = processor(text=["one", "two words"], images=[None, picture()])
    assert batch["input_ids"].tolist() == tokenizer(["one", "two words"], padding=True)["input_ids"]
    assert batch["pixel_mask"].flatten(1).all(dim=1).tolist() == [False, True]
    assert set(processor(text="one")) == {"input_ids", "attention_mask"}


def test_omits_pictures_for_a_stage_that_does_not_read_images(processor):
    assert "pixel_values" not in processor({**PROBLEM, "rationale": "So."}, stage="answer", images=[picture()])


def test_refuses_fewer_entries_of_images_than_problems(processor):
    with pytest.raises(ValueError, match="images has 1 entries for 2 problems"):
        processor([PROBLEM, PROBLEM], stage="rationale", images=[picture()])


def test_lists_known_stages_for_an_unknown_name(processor):
    with pytest.raises(ValueError, match="'ratoinale'.*rationale, answer"):
        processor(PROBLEM, stage="ratoinale")


def test_shortens_lecture_then_context_and_nothing_else(tokenizer):
    reads = ("question", "context", "choices", "lecture", "solution")
    long = {**PROBLEM, "lecture": "lecture words " * 40, "context": " ".join(f"c{i}" for i in range(100))}

    def source(length):
        processor = MMCoTProcessor(tokenizer, None, [stage("answer", "QCMG-A", reads, max_source_length=length)])
        tokens = processor(long, stage="answer")["input_ids"][0]
        assert len(tokens) <= length
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert text.startswith("Question: Which bar is the tallest?")
        assert "(A) red (B) blue" in text and text.endswith("So, it is blue. Answer:")
        return text

    whole = len(tokenizer(stage("answer", "QCMG-A", reads).render_source(long))["input_ids"])
    full = source(whole)
    assert "lecture words" in full and "c99" in full
    shorter = source(whole - 20)
    assert "lecture words" in shorter and "c99" in shorter and len(shorter) < len(full)
    shortest = source(160)
    assert "lecture words" not in shortest and "c0 c1" in shortest and "c99" not in shortest


def test_shortening_keeps_as_much_as_fits(tokenizer):
    """One more word would not fit."""
    long = {**PROBLEM, "context": "word " * 200}
    only = stage(max_source_length=100)
    processor = MMCoTProcessor(tokenizer, None, [only])
    source = processor.fit_source(long, only)
    one_more = source.replace("Options:", "word Options:")
    assert len(tokenizer(source)["input_ids"]) <= 100 < len(tokenizer(one_more)["input_ids"])


def test_choice_labels_contain_the_target_of_each_choice(processor, tokenizer):
    three = {**PROBLEM, "choices": ["a", "b", "c"]}
    labels = processor.choice_labels([PROBLEM, three], "answer")
    assert labels.shape[:2] == (2, 3)
    texts = [[tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in rows] for rows in labels]
    assert texts == [
        ["The answer is (A).", "The answer is (B).", ""],
        ["The answer is (A).", "The answer is (B).", "The answer is (C)."],
    ]
    assert (labels[0, 2] == -100).all()


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("The answer is (A).", 0),
        ("Solution: red, so. The answer is (B).", 1),
        ("The answer is (C).", -1),
        ("The answer is B.", -1),
        ("The answer is (A). The answer is (A).", -1),
        ("", -1),
    ],
)
def test_reads_an_answer_as_in_the_paper(text, index):
    assert read_answer(text, num_choices=2) == index


@pytest.mark.parametrize("with_pictures", [True, False])
def test_save_and_load_preserve_tensors(processor, tokenizer, tmp_path, with_pictures):
    if not with_pictures:
        processor = MMCoTProcessor(tokenizer, None, processor.stages)
    processor.save_pretrained(tmp_path)
    loaded = MMCoTProcessor.from_pretrained(tmp_path)
    assert loaded.stages == processor.stages
    images = [picture() if with_pictures else None]
    before, after = (p([PROBLEM], stage="rationale", images=images, with_targets=True) for p in (processor, loaded))
    assert set(before) == set(after) and ("pixel_values" in after) == with_pictures
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded.save_pretrained(tmp_path / "again")  # after a call, because padding and truncation must not change the files
    for name in ("processor_config.json", "processing_mmcot.py", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), MMCoTProcessor)


def test_accepts_pictures_in_the_problem_and_missing_columns(processor):
    picture = Image.new("RGB", (40, 30), "red")
    stage = processor.stages[0].name
    given = processor({"question": "Why?", "choices": [], "context": ""}, stage=stage, images=[picture])
    for own in ({"image": picture}, {"images": [picture]}):
        found = processor({"question": "Why?", **own}, stage=stage)
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], given[name]) for name in given)
    with pytest.raises(ValueError, match="pass them once"):
        processor({"question": "Why?", "image": picture}, stage=stage, images=[picture])
