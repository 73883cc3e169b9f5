"""`find_leaks` reports gold text that reaches a prediction by the prompt, the labels or the decoding."""

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
def gold_kept(monkeypatch):
    """Keep gold columns, and add labels to the batches. Returns a `write_column` that ignores these labels."""
    monkeypatch.setattr(predicting, "without_gold", lambda problems: problems)
    monkeypatch.setattr("modeling_mmcot.inference_mmcot.GOLD_COLUMNS", ())
    monkeypatch.setattr(predicting, "tokenized", lambda *given, with_targets: tokenized(*given, with_targets=True))

    def without_labels(*given, **options):
        *others, inputs = given[:5]
        return write_column(*others, {name: tensor for name, tensor in inputs.items() if name != "labels"}, *given[5:])

    monkeypatch.setattr(predicting, "write_column", without_labels)
    return without_labels


def leaks_of(system, problems):
    return find_leaks(problems, lambda rows: predict(*system, rows))


def test_finds_no_leak_in_correct_system(system, problems):
    assert leaks_of(system, problems) == {}


def test_ignores_gold_columns_that_no_stage_reads(system, problems, gold_kept):
    assert leaks_of(system, problems) == {}


def test_finds_gold_column_in_prompt(system, problems, gold_kept):
    processor, models = system
    stage = processor.stages[1]  # because the rationale stage writes equal texts after so short a training
    processor.stages[1] = dataclasses.replace(
        stage, source="{{ solution }} " + stage.source, reads=[*stage.reads, "solution"]
    )
    assert leaks_of((processor, models), problems)


def test_finds_answer_taken_from_labels(system, problems, gold_kept, monkeypatch):
    """A system that answers with the choice that the labels of the batch contain."""

    def looks_at_labels(model, processor, stage, rows, inputs, *options, **generation):
        columns = gold_kept(model, processor, stage, rows, inputs, *options, **generation)
        if stage.answers:
            targets = processor.batch_decode(inputs["labels"].masked_fill(inputs["labels"] == -100, 0), True)
            for column, row, target in zip(columns, rows, targets, strict=True):
                letters = [f"({letter})" for letter in "ABCDE"[: len(row["choices"])]]
                column["answer"] = next(number for number, letter in enumerate(letters) if letter in target)
        return columns

    monkeypatch.setattr(predicting, "write_column", looks_at_labels)
    leaks = leaks_of(system, problems)
    assert set(leaks) == set(problems["id"]) and all("answer" in columns for columns in leaks.values())


def test_finds_teacher_forced_decoding(system, problems, gold_kept, monkeypatch):
    """Each token of a rationale is the most likely one of a teacher-forced pass, as in the paper's first version."""

    def teacher_forced(model, processor, stage, rows, inputs, *options, **generation):
        columns = gold_kept(model, processor, stage, rows, inputs, *options, **generation)
        if not stage.answers:
            with torch.no_grad():
                tokens = model(**inputs).logits.argmax(dim=-1)
            for column, text in zip(columns, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
                column[stage.writes] = text
        return columns

    monkeypatch.setattr(predicting, "write_column", teacher_forced)
    assert leaks_of(system, problems)


def test_command_reports_leaks_and_fails(tiny_run, tiny_dataset, capsys, monkeypatch):
    options = [str(tiny_run), "--dataset", str(tiny_dataset), "--leak_check", "--limit", "4"]
    main(options)
    assert "No prediction of 4 differs" in capsys.readouterr().out
    leak = {"test-1": ["answer", "scores"]}
    monkeypatch.setattr("mmcot.predict.find_leaks", lambda problems, predict_all: leak)
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert "1 of 4 predictions differ" in stopped.value.code
    assert "test-1: answer, scores" in capsys.readouterr().out
