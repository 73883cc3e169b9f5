"""To the Hub and back: a folder is checked, compared with what stands there, uploaded in one commit, and read again.

What goes up is built by `hub.py` (a run) and `space.py` (the Space). Uploading, retrying and tokens are
huggingface_hub's own business: here is only what has to hold before and after. A push that fails leaves the repository
at the commit that it had.
"""

import ast
import hashlib
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoCard,
    get_token,
    hf_hub_download,
    metadata_load,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from safetensors import SafetensorError, safe_open

from mmcot.card import PICTURE, Publication, judged
from mmcot.hub import export, shipped_code
from mmcot.results import SCORES_FILE
from mmcot.verification import answers_alike
from modeling_mmcot import MMCoTProcessor

# What a model's repository may hold; anything else (pickles, optimizer states, data) does not go up.
MODEL_PATTERNS = (
    r"([\w.-]+/)?(config|generation_config|adapter_config)\.json",
    r"([\w.-]+/)?(model|adapter_model)(-\d+-of-\d+)?\.safetensors",
    r"([\w.-]+/)?model\.safetensors\.index\.json",
    r"(processor_config|tokenizer_config|tokenizer|special_tokens_map|added_tokens)\.json",
    r"spiece\.model|chat_template\.jinja",
    r"\.eval_results/[\w.-]+\.yaml",
    r"README\.md|\w+\.py",
    re.escape(PICTURE),
    re.escape(SCORES_FILE),
)
ALLOWED_IMPORTS = sys.stdlib_module_names | {"torch", "transformers", "PIL", "jinja2"}
GUARDED_IMPORTS = {"peft"}  # where stages are adapters, in a `try`
SECRETS = {
    "a token of the Hub": rb"hf_[A-Za-z0-9]{30,}",
    "a token of GitHub": rb"gh[pousr]_[A-Za-z0-9]{36,}",
    "a key of AWS": rb"AKIA[0-9A-Z]{16}",
    "a key of an API": rb"sk-[A-Za-z0-9_-]{32,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
FOLDERS = rb"home|Users|root|mnt|tmp|work|workspace|scratch|data|content"
ABSOLUTE_PATH = rb"(?<![\w./:-])(?:/(?:" + FOLDERS + rb")/|[A-Z]:\\+Users)[\w./\\-]+"
TEXT_FILES = {".json", ".md", ".py", ".yaml", ".jinja", ".txt"}
GITATTRIBUTES = ".gitattributes"  # the Hub's own
HUB_ERRORS = (HfHubHTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, httpx2.TransportError, ConnectionError)
MAKER = "mmcot"  # the key in a card's metadata by which a repository of ours is known


@dataclass(frozen=True)
class Repository:
    """Where a folder goes: an id of the Hub, a model's or a Space's, and the branch."""

    repo_id: str
    repo_type: str = "model"
    revision: str = "main"
    private: bool = False


@dataclass(frozen=True)
class State:
    """
    What stands in a repository.

    Args:
        commit: its head; None where the repository is not there.
        has_branch: whether the branch is there; where it is not, the state is that of the main one.
        files: by their names, without the Hub's own.
        is_ours: whether what is there was made by this tool, or nothing is.
    """

    commit: str | None = None
    has_branch: bool = False
    files: dict[str, RepoFile] = field(default_factory=dict)
    is_ours: bool = True


def publish_run(
    run_folder: Path,
    repository: Repository,
    publication: Publication,
    allow_unscored: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> str | None:
    """
    A finished run to its repository. Returns the commit, or None of a dry run.

    Raises:
        ValueError: what is wrong with the run, its scores, the repository or what came back from it.
    """
    check_repository_id(repository)
    processor = finished_processor(run_folder)
    if judged(run_folder, processor)[1] is None and not allow_unscored:
        raise ValueError(
            f"{run_folder} has no scores: python -m mmcot.evaluate makes them. --allow_unscored publishes it without, "
            f'and its card says "not evaluated".'
        )
    folder = export(run_folder, processor, publication)
    check_model_folder(folder)
    commit = push(folder, repository, overwrite, dry_run)
    if commit is not None:
        verify(folder, repository, commit)
        answers_alike(folder, repository.repo_id, commit)
    return commit


def finished_processor(run_folder: Path) -> MMCoTProcessor:
    if not (run_folder / "hub").is_dir():
        raise ValueError(
            f"{run_folder} is not a finished run: it has no hub/, which train.py writes last. Run it to its end."
        )
    processor = MMCoTProcessor.from_pretrained(run_folder / "hub")
    for stage in processor.stages:
        if not (run_folder / stage.name / "train_results.json").is_file():
            raise ValueError(f"{run_folder} is not a finished run: its {stage.name} stage is not trained to its end.")
    return processor


def check_repository_id(repository: Repository) -> None:
    """
    Raises:
        ValueError: the id is not one of the Hub's, or names a dataset.
    """
    name = repository.repo_id
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no repository id: expected USER/NAME ({error})") from error
    if name.count("/") != 1:
        raise ValueError(f"{name!r} is no repository id: expected USER/NAME")
    if name.split("/")[0] in ("datasets", "spaces", "models"):
        raise ValueError(f"{name!r} names a kind of repository: expected USER/NAME of a {repository.repo_type}")


def check_model_folder(folder: Path) -> None:
    """
    Raises:
        ValueError: all that must not, or cannot, be published, by file.
    """
    found = [*surplus_files(folder), *broken_weights(folder), *code_faults(folder), *leaks(folder)]
    metadata = metadata_load(folder / "README.md") or {}
    if not metadata.get("license"):
        found.append("README.md: no licence, and that of the dataset is not known: give --license")
    if found:
        raise ValueError(f"{folder} is not published:\n  " + "\n  ".join(found))


def surplus_files(folder: Path) -> Iterator[str]:
    for name in names_of(folder):
        if not any(re.fullmatch(pattern, name) for pattern in MODEL_PATTERNS):
            yield f"{name}: is no file of a model's repository"


def broken_weights(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            yield f"{file.relative_to(folder)}: not whole ({error})"


def code_faults(folder: Path) -> Iterator[str]:
    """Code that is not the library's, and imports of what a user of the model need not have."""
    ours = {file.name: file.read_bytes() for file in shipped_code()}
    theirs = {file.name: file.read_bytes() for file in folder.glob("*.py")}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"{name}: differs from this mmcot's own"
    for name, content in theirs.items():
        tree = ast.parse(content)
        guarded = {id(node) for tried in ast.walk(tree) if isinstance(tried, ast.Try) for node in ast.walk(tried)}
        for node in ast.walk(tree):
            allowed = ALLOWED_IMPORTS | (GUARDED_IMPORTS if id(node) in guarded else set())
            for module in imported(node):
                if module.split(".")[0] not in allowed:
                    yield f"{name}, line {node.lineno}: imports {module}"


def imported(node: ast.AST) -> list[str]:
    """The modules of other packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []


def leaks(folder: Path) -> Iterator[str]:
    """Paths of this machine, and what looks like a secret; which is not repeated."""
    token = get_token()
    patterns = SECRETS | ({"your token of the Hub": re.escape(token).encode()} if token else {})
    for name in names_of(folder):
        if Path(name).suffix not in TEXT_FILES:
            continue
        for number, line in enumerate((folder / name).read_bytes().splitlines(), start=1):
            for what, pattern in patterns.items():
                if re.search(pattern, line):
                    yield f"{name}, line {number}: holds {what}"
            if path := re.search(ABSOLUTE_PATH, line):
                yield f"{name}, line {number}: holds a path of this machine, {path[0].decode(errors='replace')}"


def names_of(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def push(folder: Path, repository: Repository, overwrite: bool, dry_run: bool) -> str | None:
    """
    The folder's content in place of the repository's, in one commit; none where nothing changes.

    Returns:
        The commit that now holds it, or None of a dry run.
    """
    api = HfApi()
    try:
        state = state_of(api, repository)
        RepoCard.load(folder / "README.md").validate(repository.repo_type)
    except OfflineModeIsEnabled:
        if not dry_run:
            raise
        print("Offline: not compared with what stands on the Hub.")
        state = State()
    if not (state.is_ours or overwrite):
        raise ValueError(
            f"{repository.repo_id} holds what this tool did not make; nothing was changed. --overwrite replaces it."
        )
    changes = changes_of(folder, state)
    show(folder, changes)
    if dry_run:
        print(f"Dry run: nothing was uploaded to {repository.repo_id}.")
        return None
    if state.commit is not None and state.has_branch and set(changes.values()) <= {"same"}:
        print(f"Nothing changes: {repository.repo_id} stays at {state.commit}.")
        return state.commit
    head = prepare_repository(api, repository, state)
    operations = [
        CommitOperationDelete(name) if change == "deleted" else CommitOperationAdd(name, folder / name)
        for name, change in changes.items()
        if change != "same"
    ]
    if not operations:
        return head
    what = {"model": "a multimodal chain-of-thought model", "space": "the Space"}[repository.repo_type]
    try:
        commit = api.create_commit(
            repository.repo_id,
            operations,
            commit_message=f"Upload {what}",
            repo_type=repository.repo_type,
            revision=repository.revision,
            parent_commit=head,
        )
    except RuntimeError as error:  # what the client makes of a large file that could not be sent
        raise error.__cause__ if isinstance(error.__cause__, HUB_ERRORS) else error from None
    return commit.oid


def state_of(api: HfApi, repository: Repository) -> State:
    where = {"repo_id": repository.repo_id, "repo_type": repository.repo_type}
    try:
        info = api.repo_info(**where, revision=repository.revision)
    except RevisionNotFoundError:
        state = state_of(api, replace(repository, revision="main"))
        return replace(state, has_branch=False)
    except RepositoryNotFoundError:
        if repository.repo_type == "model" and api.repo_exists(repository.repo_id, repo_type="dataset"):
            raise ValueError(f"{repository.repo_id} is a dataset: expected the id of a model") from None
        return State()
    if repository.private and not info.private:
        raise ValueError(f"{repository.repo_id} is there and is public: --private is for one that is made.")
    files = {
        entry.path: entry
        for entry in api.list_repo_tree(**where, revision=info.sha, recursive=True)
        if isinstance(entry, RepoFile) and entry.path != GITATTRIBUTES
    }
    is_ours = not files
    if "README.md" in files:
        readme = hf_hub_download(**where, filename="README.md", revision=info.sha)
        is_ours = MAKER in (metadata_load(readme) or {})
    return State(info.sha, True, files, is_ours)


def changes_of(folder: Path, state: State) -> dict[str, str]:
    """What becomes of each file: `new`, `changed`, `same` or `deleted`."""
    changes = {}
    for name in names_of(folder):
        there = state.files.get(name)
        changes[name] = "new" if there is None else "same" if is_same(folder / name, there) else "changed"
    return changes | dict.fromkeys(sorted(state.files.keys() - changes.keys()), "deleted")


def is_same(file: Path, there: RepoFile) -> bool:
    if file.stat().st_size != there.size:
        return False
    if there.lfs is not None:
        return sha256_of(file) == there.lfs.sha256
    return git_hash(file.read_bytes()) == there.blob_id


def sha256_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def show(folder: Path, changes: dict[str, str]) -> None:
    for name, change in changes.items():
        size = f"{(folder / name).stat().st_size:,}" if change != "deleted" else ""
        print(f"{size:>16}  {change:<8} {name}")


def prepare_repository(api: HfApi, repository: Repository, state: State) -> str:
    """The repository and the branch, made where they are not there. Returns the branch's head."""
    where = {"repo_id": repository.repo_id, "repo_type": repository.repo_type}
    if state.commit is None:
        sdk = {"space_sdk": "gradio"} if repository.repo_type == "space" else {}
        api.create_repo(**where, private=repository.private or None, exist_ok=True, **sdk)
    if not state.has_branch and repository.revision != "main":
        api.create_branch(**where, branch=repository.revision, exist_ok=True)
    return api.repo_info(**where, revision=repository.revision).sha


def verify(folder: Path, repository: Repository, commit: str) -> None:
    """
    Raises:
        ValueError: what the Hub gives back, into an empty cache, is not what was sent.
    """
    with tempfile.TemporaryDirectory() as cache:
        where = {"repo_type": repository.repo_type, "revision": commit, "cache_dir": cache}
        try:
            downloaded = Path(snapshot_download(repository.repo_id, **where))
        except HUB_ERRORS as error:
            raise ValueError(
                f"{repository.repo_id} is at {commit} now, which could not be read again ({type(error).__name__}): the "
                f"same command compares it once more."
            ) from error
        sent, got = ({name: sha256_of(place / name) for name in names_of(place)} for place in (folder, downloaded))
    got.pop(GITATTRIBUTES, None)
    differing = sorted(name for name in sent.keys() | got.keys() if sent.get(name) != got.get(name))
    if differing:
        raise ValueError(
            f"{repository.repo_id} at {commit} is not what was sent: {', '.join(differing)} differ. Push again, or "
            f"take the commit back: what stood there before is untouched under its own commit."
        )


def advice(error: Exception, repository: Repository) -> str:
    """What to do about an error of the Hub, in words; none of them holds a token."""
    name = repository.repo_id
    untouched = f"{name} stays as it was."
    if isinstance(error, OfflineModeIsEnabled):
        return f"offline (HF_HUB_OFFLINE is set): {name} was not reached. Unset it to publish; --dry_run works without."
    if isinstance(error, LocalTokenNotFoundError):
        return f"no token: log in with `hf auth login`, or set HF_TOKEN. {untouched}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    words = {
        401: "the Hub does not know your token, or there is none: log in with `hf auth login`, or set HF_TOKEN.",
        403: f"your token may not write to {name}: use one with write access to {name.split('/')[0]}.",
        404: f"{name} is not there, or your token may not see it.",
        409: "somebody else is committing to it: push again.",
        412: "somebody else committed to it meanwhile: push again, and look at the difference that is shown.",
        429: "the Hub is asked too often: wait some minutes and push again; what is uploaded is not sent twice.",
    }
    if status is not None:
        fallback = f"the Hub answered {status}: push again later; what is uploaded already is not sent twice."
        return f"{words.get(status, fallback)} {untouched}"
    return (
        f"the connection failed ({type(error).__name__}): push again; what is uploaded already is not sent twice. "
        f"{untouched}"
    )
