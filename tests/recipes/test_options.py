"""Every command refuses an option without effect, an absent path or an output that cannot be written, before any work
and in one line."""

import errno
import json
import shutil
import sys

import pytest
import yaml
from conftest import REPOSITORY, TINY_RECIPE

from mmcot import convert, evaluate, features, predict, probes, train
from mmcot.evaluation.tables import p_value
from mmcot.hub.licenses import check_license
from mmcot.storage import predictions
from mmcot.storage.journal import Journal
from mmcot.storage.paths import check_output_file, check_output_folder, refuse_absent_path

sys.path.insert(0, str(REPOSITORY))
import push_to_hub

COMMANDS = {
    "predict": (predict.main, "RUN --dataset demo --output OUT"),
    "leak_check": (predict.main, "RUN --dataset demo --leak_check"),
    "probes": (probes.main, "RUN --dataset demo"),
    "evaluate": (evaluate.main, "FILE --dataset demo"),
    "leaderboard": (evaluate.main, "--leaderboard FILE"),
    "submission": (evaluate.main, "FILE --dataset demo --submission OUT"),
    "towers": (features.main, "demo --vision vit --output DIR"),
    "captions": (features.main, "demo --captions vit --output DIR"),
    "import": (features.main, "demo --vision vit --import_features FILE --name_map FILE --output DIR"),
    "convert": (convert.main, "ORIGINAL DIR --vision vit"),
    "space": (push_to_hub.main, "--repo_id ada/model --space ada/space --dry_run"),
    "push": (push_to_hub.main, "RUN --repo_id ada/model --dry_run"),
}


def read_error(command, more, folder, capsys):
    """Run a command that must fail, and return its error message."""
    main, words = COMMANDS[command]
    (folder / "RUN").mkdir(exist_ok=True)
    (folder / "ORIGINAL").mkdir(exist_ok=True)
    (folder / "FILE").write_text("{}")
    places = {name: str(folder / name) for name in ("RUN", "OUT", "FILE", "DIR", "ORIGINAL")}
    arguments = [places.get(word, word) for word in (*words.split(), *more.split())]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return f"{stopped.value.code}\n{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("command", "more"),
    [
        *[("predict", more) for more in ("--temperature 0.5", "--seed 3", "--max_tokens 99 --batch_size 3")],
        ("predict", "--num_rationales 1 --seed 42"),
        *[("leak_check", more) for more in ("--output OUT", "--seed 3")],
        *[("evaluate", more) for more in ("--attention RUN", "--without_picture FILE", "--format csv")],
        ("evaluate", "--compare FILE --seeds FILE"),
        *[("leaderboard", more) for more in ("--split val", "--output OUT", "--report DIR", "--limit 3")],
        *[("submission", more) for more in ("--limit 3", "--output OUT", "--allow_missing", "--similarity x")],
        ("submission", "--report DIR"),
        *[("captions", more) for more in ("--dtype float32", "--bf16", "--revision x", "--num_workers 1")],
        *[("captions", more) for more in ("--preprocessing paper", "--vision_tower vit")],
        *[("import", more) for more in ("--batch_size 3", "--bf16", "--revision x", "--num_workers 1")],
        ("convert", "--prompt_formats QCM-E QCMG-A"),
        *[("space", more) for more in ("--license mit", "--base_model x/y", "--merge", "--allow_unscored")],
    ],
)
def test_refuses_option_without_effect(command, more, tmp_path, capsys):
    message = read_error(command, more, tmp_path, capsys)
    assert "has no effect here: " in message
    assert any(f"--{word.lstrip('-')} has no effect" in message for word in more.split() if word.startswith("--"))


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("predict", "--batch_size 0", "--batch_size is 0; expected 1 or more"),
        ("predict", "--num_workers -1", "--num_workers is -1; expected 0 or more"),
        ("predict", "--num_rationales 2 --temperature 0", "--temperature is 0; expected more than 0"),
        ("probes", "--batch_size 0", "--batch_size is 0; expected 1 or more"),
        ("towers", "--batch_size 0", "--batch_size is 0; expected 1 or more"),
        ("towers", "--num_workers -1", "--num_workers is -1; expected 0 or more"),
    ],
)
def test_refuses_number_that_is_too_small(command, more, message, tmp_path, capsys):
    assert message in read_error(command, more, tmp_path, capsys)


@pytest.mark.parametrize("where", ["runs/nope", "./nope", "/nope/there", "a/b/c", "nope.json"])
def test_names_absent_path_in_every_command(where, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [
        (predict.main, [where, "--dataset", "demo", "--output", "x.json"]),
        (probes.main, [where, "--dataset", "demo"]),
        (features.main, ["demo", "--vision", where, "--output", "x"]),
        (features.main, ["demo", "--captions", where, "--output", "x"]),
        (push_to_hub.main, [where, "--repo_id", "ada/model", "--dry_run"]),
        (evaluate.main, ["--leaderboard", where]),
    ]
    if where != "a/b/c":  # for mmcot.convert, a Hub id and a folder of that repository
        commands.append((convert.main, [where, "x", "--vision", "vit"]))
    for name in ("model_name_or_path", "vision_model_name_or_path", "tokenizer_name_or_path"):
        values = yaml.safe_load(TINY_RECIPE.read_text())
        for key in ("text_config", "vision_config", "image_processor", "tokenizer_vocab_size"):
            del values[key]
        values |= {"model_name_or_path": "google/flan-t5-small", "vision_model_name_or_path": "detr", name: where}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        commands.append((train.main, ["--config", f"{name}.yaml", "--dataset", "demo", "--output_dir", "out"]))
    for main, arguments in commands:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        message = str(stopped.value.code)
        assert where.removeprefix("./") in message and "no such" in message and "huggingface.co" not in message, (
            main,
            message,
        )


def test_accepts_hub_ids_as_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("google/flan-t5-small", "gpt2", "detr"):
        refuse_absent_path(name, "a model")


def test_refuses_unwritable_output_before_work(tmp_path, capsys):
    (tmp_path / "OUT").mkdir()
    assert "OUT is a folder; expected a file to write" in read_error("predict", "", tmp_path, capsys)
    assert "OUT is a folder; expected a file to write" in read_error("evaluate", "--output OUT", tmp_path, capsys)
    assert "OUT is a folder; expected a file to write" in read_error("probes", "--output OUT", tmp_path, capsys)
    assert "OUT is a folder; expected a file to write" in read_error("submission", "", tmp_path, capsys)
    (tmp_path / "DIR").write_text("a file")
    for command in ("towers", "captions", "convert"):
        assert "DIR is a file; expected a folder" in read_error(command, "", tmp_path, capsys)
    assert "--report: " in read_error("evaluate", "--report DIR", tmp_path, capsys)
    with pytest.raises(SystemExit, match="--output_dir: .*DIR is a file; expected a folder"):
        train.main(["--config", str(TINY_RECIPE), "--dataset", "demo", "--output_dir", str(tmp_path / "DIR/run")])


def test_refuses_read_only_output_before_work(tmp_path, monkeypatch):
    # Permissions do not work here, because root may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    for check in (check_output_file, check_output_folder):
        with pytest.raises(ValueError, match=f"--output: {tmp_path} is read-only"):
            check(tmp_path / "new" / "place", "--output")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["journal", "file"])
def test_full_disk_ends_prediction_with_a_message_and_it_resumes(
    place, tiny_run, tiny_dataset, tmp_path, monkeypatch, capsys
):
    command = [str(tiny_run), "--dataset", str(tiny_dataset), "--output", str(tmp_path / "test.json"), "--limit", "5"]

    def is_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Journal, "write", is_full) if place == "journal" else full.setattr(
            predictions, "write_json", is_full
        )
        with pytest.raises(SystemExit, match="test.json could not be written: .*No space left.*resumes"):
            predict.main(command)
    assert not (tmp_path / "test.json").exists()
    predict.main(command)
    assert len(json.loads((tmp_path / "test.json").read_text())) == 5


@pytest.mark.parametrize("file", ["model.safetensors", "rationale/model.safetensors"])
def test_refuses_truncated_weights(file, tiny_run, tmp_path):
    shutil.copytree(tiny_run / "hub", tmp_path / "hub")
    (tmp_path / "hub" / file).write_bytes((tmp_path / "hub" / file).read_bytes()[:-100])
    with pytest.raises(SystemExit, match=f"{file} .*is damaged"):
        predict.main([str(tmp_path / "hub"), "--dataset", "demo", "--output", str(tmp_path / "x.json")])


@pytest.mark.parametrize("name", ["foo", "Apache-2.0", "cc-by-sa"])
def test_refuses_licence_that_the_hub_does_not_list(name):
    with pytest.raises(ValueError, match=f"--license is '{name}', which is not a licence on the Hub's list"):
        check_license(name)


def test_licence_other_requires_name_and_link():
    check_license("cc-by-nc-sa-4.0")
    check_license("other", "my-licence", "LICENSE")
    for given in [("other", None, None), ("other", "my-licence", None), ("mit", "my-licence", "x"), (None, "x", "x")]:
        with pytest.raises(ValueError, match="--license_name and --license_link"):
            check_license(*given)


def test_p_value_is_never_shown_as_zero():
    assert [p_value(p) for p in (None, 1.0, 0.0123, 0.00011, 9e-5, 0.0)] == [
        *("-", "1.0000", "0.0123", "0.0001", "<0.0001", "<0.0001")
    ]
