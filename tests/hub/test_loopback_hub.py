"""The loopback Hub with the real client, which runs in a new process because it reads its settings at import."""

import base64
import hashlib
import http.client
import json
import socket
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import REPOSITORY
from loopback_hub import LoopbackHub, client_environment
from preloaded import run_python

PREAMBLE = """
import json, os, pathlib
from huggingface_hub import *

api = HfApi()

def add(path, content):
    return CommitOperationAdd(path, content if isinstance(content, bytes) else content.encode())

def error(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as raised:
        return [type(raised).__name__, getattr(getattr(raised, "response", None), "status_code", None)]
"""

CARD = "---\nlicense: mit\npipeline_tag: image-text-to-text\n---\n# A card\n"
CREATE = "api.create_repo('ada/name')\n"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


def as_client(hub: LoopbackHub, home: Path, code: str, token: str | None = None, **environment: str):
    """Run code after `PREAMBLE` in a client process, and return the JSON that it prints."""
    environment = {**client_environment(hub, home, token), **environment}
    finished = run_python("-c", PREAMBLE + textwrap.dedent(code), cwd=REPOSITORY, env=environment)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def send_request(
    hub: LoopbackHub,
    method: str,
    path: str,
    body: bytes = b"",
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, Mapping[str, str], bytes]:
    """Send a request without the client. Returns the answer's status, headers and body."""
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    authorization = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, path, body, {**authorization, **(headers or {})})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def lfs_upload_path(hub: LoopbackHub, token: str, repo_id: str, content: bytes) -> str:
    """Announce an LFS object, and return the path for its upload."""
    announced = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    body = json.dumps({"objects": [announced]}).encode()
    _, _, answer = send_request(hub, "POST", f"/{repo_id}.git/info/lfs/objects/batch", body, token)
    return json.loads(answer)["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.url)


def commit_lines(*lines: tuple[str, dict]) -> bytes:
    header = {"key": "header", "value": {"summary": "by hand"}}
    return b"\n".join(json.dumps(line).encode() for line in [header, *({"key": k, "value": v} for k, v in lines)])


def make_repository(hub: LoopbackHub, token: str, name: str) -> str:
    send_request(hub, "POST", "/api/repos/create", json.dumps({"name": name, "organization": None}).encode(), token)
    namespace = json.loads(send_request(hub, "GET", "/api/whoami-v2", token=token)[2])["name"]
    return f"{namespace}/{name}"


def commit_by_hand(hub: LoopbackHub, token: str, repo_id: str, path: str, content: bytes) -> None:
    change = ("file", {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"})
    status, _, answer = send_request(hub, "POST", f"/api/models/{repo_id}/commit/main", commit_lines(change), token)
    assert status == 200, answer


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_uploads_and_downloads_repository_of_each_type(hub, tmp_path, repo_type):
    code = f"""
    kind = {{"repo_type": "{repo_type}"}}
    sdk = {{"space_sdk": "gradio"}} if "{repo_type}" == "space" else {{}}
    url = api.create_repo("ada/name", private=True, **sdk, **kind)
    again = api.create_repo("ada/name", exist_ok=True, **sdk, **kind)
    conflict = error(api.create_repo, "ada/name", **sdk, **kind)

    folder = pathlib.Path("folder")
    (folder / "code").mkdir(parents=True)
    (folder / "README.md").write_text({CARD!r})
    (folder / "code" / "ä b.txt").write_text("text")
    (folder / "code" / "table.csv").write_text("1,2\\n" * 5000)
    (folder / "model.safetensors").write_bytes(b"weights")
    first = api.upload_folder(folder_path=folder, repo_id="ada/name", **kind)
    unchanged = api.upload_folder(folder_path=folder, repo_id="ada/name", **kind)
    change = [add("README.md", {CARD!r} + "changed"), CommitOperationDelete("code/")]
    second = api.create_commit("ada/name", change, commit_message="Second", parent_commit=first.oid, **kind)
    api.create_branch("ada/name", branch="feature/x", revision=first.oid, **kind)
    info = api.repo_info("ada/name", files_metadata=True, **kind)

    print(json.dumps({{
        "whoami": api.whoami()["name"],
        "urls": [url.repo_id, again.repo_id, url.repo_type],
        "conflict": conflict,
        "commits": [first.oid, second.oid],
        "unchanged": unchanged.oid,
        "exists": [api.repo_exists("ada/name", **kind), api.repo_exists("ada/other", **kind)],
        "info": [info.sha, info.private, api.repo_info("ada/name", revision="feature/x", **kind).sha],
        "in_lfs": [file.rfilename for file in info.siblings if file.lfs],
        "branch_conflict": error(api.create_branch, "ada/name", branch="feature/x", **kind),
        "branches": {{ref.name: ref.target_commit for ref in api.list_repo_refs("ada/name", **kind).branches}},
        "titles": [commit.title for commit in api.list_repo_commits("ada/name", **kind)],
        "tree": [entry.path for entry in api.list_repo_tree("ada/name", revision=first.oid, recursive=True, **kind)],
        "top": [entry.path for entry in api.list_repo_tree("ada/name", revision=first.oid, **kind)],
        "paths": [entry.path for entry in api.get_paths_info("ada/name", ["README.md", "absent"], **kind)],
        "discussions": list(api.get_repo_discussions("ada/name", **kind)),
        "new": open(hf_hub_download("ada/name", "README.md", **kind)).read(),
        "old": open(hf_hub_download("ada/name", "code/ä b.txt", revision="feature/x", **kind)).read(),
        "weights": open(hf_hub_download("ada/name", "model.safetensors", **kind)).read(),
        "no_file": error(hf_hub_download, "ada/name", "code/table.csv", **kind),
        "no_folder": error(lambda: list(api.list_repo_tree("ada/name", "code", **kind))),
        "no_revision": error(hf_hub_download, "ada/name", "README.md", revision="absent", **kind),
        "no_repository": error(hf_hub_download, "ada/other", "README.md", **kind),
    }}))
    """
    token = hub.add_user("ada")
    found = as_client(hub, tmp_path, f"os.chdir({str(tmp_path)!r})\n" + textwrap.dedent(code), token)

    first, second = found.pop("commits")
    lfs = ["code/table.csv", "model.safetensors"]
    regular = [".gitattributes", "README.md", "code/ä b.txt"]
    assert {**found, "tree": sorted(found["tree"]), "top": sorted(found["top"])} == {
        "whoami": "ada",
        "urls": ["ada/name", "ada/name", repo_type],
        "conflict": ["HfHubHTTPError", 409],
        "unchanged": first,
        "exists": [True, False],
        "info": [second, True, first],
        "in_lfs": ["model.safetensors"],
        "branch_conflict": ["HfHubHTTPError", 409],
        "branches": {"main": second, "feature/x": first},
        "titles": ["Second", "Upload folder using huggingface_hub", "initial commit"],
        "tree": sorted([*regular, *lfs, "code"]),
        "top": [".gitattributes", "README.md", "code", "model.safetensors"],
        "paths": ["README.md"],
        "discussions": [],
        "new": CARD + "changed",
        "old": "text",
        "weights": "weights",
        "no_file": ["RemoteEntryNotFoundError", 404],
        "no_folder": ["RemoteEntryNotFoundError", 404],
        "no_revision": ["RevisionNotFoundError", 404],
        "no_repository": ["RepositoryNotFoundError", 404],
    }
    assert hub.commits(repo_type, "ada/name")[:2] == [second, first]
    assert hub.is_private(repo_type, "ada/name")
    assert set(hub.files(repo_type, "ada/name")) == {".gitattributes", "README.md", "model.safetensors"}
    assert hub.files(repo_type, "ada/name", revision=first)["code/table.csv"] == b"1,2\n" * 5000
    stored = [path.removeprefix("/storage/") for method, path, status in hub.requests if method == "PUT"]
    assert sorted(stored) == sorted(hashlib.sha256(content).hexdigest() for content in (b"weights", b"1,2\n" * 5000))
    assert token not in repr(hub.requests) and "grant" not in repr(hub.requests)


def test_enforces_read_and_write_access(hub, tmp_path):
    ada, eve = hub.add_user("ada", organizations=["lab"]), hub.add_user("eve")
    code = f"""
    eve, anonymous, unknown = ({{"token": token}} for token in ({eve!r}, False, "hf_unknown"))
    for name in ("ada/open", "lab/open"):
        api.create_repo(name, private=False)
    api.create_repo("ada/hidden", private=True)
    commit = {{"operations": [add("a.txt", "a")], "commit_message": "m"}}
    print(json.dumps([
        error(api.model_info, "ada/open", **eve) or error(api.model_info, "lab/open", **anonymous),
        error(api.model_info, "ada/hidden", **anonymous),
        error(api.model_info, "ada/hidden", **eve),
        error(api.create_commit, "ada/hidden", **commit, **eve),
        error(api.create_commit, "ada/open", **commit, **eve),
        error(api.create_commit, "ada/open", **commit, **anonymous),
        error(api.create_repo, "lab/mine", **eve),
        error(api.create_repo, "lab/mine", **anonymous),
        error(api.model_info, "ada/open", **unknown),
        error(api.whoami, **unknown),
    ]))
    """
    assert as_client(hub, tmp_path, code, ada) == [
        None,
        ["RepositoryNotFoundError", 401],
        ["RepositoryNotFoundError", 404],
        ["RepositoryNotFoundError", 404],
        ["HfHubHTTPError", 403],
        ["HfHubHTTPError", 401],
        ["HfHubHTTPError", 403],
        ["HfHubHTTPError", 401],
        ["HfHubHTTPError", 401],
        ["HfHubHTTPError", 401],
    ]
    assert len(hub.commits("model", "ada/open")) == 1


def test_refuses_invalid_uploads(hub):
    token = hub.add_user("ada")
    repo_id = make_repository(hub, token, "name")
    content = b"the content"
    oid = hashlib.sha256(content).hexdigest()
    path = lfs_upload_path(hub, token, repo_id, content)
    pointer = commit_lines(("lfsFile", {"path": "a.bin", "algo": "sha256", "oid": oid, "size": len(content)}))
    commit = f"/api/models/{repo_id}/commit/main"
    verify = json.dumps({"oid": oid, "size": len(content)}).encode()

    assert send_request(hub, "POST", commit, pointer, token)[0] == 400  # because the object is not uploaded yet
    assert send_request(hub, "PUT", path, b"the_content")[0] == 400
    assert send_request(hub, "PUT", path, content + b"!")[0] == 400
    assert send_request(hub, "PUT", path.split("?")[0], content)[0] == 403
    assert send_request(hub, "POST", f"/{repo_id}.git/info/lfs/objects/verify", verify, token)[0] == 400
    assert len(hub.commits("model", repo_id)) == 1

    assert send_request(hub, "PUT", path, content)[0] == 200
    assert send_request(hub, "POST", f"/{repo_id}.git/info/lfs/objects/verify", verify, token)[0] == 200
    absent = commit_lines(("deletedFile", {"path": "absent"}))
    status, headers, _ = send_request(hub, "POST", commit, absent, token)
    assert (status, headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert send_request(hub, "POST", f"{commit}?create_pr=1", pointer, token)[0] == 400
    assert send_request(hub, "POST", commit, pointer.replace(b'"size": 11', b'"size": 12'), token)[0] == 400
    assert len(hub.commits("model", repo_id)) == 1

    assert send_request(hub, "POST", commit, pointer, token)[0] == 200
    assert hub.files("model", repo_id)["a.bin"] == content


def test_refuses_commit_with_outdated_parent(hub, tmp_path):
    code = """
    commit = {"repo_id": "ada/name", "commit_message": "m"}
    start = api.model_info("ada/name").sha
    first = api.create_commit(operations=[add("a.txt", "1")], parent_commit=start, **commit)
    late = error(api.create_commit, operations=[add("a.txt", "2")], parent_commit=start, **commit)
    api.create_commit(operations=[add("b.txt", "3")], parent_commit=first.oid[:7], **commit)
    print(json.dumps(late))
    """
    token = hub.add_user("ada")
    assert as_client(hub, tmp_path, CREATE + textwrap.dedent(code), token) == ["HfHubHTTPError", 412]
    assert hub.files("model", "ada/name")["a.txt"] == b"1"
    assert len(hub.commits("model", "ada/name")) == 3


def test_client_retries_faults_and_failed_commit_changes_nothing(hub, tmp_path):
    hub.fail("POST", "/preupload/", status=429, times=1, headers={"RateLimit": '"api";r=0;t=0'})
    hub.fail("POST", "/objects/batch$", status=500, times=1)
    hub.cut("PUT", "^/storage/", after_bytes=5_000)
    hub.cut("POST", "/commit/", after_bytes=100)
    hub.fail("POST", "/commit/", status=500, times=1)
    code = """
    def commit():
        return api.create_commit("ada/name", [add("a.safetensors", b"w" * 100_000)], commit_message="m")
    print(json.dumps([error(commit), error(commit), api.model_info("ada/name").sha, commit().oid]))
    """
    token = hub.add_user("ada")
    cut, refused, between, done = as_client(hub, tmp_path, CREATE + textwrap.dedent(code), token)
    assert (cut[0] in ("RemoteProtocolError", "ReadError"), refused) == (True, ["HfHubHTTPError", 500])
    assert hub.commits("model", "ada/name") == [done, between]

    def statuses(part: str) -> list[int | None]:
        return [status for _, path, status in hub.requests if part in path]

    assert statuses("/preupload/") == [429, 200, 200, 200]
    assert statuses("/objects/batch") == [500, 200, 200, 200]
    assert statuses("/storage/") == [None, 200]  # once, because the object is stored after that
    assert statuses("/commit/") == [None, 500, 200]


def test_client_resumes_cut_download(hub, tmp_path):
    token = hub.add_user("ada")
    repo_id = make_repository(hub, token, "name")
    # More than 10 MiB, because the client writes pieces of 10 MiB and restarts a smaller download from the beginning.
    content = bytes(11 << 20)
    commit_by_hand(hub, token, repo_id, "large", content)
    hub.cut("GET", "/resolve/", after_bytes=10_600_000)
    code = "print(json.dumps(os.path.getsize(hf_hub_download('ada/name', 'large'))))"
    assert as_client(hub, tmp_path, code, token) == len(content)
    assert [(method, status) for method, path, status in hub.requests if "/resolve/" in path] == [
        ("HEAD", 200),
        ("GET", None),
        ("GET", 206),
    ]


def test_answers_range_requests(hub):
    token = hub.add_user("ada")
    repo_id = make_repository(hub, token, "name")
    commit_by_hand(hub, token, repo_id, "digits", b"0123456789")

    def part(requested: str) -> tuple[int, str | None, bytes]:
        status, headers, body = send_request(
            hub, "GET", f"/{repo_id}/resolve/main/digits", headers={"Range": requested}
        )
        return status, headers["Content-Range"], body

    assert part("bytes=7-") == (206, "bytes 7-9/10", b"789")
    assert part("bytes=2-4") == (206, "bytes 2-4/10", b"234")
    assert part("bytes=8-99") == (206, "bytes 8-9/10", b"89")
    assert part("bytes=10-") == (416, "bytes */10", b"")


def test_truncated_upload_creates_no_commit(hub):
    token = hub.add_user("ada")
    repo_id = make_repository(hub, token, "name")
    body = commit_lines(("file", {"path": "a", "content": "YQ=="}))
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    connection.putrequest("POST", f"/api/models/{repo_id}/commit/main")
    connection.putheader("Authorization", f"Bearer {token}")
    connection.putheader("Content-Length", str(len(body) + 1))
    connection.endheaders(body)
    connection.sock.shutdown(socket.SHUT_WR)
    assert connection.sock.recv(1) == b""  # the server has closed the connection
    connection.close()
    assert hub.requests[-1] == ("POST", f"/api/models/{repo_id}/commit/main", None)
    assert len(hub.commits("model", repo_id)) == 1


def test_client_reads_cached_snapshot_offline(hub, tmp_path):
    token = hub.add_user("ada")
    repo_id = make_repository(hub, token, "name")
    commit_by_hand(hub, token, repo_id, "folder/a.txt", b"a")
    code = """
    folder = pathlib.Path(snapshot_download("ada/name"))
    print(json.dumps([folder.name, (folder / "folder/a.txt").read_text()]))
    """
    online = as_client(hub, tmp_path, code, token)
    sent = len(hub.requests)
    assert as_client(hub, tmp_path, code, HF_HUB_OFFLINE="1") == online == [hub.commits("model", repo_id)[0], "a"]
    assert len(hub.requests) == sent


def test_validates_cards(hub, tmp_path):
    code = f"""
    from mmcot.hub.versions import validate_card

    def card(metadata, repo_type="model"):
        return error(validate_card, RepoCard(f"---\\n{{metadata}}\\n---\\ntext", True), repo_type)
    with_readme = [add("README.md", "---\\nlicense: 3\\n---\\n")]
    print(json.dumps([
        error(validate_card, ModelCard({CARD!r}), "model"),
        card("license: [mit, apache-2.0]"),
        card("title: a space", "space"),
        card("license: 3"),
        card("language: en"),
        card("license: mit\\npipeline_tag: cooking"),
        error(api.create_commit, "ada/name", with_readme, commit_message="m"),
    ]))
    """
    invalid = ["ValueError", None]
    found = as_client(hub, tmp_path, CREATE + textwrap.dedent(code), hub.add_user("ada"))
    assert found == [None, None, None, invalid, invalid, invalid, invalid]
    broken = json.dumps({"content": "---\na: [\n---\n", "repoType": "model"}).encode()
    status, _, answer = send_request(hub, "POST", "/api/validate-yaml", broken)
    assert status == 400 and "Invalid YAML" in json.loads(answer)["errors"][0]["message"]
