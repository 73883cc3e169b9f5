"""Commands refuse a run whose `hub/` is older than its stages, because they would load and record other weights."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from mmcot.evaluate import main as score_files
from mmcot.hub.card import scores_of_run
from mmcot.predict import main as predict
from mmcot.prediction.provenance import weights_by_stage, weights_of
from mmcot.probes import main as probe
from mmcot.storage.files import read_json, write_json
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot import MMCoTProcessor
from push_to_hub import main as push


def change_weights(file):
    tensors = load_file(file)
    tensors["encoder.final_layer_norm.weight"] *= -3
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(params=["rationale", "answer", "in training"])
def stale(tiny_run, tmp_path, request):
    """A run with an outdated export: one of its stages is trained again, or its training is not finished."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    if request.param == "in training":
        (run / "answer" / "train_results.json").unlink()
        (run / "answer" / "model.safetensors").unlink()
    else:
        change_weights(run / request.param / "model.safetensors")
    return run


OUTDATED_EXPORT = (
    r"run/hub does not contain the weights of the run's stages \((rationale|answer)\).*Run train.py to its end"
)


def test_refuses_to_load_outdated_export(stale, tiny_dataset, tmp_path):
    rows = ["--dataset", str(tiny_dataset), "--limit", "2"]
    with pytest.raises(SystemExit, match=OUTDATED_EXPORT):
        predict([str(stale), *rows, "--output", str(tmp_path / "p.json")])
    with pytest.raises(SystemExit, match=OUTDATED_EXPORT):
        probe([str(stale), *rows, "--output", str(tmp_path / "probes.json")])
    assert not (tmp_path / "p.json").exists() and not (tmp_path / "probes.json").exists()
    predict([str(stale / "hub"), *rows, "--output", str(tmp_path / "p.json")])
    page = ["--report", str(tmp_path / "page"), "--attention", str(stale)]
    with pytest.raises(SystemExit, match=OUTDATED_EXPORT):
        score_files([str(tmp_path / "p.json"), *rows, *page])
    assert not (tmp_path / "page").exists()


def test_refuses_to_push_outdated_export(stale):
    shutil.rmtree(stale / "scores")
    with pytest.raises(SystemExit, match=f"{OUTDATED_EXPORT}|training of its .* stage is not finished"):
        push([str(stale), "--repo_id", "ada/tiny", "--license", "mit", "--allow_unscored", "--dry_run"])


@pytest.mark.parametrize("kind", ["tiny_run", "adapter_run"])
def test_weights_digests_are_those_of_loaded_files(kind, request, tmp_path):
    run = shutil.copytree(request.getfixturevalue(kind), tmp_path / "run")
    processor = MMCoTProcessor.from_pretrained(run / "hub", trust_remote_code=False)
    exported = weights_of(str(run), processor)
    assert exported == weights_of(str(run / "hub"), processor) == weights_by_stage(run, processor)
    for file in (run / "rationale").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert weights_of(str(run), processor) == exported != weights_by_stage(run, processor)


def test_refuses_maps_of_other_weights_than_predictions(tiny_run, tiny_dataset, tmp_path):
    shutil.copytree(tiny_run / "hub", tmp_path / "other")
    change_weights(tmp_path / "other" / "rationale" / "model.safetensors")
    files = [str(tiny_run / "predictions" / "test.json"), "--dataset", str(tiny_dataset)]
    files += ["--output", str(tmp_path / "scores.json"), "--report", str(tmp_path / "page")]
    with pytest.raises(SystemExit, match=r"has other weights than the model that wrote .*test.json \(rationale\)"):
        score_files([*files, "--attention", str(tmp_path / "other")])


def test_card_refuses_scores_of_changed_predictions(tiny_run, tiny_dataset, tmp_path):
    """The check also works after the run folder moves. Without a predictions file there is nothing to compare."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    processor = MMCoTProcessor.from_pretrained(run / "hub", trust_remote_code=False)
    assert scores_of_run(RunFolder(run), processor)["predictions_file"] == "test.json", "a path is not published"
    predictions = read_json(run / "predictions" / "test.json")
    for columns in predictions.values():
        columns["answer"] = 1 - columns["answer"]
    write_json(run / "predictions" / "test.json", predictions)
    with pytest.raises(
        ValueError, match=r"scores/test.json has scores of other predictions than .*test.json contains now"
    ):
        scores_of_run(RunFolder(run), processor)
    (run / "predictions" / "test.json").unlink()
    assert scores_of_run(RunFolder(run), processor)["n"] == 20
    scores = read_json(run / "scores" / "test.json")
    del scores["predictions"]
    write_json(run / "scores" / "test.json", scores)
    with pytest.raises(ValueError, match="does not record its predictions: an older mmcot wrote it"):
        scores_of_run(RunFolder(run), processor)
