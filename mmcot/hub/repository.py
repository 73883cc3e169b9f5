"""A folder -> a repository on the Hub, in one commit, with a comparison before and a verification after the upload.

huggingface_hub handles the upload, retries and tokens. A failed push leaves the repository at its commit.
"""

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    RepoCard,
    SpaceInfo,
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

from mmcot.hub.versions import TransportError, validate_card
from mmcot.storage.digests import sha256_of_file
from mmcot.storage.files import list_files

GITATTRIBUTES = ".gitattributes"  # created by the Hub
HUB_ERRORS = (HfHubHTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, TransportError, ConnectionError)
PUSH_AGAIN = "Nothing was committed: push again, and check the listed changes."
MAKER = "mmcot"  # the key in a card's metadata that identifies a repository of this tool


@dataclass(frozen=True)
class Repository:
    """The target of an upload: the id of a model or a Space on the Hub, and the branch."""

    repo_id: str
    repo_type: str = "model"
    revision: str = "main"
    private: bool = False


@dataclass(frozen=True)
class State:
    """
    The content of a repository.

    Args:
        commit: its head; None if the repository does not exist.
        has_branch: whether the branch exists; if not, the state describes the main branch.
        files: by name, without `.gitattributes`, which the Hub creates.
        is_ours: whether this tool created the content, or the repository is empty.
        pushed: the files of the last push, as listed in the card; None if the card lists none.
    """

    commit: str | None = None
    has_branch: bool = False
    files: dict[str, RepoFile] = field(default_factory=dict)
    is_ours: bool = True
    pushed: frozenset[str] | None = None


def check_repository_id(repository: Repository) -> None:
    """
    Check the id and the branch of a repository.

    Raises:
        ValueError: the id is not a valid Hub id, or includes a kind of repository; the branch is a full ref.
    """
    name = repository.repo_id
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is not a repository id: expected USER/NAME ({error})") from error
    if name.count("/") != 1:
        raise ValueError(f"{name!r} is not a repository id: expected USER/NAME")
    if name.split("/")[0] in ("datasets", "spaces", "models"):
        raise ValueError(f"{name!r} starts with a kind of repository: expected USER/NAME of a {repository.repo_type}")
    if repository.revision.startswith("refs/"):
        raise ValueError(f"--revision {repository.revision}: expected the name of a branch")


@dataclass(frozen=True)
class Plan:
    """
    The changes of a push.

    Args:
        changes: the change of each file: `new`, `changed`, `same` or `deleted`.
    """

    folder: Path
    repository: Repository
    state: State
    changes: dict[str, str]

    @property
    def changes_nothing(self) -> bool:
        return self.state.has_branch and set(self.changes.values()) <= {"same"}


def plan_push(folder: Path, repository: Repository, overwrite: bool, dry_run: bool) -> Plan:
    """
    Compare a folder with a repository, and print the change of each file. Nothing is changed.

    Raises:
        ValueError: the push would replace or delete content that this tool did not create, or the Hub rejects the
            folder's card.
    """
    try:
        state = read_state(HfApi(), repository)
        validate_card(RepoCard.load(folder / "README.md"), repository.repo_type)
    except OfflineModeIsEnabled:
        if not dry_run:
            raise
        print("Offline: not compared with the content on the Hub.")
        state = State()
    changes = compare_files(folder, state)
    if not overwrite:
        check_owner(repository, state, changes)
    for name, change in changes.items():
        size = f"{(folder / name).stat().st_size:,}" if change != "deleted" else ""
        print(f"{size:>16}  {change:<8} {name}")
    return Plan(folder, repository, state, changes)


def check_owner(repository: Repository, state: State, changes: dict[str, str]) -> None:
    """
    Check, by the file list in the repository's card, that this tool pushed all files to delete or replace.

    Raises:
        ValueError: the repository, or a file in it, comes from somebody else.
    """
    content = "content that this tool did not create"
    foreign = [name for name, change in changes.items() if change in ("changed", "deleted")]
    if state.is_ours and state.pushed is not None:
        foreign = [name for name in foreign if name not in state.pushed]
        content = f"files ({', '.join(foreign)}) that this tool did not create"
    elif state.is_ours:
        foreign = [name for name in foreign if changes[name] == "deleted"]
        content = f"files ({', '.join(foreign)}) that are not in this run, and its card, by an older mmcot, lists none"
    if foreign or not state.is_ours:
        raise ValueError(
            f"{repository.repo_id} contains {content}; nothing was changed. --overwrite replaces its content."
        )


def upload(plan: Plan) -> str:
    """Upload a folder in one commit, or in none if nothing changes. Return the commit that contains the folder."""
    api, repository = HfApi(), plan.repository
    if plan.changes_nothing:
        print(f"Nothing changes: {repository.repo_id} stays at {plan.state.commit}.")
        return plan.state.commit
    head = prepare_repository(api, repository, plan.state)
    operations = [
        CommitOperationDelete(name) if change == "deleted" else CommitOperationAdd(name, plan.folder / name)
        for name, change in plan.changes.items()
        if change != "same"
    ]
    if not operations:
        return head
    content = {"model": "a multimodal chain-of-thought model", "space": "the Space"}[repository.repo_type]
    try:
        commit = api.create_commit(
            repository.repo_id,
            operations,
            commit_message=f"Upload {content}",
            repo_type=repository.repo_type,
            revision=repository.revision,
            parent_commit=head,
        )
    except (RuntimeError, *HUB_ERRORS) as error:
        raise explain_failure(api, repository, head, error) from error
    return commit.oid


def explain_failure(api: HfApi, repository: Repository, head: str, error: Exception) -> Exception:
    """Return the exception to raise after a failed commit. The commit may exist, if only its response was lost."""
    # huggingface_hub raises a RuntimeError if a large file cannot be sent, and its Xet client for other failures too.
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    failure = cause if isinstance(cause, HUB_ERRORS) else ConnectionError(str(error))
    try:
        info = api.repo_info(repository.repo_id, repo_type=repository.repo_type, revision=repository.revision)
    except HUB_ERRORS:
        return ValueError(
            f"The Hub did not confirm whether {repository.repo_id} has the commit ({type(failure).__name__}): the same "
            f"command compares the contents again, and continues."
        )
    if info.sha == head:
        return failure
    return ValueError(
        f"{repository.repo_id} is at {info.sha} now, but the Hub's response was lost: the same command compares the "
        f"contents again."
    )


def read_state(api: HfApi, repository: Repository) -> State:
    """Read the content of a repository's branch; if the branch does not exist, of the main branch."""
    address = {"repo_id": repository.repo_id, "repo_type": repository.repo_type}
    try:
        info = api.repo_info(**address, revision=repository.revision)
    except RevisionNotFoundError:
        if repository.revision == "main":
            raise
        state = read_state(api, replace(repository, revision="main"))
        return replace(state, has_branch=False)
    except RepositoryNotFoundError:
        if repository.repo_type == "model" and api.repo_exists(repository.repo_id, repo_type="dataset"):
            raise ValueError(f"{repository.repo_id} is a dataset: expected the id of a model") from None
        return State()
    check_private(repository, info)
    files = {
        entry.path: entry
        for entry in api.list_repo_tree(**address, revision=info.sha, recursive=True)
        if isinstance(entry, RepoFile) and entry.path != GITATTRIBUTES
    }
    if is_empty(repository, files) or "README.md" not in files:
        return State(info.sha, True, files, is_empty(repository, files))
    readme = hf_hub_download(**address, filename="README.md", revision=info.sha)
    metadata = read_metadata(Path(readme))
    maker = metadata.get(MAKER)
    pushed = maker.get("files") if isinstance(maker, dict) else None
    pushed = frozenset(map(str, pushed)) if isinstance(pushed, list) else None
    return State(info.sha, True, files, MAKER in metadata, pushed)


def is_empty(repository: Repository, files: Collection[str]) -> bool:
    """Whether a repository has no content yet; the Hub creates a Space with a README."""
    return not files or (repository.repo_type == "space" and set(files) == {"README.md"})


def check_private(repository: Repository, info: ModelInfo | SpaceInfo) -> None:
    """Raise an error if the repository should be private, but exists and is public."""
    if repository.private and not info.private:
        raise ValueError(
            f"{repository.repo_id} exists and is public: --private is for new repositories only. Nothing was committed."
        )


def read_metadata(readme: Path) -> dict[str, Any]:
    try:
        return metadata_load(readme) or {}
    except (yaml.YAMLError, ValueError):  # an invalid card, not from this tool
        return {}


def compare_files(folder: Path, state: State) -> dict[str, str]:
    """Return the change of each file in the folder or in the repository."""
    changes = {}
    for name in list_files(folder):
        remote = state.files.get(name)
        changes[name] = "new" if remote is None else "same" if is_same(folder / name, remote) else "changed"
    return changes | dict.fromkeys(sorted(state.files.keys() - changes.keys()), "deleted")


def is_same(file: Path, remote: RepoFile) -> bool:
    if file.stat().st_size != remote.size:
        return False
    if remote.lfs is not None:
        return sha256_of_file(file) == remote.lfs.sha256
    return git_hash(file.read_bytes()) == remote.blob_id


def prepare_repository(api: HfApi, repository: Repository, state: State) -> str:
    """
    Create the repository and the branch if they do not exist. Return the parent of the next commit: the commit that was
    compared, so that a later commit by somebody else is a conflict; or the first commit of a new repository.

    Raises:
        ValueError: since the comparison, somebody else created the repository or the branch, or made it public.
    """
    address = {"repo_id": repository.repo_id, "repo_type": repository.repo_type}
    if state.commit is None:
        head = create_repository(api, repository)
    else:
        head = state.commit
        check_private(repository, api.repo_info(**address))
    if not state.has_branch and repository.revision != "main":
        with refuse_existing(f"the branch {repository.revision} of {repository.repo_id}"):
            api.create_branch(**address, branch=repository.revision, revision=head, exist_ok=False)
    return head


def create_repository(api: HfApi, repository: Repository) -> str:
    """Create a repository. Return its first commit, which has no content."""
    sdk = {"space_sdk": "gradio"} if repository.repo_type == "space" else {}
    address = {"repo_id": repository.repo_id, "repo_type": repository.repo_type}
    with refuse_existing(repository.repo_id):
        api.create_repo(**address, private=repository.private or None, exist_ok=False, **sdk)
    created = read_state(api, replace(repository, revision="main"))
    if not is_empty(repository, created.files):
        raise ValueError(
            f"{created_meanwhile(repository.repo_id)}: it contains {', '.join(sorted(created.files))}. {PUSH_AGAIN}"
        )
    return created.commit


@contextmanager
def refuse_existing(name: str) -> Iterator[None]:
    """Turn the Hub's conflict error for something that exists already into a ValueError that names it."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 409:
            raise
        raise ValueError(f"{created_meanwhile(name)}. {PUSH_AGAIN}") from error


def created_meanwhile(name: str) -> str:
    return f"{name} did not exist at the comparison, and somebody else created it since"


def verify_upload(plan: Plan, commit: str) -> None:
    """
    Download the commit into an empty cache, and compare it with the folder.

    Raises:
        ValueError: the download fails, or differs from the folder.
    """
    repository = plan.repository
    with tempfile.TemporaryDirectory() as cache:
        options = {"repo_type": repository.repo_type, "revision": commit, "cache_dir": cache}
        try:
            downloaded = Path(snapshot_download(repository.repo_id, **options))
        except HUB_ERRORS as error:
            raise ValueError(
                f"{repository.repo_id} is at {commit} now, but the download failed ({type(error).__name__}): the same "
                f"command compares it again."
            ) from error
        sent, received = (
            {name: sha256_of_file(folder / name) for name in list_files(folder)} for folder in (plan.folder, downloaded)
        )
    received.pop(GITATTRIBUTES, None)
    differing = sorted(name for name in sent.keys() | received.keys() if sent.get(name) != received.get(name))
    if differing:
        raise ValueError(
            f"{repository.repo_id} at {commit} differs from the uploaded folder: {', '.join(differing)}. Push again, "
            f"or revert the commit: the earlier content is unchanged under its own commit."
        )


def advice(error: Exception, repository: Repository) -> str:
    """Return the message for an error of the Hub: the cause and what to do. It never contains a token."""
    name = repository.repo_id
    untouched = f"{name} is unchanged."
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"offline (HF_HUB_OFFLINE is set): {name} was not reached. Unset the variable to publish; --dry_run works "
            f"offline."
        )
    if isinstance(error, LocalTokenNotFoundError):
        return f"no token: log in with `hf auth login`, or set HF_TOKEN. {untouched}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        failure = type(error).__name__
        return f"the connection failed ({failure}): push again; uploaded files are not sent twice. {untouched}"
    messages = {
        401: "the Hub rejects your token, or no token is set: log in with `hf auth login`, or set HF_TOKEN.",
        403: f"the Hub denies access: your token needs write access to {name.split('/')[0]}.",
        404: f"{name} does not exist, or your token has no access to it.",
        409: "somebody else is committing to the repository: push again.",
        412: "somebody else committed to the repository meanwhile: push again, and check the listed changes.",
        429: "too many requests to the Hub: wait some minutes and push again; uploaded files are not sent twice.",
    }
    other = "push again later; uploaded files are not sent twice." if status >= 500 else "the Hub rejects the request."
    server_message = getattr(error, "server_message", None)
    details = f"{status}, {server_message}" if server_message else status
    return f"{messages.get(status, other)} (The Hub: {details}.) {untouched}"
