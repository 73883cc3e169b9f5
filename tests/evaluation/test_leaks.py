"""Gold text that reaches a prediction is caught, wherever it comes in."""

import dataclasses

import pytest
import torch

from mmcot.evaluation.leaks import find_leaks
from mmcot.predict import main
from mmcot.prediction import predictor as predicting
from mmcot.prediction.examples import tokenized
from mmcot.prediction.predictor import predict
from mmcot.prediction.system import load_system
from mmcot.problems.sources import load_problems
from modeling_mmcot.inference_mmcot import write_column


@pytest.fixture
def system(tiny_run):
    processor, models = load_system(str(tiny_run))
    return processor, dict(models)


@pytest.fixture
def problems(tiny_dataset):
    return load_problems(str(tiny_dataset), "test").select(range(6))


@pytest.fixture
def careless(monkeypatch):
    """A pipeline that leaves gold columns where they are, and gives batches their labels."""
    monkeypatch.setattr(predicting, "without_gold", lambda problems: problems)
    monkeypatch.setattr("modeling_mmcot.inference_mmcot.GOLD_COLUMNS", ())
    monkeypatch.setattr(predicting, "tokenized", lambda *given, with_targets: tokenized(*given, with_targets=True))

    def without_labels(*given, **options):
        *others, inputs = given[:5]
        return write_column(*others, {name: tensor for name, tensor in inputs.items() if name != "labels"}, *given[5:])

    monkeypatch.setattr(predicting, "write_column", without_labels)
    return without_labels


def found(system, problems):
    return find_leaks(problems, lambda rows: predict(*system, rows))


def test_nothing_leaks(system, problems):
    assert found(system, problems) == {}


def test_gold_columns_that_nobody_looks_at_are_no_leak(system, problems, careless):
    assert found(system, problems) == {}


def test_a_leak_in_the_prompt(system, problems, careless):
    processor, models = system
    stage = processor.stages[1]  # the first one's texts are all alike after so short a training
    processor.stages[1] = dataclasses.replace(
        stage, source="{{ solution }} " + stage.source, reads=[*stage.reads, "solution"]
    )
    assert found((processor, models), problems)


def test_a_leak_in_the_labels(system, problems, careless, monkeypatch):
    """The answer is that of the choice whose target the batch's labels are."""

    def looks_at_labels(model, processor, stage, rows, inputs, *options, **generation):
        columns = careless(model, processor, stage, rows, inputs, *options, **generation)
        if stage.answers:
            targets = processor.batch_decode(inputs["labels"].masked_fill(inputs["labels"] == -100, 0), True)
            for column, row, target in zip(columns, rows, targets, strict=True):
                letters = [f"({letter})" for letter in "ABCDE"[: len(row["choices"])]]
                column["answer"] = next(number for number, letter in enumerate(letters) if letter in target)
        return columns

    monkeypatch.setattr(predicting, "write_column", looks_at_labels)
    leaks = found(system, problems)
    assert set(leaks) == set(problems["id"]) and all("answer" in columns for columns in leaks.values())


def test_a_leak_in_the_decoding(system, problems, careless, monkeypatch):
    """Rationales are the likeliest token at each place of a teacher-forced pass, as in the paper's first version."""

    def teacher_forced(model, processor, stage, rows, inputs, *options, **generation):
        columns = careless(model, processor, stage, rows, inputs, *options, **generation)
        if not stage.answers:
            with torch.no_grad():
                tokens = model(**inputs).logits.argmax(dim=-1)
            for column, text in zip(columns, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
                column[stage.writes] = text
        return columns

    monkeypatch.setattr(predicting, "write_column", teacher_forced)
    assert found(system, problems)


def test_the_command_says_so(tiny_run, tiny_dataset, capsys, monkeypatch):
    options = [str(tiny_run), "--dataset", str(tiny_dataset), "--leak_check", "--limit", "4"]
    main(options)
    assert "No prediction of 4 differs" in capsys.readouterr().out
    leak = {"test-1": ["answer", "scores"]}
    monkeypatch.setattr("mmcot.predict.find_leaks", lambda problems, predict_all: leak)
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert "1 of 4 predictions differ" in stopped.value.code
    assert "test-1: answer, scores" in capsys.readouterr().out
