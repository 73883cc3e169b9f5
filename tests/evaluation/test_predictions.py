"""A predictions file is scored only with its own meta file and against the problems that it answers."""

import json
import shutil

import pytest
from conftest import TINY_RECIPE
from safetensors.torch import load_file, save_file

from mmcot.evaluate import main as score_files
from mmcot.evaluation.predictions import evaluate
from mmcot.predict import main as predict
from mmcot.problems.sources import load_problems
from mmcot.storage.files import read_json, write_json
from mmcot.train import main as train


@pytest.fixture(scope="module")
def other_system(tiny_run, tmp_path_factory):
    """The run's exported folder with other weights in the rationale stage."""
    folder = tmp_path_factory.mktemp("other") / "hub"
    shutil.copytree(tiny_run / "hub", folder)
    file = folder / "rationale" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.final_layer_norm.weight"] *= -3
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pairs(tiny_run, other_system, tiny_dataset, tmp_path_factory):
    """A folder with the predictions of two systems, `one.json` and `other.json`."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, model in (("one", tiny_run), ("other", other_system)):
        predict([str(model), "--dataset", str(tiny_dataset), "--output", str(folder / f"{name}.json")])
    return folder


@pytest.fixture
def mixed(pairs, tmp_path):
    """One system's predictions beside another's meta file: the result of a kill between the two writes."""
    shutil.copy(pairs / "one.json", tmp_path / "mixed.json")
    shutil.copy(pairs / "other.meta.json", tmp_path / "mixed.meta.json")
    shutil.copy(pairs / "one.json", tmp_path / "plain.json")
    return tmp_path / "mixed.json"


@pytest.mark.parametrize(
    "options",
    [
        ("mixed.json",),
        ("plain.json", "--compare", "mixed.json"),
        ("plain.json", "--seeds", "mixed.json"),
        ("mixed.json", "--submission", "submission.json"),
        ("plain.json", "--report", "page", "--without_picture", "mixed.json"),
    ],
    ids=["score", "compare", "seeds", "submission", "report"],
)
def test_refuses_meta_file_of_other_predictions(mixed, tiny_dataset, monkeypatch, options):
    monkeypatch.chdir(mixed.parent)
    with pytest.raises(SystemExit, match="mixed.meta.json does not belong to mixed.json.*Predict again; or remove"):
        score_files([*options, "--dataset", str(tiny_dataset)])
    assert not {"submission.json", "page", "mixed.scores.json"} & {file.name for file in mixed.parent.iterdir()}
    with pytest.raises(ValueError, match="does not belong to"):
        evaluate(mixed, str(tiny_dataset), "test")


def test_scores_predictions_without_meta_file(mixed, tiny_dataset):
    score_files([str(mixed.with_name("plain.json")), "--dataset", str(tiny_dataset)])
    assert "weights" not in read_json(mixed.with_name("plain.scores.json"))


def test_refuses_meta_file_of_older_version(pairs, tiny_dataset, tmp_path):
    shutil.copy(pairs / "one.json", tmp_path / "old.json")
    meta = read_json(pairs / "one.meta.json")
    write_json(tmp_path / "old.meta.json", {name: value for name, value in meta.items() if name != "predictions"})
    with pytest.raises(SystemExit, match="old.meta.json does not name its predictions: an older mmcot wrote it"):
        score_files([str(tmp_path / "old.json"), "--dataset", str(tiny_dataset)])


def test_next_call_repairs_files_of_killed_call(pairs, other_system, tiny_dataset, tmp_path, monkeypatch):
    for file in ("one.json", "one.meta.json"):
        shutil.copy(pairs / file, tmp_path / file.replace("one", "p"))
    command = [str(other_system), "--dataset", str(tiny_dataset), "--output", str(tmp_path / "p.json")]
    written = []

    def write_once(path, data):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_json(path, data)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr("mmcot.storage.predictions.write_json", write_once)
        predict(command)
    scoring = [str(tmp_path / "p.json"), "--dataset", str(tiny_dataset)]
    with pytest.raises(SystemExit, match="p.meta.json does not belong to"):
        score_files(scoring)
    predict(command)
    score_files(scoring)
    assert (tmp_path / "p.json").read_bytes() == (pairs / "other.json").read_bytes()
    assert read_json(tmp_path / "p.scores.json")["weights"] == read_json(pairs / "other.meta.json")["weights"]


@pytest.mark.parametrize("without_digest", [False, True], ids=["of another system", "of an older version"])
def test_run_rewrites_predictions_that_do_not_match_meta_file(tiny_run, pairs, tiny_dataset, tmp_path, without_digest):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.copy(pairs / "other.json", run / "predictions" / "test.json")
    if without_digest:
        meta = read_json(run / "predictions" / "test.meta.json")
        meta.pop("predictions", None)
        write_json(run / "predictions" / "test.meta.json", meta)
    train(["--config", str(TINY_RECIPE), "--dataset", str(tiny_dataset), "--output_dir", str(run)])
    for file in ("predictions/test.json", "predictions/test.meta.json"):
        assert (run / file).read_bytes() == (tiny_run / file).read_bytes()
    assert read_json(run / "scores/test.json")["accuracy"] == read_json(tiny_run / "scores/test.json")["accuracy"]


def write_changed_dataset(tiny_dataset, folder, change):
    """Write a copy of the dataset with changed rows, and its pictures beside it."""
    shutil.copytree(tiny_dataset.parent, folder)
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    file = folder / tiny_dataset.name
    file.write_text("".join(json.dumps(change(folder, row)) + "\n" for row in rows))
    return file


def replace_pictures(folder, row):
    for name in row["images"]:
        shutil.copy(next(file for file in sorted(folder.glob("*.png")) if file.name != name), folder / name)
    return row


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (replace_pictures, "other pictures"),
        (lambda _, row: {**row, "question": row["question"] + " Say it."}, "other questions, choices, answers"),
        (lambda _, row: {**row, "choices": row["choices"][::-1]}, "other questions, choices, answers"),
        (lambda _, row: {**row, "solution": "No."}, "other questions, choices, answers"),
    ],
    ids=["pictures", "question", "choices", "gold"],
)
@pytest.mark.parametrize("writer", ["predict", "run"])
def test_refuses_to_score_changed_problems(tiny_run, pairs, tiny_dataset, tmp_path, change, differing, writer):
    file = {"predict": pairs / "one.json", "run": tiny_run / "predictions" / "test.json"}[writer]
    dataset = write_changed_dataset(tiny_dataset, tmp_path / "changed", change)
    with pytest.raises(SystemExit) as refused:
        score_files([str(file), "--dataset", str(dataset), "--output", str(tmp_path / "scores.json")])
    for words in (str(tiny_dataset), str(dataset), differing, "predict again"):
        assert words in refused.value.code
    assert not (tmp_path / "scores.json").exists()
    with pytest.raises(ValueError, match=differing):
        evaluate(file, str(dataset), "test")


def test_report_compares_predictions_without_pictures_of_same_texts(tiny_run, pairs, tiny_dataset, tmp_path):
    showing = [str(pairs / "one.json"), "--dataset", str(tiny_dataset), "--report", str(tmp_path / "page")]
    showing += ["--output", str(tmp_path / "scores.json")]
    without = {"blind": {"images": []}, "other": {"images": [], "question": "Another?"}}
    for name, columns in without.items():
        dataset = write_changed_dataset(
            tiny_dataset, tmp_path / name, lambda _, row, columns=columns: {**row, **columns}
        )
        predict([str(tiny_run), "--dataset", str(dataset), "--output", str(tmp_path / f"{name}.json")])
    score_files([*showing, "--without_picture", str(tmp_path / "blind.json")])
    assert "picture_not_used" in (tmp_path / "page" / "problems.js").read_text()
    with pytest.raises(SystemExit, match="have other questions, choices, answers or other texts. Give"):
        score_files([*showing, "--without_picture", str(tmp_path / "other.json")])


def test_scores_after_dataset_moves_or_loses_picture_files(tiny_run, pairs, tiny_dataset, tmp_path):
    """The problems stay the same in another folder, with captions, or without the files of their pictures."""
    moved = write_changed_dataset(tiny_dataset, tmp_path / "moved", lambda _, row: {**row, "caption": "a picture"})
    for number, dataset in enumerate((tiny_dataset, moved, moved)):
        if number == 2:
            for picture in moved.parent.glob("*.png"):
                picture.unlink()
        scores = tmp_path / f"{number}.json"
        score_files([str(pairs / "one.json"), "--dataset", str(dataset), "--output", str(scores)])
    score_files(["--leaderboard", *(str(tmp_path / f"{number}.json") for number in range(3))])


def test_scores_first_problems_of_split(tiny_run, tiny_dataset, tmp_path):
    rows = ["--dataset", str(tiny_dataset), "--limit", "6"]
    predict([str(tiny_run), *rows, "--output", str(tmp_path / "p.json")])
    score_files([str(tmp_path / "p.json"), *rows])
    score_files([str(tmp_path / "p.json"), "--dataset", str(tiny_dataset), "--allow_missing"])
    assert read_json(tmp_path / "p.scores.json")["n"] == 20


def test_ignores_changes_of_unread_pictures(tmp_path, tiny_dataset):
    """A system with `max_images` 1 reads only the first picture of a ScienceQA problem with pictures of its choices."""
    from mmcot.problems.digests import digest_of_problems
    from mmcot.storage.predictions import write_predictions

    folder, pictures = tmp_path / "scienceqa", tmp_path / "scienceqa" / "images" / "test" / "1"
    pictures.mkdir(parents=True)
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "image": "image.png", "split": "test"}
    write_json(folder / "problems.json", {"1": problem})
    write_json(folder / "pid_splits.json", {"test": ["1"]})
    first, *others = sorted(tiny_dataset.parent.glob("*.png"))
    shutil.copy(first, pictures / "image.png")
    shutil.copy(others[0], pictures / "choice_0.png")
    scoring = [str(tmp_path / "p.json"), "--dataset", str(folder)]
    for max_images in (1, None):
        meta = {"dataset": str(folder), "split": "test", "max_images": max_images}
        meta["problems"] = digest_of_problems(load_problems(str(folder), "test", max_images))
        write_predictions(tmp_path / "p.json", {"1": {"answer": 0}}, meta)
        score_files(scoring)
        shutil.copy(others[1], pictures / "choice_0.png")
        if max_images is None:
            with pytest.raises(SystemExit, match="other pictures"):
                score_files(scoring)
        else:
            score_files(scoring)
        shutil.copy(others[0], pictures / "choice_0.png")


def test_command_gives_scores_of_run(tiny_run, tiny_dataset, tmp_path):
    file = tiny_run / "predictions" / "test.json"
    output = tmp_path / "run" / "scores" / "test.json"
    shutil.copytree(tiny_run / "predictions", tmp_path / "run" / "predictions")
    score_files([str(tmp_path / "run" / "predictions" / file.name), "--dataset", str(tiny_dataset)])
    assert read_json(output) == read_json(tiny_run / "scores" / "test.json")


def test_leaderboard_refuses_scores_of_other_pictures(tiny_run, pairs, tiny_dataset, tmp_path):
    """The ids, answers and questions are equal; only the pictures differ."""
    dataset = write_changed_dataset(tiny_dataset, tmp_path / "changed", replace_pictures)
    predict([str(tiny_run), "--dataset", str(dataset), "--output", str(tmp_path / "p.json")])
    score_files([str(tmp_path / "p.json"), "--dataset", str(dataset)])
    with pytest.raises(SystemExit) as refused:
        score_files(["--leaderboard", str(tiny_run), str(tmp_path / "p.scores.json")])
    for words in (str(tiny_dataset), str(dataset), "other pictures"):
        assert words in refused.value.code


@pytest.mark.slow
def test_refuses_predictions_of_another_demonstration_variant(tiny_run, tmp_path):
    rows = ["--limit", "8", "--output", str(tmp_path / "p.json")]
    predict([str(tiny_run), "--dataset", "demo", *rows])
    with pytest.raises(SystemExit, match="predicted from 'demo' .* of 'demo:5' with the same ids have other"):
        score_files([str(tmp_path / "p.json"), "--dataset", "demo:5", "--limit", "8"])
