"""The command `python -m mmcot.predict`: predictions without gold columns, complete, in order, and resumable."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY, log_probability, run_script

from mmcot.pictures.reading import read_pictures
from mmcot.predict import main
from mmcot.prediction.predictor import PredictOptions, batches_of, predict_stage
from mmcot.prediction.predictor import predict as predict_all
from mmcot.prediction.provenance import provenance
from mmcot.prediction.self_consistency import Drawing
from mmcot.prediction.system import load_system
from mmcot.problems.schema import without_gold
from mmcot.problems.sources import load_problems
from mmcot.problems.subsets import select
from mmcot.storage.journal import Journal
from modeling_mmcot.pictures_mmcot import as_pictures
from modeling_mmcot.self_consistency_mmcot import majority_answer
from modeling_mmcot.stage_mmcot import Stage


def predict(model, dataset, output, *options):
    main([str(model), "--dataset", str(dataset), "--split", "test", "--output", str(output), *options])
    return output


def copy_dataset(tiny_dataset, folder, change):
    """Copy the tiny dataset with its pictures, and apply `change` to each row."""
    shutil.copytree(tiny_dataset.parent, folder)
    file = folder / tiny_dataset.name
    rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_gold_columns_do_not_change_predictions(tiny_run, tiny_dataset, tmp_path):
    """Predictions with garbage in answer, lecture and solution are byte-equal to those without, and to training's."""

    def garbage(row):
        answer = (row["answer"] + 1) % len(row["choices"])
        return {**row, "answer": answer, "lecture": "zzz", "solution": "The answer is (A). zzz"}

    other = copy_dataset(tiny_dataset, tmp_path / "garbage", garbage)
    options = ("--decode_answer", "--batch_size", "16")
    expected = predict(tiny_run, tiny_dataset, tmp_path / "gold.json", *options).read_bytes()
    assert predict(tiny_run, other, tmp_path / "garbage.json", *options).read_bytes() == expected
    assert (tiny_run / "predictions/test.json").read_bytes() == expected


def test_predicts_problems_with_one_or_no_choice(tiny_run, tiny_dataset, tmp_path):
    def fewer(row):
        number = int(row["id"].split("-")[-1])
        choices = row["choices"] if number % 3 == 0 else row["choices"][: number % 3 - 1]
        return {**row, "choices": choices, "answer": -1}

    dataset = copy_dataset(tiny_dataset, tmp_path / "fewer", fewer)
    predictions = json.loads(predict(tiny_run, dataset, tmp_path / "fewer.json").read_text())
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    assert {min(len(row["choices"]), 2) for row in rows if row["split"] == "test"} == {0, 1, 2}
    for row in rows:
        if row["split"] == "test":
            columns = predictions[row["id"]]
            assert len(columns["scores"]) == len(row["choices"])
            assert (columns["answer"] == -1) == (row["choices"] == [])
            if len(row["choices"]) == 1:
                assert columns["answer"] == 0 and columns["scores"] == [1.0]


def predict_alone(model, processor, stage, problem):
    """Predict one problem with transformers' own decoding, or score each choice in a separate forward pass."""
    images = [as_pictures(read_pictures(problem))]
    inputs = processor([{**problem, "images": []}], stage=stage.name, images=images)
    if not stage.answers:
        return processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0]
    targets = [labels[labels != -100] for labels in processor.choice_labels([problem], stage.name)[0]]
    log_probs = torch.stack([log_probability(model, inputs, target) for target in targets])
    if stage.score == "mean":
        log_probs = log_probs / torch.tensor([len(target) for target in targets])
    return log_probs.softmax(dim=0)


def test_predictions_match_predicting_each_problem_alone(tiny_run, tiny_dataset):
    """Sorting, batching, dropping finished texts, packing choices and caching pictures change no prediction."""
    processor, models = load_system(str(tiny_run))
    predictions = json.loads((tiny_run / "predictions/test.json").read_text())
    for problem in without_gold(load_problems(str(tiny_dataset), "test")):
        columns = predictions[problem["id"]]
        rationale = predict_alone(models["rationale"], processor, processor.stages[0], problem)
        assert rationale == columns["rationale"]
        problem = {**problem, "rationale": rationale}
        scores = predict_alone(models["answer"], processor, processor.stages[1], problem)
        assert scores.tolist() == pytest.approx(columns["scores"], abs=1e-5)
        assert int(scores.argmax()) == columns["answer"]


def test_loaded_stage_keeps_its_own_length_limit(tiny_run):
    """It does not take the limit of the last stage, whose files are at the root."""
    _, models = load_system(str(tiny_run))
    limits = {name: model.generation_config.max_new_tokens for name, model in models.items()}
    assert limits == {"rationale": 12, "answer": 16}


OPTIONS = ("--batch_size", "4", "--decode_answer")


@pytest.fixture
def uninterrupted(tiny_run, tiny_dataset, tmp_path):
    main([str(tiny_run), "--dataset", str(tiny_dataset), *OPTIONS, "--output", str(tmp_path / "uninterrupted.json")])
    return (tmp_path / "uninterrupted.json").read_bytes()


def test_resumes_at_the_interrupted_batch(tiny_run, tiny_dataset, tmp_path, monkeypatch, uninterrupted):
    output = tmp_path / "broken[1].json"  # brackets, because a glob pattern interprets them
    command = [str(tiny_run), "--dataset", str(tiny_dataset), *OPTIONS, "--output", str(output)]
    written = []
    write = Journal.write

    def interrupt_every_third_write(journal, of, ids, columns):
        if len(written) % 3 == 2:
            written.append(None)
            journal.log.lines.write(b'{"of": "rationale", "ids": ["te')  # as if killed while writing a line
            journal.log.lines.close()
            raise KeyboardInterrupt
        written.append((of, ids))
        write(journal, of, ids, columns)

    monkeypatch.setattr(Journal, "write", interrupt_every_third_write)
    for kill in range(3):
        with pytest.raises(SystemExit, match="130"):
            main(command)
        assert not output.exists()
        if kill == 0:  # as if another process had written it
            (tmp_path / f"{output.name}.partial-0.jsonl").rename(tmp_path / f"{output.name}.partial-1.jsonl")
    monkeypatch.setattr(Journal, "write", lambda journal, *batch: (written.append(batch[:2]), write(journal, *batch)))
    main(command)
    assert output.read_bytes() == uninterrupted
    batches = [batch for batch in written if batch is not None]
    assert len(batches) == len(set(batches)), "a batch other than the lost one was predicted twice"
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.slow
def test_predictions_are_byte_equal_after_three_kills(tiny_run, tiny_dataset, tmp_path, uninterrupted):
    output = tmp_path / "killed.json"
    options = ["--dataset", str(tiny_dataset), *OPTIONS, "--output", str(output)]
    command = [sys.executable, "-m", "mmcot.predict", str(tiny_run), *options]
    partial = tmp_path / "killed.json.partial-0.jsonl"
    for kill in range(3):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 3 * kill + 3):
            time.sleep(0.005)
        assert process.poll() is None, "the command ended before the kill"
        process.kill()
        process.wait()
        assert not output.exists()
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    assert output.read_bytes() == uninterrupted


def test_refuses_to_resume_with_other_options(tiny_run, tiny_dataset, tmp_path, monkeypatch):
    output = tmp_path / "broken.json"
    command = [str(tiny_run), "--dataset", str(tiny_dataset), "--output", str(output)]

    def killed(journal, *batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", killed)
    with pytest.raises(SystemExit, match="130"):
        main(command)
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--batch_size", "7"])
    for words in ("broken.json.partial-0.jsonl", "batch_size: 32 there, 7 here", "remove the file"):
        assert words in stopped.value.code


def test_meta_file_records_the_origin_of_predictions(tiny_run, tiny_dataset, tmp_path):
    shutil.copytree(tiny_run / "hub", tmp_path / "moved")
    shutil.copytree(tiny_dataset.parent, tmp_path / "elsewhere")
    metas = []
    for number, (model, dataset) in enumerate(
        [(tiny_run, tiny_dataset), (tmp_path / "moved", tmp_path / "elsewhere" / tiny_dataset.name)]
    ):
        output = tmp_path / f"{number}.json"
        main([str(model), "--dataset", str(dataset), "--limit", "3", "--output", str(output)])
        metas.append(json.loads((tmp_path / f"{number}.meta.json").read_text()))
    assert metas[0]["n"] == len(json.loads((tmp_path / "0.json").read_text())) == 3
    assert metas[0]["stages"][0]["source"] == load_system(str(tiny_run))[0].stages[0].source
    assert metas[0]["decoding"]["rationale"]["max_new_tokens"] == 12
    same = metas[0].keys() - {"model", "dataset"}
    assert all(metas[0][name] == metas[1][name] for name in same)
    weights = tmp_path / "moved" / "rationale" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    other = provenance(str(tmp_path / "moved"), *load_system(str(tiny_run)), load_problems(str(tiny_dataset), "val"))
    assert other["revision"] != metas[0]["revision"]
    assert other["dataset_fingerprint"] != metas[0]["dataset_fingerprint"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ids": ["test-3", "test-1"]}, ["test-1", "test-3"]),
        ({"filters": ["subject=natural science"], "limit": 2}, None),
        ({"filters": ["subject=natural science", "grade=grade2"]}, None),
    ],
)
def test_selects_problems_by_id_filter_and_limit(tiny_dataset, options, expected):
    problems = load_problems(str(tiny_dataset), "test")
    problems = problems.map(lambda row, number: {"id": f"test-{number}"}, with_indices=True)
    found = select(problems, **options)
    if expected is None:
        filters = dict(text.split("=") for text in options["filters"])
        rows = [row["id"] for row in problems if all(row[name] == text for name, text in filters.items())]
        expected = rows[: options.get("limit")]
    assert expected and found["id"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": ["test-1", "nobody"]}, "1 of 2 are not in this split: nobody"),
        ({"filters": ["subject"]}, "expected COLUMN=TEXT"),
        ({"filters": ["answer=1"]}, "expected COLUMN=TEXT with a COLUMN of .*subject"),
        ({"filters": ["subject=alchemy"]}, "no problem has that subject; there are .*'natural science'"),
        ({"limit": 0}, "--limit is 0"),
    ],
)
def test_refuses_invalid_selection(tiny_dataset, options, message):
    problems = load_problems(str(tiny_dataset), "test")
    problems = problems.map(lambda row, number: {"id": f"test-{number}"}, with_indices=True)
    with pytest.raises(ValueError, match=message):
        select(problems, **options)


def test_majority_answer_renders_target_that_contains_the_rationale():
    target = "The answer is ({{ letters[answer] }}) because {{ rationale }}"
    stage = Stage("answer", ["question", "rationale"], "answer_text", "{{ question }}", target)
    samples = [
        {"rationale": "so", "answer": 0, "answer_text": "The answer is (A) because so", "scores": [0.6, 0.0, 0.4]},
        {"rationale": "no", "answer": 1, "answer_text": "The answer is (B) because no", "scores": [0.0, 0.5, 0.5]},
    ]
    found = majority_answer(samples, {"id": "1", "question": "?", "choices": ["a", "b", "c"]}, stage)
    assert found["answer"] == 2 and found["agreement"] == 0
    assert found["answer_text"] == "The answer is (C) because so"
    assert majority_answer(samples[:1], {"choices": ["a", "b", "c"]}, stage)["answer_text"] == samples[0]["answer_text"]


def test_self_consistency_averages_scores_over_rationales(tiny_run, tiny_dataset):
    processor, models = load_system(str(tiny_run))
    problems = load_problems(str(tiny_dataset), "test")
    options, drawing = PredictOptions(batch_size=8), Drawing(4, 1.5)
    whole = predict_all(processor, models, problems, options, drawing=drawing)
    assert whole == predict_all(processor, models, problems, options, drawing=drawing)
    assert whole != predict_all(processor, models, problems, options, drawing=Drawing(4, 1.5, seed=1))
    assert any(len(set(columns["rationales"])) > 1 for columns in whole.values())
    for row in problems.remove_columns("images").select(range(4)):
        columns = whole[row["id"]]
        alone = problems.filter(lambda other, name=row["id"]: other["id"] == name)
        scores = []
        for rationale in columns["rationales"]:
            written = {row["id"]: {"rationale": rationale}}
            predict_stage(models["answer"], processor, processor.stages[1], alone, written)
            scores.append(written[row["id"]]["scores"])
        means = [sum(column) / 4 for column in zip(*scores, strict=True)]
        assert columns["scores"] == pytest.approx(means, abs=1e-5)
        votes = [score.index(max(score)) for score in scores]
        assert columns["answer"] == means.index(max(means))
        assert columns["agreement"] == votes.count(columns["answer"]) / 4


@pytest.mark.parametrize("ends", [True, False])
def test_counts_texts_cut_at_the_limit_of_new_tokens(tiny_run, tiny_dataset, caplog, ends):
    processor, models = load_system(str(tiny_run))
    problems = load_problems(str(tiny_dataset), "test").select(range(4))
    model = models["rationale"]
    tokens, end = set(range(model.config.vocab_size)), model.generation_config.eos_token_id
    model.generation_config.suppress_tokens = sorted(tokens - {end}) if ends else [end]
    written: dict[str, dict] = {}
    with caplog.at_level("WARNING"):
        predict_stage(model, processor, processor.stages[0], problems, written)
    counted = "rationale stage: 4 of 4 texts reached the limit of new tokens and are cut off" in caplog.text
    assert counted != ends
    assert all(columns.keys() == {"rationale"} for columns in written.values())


@pytest.mark.parametrize(("max_tokens", "largest"), [(1, 1), (10**6, None)])
def test_max_tokens_limits_batches(max_tokens, largest):
    lengths = [(length, 0) for length in range(5, 25)]
    batches = batches_of(lengths, PredictOptions(max_tokens=max_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(20))
    assert max(map(len, batches)) == (largest or 20)
    middle = batches_of(lengths, PredictOptions(max_tokens=60))
    assert all(len(batch) * max(lengths[index][0] for index in batch) <= 60 for batch in middle) and len(middle) < 20


@pytest.mark.slow
def test_two_processes_predict_the_same_as_one(tiny_run, tiny_dataset, tmp_path):
    """The file contains all problems in the dataset's order, whichever process predicted them."""
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    options = ("--dataset", tiny_dataset, "--split", "test", "--batch_size", "4", "--decode_answer")
    command = (*launch, "-m", "mmcot.predict", tiny_run, *options, "--output", tmp_path / "two.json")
    run_script(*command)
    two = json.loads((tmp_path / "two.json").read_text())
    one = json.loads((tiny_run / "predictions/test.json").read_text())
    assert list(two) == list(one)
    for problem_id, columns in one.items():
        scores = two[problem_id].pop("scores")
        assert scores == pytest.approx(columns.pop("scores"), abs=1e-5)
        assert two[problem_id] == columns


def test_refuses_problem_without_the_column_of_an_earlier_stage(tiny_run, tiny_dataset):
    processor, models = load_system(str(tiny_run))
    problems = load_problems(str(tiny_dataset), "test")
    first = problems["id"][0]
    predictions = {problem_id: {"rationale": "so"} for problem_id in problems["id"] if problem_id != first}
    found = f"1 of {len(problems)} problems have no 'rationale' from the rationale stage: {first}"
    with pytest.raises(ValueError, match=found):
        predict_stage(models["answer"], processor, processor.stages[1], problems, predictions)


def test_pictures_change_predictions(tiny_run, tiny_dataset, tmp_path):
    blind = copy_dataset(tiny_dataset, tmp_path / "blind", lambda row: {**row, "images": []})
    without = json.loads(predict(tiny_run, blind, tmp_path / "blind.json").read_text())
    with_pictures = json.loads((tiny_run / "predictions/test.json").read_text())
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    for row in rows:
        if row["split"] == "test":
            same = without[row["id"]]["scores"] == pytest.approx(with_pictures[row["id"]]["scores"], abs=1e-6)
            assert same == (row["images"] == []), row["id"]


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_refuses_path_without_a_model(name, tmp_path):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "predictions.json"
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / name), "--dataset", "demo", "--output", str(output)])
    assert stopped.value.code.startswith("error: ") and str(tmp_path / name) in stopped.value.code
    assert not output.exists()
