"""Publishes the Space of a model: the app of `space/` with the id and the commit of the model."""

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, metadata_load, metadata_save
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

import mmcot
from mmcot.hub.checks import find_leaks
from mmcot.hub.repository import MAKER, Repository, plan_push, upload, verify_upload
from mmcot.storage.files import list_files, write_json
from modeling_mmcot.configuration_mmcot import __version__

APP = Path(mmcot.__file__).parents[1] / "space"
FILES = ("app.py", "README.md", "requirements.txt", "examples")


def publish_space(
    repository: Repository, model_id: str, model_revision: str, overwrite: bool = False, dry_run: bool = False
) -> str | None:
    """
    Publish a Space for a published model. Return the Space's commit, or None in a dry run.

    Raises:
        ValueError: the model is not on the Hub, or the Space's repository contains files that this tool did not create.
    """
    commit = commit_of_model(model_id, model_revision, dry_run)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_space(Path(temporary), model_id, commit)
        problems = list(find_leaks(folder))
        if problems:
            raise ValueError("the Space is not published:\n  " + "\n  ".join(problems))
        plan = plan_push(folder, repository, overwrite, dry_run)
        if dry_run:
            print(f"Dry run: nothing was uploaded to {repository.repo_id}.")
            return None
        space_commit = upload(plan)
        verify_upload(plan, space_commit)
    return space_commit


def commit_of_model(model_id: str, revision: str, dry_run: bool) -> str:
    """Return the current commit of a model's branch; in a dry run the branch itself, if the model is not available."""
    try:
        return HfApi().model_info(model_id, revision=revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, OfflineModeIsEnabled) as error:
        if dry_run:
            print(
                f"{model_id} is not on the Hub, or the Hub is offline. Without --dry_run, the Space names the commit "
                f"of the model's upload."
            )
            return revision
        if isinstance(error, OfflineModeIsEnabled):
            raise
        raise ValueError(
            f"a Space requires a model: {model_id} has no {revision} on the Hub. Publish the model first, or name its "
            f"run folder."
        ) from None


def write_space(folder: Path, model_id: str, commit: str) -> Path:
    """Write the app, and `model.json` with the model's id and commit. Return the folder."""
    for name in FILES:
        copy = shutil.copytree if (APP / name).is_dir() else shutil.copyfile
        copy(APP / name, folder / name)
    write_json(folder / "model.json", {"repo_id": model_id, "revision": commit})
    readme = folder / "README.md"
    maker = {"version": __version__, "files": list_files(folder)}
    metadata_save(readme, {**(metadata_load(readme) or {}), "models": [model_id], MAKER: maker})
    return folder
