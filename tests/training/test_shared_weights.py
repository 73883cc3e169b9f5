"""One model for all stages (`share_weights`): its mixture, its settings, a run, the exported system, resuming."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import yaml
from conftest import REPOSITORY, TINY_RECIPE, pipeline_problems, run_isolated, run_script, tiny_model
from safetensors import safe_open

from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.files import read_json
from mmcot.storage.run_folder import RunFolder
from mmcot.training.building import build_model
from mmcot.training.mixture import mix
from mmcot.training.passages import open_searchers
from mmcot.training.preparation import prepare
from mmcot.training.stage import stage_examples
from modeling_mmcot.loading_mmcot import share_model

STAGES = [
    {
        **{"name": "description", "reads": ["question", "images"], "writes": "description"},
        **{"source": "Describe: {{ question }}", "target": "{{ solution }}", "max_target_length": 8, "num_beams": 2},
    },
    {
        **{"name": "retrieval", "kind": "retrieve", "reads": ["question", "description"], "writes": "passages"},
        **{"source": "{{ question }} {{ description }}", "corpora": ["lectures"], "num_passages": 1},
    },
    {
        **{"name": "rationale", "reads": ["question", "passages"], "writes": "rationale", "target": "{{ solution }}"},
        "source": "Explain: {{ question }} {% for passage in passages %}{{ passage.text }} {% endfor %}",
        "max_target_length": 12,
    },
    {
        **{"name": "answer", "reads": ["question", "choices", "rationale", "images"], "writes": "answer_text"},
        **{"source": "Answer: {{ question }} {{ rationale }}", "target": "The answer is ({{ letters[answer] }})."},
        "max_target_length": 16,
    },
]
TRAINED = ["description", "rationale", "answer"]
WORDS = {"Describe", "Explain", "Answer"}


def write_recipe(folder, stages=STAGES, **settings):
    values = {**yaml.safe_load(TINY_RECIPE.read_text()), "share_weights": True, "stages": stages, **settings}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def command(recipe, dataset, folder):
    return list(map(str, ("--config", recipe, "--dataset", dataset, "--output_dir", folder)))


def words_of(prepared, examples):
    """The first word of each source, which names the stage in the templates above."""
    sources = prepared.processor.batch_decode(list(examples["input_ids"]), skip_special_tokens=True)
    return [source.split(":")[0] for source in sources]


@pytest.fixture(scope="module")
def mixtures(tiny_dataset, tmp_path_factory):
    """A prepared run, and the examples of each split by stage and mixed."""
    folder = tmp_path_factory.mktemp("mixture")
    prepared = prepare(parse_recipe(command(write_recipe(folder), tiny_dataset, folder / "run")))
    open_searchers(prepared)
    stages = prepared.training_of(prepared.stages[0]).stages
    examples = {split: [stage_examples(prepared, stage, split) for stage in stages] for split in ("train", "val")}
    return prepared, examples, {split: mix(stages, rows, seed=3) for split, rows in examples.items()}


def test_mixture_has_each_problem_once_for_each_stage(mixtures):
    prepared, examples, mixed = mixtures
    assert prepared.training_of(prepared.stages[0]).stages.names == TRAINED
    for split in ("train", "val"):
        pairs = Counter(zip(mixed[split]["id"], words_of(prepared, mixed[split]), strict=True))
        ids = prepared.problems[split]["id"]
        assert pairs.keys() == {(problem_id, word) for problem_id in ids for word in WORDS}
        assert set(pairs.values()) == {1}
        labels = Counter(map(tuple, mixed[split]["labels"]))
        assert labels == Counter(tuple(row) for rows in examples[split] for row in rows["labels"])


def test_mixture_has_pictures_only_for_stages_that_read_them(mixtures):
    prepared, _, mixed = mixtures
    rows = mixed["train"]
    seen = dict.fromkeys(WORDS, 0)
    for word, images in zip(words_of(prepared, rows), rows["images"], strict=True):
        seen[word] += len(images)
    with_pictures = sum(map(len, prepared.problems["train"]["images"]))
    assert seen == {"Describe": with_pictures, "Explain": 0, "Answer": with_pictures} and with_pictures > 0


def test_mixture_is_shuffled_by_the_seed(mixtures):
    prepared, examples, mixed = mixtures
    stages = prepared.training_of(prepared.stages[0]).stages
    assert set(words_of(prepared, mixed["train"].select(range(20)))) == WORDS
    again, other = (mix(stages, examples["train"], seed=seed) for seed in (3, 4))
    assert list(again["input_ids"]) == list(mixed["train"]["input_ids"]) != list(other["input_ids"])


CHECK = {"name": "check", "kind": "check", "reads": ["rationale", "answer_text"], "writes": "verdict"}
CHECK |= {"source": "{{ rationale }} {{ answer_text }}", "inputs_from": "cross_fit"}


def changed(**settings):
    """The stages with other settings of the rationale stage."""
    return [{**stage, **settings} if stage["name"] == "rationale" else stage for stage in STAGES]


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"stages": changed(num_train_epochs=2)}, [], "'rationale' has num_train_epochs 2.0, which has no effect with"),
        ({"stages": changed(learning_rate="1e-4")}, [], "'rationale' has learning_rate 0.0001, which has no effect"),
        ({"stages": changed(inputs_from="generated")}, [], "'rationale' has inputs_from 'generated', which has no eff"),
        ({"stages": changed(inputs_from="cross_fit")}, [], "'rationale' has inputs_from 'cross_fit', which has no eff"),
        ({"stages": changed(init_from="previous_stage")}, [], "'rationale' has init_from 'previous_stage', which has"),
        ({"stages": changed(name="shared")}, [], "name of a stage is 'shared', a folder that a run uses"),
        ({"stages": [{**STAGES[3], "reads": ["question", "choices"]}]}, [], "only the stage 'answer' has a model"),
        ({}, ["--stage", "rationale"], "stage and share_weights are set, but a shared model is trained for all"),
        (
            {"stages": [*STAGES, CHECK]},
            [],
            "share_weights is set, but stage 'check' of kind 'check' learns from answers",
        ),
        ({"use_peft": True}, [], "share_weights and use_peft are set, but adapters share their base already"),
        (
            {"stages": [STAGES[0], {**STAGES[3], "reads": ["question", "choices"]}], "tokenizer_vocab_size": None},
            ["--streaming", "true", "--tokenizer_name_or_path", "none"],
            "share_weights is set, which needs all training problems and cannot be used with streaming",
        ),
    ],
)
def test_refuses_settings_without_effect_on_a_shared_model(tmp_path, settings, options, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(["--config", str(write_recipe(tmp_path, **settings)), *options])


def test_refuses_two_stages_with_the_same_source(tmp_path):
    stages = changed(reads=["question", "images"], source=STAGES[0]["source"])
    with pytest.raises(ValueError, match="stages 'description' and 'rationale' have the same source"):
        prepare(parse_recipe(["--config", str(write_recipe(tmp_path, stages))]))


def test_model_that_starts_from_the_root_of_a_system_is_whole(tmp_path):
    """Otherwise its stages would be loaded like those of that system."""
    tiny_model(shared_stages={"answer": {}}, stage_adapters=["answer"]).save_pretrained(tmp_path / "root")
    parts = {"text_config": None, "vision_config": None, "model_name_or_path": str(tmp_path / "root")}
    config = build_model(parse_recipe(["--config", str(write_recipe(tmp_path, **parts))]), None, None).config
    assert config.shared_stages is None and config.stage_adapters is None


def test_shared_model_has_the_settings_of_each_stage_and_one_set_of_modules():
    model = tiny_model(shared_stages={"rationale": {"max_new_tokens": 5, "num_beams": 2}, "answer": {}})
    models = share_model(model, ["rationale", "answer"])
    assert models["rationale"].generation_config.max_new_tokens == 5
    assert models["rationale"].generation_config.num_beams == 2
    assert models["answer"].generation_config.max_new_tokens == model.generation_config.max_new_tokens == 12
    for other in models.values():
        assert all(
            own is shared for own, shared in zip(other.modules(), model.modules(), strict=True) if own is not other
        )
        assert all(own is shared for own, shared in zip(other.parameters(), model.parameters(), strict=True))


def test_refuses_shared_model_without_settings_of_a_stage_or_with_unknown_ones():
    model = tiny_model(shared_stages={"answer": {"max_tokens": 5}})
    with pytest.raises(ValueError, match="has no settings for the stage 'rationale'; found answer"):
        share_model(model, ["rationale", "answer"])
    with pytest.raises(TypeError, match="unexpected keyword 'max_tokens'"):
        share_model(model, ["answer"])


def start(recipe, dataset, folder):
    words = [sys.executable, "train.py", *command(recipe, dataset, folder)]
    return subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def run(recipe, tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "run"
    run_script("train.py", *command(recipe, tiny_dataset, folder))
    return RunFolder(folder)


@pytest.mark.slow
def test_hub_folder_has_one_model_for_all_stages(run):
    weights = [file.relative_to(run.hub).as_posix() for file in run.hub.rglob("*.safetensors")]
    assert weights == ["model.safetensors"]
    assert (run.hub / "model.safetensors").read_bytes() == (run.stage("shared") / "model.safetensors").read_bytes()
    assert [path.name for path in run.hub.iterdir() if path.is_dir()] == ["retrieval"]
    assert sorted(run.trained_stages()) == ["retrieval", "shared"]
    assert [stage["name"] for stage in read_json(run.hub / "processor_config.json")["stages"]] == [
        *("description", "retrieval", "rationale", "answer")
    ]


@pytest.mark.slow
def test_card_describes_one_model(run):
    with safe_open(run.hub / "model.safetensors", "pt") as tensors:
        parameters = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118 (not a dict)
    card = (run.hub / "README.md").read_text()
    assert "which share one model" in card and "The root contains the model that all stages share" in card
    assert f"| parameters | {parameters:,} (root) |" in card and "| shared model | " in card
    assert "subfolder" not in card and "answer stage |" not in card


@pytest.mark.slow
def test_exported_system_answers_in_fresh_process_like_run(run, tiny_dataset):
    (run.path / "problems.json").write_text(json.dumps(pipeline_problems(tiny_dataset)))
    found, num_models, num_weights = run_isolated(
        """
        answer = pipeline("multimodal-cot", model="hub", trust_remote_code=True)
        problems = json.load(open("problems.json"))
        results = {problem["id"]: answer(problem) for problem in problems}
        answer.save_pretrained("saved")
        saved = pipeline("multimodal-cot", model="saved", trust_remote_code=True)
        assert saved(problems[0]) == results[problems[0]["id"]]
        models = answer.models.values()
        weights = {id(weight) for model in models for weight in model.parameters()}
        print(json.dumps([results, len(models), len(weights) - len(list(answer.model.parameters()))]))
        """,
        run.path,
    )
    assert (num_models, num_weights) == (3, 0)
    predictions = run.predictions_so_far("test")
    assert found.keys() == predictions.keys()
    for problem_id, result in found.items():
        columns = predictions[problem_id]
        assert [result[name] for name in ("description", "rationale")] == [
            columns[name] for name in ("description", "rationale")
        ]
        assert result["answer_index"] == columns["answer"]
        assert result["scores"] == pytest.approx(columns["scores"], abs=1e-5)
    assert [file.name for file in (run.path / "saved").rglob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.slow
def test_each_stage_predicts_with_its_own_limit_of_new_tokens(run):
    """The tiny model ends no text, so every text has as many tokens as its stage allows."""
    known = read_json(run.hub / "known_answer.json")["stages"]
    limits = {name: known[name]["generation"]["max_new_tokens"] for name in TRAINED}
    assert limits == {"description": 8, "rationale": 12, "answer": 16}
    assert known["description"]["generation"]["num_beams"] == 2 and known["answer"]["generation"]["num_beams"] == 1


@pytest.mark.slow
def test_predict_command_and_repeated_command_change_nothing(run, recipe, tiny_dataset, tmp_path):
    common = ("-m", "mmcot.predict", run.path, "--dataset", tiny_dataset, "--split", "test")
    run_script(*common, "--decode_answer", "--output", tmp_path / "test.json")
    assert read_json(tmp_path / "test.json") == run.predictions_so_far("test")
    assert "No prediction of 20 differs" in run_script(*common, "--leak_check").stdout
    files = {file: file.stat().st_mtime_ns for file in run.path.rglob("*.safetensors") if "hub" not in file.parts}
    run_script("train.py", *command(recipe, tiny_dataset, run.path))
    assert all(file.stat().st_mtime_ns == time for file, time in files.items())


@pytest.mark.slow
def test_last_report_of_all_stages_equals_validation_scores_and_changes_no_weights(run, recipe, tiny_dataset, tmp_path):
    run_script("train.py", *command(recipe, tiny_dataset, tmp_path / "run"), "--report_problems", "12")
    reporting = RunFolder(tmp_path / "run")
    for name in ("shared/model.safetensors", "predictions/val.json"):
        assert (reporting.path / name).read_bytes() == (run.path / name).read_bytes()
    history = read_json(reporting.train_results("shared"))["log_history"]
    report = [entry for entry in history if "eval_gate" in entry][-1]
    scores = read_json(reporting.scores("val"))
    assert report["eval_accuracy_Avg"] == pytest.approx(scores["accuracy"]["Avg"])
    assert report["eval_bleu1"] == pytest.approx(scores["rationale"]["bleu1"]) and 0 < report["eval_gate"] < 1
    for name in TRAINED:
        assert (reporting.reports("shared") / name / "step-24.md").is_file()


@pytest.mark.slow
def test_interrupted_training_of_shared_model_resumes_to_same_files(run, recipe, tiny_dataset, tmp_path):
    folder = tmp_path / "run"
    process = start(recipe, tiny_dataset, folder)
    while not (folder / "shared" / "checkpoint-4").exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143 and "SIGTERM: the shared model stopped at step" in errors
    resumed = run_script("train.py", *command(recipe, tiny_dataset, folder))
    assert resumed.stderr.count("shared model is trained already") == 2, "the later stages load it"
    for name in ("shared/model.safetensors", "predictions/val.json", "predictions/test.json"):
        assert (folder / name).read_bytes() == (run.path / name).read_bytes()
