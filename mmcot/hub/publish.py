"""Publishes a finished run: exported, checked, uploaded, and loaded again in a fresh process."""

from mmcot.hub.card import Publication
from mmcot.hub.checks import check_model_folder
from mmcot.hub.export import export
from mmcot.hub.repository import Repository, compare, upload, verify
from mmcot.hub.verification import answer_in_fresh_process
from mmcot.prediction.provenance import check_export
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
    A finished run to its repository. Returns the commit, or None of a dry run.

    Raises:
        ValueError: what is wrong with the run, its scores, the repository or what came back from it.
    """
    processor = finished_processor(run_folder)
    if run_folder.judged_split() is None and not allow_unscored:
        raise ValueError(
            f"{run_folder} has no scores: python -m mmcot.evaluate makes them. --allow_unscored publishes it without, "
            f'and its card says "not evaluated".'
        )
    folder = export(run_folder, processor, publication)
    check_model_folder(folder)
    plan = compare(folder, repository, overwrite, dry_run)
    expected = answer_in_fresh_process(str(folder.resolve()))
    if dry_run:
        print(f"Dry run: nothing was uploaded to {repository.repo_id}.")
        return None
    commit = upload(plan)
    verify(plan, commit)
    found = answer_in_fresh_process(repository.repo_id, commit)
    if found != expected:
        raise ValueError(f"{repository.repo_id} at {commit} answers {found}, and {folder} answers {expected}")
    return commit


def finished_processor(run_folder: RunFolder) -> MMCoTProcessor:
    if not run_folder.hub.is_dir():
        raise ValueError(
            f"{run_folder} is not a finished run: it has no hub/, which train.py writes last. Run it to its end."
        )
    processor = MMCoTProcessor.from_pretrained(run_folder.hub, trust_remote_code=False)
    for stage in processor.stages:
        if not run_folder.is_trained(stage.name):
            raise ValueError(f"{run_folder} is not a finished run: its {stage.name} stage is not trained to its end.")
    check_export(run_folder, processor)
    return processor
