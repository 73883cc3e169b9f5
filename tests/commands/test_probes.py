"""Probes: each changes only the input that it names, and its figures show what the answers depend on."""

import random

import pytest

from mmcot.analysis import probes as probing
from mmcot.analysis.probes import other_indices, probe, take_from_another, with_permuted_choices
from mmcot.prediction.system import load_system
from mmcot.probes import main
from mmcot.problems.sources import load_problems
from mmcot.storage.files import read_json

CHANGED_RATIONALES = [name.format(column="rationale") for name in probing.CHANGES]


@pytest.fixture
def problems(tiny_dataset):
    return load_problems(str(tiny_dataset), "test")


@pytest.mark.parametrize("count", [2, 3, 50])
def test_other_indices_permutes_without_fixed_points(count):
    found = other_indices(count, random.Random(1))
    assert sorted(found) == list(range(count)) and all(index != other for index, other in enumerate(found))
    texts = [str(number) for number in range(count)]
    assert all(a != b for a, b in zip(texts, take_from_another(texts, random.Random(1)), strict=True))


def test_permuting_choices_changes_only_their_order(problems):
    permuted, orders = with_permuted_choices(problems, random.Random(0))
    for row, other, order in zip(problems, permuted, orders, strict=True):
        assert other["choices"][other["answer"]] == row["choices"][row["answer"]]
        assert [row["choices"][place] for place in order] == other["choices"]
        assert order != sorted(order)
        changed = {"choices", "answer"}
        assert {k: v for k, v in row.items() if k not in changed} == {
            k: v for k, v in other.items() if k not in changed
        }


def fake_system(choose):
    """Replacements of `predict_stage` and `predict` that answer with `choose` and write gold rationales."""

    def predict_stage(model, processor, stage, rows, written, *options):
        for row in rows:
            columns = written.setdefault(row["id"], {})
            if stage.answers:
                columns["answer"] = choose(row, columns["rationale"])
            else:
                columns["rationale"] = row["solution"]

    def predict(processor, models, rows, *options):
        written = {}
        for stage in processor.stages:
            predict_stage(None, processor, stage, rows, written)
        return written

    return predict_stage, predict


@pytest.fixture
def probed(tiny_run, problems, monkeypatch):
    processor, models = load_system(str(tiny_run))

    def with_system(choose):
        predict_stage, predict = fake_system(choose)
        monkeypatch.setattr(probing, "predict_stage", predict_stage)
        monkeypatch.setattr(probing, "predict", predict)
        return probe(processor, models, problems)

    return with_system


def test_probes_show_dependence_on_the_rationale(probed, problems):
    """The system is right only with the problem's own rationale."""
    results = probed(
        lambda row, text: row["answer"] if text == row["solution"] else (row["answer"] + 1) % len(row["choices"])
    )
    assert results["rationale dropped"]["accuracy"] == 100 and results["rationale dropped"]["probed"] == 0
    assert results["rationale's words mixed"]["probed"] == results["rationale's first half"]["probed"] == 0
    assert results["picture dropped"]["changed"] == results["another problem's picture"]["changed"] == 0
    assert results["choices permuted"]["follow_content"] == 100 == results["choices permuted"]["probed"]


def test_probes_show_dependence_on_the_picture(probed, problems):
    shown = {row["id"]: row["images"] for row in problems}
    results = probed(lambda row, text: row["answer"] if row["images"] == shown[row["id"]] else -1)
    seeing = sum(bool(images) for images in problems["images"])
    for name in ("picture dropped", "another problem's picture"):
        assert (results[name]["n"], results[name]["accuracy"], results[name]["probed"]) == (seeing, 100, 0)
    assert all(results[name]["changed"] == 0 for name in CHANGED_RATIONALES)


def test_probes_show_preference_for_a_letter(probed):
    results = probed(lambda row, text: 0)["choices permuted"]
    assert results["follow_letter"] == 100 and results["follow_content"] < 60


def test_refuses_pictures_without_a_tower_or_features(tiny_run, tiny_dataset, monkeypatch):
    processor, models = load_system(str(tiny_run))
    processor.image_processor = None
    monkeypatch.setattr("mmcot.probes.load_system", lambda model: (processor, models))
    with pytest.raises(SystemExit, match="has no picture tower, but problems have pictures: specify --features"):
        main([str(tiny_run), "--dataset", str(tiny_dataset)])


def test_command_prints_table_and_writes_file(tiny_run, tiny_dataset, tmp_path, capsys):
    output = tmp_path / "probes.json"
    main([str(tiny_run), "--dataset", str(tiny_dataset), "--limit", "6", "--output", str(output)])
    printed = capsys.readouterr().out
    for name in (*CHANGED_RATIONALES, "picture dropped", "another problem's picture", "choices permuted"):
        assert name in printed
    scores = read_json(tiny_run / "scores" / "test.json")
    assert read_json(output)["weights"] == scores["weights"], "a model card compares them with its own weights"
