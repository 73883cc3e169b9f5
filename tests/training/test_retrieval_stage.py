"""A stage that retrieves, in a run: its index, the passages of each split, the exported system, and resuming."""

import json
import shutil

import pytest
import yaml
from conftest import TINY_RECIPE, run_isolated, run_script
from transformers import pipeline

from mmcot.hub.checks import code_faults, find_leaks, surplus_files
from mmcot.storage.files import read_json
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot.retrieval_mmcot import INDEX_FILES, MANIFEST, BM25Searcher

pytestmark = pytest.mark.slow

STAGES = [
    {
        **{"name": "rationale", "reads": ["question", "passages", "images"], "writes": "rationale"},
        "source": "{{ question }} {% for passage in passages %}{{ passage.text }} {% endfor %}Solution:",
        **{"target": "{{ solution }}", "max_source_length": 64, "max_target_length": 12},
    },
    {
        **{"name": "retrieval", "kind": "retrieve", "reads": ["question", "description"], "writes": "passages"},
        **{"source": "{{ question }} {{ description }}", "num_passages": 2, "exclude_verbatim": True},
    },
    {
        **{"name": "description", "reads": ["question", "images"], "writes": "description", "source": "{{ question }}"},
        **{"target": "{{ solution }}", "max_source_length": 64, "max_target_length": 12},
    },
    {
        **{"name": "answer", "reads": ["question", "context", "choices", "rationale"], "writes": "answer_text"},
        **{"template": "QCMG-A", "max_source_length": 128, "max_target_length": 16},
    },
]


@pytest.fixture(scope="module")
def command(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    texts = ["Like poles repel each other.", "Opposite poles attract.", "A thermometer measures temperature."]
    lines = [json.dumps({"id": f"p{number}", "title": "Fact", "text": text}) for number, text in enumerate(texts)]
    (folder / "passages.jsonl").write_text("\n".join(lines))
    stages = [dict(stage) for stage in STAGES]
    stages[1]["corpora"] = ["lectures", str(folder / "passages.jsonl")]
    recipe = {**yaml.safe_load(TINY_RECIPE.read_text()), "max_steps": 2, "save_steps": 2, "eval_steps": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": stages}))
    return ("train.py", "--config", folder / "recipe.yaml", "--dataset", tiny_dataset, "--output_dir", folder / "run")


@pytest.fixture(scope="module")
def run(command):
    run_script(*command)
    return RunFolder(command[-1])


def files_of(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"}


def rows_of(dataset, split):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    return {row["id"]: row for row in rows if row["split"] == split}


def test_writes_passages_of_every_problem_without_its_own_lecture(run, tiny_dataset):
    for split in ("val", "test"):
        predictions, rows = run.predictions_so_far(split), rows_of(tiny_dataset, split)
        assert predictions.keys() == rows.keys()
        for problem_id, columns in predictions.items():
            texts = [passage["text"] for passage in columns["passages"]]
            assert len(texts) <= 2 and rows[problem_id]["lecture"] not in texts
        assert any(columns["passages"] for columns in predictions.values())


def test_index_contains_corpora_and_only_training_lectures(run, tiny_dataset):
    passages = [json.loads(line) for line in (run.stage("retrieval") / "passages.jsonl").read_text().splitlines()]
    trained = {row["lecture"] for row in rows_of(tiny_dataset, "train").values()}
    lectures = {passage["text"] for passage in passages if passage["id"].startswith("lecture-")}
    assert lectures == {text for text in trained if text} and len(passages) == len(lectures) + 3


def test_exported_system_retrieves_and_answers_without_repository(run):
    found = run_isolated(
        """
        answer = pipeline("multimodal-cot", model="hub", trust_remote_code=True)
        result = answer({"question": "Will these magnets attract or repel?", "choices": ["attract", "repel"]})
        print(json.dumps([sorted(result), [sorted(passage) for passage in result["passages"]]]))
        """,
        run.path,
    )
    assert found[0] == ["answer", "answer_index", "description", "passages", "rationale", "scores"]
    assert found[1] == 2 * [["id", "score", "source", "text", "title"]]


def test_pipeline_saves_index_into_own_and_new_folder(run, tmp_path):
    shutil.copytree(run.hub, tmp_path / "hub")
    searcher = BM25Searcher(run.stage("retrieval"))
    for settings in ({}, {"searcher": searcher}):
        answer = pipeline("multimodal-cot", model=str(tmp_path / "hub"), trust_remote_code=True, **settings)
        for folder in (tmp_path / "hub", tmp_path / "copy"):
            answer.save_pretrained(folder)
            for name in (MANIFEST, *INDEX_FILES):
                assert (folder / "retrieval" / name).read_bytes() == (run.stage("retrieval") / name).read_bytes()


def test_exported_system_reproduces_predictions_of_run(run, tiny_dataset, tmp_path):
    common = ("-m", "mmcot.predict", run.path, "--dataset", tiny_dataset, "--split", "test")
    run_script(*common, "--decode_answer", "--output", tmp_path / "test.json")
    assert read_json(tmp_path / "test.json") == run.predictions_so_far("test")
    assert "No prediction of 20 differs" in run_script(*common, "--leak_check").stdout


def test_card_names_corpora_and_checks_accept_index(run):
    card = (run.hub / "README.md").read_text()
    assert "`bm25s` and `PyStemmer` to search passages" in card and "passages.jsonl (3)" in card
    assert [*surplus_files(run.hub), *code_faults(run.hub), *find_leaks(run.hub)] == []


def test_repeated_command_changes_nothing_and_refuses_changed_corpus(run, command):
    before = files_of(run.path)
    run_script(*command)
    assert files_of(run.path) == before
    corpus = command[2].parent / "passages.jsonl"
    text = corpus.read_text()
    corpus.write_text(text.replace("Like poles repel", "Like poles attract"))
    refused = run_script(*command, check=False)
    corpus.write_text(text)
    assert refused.returncode != 0 and "corpora has different content" in refused.stderr
    assert files_of(run.path) == before
