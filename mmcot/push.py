"""Publish a finished run on the Hub: built, checked, shown, uploaded in one commit, downloaded again and compared.

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

# Options that say how a run is published.
OF_A_RUN = ("base_model", "license", "license_name", "license_link", "adapters", "merge", "allow_unscored")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcot.push", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", nargs="?", type=Path, help="a finished run's folder; none to publish a Space alone")
    parser.add_argument("--repo_id", required=True, help="USER/NAME on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--dry_run", action="store_true", help="all but the upload")
    parser.add_argument("--revision", default="main", help="the branch to commit to; made where it is not there")
    parser.add_argument("--base_model", metavar="ID", help="of the text model, where the recipe names it by a path")
    parser.add_argument("--license", metavar="ID", help="of the weights, where that of their dataset is not known")
    parser.add_argument("--license_name", metavar="NAME", help="with --license other")
    parser.add_argument(
        "--license_link", metavar="LINK", help="with --license other: a page, or a file of the run's hub/"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--adapters", action="store_true", help="stages as adapters of one base, as they were trained")
    form.add_argument("--merge", action="store_true", help="stages that are adapters as whole models")
    parser.add_argument("--allow_unscored", action="store_true", help='without scores; the card says "not evaluated"')
    parser.add_argument("--overwrite", action="store_true", help="a repository whose content this tool did not make")
    parser.add_argument("--space", metavar="USER/NAME", help="publish a Space that answers with the model, too")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.run_dir is None and arguments.space is None:
        parser.error("name a finished run's folder, or a --space for a model that is published already")
    repository = Repository(arguments.repo_id, revision=arguments.revision, private=arguments.private)
    try:
        if arguments.run_dir is None:
            said = given_options(build_parser(), argv)
            refuse_without_effect(said, OF_A_RUN, "only a Space is published, and no run is named")
        elif not arguments.run_dir.exists():
            raise ValueError(f"{arguments.run_dir}: there is no such folder; expected a finished run.")
        check_repository_id(repository)
        if arguments.space is not None:
            check_repository_id(Repository(arguments.space, "space"))
        if arguments.run_dir is not None:
            if (arguments.adapters or arguments.merge) and not RunFolder(arguments.run_dir).is_adapted:
                raise ValueError(f"{arguments.run_dir}: its stages are no adapters; leave --adapters and --merge out.")
            check_license(arguments.license, arguments.license_name, arguments.license_link)
            publication = Publication(
                arguments.repo_id,
                arguments.base_model,
                arguments.license,
                arguments.merge,
                arguments.license_name,
                arguments.license_link,
            )
            how = (arguments.allow_unscored, arguments.overwrite, arguments.dry_run)
            commit = publish_run(RunFolder(arguments.run_dir), repository, publication, *how)
            if commit is not None:
                print(f"{arguments.repo_id} at {commit}: loads, and answers as {arguments.run_dir} does.")
        if arguments.space is not None:
            repository = Repository(arguments.space, "space", private=arguments.private)
            how = (arguments.overwrite, arguments.dry_run)
            commit = publish_space(repository, arguments.repo_id, arguments.revision, *how)
            if commit is not None:
                print(f"Space {arguments.space} at {commit}.")
    except HUB_ERRORS as error:
        raise SystemExit(f"error: {advice(error, repository)}") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
