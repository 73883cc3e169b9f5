"""Publishes a finished run: exports it, checks it, uploads it, and loads it again in a fresh process."""

from mmcot.hub.card import Publication
from mmcot.hub.checks import check_model_folder
from mmcot.hub.export import export
from mmcot.hub.repository import Repository, plan_push, upload, verify_upload
from mmcot.hub.verification import answer_in_fresh_process
from mmcot.prediction.provenance import check_export, training_names
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot import MMCoTProcessor


def publish_run(
    run_folder: RunFolder,
    repository: Repository,
    publication: Publication,
    allow_unscored: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> str | None:
    """
    Publish a finished run. Return the commit, or None in a dry run.

    Raises:
        ValueError: the run, its scores or the repository are invalid, or the model downloaded from the repository
            answers differently.
    """
    processor = finished_processor(run_folder)
    if run_folder.judged_split() is None and not allow_unscored:
        raise ValueError(
            f"{run_folder} has no scores: create them with python -m mmcot.evaluate. --allow_unscored publishes the "
            f'run without scores, and its card reports "not evaluated".'
        )
    folder = export(run_folder, processor, publication)
    check_model_folder(folder)
    plan = plan_push(folder, repository, overwrite, dry_run)
    expected = answer_in_fresh_process(str(folder.resolve()))
    if dry_run:
        print(f"Dry run: nothing was uploaded to {repository.repo_id}.")
        return None
    commit = upload(plan)
    verify_upload(plan, commit)
    found = answer_in_fresh_process(repository.repo_id, commit)
    if found != expected:
        raise ValueError(
            f"{repository.repo_id} at {commit} answers {found}; expected {expected}, the answer of {folder}."
        )
    return commit


def finished_processor(run_folder: RunFolder) -> MMCoTProcessor:
    """Load the processor of a run; raise a ValueError if the run is not finished."""
    if not run_folder.hub.is_dir():
        raise ValueError(
            f"{run_folder} is not a finished run: it has no hub/, which train.py writes last. Finish the run first."
        )
    processor = MMCoTProcessor.from_pretrained(run_folder.hub, trust_remote_code=False)
    for name in training_names(run_folder, processor):
        if not run_folder.is_trained(name):
            raise ValueError(f"{run_folder} is not a finished run: the training of its {name} stage is not finished.")
    check_export(run_folder, processor)
    return processor
