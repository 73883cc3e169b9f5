"""A folder -> a repository of the Hub, in one commit: compared first, and verified after.

Uploading, retrying and tokens are handled by huggingface_hub. A push that fails leaves the repository at its commit.
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

GITATTRIBUTES = ".gitattributes"  # the Hub's own
HUB_ERRORS = (HfHubHTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, TransportError, ConnectionError)
PUSH_AGAIN = "Nothing was committed: push again, and look at the difference that is shown."
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
        pushed: the files that the card lists as those of the last push; None where it lists none.
    """

    commit: str | None = None
    has_branch: bool = False
    files: dict[str, RepoFile] = field(default_factory=dict)
    is_ours: bool = True
    pushed: frozenset[str] | None = None


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
    if repository.revision.startswith("refs/"):
        raise ValueError(f"--revision {repository.revision}: expected the name of a branch")


@dataclass(frozen=True)
class Plan:
    """
    What a push would do.

    Args:
        changes: what becomes of each file: `new`, `changed`, `same` or `deleted`.
    """

    folder: Path
    repository: Repository
    state: State
    changes: dict[str, str]

    @property
    def changes_nothing(self) -> bool:
        return self.state.has_branch and set(self.changes.values()) <= {"same"}


def compare(folder: Path, repository: Repository, overwrite: bool, dry_run: bool) -> Plan:
    """
    The folder's content in place of the repository's, file by file, and shown; nothing is changed.

    Raises:
        ValueError: the repository holds what this tool did not make, or the Hub does not take the folder's card.
    """
    try:
        state = state_of(HfApi(), repository)
        validate_card(RepoCard.load(folder / "README.md"), repository.repo_type)
    except OfflineModeIsEnabled:
        if not dry_run:
            raise
        print("Offline: not compared with what stands on the Hub.")
        state = State()
    changes = changes_of(folder, state)
    if not overwrite:
        check_owner(repository, state, changes)
    for name, change in changes.items():
        size = f"{(folder / name).stat().st_size:,}" if change != "deleted" else ""
        print(f"{size:>16}  {change:<8} {name}")
    return Plan(folder, repository, state, changes)


def check_owner(repository: Repository, state: State, changes: dict[str, str]) -> None:
    """
    What would be deleted or replaced was pushed by this tool, by the list of files in the repository's card.

    Raises:
        ValueError: the repository, or a file in it, is somebody else's.
    """
    holds = "what this tool did not make"
    foreign = [name for name, change in changes.items() if change in ("changed", "deleted")]
    if state.is_ours and state.pushed is not None:
        foreign = [name for name in foreign if name not in state.pushed]
        holds = f"files ({', '.join(foreign)}) that this tool did not make"
    elif state.is_ours:
        foreign = [name for name in foreign if changes[name] == "deleted"]
        holds = f"files ({', '.join(foreign)}) that are not in this run, and its card, by an older mmcot, lists none"
    if foreign or not state.is_ours:
        raise ValueError(f"{repository.repo_id} holds {holds}; nothing was changed. --overwrite replaces its content.")


def upload(plan: Plan) -> str:
    """In one commit; none where nothing changes. Returns the one that now holds the folder's content."""
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
    except (RuntimeError, *HUB_ERRORS) as error:
        raise after_failure(api, repository, head, error) from error
    return commit.oid


def after_failure(api: HfApi, repository: Repository, head: str, error: Exception) -> Exception:
    """What to raise for a commit that ended in an error: the answer to one that was made can be lost."""
    # The client makes a RuntimeError of a large file that could not be sent, its Xet part of other failures too.
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    failure = cause if isinstance(cause, HUB_ERRORS) else ConnectionError(str(error))
    try:
        info = api.repo_info(repository.repo_id, repo_type=repository.repo_type, revision=repository.revision)
    except HUB_ERRORS:
        return ValueError(
            f"{repository.repo_id} could not be asked whether it took the commit ({type(failure).__name__}): the same "
            f"command compares, and goes on."
        )
    if info.sha == head:
        return failure
    return ValueError(
        f"{repository.repo_id} is at {info.sha} now, but the answer to the commit was lost: the same command compares."
    )


def state_of(api: HfApi, repository: Repository) -> State:
    where = {"repo_id": repository.repo_id, "repo_type": repository.repo_type}
    try:
        info = api.repo_info(**where, revision=repository.revision)
    except RevisionNotFoundError:
        if repository.revision == "main":
            raise
        state = state_of(api, replace(repository, revision="main"))
        return replace(state, has_branch=False)
    except RepositoryNotFoundError:
        if repository.repo_type == "model" and api.repo_exists(repository.repo_id, repo_type="dataset"):
            raise ValueError(f"{repository.repo_id} is a dataset: expected the id of a model") from None
        return State()
    check_private(repository, info)
    files = {
        entry.path: entry
        for entry in api.list_repo_tree(**where, revision=info.sha, recursive=True)
        if isinstance(entry, RepoFile) and entry.path != GITATTRIBUTES
    }
    if is_newborn(repository, files) or "README.md" not in files:
        return State(info.sha, True, files, is_newborn(repository, files))
    readme = hf_hub_download(**where, filename="README.md", revision=info.sha)
    metadata = metadata_of(Path(readme))
    maker = metadata.get(MAKER)
    pushed = maker.get("files") if isinstance(maker, dict) else None
    pushed = frozenset(map(str, pushed)) if isinstance(pushed, list) else None
    return State(info.sha, True, files, MAKER in metadata, pushed)


def is_newborn(repository: Repository, files: Collection[str]) -> bool:
    """Whether a repository holds nothing yet; a Space is born with a README of the Hub's."""
    return not files or (repository.repo_type == "space" and set(files) == {"README.md"})


def check_private(repository: Repository, info: ModelInfo | SpaceInfo) -> None:
    if repository.private and not info.private:
        raise ValueError(
            f"{repository.repo_id} is there and is public: --private is for one that is made. Nothing was committed."
        )


def metadata_of(readme: Path) -> dict[str, Any]:
    try:
        return metadata_load(readme) or {}
    except (yaml.YAMLError, ValueError):  # somebody else's, and broken
        return {}


def changes_of(folder: Path, state: State) -> dict[str, str]:
    """Of each file that is in the folder or in the repository."""
    changes = {}
    for name in list_files(folder):
        there = state.files.get(name)
        changes[name] = "new" if there is None else "same" if is_same(folder / name, there) else "changed"
    return changes | dict.fromkeys(sorted(state.files.keys() - changes.keys()), "deleted")


def is_same(file: Path, there: RepoFile) -> bool:
    if file.stat().st_size != there.size:
        return False
    if there.lfs is not None:
        return sha256_of_file(file) == there.lfs.sha256
    return git_hash(file.read_bytes()) == there.blob_id


def prepare_repository(api: HfApi, repository: Repository, state: State) -> str:
    """
    The repository and the branch, made where they are not there. Returns the branch's head: the commit that was
    compared with, because one that came since is not built upon, or the first one of a repository that is made here.

    Raises:
        ValueError: somebody else made the repository or the branch since it was compared, or made it public.
    """
    where = {"repo_id": repository.repo_id, "repo_type": repository.repo_type}
    if state.commit is None:
        head = make_repository(api, repository)
    else:
        head = state.commit
        check_private(repository, api.repo_info(**where))
    if not state.has_branch and repository.revision != "main":
        with made_by_nobody_else(f"the branch {repository.revision} of {repository.repo_id}"):
            api.create_branch(**where, branch=repository.revision, revision=head, exist_ok=False)
    return head


def make_repository(api: HfApi, repository: Repository) -> str:
    """Returns its first commit, which holds nothing of anybody's."""
    sdk = {"space_sdk": "gradio"} if repository.repo_type == "space" else {}
    where = {"repo_id": repository.repo_id, "repo_type": repository.repo_type}
    with made_by_nobody_else(repository.repo_id):
        api.create_repo(**where, private=repository.private or None, exist_ok=False, **sdk)
    born = state_of(api, replace(repository, revision="main"))
    if not is_newborn(repository, born.files):
        raise ValueError(
            f"{since_compared(repository.repo_id)}: it holds {', '.join(sorted(born.files))}. {PUSH_AGAIN}"
        )
    return born.commit


@contextmanager
def made_by_nobody_else(name: str) -> Iterator[None]:
    """What is made in this block was not there; the Hub's conflict is an error that says so."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 409:
            raise
        raise ValueError(f"{since_compared(name)}. {PUSH_AGAIN}") from error


def since_compared(name: str) -> str:
    return f"{name} was not there when it was compared, and somebody else made it since"


def verify(plan: Plan, commit: str) -> None:
    """
    Raises:
        ValueError: what the Hub gives back, into an empty cache, is not what was sent.
    """
    repository = plan.repository
    with tempfile.TemporaryDirectory() as cache:
        where = {"repo_type": repository.repo_type, "revision": commit, "cache_dir": cache}
        try:
            downloaded = Path(snapshot_download(repository.repo_id, **where))
        except HUB_ERRORS as error:
            raise ValueError(
                f"{repository.repo_id} is at {commit} now, which could not be read again ({type(error).__name__}): the "
                f"same command compares it once more."
            ) from error
        sent, got = (
            {name: sha256_of_file(place / name) for name in list_files(place)} for place in (plan.folder, downloaded)
        )
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
    if status is None:
        failure = type(error).__name__
        return f"the connection failed ({failure}): push again; what is uploaded is not sent twice. {untouched}"
    words = {
        401: "the Hub does not know your token, or there is none: log in with `hf auth login`, or set HF_TOKEN.",
        403: f"the Hub refuses: your token has to have write access to {name.split('/')[0]}.",
        404: f"{name} is not there, or your token may not see it.",
        409: "somebody else is committing to it: push again.",
        412: "somebody else committed to it meanwhile: push again, and look at the difference that is shown.",
        429: "the Hub is asked too often: wait some minutes and push again; what is uploaded is not sent twice.",
    }
    other = "push again later; what is uploaded is not sent twice." if status >= 500 else "it refuses what was sent."
    said = getattr(error, "server_message", None)
    return f"{words.get(status, other)} (The Hub: {status}{f', {said}' if said else ''}.) {untouched}"
