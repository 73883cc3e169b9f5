"""The files that a push may replace or delete, and concurrent changes by other users, on the loopback Hub.

The pushed folders are small. `test_publishing.py` publishes a whole run.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from conftest import REPOSITORY
from huggingface_hub import metadata_load
from loopback_hub import LoopbackHub, client_environment

# One client process for all tests. It reads code as a line of JSON, and answers with `result` and the error message.
CODE = """
import contextlib, json, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi
from mmcot.hub.repository import Repository, plan_push, upload
plans = []
for line in sys.stdin:
    result, error = None, None
    names = dict(globals(), **json.loads(line))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(names["code"], names)
        result = names.get("result")
    except ValueError as caught:
        error = str(caught)
    print(json.dumps([result, error]), flush=True)
"""


class Client:
    def __init__(self, hub, home, token):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE],
            cwd=REPOSITORY,
            env=client_environment(hub, home, token),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, code, **values):
        self.process.stdin.write(json.dumps({"code": code, **values}) + "\n")
        self.process.stdin.flush()
        result, error = json.loads(self.process.stdout.readline())
        return SimpleNamespace(result=result, error=error)

    def push(self, folder, repo_id, meanwhile="pass", overwrite=False, **repository):
        """Push a folder as `push_to_hub` does, and run `meanwhile` between the comparison and the upload."""
        code = "plan = plan_push(Path(folder), Repository(repo_id, **repository), overwrite, False)\n"
        code += f"{meanwhile}\nresult = upload(plan)"
        return self.run(code, folder=str(folder), repo_id=repo_id, repository=repository, overwrite=overwrite)


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as running:
        yield running


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    started = Client(hub, tmp_path_factory.mktemp("home"), hub.add_user("ada"))
    yield started
    started.process.stdin.close()
    started.process.wait(timeout=60)


@pytest.fixture
def folder(tmp_path):
    """A function that makes a folder to push. Its card lists the files unless `is_listed` is false (older versions)."""

    def make(*names, is_listed=True, **metadata):
        place = tmp_path / "-".join(("folder", *names)).replace("/", "_")
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(f"{name} of this push")
        maker = {"version": "0"} | ({"files": sorted([*names, "README.md"])} if is_listed else {})
        card = yaml.safe_dump({"license": "mit", "mmcot": maker, **metadata})
        (place / "README.md").write_text(f"---\n{card}---\n# A model\n")
        return place

    return make


def names(hub, repo_id, repo_type="model", revision="main"):
    return sorted(hub.files(repo_type, repo_id, revision).keys() - {".gitattributes"})


THEIRS = "HfApi().upload_file(path_or_fileobj=b'theirs', path_in_repo=name, repo_id=repo_id)"


@pytest.mark.parametrize("name", ["handler.py", "my_lora/adapter_model.safetensors", "my_lora/adapter_config.json"])
def test_keeps_file_that_no_push_listed(hub, client, folder, name):
    repo_id = f"ada/own-{name.split('/')[-1].split('.')[0]}"
    first, second = folder("config.json", "scores.json"), folder("config.json")
    assert not client.push(first, repo_id).error
    client.run(THEIRS, name=name, repo_id=repo_id)
    before = hub.commits("model", repo_id)
    refused = client.push(second, repo_id)
    assert f"{repo_id} contains files ({name}) that this tool did not create; nothing was changed" in str(refused.error)
    assert hub.commits("model", repo_id) == before and hub.files("model", repo_id)[name] == b"theirs"
    assert not client.push(second, repo_id, overwrite=True).error
    assert names(hub, repo_id) == ["README.md", "config.json"]


def test_deletes_file_that_last_push_listed(hub, client, folder):
    assert not client.push(folder("config.json", "scores.json"), "ada/listed").error
    assert not client.push(folder("config.json"), "ada/listed").error
    assert names(hub, "ada/listed") == ["README.md", "config.json"]


def test_keeps_other_users_file_of_same_name(hub, client, folder):
    assert not client.push(folder("config.json"), "ada/replaced").error
    client.run(THEIRS, name="scores.json", repo_id="ada/replaced")
    refused = client.push(folder("config.json", "scores.json"), "ada/replaced")
    assert "contains files (scores.json) that this tool did not create" in str(refused.error)
    assert hub.files("model", "ada/replaced")["scores.json"] == b"theirs"


def test_deletes_no_file_after_push_of_older_version(hub, client, folder):
    assert not client.push(folder("config.json", "scores.json", is_listed=False), "ada/older").error
    refused = client.push(folder("config.json"), "ada/older")
    assert "(scores.json) that are not in this run, and its card, by an older mmcot, lists none" in str(refused.error)
    assert not client.push(folder("config.json", "scores.json", "more.json"), "ada/older").error
    assert not client.push(folder("config.json"), "ada/older").error
    assert names(hub, "ada/older") == ["README.md", "config.json"]


CREATE = "HfApi().create_repo(repo_id, repo_type=repository.get('repo_type'), {options})"
CREATED_MEANWHILE = (
    "did not exist at the comparison, and somebody else created it since. Nothing was committed: push again"
)


@pytest.mark.parametrize("repo_type", ["model", "space"])
@pytest.mark.parametrize("private", [False, True])
def test_leaves_repository_created_after_comparison(hub, client, folder, repo_type, private):
    options = {"repo_type": repo_type, "private": private}
    repo_id = f"ada/raced-{repo_type}-{private}"
    space = {"sdk": "gradio", "title": "x"} if repo_type == "space" else {}
    make = CREATE.format(options="space_sdk='gradio'" if repo_type == "space" else "")
    refused = client.push(folder("config.json", **space), repo_id, meanwhile=make, **options)
    assert f"{repo_id} {CREATED_MEANWHILE}" in str(refused.error)
    assert len(hub.commits(repo_type, repo_id)) == 1 and "config.json" not in names(hub, repo_id, repo_type)


def test_leaves_commit_of_other_user_in_new_repository(hub, client, folder):
    """The commit happens after the repository is created and before its files are listed."""
    meanwhile = """
create = HfApi.create_repo
def create_and_commit(api, *arguments, **options):
    create(api, *arguments, **options)
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo="notes.txt", repo_id=repo_id)
HfApi.create_repo = create_and_commit
"""
    code = f"{meanwhile}\ntry:\n    result = upload(plan)\nfinally:\n    HfApi.create_repo = create"
    refused = client.push(folder("config.json"), "ada/just-made", meanwhile=code)
    assert "somebody else created it since: it contains notes.txt. Nothing was committed" in str(refused.error)
    assert names(hub, "ada/just-made") == ["notes.txt"]


def test_leaves_branch_created_after_comparison(hub, client, folder):
    assert not client.push(folder("config.json"), "ada/branched").error
    make = "HfApi().create_branch(repo_id, branch='next')"
    refused = client.push(folder("config.json", "more.json"), "ada/branched", meanwhile=make, revision="next")
    assert f"the branch next of ada/branched {CREATED_MEANWHILE}" in str(refused.error)
    assert "more.json" not in names(hub, "ada/branched", revision="next")


def test_new_branch_starts_at_compared_commit(hub, client, folder):
    assert not client.push(folder("config.json"), "ada/starts").error
    compared = hub.commits("model", "ada/starts")[0]
    commit = "HfApi().upload_file(path_or_fileobj=b'theirs', path_in_repo='notes.txt', repo_id=repo_id)"
    pushed = client.push(folder("config.json", "more.json"), "ada/starts", meanwhile=commit, revision="next")
    assert hub.commits("model", "ada/starts", "next")[:2] == [pushed.result, compared]
    assert names(hub, "ada/starts", revision="next") == ["README.md", "config.json", "more.json"]


def test_refuses_private_push_after_repository_becomes_public(hub, client, folder):
    assert not client.push(folder("config.json"), "ada/opened", private=True).error
    code = "plans.append(plan_push(Path(folder), Repository('ada/opened', private=True), False, False))"
    client.run(code, folder=str(folder("config.json", "more.json")))
    assert hub.is_private("model", "ada/opened")
    hub.make_public("model", "ada/opened")
    refused = client.run("upload(plans.pop())")
    assert "ada/opened exists and is public" in str(refused.error)
    assert not hub.is_private("model", "ada/opened") and "more.json" not in names(hub, "ada/opened")


def test_exported_card_lists_files(tiny_run):
    listed = metadata_load(tiny_run / "hub" / "README.md")["mmcot"]["files"]
    there = sorted(file.relative_to(tiny_run / "hub").as_posix() for file in (tiny_run / "hub").rglob("*.*"))
    assert listed == there and "scores.json" in listed
