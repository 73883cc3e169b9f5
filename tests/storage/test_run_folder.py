"""The paths of a run folder: those of DESIGN section 4, and the files of finished runs."""

from pathlib import Path

import pytest

from mmcot.storage.files import write_json
from mmcot.storage.run_folder import CROSS_FITTED, RunFolder

RUN = RunFolder(Path("runs/demo"))
LAYOUT = {
    "recipe.yaml": RUN.recipe,
    "inputs.json": RUN.inputs,
    "splits.json": RUN.splits,
    ".lock": RUN.lock,
    ".lock-stage-answer": RUN.stage_lock("answer"),
    "base": RUN.base,
    "answer": RUN.stage("answer"),
    "answer/train_results.json": RUN.train_results("answer"),
    "answer/curves.png": RUN.curves("answer"),
    "answer/reports": RUN.reports("answer"),
    "predictions/test.json": RUN.predictions("test"),
    "predictions/train_cross_fit.json": RUN.predictions(CROSS_FITTED),
    "predictions/test.answer": RUN.unfinished_predictions("test", "answer"),
    "scores/test.json": RUN.scores("test"),
    "scores/probes.json": RUN.probes,
    "hub": RUN.hub,
    "hub_merged": RUN.hub_merged,
    "folds": RUN.folds,
    "folds/1": RUN.fold(1).path,
    "folds/1/answer/train_results.json": RUN.fold(1).train_results("answer"),
    "folds/1/predictions/held_out.json": RUN.fold(1).predictions("held_out"),
    ".lock-fold-1": RUN.fold(1).lock,
}


@pytest.mark.parametrize("path", LAYOUT)
def test_path_matches_layout(path):
    assert LAYOUT[path] == Path("runs/demo") / path


def test_fold_belongs_to_run_and_shares_its_base():
    assert RUN.fold(1).run == RUN.run == RUN
    assert RUN.fold(1).fold_of == RUN and RUN.fold_of is None
    assert RUN.fold(1).base == RUN.base


def test_formats_as_path():
    assert f"{RUN}" == "runs/demo" and f"{RUN.fold(1)}" == "runs/demo/folds/1"


def test_finished_run_contains_files_of_layout(tiny_run):
    folder = RunFolder(tiny_run)
    files = [folder.recipe, folder.inputs, folder.splits]
    files += [file(stage) for stage in ("rationale", "answer") for file in (folder.train_results, folder.curves)]
    files += [file(split) for split in ("val", "test") for file in (folder.predictions, folder.scores)]
    assert all(file.is_file() for file in files)
    assert folder.hub.is_dir() and not folder.is_adapted
    assert sorted(folder.trained_stages()) == ["answer", "rationale"]
    assert len(folder.predictions_so_far("test")) == 20


def test_run_of_adapters_and_its_folds_are_adapted(adapter_run):
    folder = RunFolder(adapter_run)
    assert folder.is_adapted and folder.fold(0).is_adapted


def test_stage_is_trained_after_results_are_written(tmp_path):
    folder = RunFolder(tmp_path)
    folder.stage("answer").mkdir()
    assert not folder.is_trained("answer") and folder.trained_stages() == []
    write_json(folder.train_results("answer"), {})
    assert folder.is_trained("answer") and folder.trained_stages() == ["answer"]


def test_judged_split_is_val_only_without_test_scores(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.judged_split() is None
    write_json(folder.scores("val"), {})
    assert folder.judged_split() == "val"
    write_json(folder.scores("test"), {})
    assert folder.judged_split() == "test"


def test_predictions_are_empty_before_a_stage_writes(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.predictions_so_far("test") == {}
    write_json(folder.predictions("test"), {"1": {"rationale": "text"}})
    assert folder.predictions_so_far("test") == {"1": {"rationale": "text"}}
