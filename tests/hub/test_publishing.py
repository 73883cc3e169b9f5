"""A run is published to the loopback Hub with `push_to_hub.py`, and loaded by processes without this repository.

`loopback_hub.py` defines the Hub's behaviour and its faults.
"""

import json
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import REPOSITORY, run_script
from huggingface_hub import ModelCard, parse_eval_result_entries
from loopback_hub import LoopbackHub, client_environment
from peft import PromptTuningConfig
from PIL import Image
from preloaded import run_python
from safetensors.torch import load_file, save_file

from mmcot.evaluate import main as evaluate
from mmcot.hub.checks import check_model_folder
from mmcot.hub.export import export, merge, shipped_code
from mmcot.predict import main as predict
from mmcot.storage.files import read_json, write_json
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot import MMCoTProcessor
from push_to_hub import main

# Runs `push_to_hub.py` for each list of arguments, one a line. One process for all, because it imports torch once and
# caches the answers of each folder and commit.
PUSHES = """
import contextlib, functools, io, json, sys
import push_to_hub
from mmcot.hub import publish as publishing
publishing.answer_in_fresh_process = functools.cache(publishing.answer_in_fresh_process)
for line in sys.stdin:
    printed, status = io.StringIO(), 0
    with contextlib.redirect_stdout(printed):
        try:
            push_to_hub.main(json.loads(line))
        except SystemExit as error:
            status = error.code
        except Exception as error:
            status = f"Traceback: {error!r}"
    print(json.dumps([printed.getvalue(), status]), flush=True)
"""


class Client:
    """A client process whose token may write to `ada`'s repositories."""

    def __init__(self, hub, home, token):
        self.environment = client_environment(hub, home, token)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PUSHES],
            cwd=REPOSITORY,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def push(self, *arguments):
        """Return the printed text and the error message of the push (0 without an error)."""
        self.process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self.process.stdin.flush()
        printed, status = json.loads(self.process.stdout.readline())
        return SimpleNamespace(stdout=printed, error=status)

    def stop(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as running:
        yield running


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    started = Client(hub, tmp_path_factory.mktemp("home"), hub.add_user("ada"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A run on a dataset without a known licence, so that a push must set --license."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    shutil.copytree(tiny_run, folder)
    return folder


@pytest.fixture(scope="module")
def published(client, run):
    """The result of the run's first push."""
    result = client.push(run, "--repo_id", "ada/tiny", "--license", "mit")
    assert not result.error, result.error
    return result


def content(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def published_files(hub, repo_id, repo_type="model", revision="main"):
    files = hub.files(repo_type, repo_id, revision)
    files.pop(".gitattributes", None)
    return files


def run_as_user(code, environment, cwd, **changes):
    """Run code in a new process that reads only the Hub or its cache, and return the last line that it prints."""
    result = run_python("-I", "-c", code, cwd=cwd, env={**environment, **changes})
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip().splitlines()[-1]


def test_publishes_run_in_one_commit_and_checks_answers(hub, client, run, published):
    assert published_files(hub, "ada/tiny") == content(run / "hub")
    first, created = hub.commits("model", "ada/tiny")
    assert f"ada/tiny at {first}: loads and gives the same answers as {run}." in published.stdout
    assert re.search(r"[\d,]+  new      rationale/model.safetensors", published.stdout)
    assert not hub.is_private("model", "ada/tiny") and created != first


def test_second_push_changes_nothing(hub, client, run, published):
    before = hub.commits("model", "ada/tiny")
    result = client.push(run, "--repo_id", "ada/tiny", "--license", "mit")
    assert not result.error and f"Nothing changes: ada/tiny stays at {before[0]}" in result.stdout
    assert hub.commits("model", "ada/tiny") == before


PICTURE_ON_THE_HUB = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/p-blog/candy.JPG"


def python_blocks(card, commit, folder):
    """The card's Python blocks, with `commit` in place of the placeholder and a local picture in place of the URL."""
    Image.new("RGB", (50, 40), "red").save(folder / "candy.png")
    text = card.replace("COMMIT", commit).replace(PICTURE_ON_THE_HUB, str(folder / "candy.png"))
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_card_code_blocks_run_from_hub_and_from_cache(hub, client, published, run, tmp_path):
    card = published_files(hub, "ada/tiny")["README.md"].decode()
    blocks = python_blocks(card, hub.commits("model", "ada/tiny")[0], tmp_path)
    assert len(blocks) == 6 and [number for number, block in enumerate(blocks) if "ada/tiny" not in block] == [3]
    assert 'pipeline("image-text-to-text"' in blocks[0] and PICTURE_ON_THE_HUB in card
    assert "AutoModelForImageTextToText" in blocks[1] and "apply_chat_template" in blocks[1]
    check = "\nloaded = model, processor, pinned_model, pipe.model"
    check += "\nassert {type(each).__module__.split('.')[0] for each in loaded} == {'transformers_modules'}"
    check += "\nassert commit in type(pinned_model).__module__ and commit in type(pinned_answer).__module__"
    check += "\nassert pinned_answer(problem)['answer'] == answer(problem)['answer']"
    check += "\nassert reply == pipe(text=messages, return_full_text=False)[0]['generated_text'], reply"
    check += "\nassert reply.endswith(('The answer is (A).', 'The answer is (B).'))"
    check += "\nprint(sorted(result), type(rationale).__name__)"
    environment = client.environment | {"HF_HOME": str(tmp_path / "empty")}
    expected = "['answer', 'answer_index', 'rationale', 'scores'] MMCoTForConditionalGeneration"
    assert run_as_user("\n".join(blocks) + check, environment, tmp_path) == expected
    num_requests = len(hub.requests)
    assert run_as_user("\n".join(blocks) + check, environment, tmp_path, HF_HUB_OFFLINE="1") == expected
    assert len(hub.requests) == num_requests, "the offline process sends requests"


@pytest.mark.slow
def test_card_commands_reproduce_scores(hub, client, published, tiny_dataset, tmp_path):
    files = published_files(hub, "ada/tiny")
    (block,) = re.findall(r"```bash\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    for file in tiny_dataset.parent.iterdir():
        shutil.copy(file, tmp_path)
    for command in block.strip().splitlines():
        python, *words = command.split()
        assert python == "python"
        run_script(*words, cwd=tmp_path, **client.environment, PYTHONPATH=str(REPOSITORY))
    found, published_scores = read_json(tmp_path / "scores.json"), json.loads(files["scores.json"])
    for name in ("accuracy", "decoded_accuracy", "rationale", "n", "intervals"):
        assert found[name] == published_scores[name]


def test_card_shows_values_of_scores_file(hub, published, run):
    card = ModelCard(published_files(hub, "ada/tiny")["README.md"].decode())
    scores = read_json(run / "scores" / "test.json")
    assert (card.data.license, card.data.pipeline_tag, card.data.model_name) == ("mit", "image-text-to-text", "tiny")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    rows = dict(re.findall(r"^\| ([\w-]+) \| \d+ \| ([\d.]+) \|", card.text, re.MULTILINE))
    for name, value in scores["accuracy"].items():
        assert rows[name] == f"{value:.2f}"
    assert values["accuracy, Avg"] == round(scores["accuracy"]["Avg"], 2)
    assert values["rougeL"] == round(scores["rationale"]["rougeL"], 2)
    low, high = scores["intervals"]["accuracy"]["Avg"]
    assert f"| Avg | 20 | {scores['accuracy']['Avg']:.2f} | {low:.2f} – {high:.2f} |" in card.text
    assert "max_steps: 24" in card.text and "dataset: problems.jsonl" in card.text and "/tmp" not in card.text
    assert "Not measured: how the model answers without the picture" in card.text


def test_card_lists_code_files_with_digests(hub, published):
    files = published_files(hub, "ada/tiny")
    card = files["README.md"].decode()
    listed = dict(re.findall(r"^\| `(\w+\.py)` \| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    assert listed == {name: sha256(text).hexdigest() for name, text in files.items() if name.endswith(".py")}
    assert "modeling_mmcot.py" in listed and "https://huggingface.co/ada/tiny/commits/main" in card


# A push refuses a faulty run or name before it sends a request to the Hub.


@pytest.fixture
def broken(run, tmp_path, monkeypatch):
    """A copy of the run to damage. The check in a new process is replaced, because tests of a real push cover it."""
    monkeypatch.setattr("mmcot.hub.publish.answer_in_fresh_process", lambda *_: {})
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def rewrite(file, **values):
    write_json(file, {**read_json(file), **values})


def dry_run(folder, *options, repo_id="ada/tiny"):
    main([str(folder), "--repo_id", repo_id, "--dry_run", *options])


def test_offline_dry_run_exports_and_lists_files(broken, capsys):
    dry_run(broken, "--license", "mit")
    printed = capsys.readouterr().out
    listed = re.findall(r"^ *[\d,]+  new      (.+)$", printed, re.MULTILINE)
    assert listed == sorted(content(broken / "hub")) and "nothing was uploaded" in printed


@pytest.mark.parametrize("repo_id", ["tiny", "ada/tiny/more", "ada/ti ny", "datasets/tiny", "ada/tiny..git", ""])
def test_refuses_malformed_repo_id(broken, repo_id):
    with pytest.raises(SystemExit, match="expected USER/NAME"):
        dry_run(broken, repo_id=repo_id)


def test_refuses_unfinished_run(broken, tmp_path):
    (broken / "answer" / "train_results.json").unlink()
    with pytest.raises(SystemExit, match="not a finished run: the training of its answer stage is not finished"):
        dry_run(broken)
    with pytest.raises(SystemExit, match="not a finished run: it has no hub/"):
        dry_run(tmp_path)


def test_refuses_scores_of_other_weights(broken):
    for file in (broken / "answer" / "model.safetensors", broken / "hub" / "model.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"test.json was measured with other weights than the run's \(answer\)"):
        dry_run(broken, "--license", "mit")
    rewrite(broken / "scores" / "test.json", weights=None)
    with pytest.raises(SystemExit, match="does not record its weights"):
        dry_run(broken, "--license", "mit")


def test_refuses_scores_of_another_split(broken):
    rewrite(broken / "scores" / "test.json", split="val")
    with pytest.raises(SystemExit, match="test.json has scores of the split 'val'; expected 'test'"):
        dry_run(broken, "--license", "mit")


def test_card_command_contains_prediction_options(broken, tiny_dataset):
    file = broken / "predictions" / "test.json"
    rows = ["--dataset", str(tiny_dataset), "--limit", "6"]
    predict([str(broken), *rows, "--output", str(file), "--bf16", "--num_rationales", "2"])
    evaluate([str(file), *rows])
    dry_run(broken, "--license", "mit")
    card = (broken / "hub" / "README.md").read_text()
    assert "split of `problems.jsonl` (6 problems)" in card
    drawn = "--limit 6 --bf16 --num_rationales 2 --temperature 0.7 --seed 42"
    assert f"--dataset problems.jsonl --split test --output predictions.json {drawn}\n" in card
    assert "--dataset problems.jsonl --split test --output scores.json --limit 6\n" in card


def test_card_recipe_contains_no_token_or_local_path(broken):
    recipe = yaml.safe_load((broken / "recipe.yaml").read_text())
    recipe |= {
        "hub_token": "0123secret",
        "features": "/lustre/ada/store",
        "target_column": "rationale=/storage/alice/texts.json",
        "captions": "../alice/captions.json",
        "vision_config": {"x": ["/nfs/x/y.json", "~/z"]},
    }
    (broken / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    dry_run(broken, "--license", "mit")
    card = (broken / "hub" / "README.md").read_text()
    assert not any(word in card for word in ("secret", "lustre", "storage", "alice", "nfs", "~"))
    assert "features: store" in card and "target_column: rationale=texts.json" in card and "- y.json" in card


def test_refuses_run_of_older_version(broken):
    results = read_json(broken / "rationale" / "train_results.json")
    del results["hardware"]
    write_json(broken / "rationale" / "train_results.json", results)
    with pytest.raises(SystemExit, match="train_results.json has no 'hardware': an older mmcot trained the stage"):
        dry_run(broken, "--license", "mit")


def test_card_of_unscored_run_says_not_evaluated(broken):
    shutil.rmtree(broken / "scores")
    with pytest.raises(SystemExit, match="has no scores"):
        dry_run(broken, "--license", "mit")
    dry_run(broken, "--license", "mit", "--allow_unscored")
    card = ModelCard.load(broken / "hub" / "README.md")
    assert "Not evaluated" in card.text and card.data.eval_results is None
    assert not (broken / "hub" / "scores.json").exists()


def test_licence_comes_from_dataset_or_user(broken):
    with pytest.raises(SystemExit, match="no licence, and the licence of the dataset is not known: set --license"):
        dry_run(broken)
    rewrite(broken / "answer" / "train_results.json", dataset_known_as="ScienceQA")
    rewrite(broken / "scores" / "test.json", dataset_known_as="ScienceQA")
    dry_run(broken)
    card = ModelCard.load(broken / "hub" / "README.md")
    assert card.data.license == "cc-by-nc-sa-4.0" and card.data.datasets == ["derek-thomas/ScienceQA"]
    assert "not for commercial use" in card.text and "lu2022learn" in card.text
    (entry,) = (broken / "hub" / ".eval_results").iterdir()
    scores = read_json(broken / "scores" / "test.json")
    results = parse_eval_result_entries(yaml.safe_load(entry.read_text()))
    assert results[0].value == round(scores["accuracy"]["Avg"], 2)
    with pytest.raises(SystemExit, match="--license is mit; expected cc-by-nc-sa-4.0, the licence of ScienceQA"):
        dry_run(broken, "--license", "mit")


def test_card_shows_probes(broken):
    row = {"n": 14, "accuracy": 50.0, "probed": 21.43, "interval": [0, 1], "p": 0.1, "changed": 42.86}
    weights = read_json(broken / "scores" / "test.json")["weights"]
    probes = {"dataset": "rows", "split": "test", "weights": weights, "probes": {"picture dropped": row}}
    write_json(broken / "scores" / "probes.json", probes)
    dry_run(broken, "--license", "mit")
    assert "| picture dropped | 14 | 50.00 | 21.43 | 42.86 |" in (broken / "hub" / "README.md").read_text()
    write_json(broken / "scores" / "probes.json", {**probes, "weights": {**weights, "rationale": "sha256:0"}})
    with pytest.raises(SystemExit, match=r"probes.json was measured with other weights than the run's \(rationale\)"):
        dry_run(broken, "--license", "mit")


def test_card_shows_mean_over_seeds(broken):
    dry_run(broken, "--license", "mit")
    assert "One training, one seed." in (broken / "hub" / "README.md").read_text()
    rewrite(broken / "scores" / "test.json", seeds={"n": 3, "accuracy": {"Avg": {"mean": 61.25, "sd": 1.5}}})
    dry_run(broken, "--license", "mit")
    assert "Over 3 trainings with different seeds: 61.25 ± 1.50." in (broken / "hub" / "README.md").read_text()


def test_refuses_merge_without_adapters(broken):
    with pytest.raises(SystemExit, match="its stages are not adapters"):
        dry_run(broken, "--merge")


def test_error_names_stage_that_cannot_be_merged(run, tmp_path):
    for stage in ("rationale", "answer"):
        PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2).save_pretrained(tmp_path / stage)
    with pytest.raises(ValueError, match="--merge: the rationale stage's adapter is PROMPT_TUNING"):
        merge(tmp_path / "base", MMCoTProcessor.from_pretrained(run / "hub"), tmp_path)


TOKEN = "hf_" + "a1" * 20


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("pytorch_model.bin", b"x", "pytorch_model.bin: not a file of a model's repository"),
        ("rationale/optimizer.pt", b"x", "rationale/optimizer.pt: not a file"),
        ("train.jsonl", b"{}", "train.jsonl: not a file"),
        ("model.safetensors", b"x" * 100, "model.safetensors: damaged"),
        ("layers_mmcot.py", b"import torch\n", "layers_mmcot.py: differs from the file of this version"),
        ("more_mmcot.py", b"def f():\n    import datasets\n", "more_mmcot.py, line 2: imports datasets"),
        ("more_mmcot.py", b"import peft\n", "more_mmcot.py, line 1: imports peft"),
        ("config.json", f'{{"token": "{TOKEN}"}}'.encode(), "config.json, line 1: contains a token of the Hub"),
        (
            "config.json",
            b'{"x": "see file:///srv/x"}',
            "config.json, line 1: contains a path of this machine, file:///",
        ),
        (
            "config.json",
            b'{"a": 1,\n"from": "/home/ada/base"}',
            "config.json, line 2: contains a path of this machine, /home/",
        ),
    ],
)
def test_error_names_file_that_must_not_be_published(run, tmp_path, name, data, message):
    shutil.copytree(run / "hub", tmp_path / "hub")
    (tmp_path / "hub" / name).write_bytes(data)
    with pytest.raises(ValueError) as caught:
        check_model_folder(tmp_path / "hub")
    assert message in str(caught.value) and TOKEN not in str(caught.value)


def test_exported_folder_passes_checks(published, run, tmp_path):
    check_model_folder(run / "hub")
    shutil.copytree(run / "hub", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    harmless = (
        "multi-task-learning-for-multimodal-chain-of-thought mask-conditioned-rationale https://huggingface.co/data/x"
    )
    (tmp_path / "hub" / "README.md").write_text(card + harmless)
    check_model_folder(tmp_path / "hub")
    assert {file.name for file in shipped_code()} <= content(run / "hub").keys()


# Each test below pushes, and checks the repository on the Hub.


@pytest.fixture
def changed(run, tmp_path):
    """The run with other weights in its rationale stage, and without the scores of the old weights."""
    shutil.copytree(run, tmp_path / "changed")
    file = tmp_path / "changed" / "rationale" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.final_layer_norm.weight"] += torch.linspace(0, 1, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "changed" / "scores")
    export(RunFolder(tmp_path / "changed"), MMCoTProcessor.from_pretrained(run / "hub"))
    return tmp_path / "changed"


UNSCORED = ("--license", "mit", "--allow_unscored")
PRINT_WEIGHT_SUMS = """
import sys
from transformers import pipeline
for revision in {revisions}:
    revisions = {{"revision": revision, "code_revision": revision}}
    answer = pipeline("multimodal-cot", model="{repo_id}", **revisions, trust_remote_code=True)
    print(answer.models["rationale"].encoder.final_layer_norm.weight.sum().item(), end=" ")
"""


@pytest.mark.slow
def test_push_uploads_only_changed_files_and_keeps_old_revision(hub, client, run, changed, tmp_path):
    assert not client.push(run, "--repo_id", "ada/twice", "--license", "mit").error
    old = hub.commits("model", "ada/twice")[0]
    result = client.push(changed, "--repo_id", "ada/twice", *UNSCORED)
    assert not result.error
    listed = re.findall(r"^ *[\d,]*  (\w+) +(\S+)$", result.stdout, re.MULTILINE)
    expected = {"rationale/model.safetensors", "known_answer.json", "README.md"}
    assert {name for state, name in listed if state == "changed"} == expected
    assert {name for state, name in listed if state == "deleted"} == {"scores.json"}
    new = hub.commits("model", "ada/twice")[0]
    assert published_files(hub, "ada/twice") == content(changed / "hub")
    code = PRINT_WEIGHT_SUMS.format(revisions=[None, old, new], repo_id="ada/twice")
    sums = run_as_user(code, client.environment | {"HF_HOME": str(tmp_path / "empty")}, tmp_path).split()
    assert sums[0] == sums[2] != sums[1]


@pytest.mark.slow
def test_dry_run_lists_changes_and_uploads_nothing(hub, client, run, published, changed):
    before, sent = hub.commits("model", "ada/tiny"), len(hub.requests)
    result = client.push(changed, "--repo_id", "ada/tiny", *UNSCORED, "--dry_run")
    assert not result.error and "changed  rationale/model.safetensors" in result.stdout
    assert hub.commits("model", "ada/tiny") == before
    assert {method for method, path, _ in hub.requests[sent:] if "validate-yaml" not in path} <= {"GET", "HEAD"}
    assert not client.push(run, "--repo_id", "ada/absent", "--license", "mit", "--dry_run").error
    with pytest.raises(KeyError):
        hub.files("model", "ada/absent")


@pytest.mark.slow
def test_pushes_to_private_repository_and_branch(hub, client, run, changed, published):
    assert not client.push(run, "--repo_id", "ada/secret", "--license", "mit", "--private").error
    assert hub.is_private("model", "ada/secret")
    refused = client.push(run, "--repo_id", "ada/tiny", "--license", "mit", "--private")
    assert "ada/tiny exists and is public" in refused.error
    refused = client.push(run, "--repo_id", "ada/tiny", "--license", "mit", "--revision", "refs/pr/1")
    assert "expected the name of a branch" in refused.error
    main_before = hub.commits("model", "ada/secret")
    assert not client.push(changed, "--repo_id", "ada/secret", *UNSCORED, "--revision", "next").error
    assert hub.commits("model", "ada/secret") == main_before
    assert published_files(hub, "ada/secret", revision="next") == content(changed / "hub")


@pytest.mark.slow
def test_overwrites_content_of_another_tool_only_on_request(hub, client, run, tmp_path):
    code = """
from huggingface_hub import HfApi
HfApi().create_repo("ada/other")
HfApi().upload_file(path_or_fileobj=b"---\\nlicense: mit\\n---\\n# Mine", path_in_repo="README.md", repo_id="ada/other")
HfApi().create_repo("ada/rows", repo_type="dataset")
print(1)
"""
    run_as_user(code, client.environment, tmp_path)
    before = hub.commits("model", "ada/other")
    refused = client.push(run, "--repo_id", "ada/other", "--license", "mit")
    assert (
        "contains content that this tool did not create" in refused.error
        and hub.commits("model", "ada/other") == before
    )
    assert not client.push(run, "--repo_id", "ada/other", "--license", "mit", "--overwrite").error
    assert published_files(hub, "ada/other") == content(run / "hub")
    code = "from huggingface_hub import upload_file\nprint(upload_file(path_or_fileobj=b'x', "
    code += "path_in_repo='onnx/model.onnx', repo_id='ada/other'))"
    run_as_user(code, client.environment, tmp_path)
    refused = client.push(run, "--repo_id", "ada/other", "--license", "mit")
    assert "contains files (onnx/model.onnx) that this tool did not create" in refused.error
    assert "onnx/model.onnx" in published_files(hub, "ada/other")
    assert "ada/rows is a dataset" in client.push(run, "--repo_id", "ada/rows", "--license", "mit").error


FAILURES = {  # the cut upload comes first, because an uploaded file is not sent again
    "large file cut": (("cut", "PUT", ""), {"after_bytes": 1000, "times": None}, "push again"),
    "server error in the commit": (("fail", "POST", "/commit/"), {"status": 500}, "push again later"),
    "no rights": (("fail", "POST", "/preupload/"), {"status": 403}, "needs write access to ada"),
    "bad request": (
        ("fail", "POST", "/commit/"),
        {"status": 400},
        "the Hub rejects the request. (The Hub: 400, A fault",
    ),
    "token expired": (("fail", "POST", "/commit/"), {"status": 401}, "the Hub rejects your token"),
    "commit of another user": (("fail", "POST", "/commit/"), {"status": 412}, "somebody else committed"),
    "commit cut": (("cut", "POST", "/commit/"), {"after_bytes": 50, "times": None}, "the connection failed"),
    "rate limit": (("fail", "POST", "/commit/"), {"status": 429}, "wait some minutes"),
}
PASSING = {
    "rate limit once": (("fail", "POST", "/preupload/"), {"status": 429, "times": 1, "headers": {"Retry-After": "0"}}),
    "server error once": (("fail", "POST", "/info/lfs/objects/batch"), {"status": 500, "times": 1}),
    "download cut once": (("cut", "GET", "/resolve/.*/model.safetensors"), {"after_bytes": 1000, "times": 1}),
}


@pytest.mark.slow
def test_failed_push_changes_nothing(hub, client, run, changed, tmp_path):
    """Every failure happens once, on a Hub of this test's own. The same push then succeeds."""
    with LoopbackHub() as failing:
        user = Client(failing, tmp_path / "home", failing.add_user("ada"))
        assert not user.push(run, "--repo_id", "ada/again", "--license", "mit").error
        before, old = failing.commits("model", "ada/again"), published_files(failing, "ada/again")
        for name, ((how, method, path), options, message) in FAILURES.items():
            getattr(failing, how)(method, path, **options)
            result = user.push(changed, "--repo_id", "ada/again", *UNSCORED)
            assert message in str(result.error) and "is unchanged" in str(result.error), (name, result)
            assert failing.commits("model", "ada/again") == before, name
            failing.clear_faults()
        assert published_files(failing, "ada/again") == old
        code = PRINT_WEIGHT_SUMS.format(revisions=[None], repo_id="ada/again")
        assert run_as_user(code, user.environment | {"HF_HOME": str(tmp_path / "empty")}, tmp_path)
        failing.lose_answer("POST", "/commit/")
        lost = user.push(changed, "--repo_id", "ada/again", *UNSCORED, "--revision", "lost")
        assert "now, but the Hub's response was lost: the same command compares" in lost.error
        assert not user.push(changed, "--repo_id", "ada/again", *UNSCORED, "--revision", "lost").error
        assert len(failing.commits("model", "ada/again", "lost")) == len(before) + 1
        for (how, method, path), options in PASSING.values():
            getattr(failing, how)(method, path, **options)
        result = user.push(changed, "--repo_id", "ada/again", *UNSCORED)
        assert not result.error, result.error
        assert published_files(failing, "ada/again") == content(changed / "hub")
        user.stop()


@pytest.mark.slow
def test_error_without_token_rights_or_network_names_remedy(hub, run, published, tmp_path):
    other_token = hub.add_user("bob")
    for token, changes, message in (
        (None, {}, "no token is set: log in with `hf auth login`"),
        ("hf_unknown", {}, "the Hub rejects your token"),
        (other_token, {}, "your token needs write access to ada"),
        (other_token, {"HF_HUB_OFFLINE": "1"}, "offline .* was not reached"),
        (other_token, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the connection failed"),
    ):
        environment = client_environment(hub, tmp_path / "home", token) | changes
        arguments = (run, "--repo_id", "ada/tiny", "--license", "apache-2.0")
        result = run_script("push_to_hub.py", *arguments, check=False, **environment)
        assert result.returncode == 1 and re.search(message, result.stderr), result.stderr
        assert "Traceback" not in result.stderr and (token or "hf_") not in result.stdout + result.stderr


@pytest.fixture(scope="module")
def adapters(adapter_run, tmp_path_factory):
    """A finished run whose stages adapt one base, to publish."""
    return shutil.copytree(adapter_run, tmp_path_factory.mktemp("published") / "adapters")


ANSWERS = """
import json, sys
from transformers import pipeline
problem = {"question": "Which color is it?", "choices": ["red", "blue", "green"], "image": sys.argv[2]}
answer = pipeline("multimodal-cot", model=sys.argv[1], trust_remote_code=True)
print(json.dumps(answer(problem)))
"""


@pytest.mark.slow
def test_publishes_adapters_with_base_or_merged(hub, client, adapters, tiny_dataset, tmp_path):
    assert not client.push(adapters, "--repo_id", "ada/adapters", "--license", "mit", "--adapters").error
    files = published_files(hub, "ada/adapters")
    assert files == content(adapters / "hub") and "adapter_config.json" not in files
    blocks = python_blocks(files["README.md"].decode(), hub.commits("model", "ada/adapters")[0], tmp_path)
    environment = client.environment | {"HF_HOME": str(tmp_path / "empty")}
    printed = run_as_user(
        "\n".join(blocks) + "\nprint(type(model).__name__, model.active_adapter)", environment, tmp_path
    )
    assert printed == "PeftModelForSeq2SeqLM default"

    assert not client.push(adapters, "--repo_id", "ada/merged", "--license", "mit", "--merge").error
    merged = published_files(hub, "ada/merged")
    assert merged == content(adapters / "hub_merged") and "rationale/model.safetensors" in merged
    assert not any("adapter" in name for name in merged) and json.loads(merged["config.json"])["stage_adapters"] is None
    assert b"before they were merged" in merged["README.md"]
    picture = str(next(tiny_dataset.parent.glob("*.png")))
    answers = []
    for name in ("ada/adapters", "ada/merged"):
        arguments = ["-c", ANSWERS, name, picture]
        answers.append(json.loads(run_script(*arguments, cwd=tmp_path, **environment).stdout.splitlines()[-1]))
    scores = [answer.pop("scores") for answer in answers]
    assert answers[0] == answers[1] and scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.slow
def test_space_names_model_and_its_commit(hub, client, run, published):
    refused = client.push("--repo_id", "ada/nothing", "--space", "ada/ask")
    assert "a Space requires a model: ada/nothing has no main on the Hub" in refused.error
    result = client.push(run, "--repo_id", "ada/tiny", "--license", "mit", "--space", "ada/ask")
    assert not result.error, result.error
    files = published_files(hub, "ada/ask", "space")
    app = content(REPOSITORY / "space")
    assert {name: text for name, text in files.items() if name not in ("README.md", "model.json")} == {
        name: text for name, text in app.items() if name != "README.md" and "__pycache__" not in name
    }
    model = {"repo_id": "ada/tiny", "revision": hub.commits("model", "ada/tiny")[0]}
    assert json.loads(files["model.json"]) == model
    metadata = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert metadata["models"] == ["ada/tiny"] and (metadata["sdk"], metadata["app_file"]) == ("gradio", "app.py")
    before = hub.commits("space", "ada/ask")
    again = client.push("--repo_id", "ada/tiny", "--space", "ada/ask")
    assert "Nothing changes" in again.stdout and hub.commits("space", "ada/ask") == before


def test_refuses_push_without_run_or_space(capsys):
    with pytest.raises(SystemExit):
        main(["--repo_id", "ada/tiny"])
    assert "name the folder of a finished run, or a --space" in capsys.readouterr().err


@pytest.mark.slow
def test_loading_and_saving_published_model_keeps_files(hub, client, published, run, tmp_path):
    code = """
from transformers import AutoModelForSeq2SeqLM, AutoProcessor
AutoProcessor.from_pretrained("ada/tiny", trust_remote_code=True).save_pretrained("again")
AutoModelForSeq2SeqLM.from_pretrained("ada/tiny", trust_remote_code=True).save_pretrained("again")
stage = AutoModelForSeq2SeqLM.from_pretrained("ada/tiny", subfolder="rationale", trust_remote_code=True)
stage.save_pretrained("again/rationale")
print(1)
"""
    run_as_user(code, client.environment | {"HF_HOME": str(tmp_path / "empty")}, tmp_path)
    again, files = content(tmp_path / "again"), published_files(hub, "ada/tiny")
    some = {"model.safetensors", "rationale/model.safetensors", "processor_config.json", "modeling_mmcot.py"}
    assert some <= again.keys() and "tokenizer_config.json" in again
    for name in again.keys() & files.keys():
        assert again[name] == files[name], name
