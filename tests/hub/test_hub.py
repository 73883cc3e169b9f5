"""The exported folder, loaded by a process without this repository. test_publishing.py tests the upload."""

import json
import shutil

import pytest
import torch
from conftest import run_isolated, tiny_model

from mmcot.hub.export import shipped_code
from modeling_mmcot import MMCoTProcessor


@pytest.fixture
def elsewhere(tiny_run, tmp_path):
    """A folder outside the repository that contains a copy of the exported folder, `model/`."""
    shutil.copytree(tiny_run / "hub", tmp_path / "model")
    return tmp_path


def test_auto_classes_and_pipeline_reproduce_predictions(elsewhere, tiny_run, tiny_dataset):
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    problems = [
        {
            "image": [str(tiny_dataset.parent / name) for name in row["images"]] or None,
            **{name: row[name] for name in ("question", "choices", "context")},
        }
        for row in rows
    ]
    (elsewhere / "problems.json").write_text(json.dumps(problems))
    answers = run_isolated(
        """
        classes = [
            auto.from_pretrained("model", trust_remote_code=True)
            for auto in (AutoModelForSeq2SeqLM, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoConfig)
        ]
        classes.append(AutoModelForSeq2SeqLM.from_pretrained("model", subfolder="rationale", trust_remote_code=True))
        assert len({type(model) for model in classes[:3] + classes[5:]}) == 1
        assert not torch.equal(classes[0].shared.weight, classes[5].shared.weight)
        for loaded in classes:
            assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
        answer = pipeline("multimodal-cot", model="model", trust_remote_code=True)
        assert type(answer).__module__.startswith("transformers_modules.")
        problems = json.load(open("problems.json"))
        one = answer(problems[0])
        many = answer(problems, batch_size=5, decode_answer=True)
        assert [one["answer"], one["rationale"]] == [many[0]["answer"], many[0]["rationale"]]
        print(json.dumps(many))
        """,
        elsewhere,
    )
    predictions = json.loads((tiny_run / "predictions/test.json").read_text())
    for row, answer in zip(rows, answers, strict=True):
        expected = predictions[row["id"]]
        assert answer["answer_index"] == expected["answer"]
        assert answer["answer"] == row["choices"][expected["answer"]]
        assert answer["rationale"] == expected["rationale"]
        assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-5)
        assert answer["decoded_answer"] == expected["decoded_answer"]


def test_pipeline_accepts_pictures_in_every_form_and_no_choices(elsewhere):
    results = run_isolated(
        """
        from PIL import Image
        answer = pipeline("multimodal-cot", model="model", trust_remote_code=True)
        Image.new("RGB", (50, 40), "red").save("red.png")
        forms = ["red.png", Image.open("red.png"), ["red.png"], None]
        problem = {"question": "Which color is it?", "choices": ["red", "blue"]}
        results = [answer({**problem, "image": form}) for form in forms]
        results.append(answer({"question": "Which color is it?", "image": "red.png"}))
        results.append(answer({**problem, "choices": ["red"]}))
        print(json.dumps(results))
        """,
        elsewhere,
    )
    path, opened, listed, none, open_ended, one_choice = results
    assert path == opened == listed != none
    assert open_ended["answer_index"] == -1 and open_ended["scores"] == [] and isinstance(open_ended["answer"], str)
    assert one_choice["answer_index"] == 0 and one_choice["scores"] == [1.0] and one_choice["answer"] == "red"


def test_pipeline_refuses_malformed_problems(elsewhere):
    messages = run_isolated(
        """
        answer = pipeline("multimodal-cot", model="model", trust_remote_code=True)
        messages = []
        for problem in ("Why?", {"choices": ["a"]}, {"question": "Why?", "choices": "ab"}):
            try:
                answer(problem)
            except ValueError as error:
                messages.append(str(error))
        print(json.dumps(messages))
        """,
        elsewhere,
    )
    assert len(messages) == 3 and "question" in messages[1] and "'ab'" in messages[2]


@pytest.mark.parametrize("source", ["checkpoint", "stage"])
def test_stage_folders_and_checkpoints_load_without_repository(source, tiny_run, tmp_path):
    folder = tiny_run / "rationale"
    if source == "checkpoint":
        folder = sorted(folder.glob("checkpoint-*"))[0]
    shutil.copytree(folder, tmp_path / "model")
    loaded = run_isolated(
        """
        model = AutoModel.from_pretrained("model", trust_remote_code=True)
        processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
        inputs = processor({"question": "Why?", "choices": ["a"], "context": ""}, stage="rationale")
        print(json.dumps([type(model).__module__, type(processor).__module__, model.generate(**inputs).tolist()]))
        """,
        tmp_path,
    )
    assert loaded[0].startswith("transformers_modules.") and loaded[1].startswith("transformers_modules.")
    assert loaded[2]


def test_save_pretrained_folders_load_without_repository_and_save_same_files(tiny_run, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    MMCoTProcessor.from_pretrained(tiny_run / "hub").save_pretrained(tmp_path / "processor")
    run_isolated(
        """
        for auto, name in ((AutoModelForSeq2SeqLM, "model"), (AutoProcessor, "processor")):
            auto.from_pretrained(name, trust_remote_code=True).save_pretrained(name + "_again")
        print(1)
        """,
        tmp_path,
    )
    for name in ("model", "processor"):
        first = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        again = {file.name: file.read_bytes() for file in (tmp_path / f"{name}_again").iterdir()}
        assert first == again


def test_export_copies_code_byte_for_byte(tiny_run):
    exported = sorted(file.name for file in (tiny_run / "hub").glob("*.py"))
    assert exported == [file.name for file in shipped_code()] and "pipeline_mmcot.py" in exported
    for file in shipped_code():
        assert (tiny_run / "hub" / file.name).read_bytes() == file.read_bytes()


def test_export_copies_weights_of_stages(tiny_run):
    from safetensors.torch import load_file

    for folder, stage in ((tiny_run / "hub", "answer"), (tiny_run / "hub" / "rationale", "rationale")):
        exported, trained = (load_file(f / "model.safetensors") for f in (folder, tiny_run / stage))
        assert exported.keys() == trained.keys()
        assert all(torch.equal(exported[name], trained[name]) for name in exported)
    assert not list((tiny_run / "hub").rglob("*.bin"))


def test_pipeline_loads_every_stage_at_given_revision(elsewhere):
    """The cache contains two revisions that differ only in the rationale stage."""
    first, second = "a" * 40, "b" * 40
    repo = elsewhere / "hf_home" / "hub" / "models--user--model"
    for commit in (first, second):
        shutil.copytree(elsewhere / "model", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(second)
    weights = repo / "snapshots" / second / "rationale" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["encoder.final_layer_norm.weight"].zero_()
    save_file(tensors, weights, metadata={"format": "pt"})
    sums = run_isolated(
        """
        sums = []
        for revision in (None, sys.argv[1], sys.argv[2]):
            answer = pipeline(
                "multimodal-cot", model="user/model", revision=revision, trust_remote_code=True, check=False
            )
            sums.append(answer.models["rationale"].encoder.final_layer_norm.weight.abs().sum().item())
        print(json.dumps(sums))
        """,
        elsewhere,
        first,
        second,
    )
    assert sums[0] == 0 and sums[1] > 0 and sums[2] == 0
