"""The files and texts that may be published. test_publishing.py tests the check of a whole folder."""

from pathlib import Path

import pytest

from mmcot.hub.checks import find_leaks, is_model_file


@pytest.fixture
def leaks_of(tmp_path, monkeypatch):
    """The faults found in a text, on a machine whose home and working folder match no known pattern."""
    for name in ("quux/alice", "quux/job"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: Path("/quux/alice"))
    monkeypatch.chdir(tmp_path / "quux/job")

    def search(text):
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / "README.md").write_text(text)
        return [fault.removeprefix("README.md, line 1: contains ") for fault in find_leaks(tmp_path / "hub")]

    return search


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/home/alice/x",
            "/Users/alice/x",
            "/storage/alice/texts.json",
            "/project/x/y",
            "/projects/x/y",
            "/export/x/y",
        ),
        *("/users/alice/x", "/net/scratch/x", "/gpfs/x/y", "/fsx/x/y", "/data1/x/y", "/mnt2/x/y", "/kaggle/input/x"),
        *("/dev/shm/x", "../alice/x", "../../x", "runs/../../alice/x", "~/x.json", "~alice/x.json"),
    ],
)
@pytest.mark.parametrize("context", ["{}", "target_column: rationale={}", '"file": "{}"', "see {}, and more"])
def test_finds_local_path_in_any_text(leaks_of, path, context):
    (found,) = leaks_of(context.format(path))
    assert found == f"a path of this machine, {path}"


def test_finds_home_and_working_folder_by_name(leaks_of):
    (found,) = leaks_of("texts: rationale=/quux/alice/texts.json")
    assert found == "a path of this machine, /quux/alice/texts.json"
    assert leaks_of(f"texts=[{Path.cwd()}]") == [f"a path of this machine, {Path.cwd()}"]
    assert leaks_of("a box of /quux/alices") == []


def test_home_at_root_does_not_match_every_path(leaks_of, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    monkeypatch.chdir("/")
    assert leaks_of("/ or /x/y") == []


SECRETS = {
    "a token of the Hub": ["hf_" + "a1" * 17],
    "a token of GitHub": ["ghp_" + "a1" * 18, "github_pat_" + "A1" * 11 + "_" + "b2" * 29],
    "a token of GitLab": ["glpat-" + "a1-_" * 5],
    "a key of Google": ["AIza" + "a1-_B" * 7, "GOCSPX-" + "a1-_" * 7],
    "a token of Slack": [f"xox{kind}-123456789012-abcDEF123456" for kind in "abprs"],
    "a key of AWS": ["AKIA" + "A1" * 8, "ASIA" + "A1" * 8],
    "a key of an API": ["sk-" + "a1" * 20, "sk-ant-api03-" + "a1" * 20, "gsk_" + "a1" * 26, "nvapi-" + "a1" * 30],
    "a key of Stripe": ["sk_live_" + "a1" * 12, "rk_test_" + "a1" * 12],
    "a token of npm": ["npm_" + "a1" * 18],
    "a token of PyPI": ["pypi-AgEIcHlwaS5vcmc" + "a1" * 20],
    "a key of Weights & Biases": ["WANDB_API_KEY=" + "a1" * 20, '"wandb_api_key": "' + "a1" * 20],
    "a key of SendGrid": ["SG." + "a1" * 11 + "." + "b" * 43],
    "a signed token (JWT)": ["eyJ" + "a1" * 10 + ".eyJ" + "b2" * 10 + "." + "c3" * 10],
    "a password in an address": ["https://alice:s3cret@example.org/x"],
    "a private key": ["-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN PGP PRIVATE KEY BLOCK-----"],
}


@pytest.mark.parametrize(("kind", "secret"), [(kind, secret) for kind, all_ in SECRETS.items() for secret in all_])
def test_names_kind_of_secret_without_repeating_it(leaks_of, kind, secret):
    assert leaks_of(f"key={secret}") == [kind]
    assert leaks_of(f'{{"key": "{secret}"}}') == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "multi-task-learning-for-multimodal-chain-of-thought mask-conditioned-rationale sk-learn",
        "https://huggingface.co/data/x https://example.org/home/x http://127.0.0.1:7860/tmp",
        "a digest: sha256:" + "a1" * 32 + ' "model": "' + "b2" * 20 + '"',
        "and/or, 1/2, ... /, wait.../so, NAT/SOC/LAN ~ 3, ~20/30, problems.jsonl, runs/demo/hub, ./x/y",
        "mail@example.org, https://example.org:8080/a@b, git@github.com:a/b, AKIA, AIza, xoxo-hugs-and-kisses, glpat-x",
    ],
)
def test_accepts_texts_that_resemble_paths_or_secrets(leaks_of, text):
    assert leaks_of(text) == []


def test_recognizes_files_of_model_repository():
    allowed = ["known_answer.json", "rationale/known_answer.json", "chat_template.jinja", "chat_template.json"]
    assert [name for name in allowed if not is_model_file(name)] == []
    refused = ["a/b/known_answer.json", "rationale/chat_template.jinja", "known_answers.json", "train.jsonl"]
    assert [name for name in refused if is_model_file(name)] == []
