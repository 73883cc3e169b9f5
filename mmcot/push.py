"""Publishes a finished run on the Hub: checks and lists its files, uploads them in one commit, and verifies the upload.

python -m mmcot.push runs/demo --repo_id USER/NAME [--private] [--dry_run] [--space USER/SPACE]
"""

import argparse
from pathlib import Path

from mmcot.hub.card import Publication
from mmcot.hub.licenses import check_license
from mmcot.hub.publish import publish_run
from mmcot.hub.repository import HUB_ERRORS, Repository, advice, check_repository_id
from mmcot.hub.space import publish_space
from mmcot.recipes.command_line import given_options, refuse_without_effect
from mmcot.storage.run_folder import RunFolder

# Options that have no effect if only a Space is published.
RUN_OPTIONS = ("base_model", "license", "license_name", "license_link", "adapters", "merge", "allow_unscored")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcot.push", description=__doc__.splitlines()[0])
    parser.add_argument(
        "run_dir", nargs="?", type=Path, help="the folder of a finished run; omit it to publish only a Space"
    )
    parser.add_argument("--repo_id", required=True, help="USER/NAME on the Hub")
    parser.add_argument("--private", action="store_true", help="if the repository is new, create it as private")
    parser.add_argument("--dry_run", action="store_true", help="do everything but the upload")
    parser.add_argument("--revision", default="main", help="the branch to commit to; created if missing")
    parser.add_argument("--base_model", metavar="ID", help="the text model's Hub id, if the recipe names it by a path")
    parser.add_argument("--license", metavar="ID", help="the weights' license, if the dataset's license is unknown")
    parser.add_argument("--license_name", metavar="NAME", help="with --license other: the name of the license")
    parser.add_argument(
        "--license_link", metavar="LINK", help="with --license other: a page, or a file of the run's hub/"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--adapters", action="store_true", help="publish one base model and an adapter for each stage, as trained"
    )
    form.add_argument(
        "--merge", action="store_true", help="merge each stage's adapter into the base, and publish whole models"
    )
    parser.add_argument(
        "--allow_unscored", action="store_true", help='publish without scores; the card has "not evaluated"'
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files of a repository not made by mmcot")
    parser.add_argument("--space", metavar="USER/NAME", help="also publish a Space that answers with the model")
    return parser


def main(argv: list[str] | None = None) -> None:
    """
    Publish a run, a Space or both.

    Args:
        argv: the command line; by default that of this process.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.run_dir is None and arguments.space is None:
        parser.error("name the folder of a finished run, or a --space for a model that is already published")
    repository = Repository(arguments.repo_id, revision=arguments.revision, private=arguments.private)
    try:
        if arguments.run_dir is None:
            given = given_options(build_parser(), argv)
            refuse_without_effect(given, RUN_OPTIONS, "no run is named, so only a Space is published")
        elif not arguments.run_dir.exists():
            raise ValueError(f"{arguments.run_dir}: no such folder; expected a finished run.")
        check_repository_id(repository)
        if arguments.space is not None:
            check_repository_id(Repository(arguments.space, "space"))
        if arguments.run_dir is not None:
            if (arguments.adapters or arguments.merge) and not RunFolder(arguments.run_dir).is_adapted:
                raise ValueError(f"{arguments.run_dir}: its stages are not adapters; omit --adapters and --merge.")
            check_license(arguments.license, arguments.license_name, arguments.license_link)
            publication = Publication(
                arguments.repo_id,
                arguments.base_model,
                arguments.license,
                arguments.merge,
                arguments.license_name,
                arguments.license_link,
            )
            commit = publish_run(
                RunFolder(arguments.run_dir),
                repository,
                publication,
                allow_unscored=arguments.allow_unscored,
                overwrite=arguments.overwrite,
                dry_run=arguments.dry_run,
            )
            if commit is not None:
                print(f"{arguments.repo_id} at {commit}: loads and gives the same answers as {arguments.run_dir}.")
        if arguments.space is not None:
            repository = Repository(arguments.space, "space", private=arguments.private)
            commit = publish_space(
                repository,
                arguments.repo_id,
                arguments.revision,
                overwrite=arguments.overwrite,
                dry_run=arguments.dry_run,
            )
            if commit is not None:
                print(f"Space {arguments.space} at {commit}.")
    except HUB_ERRORS as error:
        raise SystemExit(f"error: {advice(error, repository)}") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
