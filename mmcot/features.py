"""Pictures -> features, computed once into a store (`feature_store.py`), or taken over from the authors' own files.

    python -m mmcot.features DATASET --vision CHECKPOINT_OR_NAME --output DIR [--preprocessing paper] [--dtype float16]
    python -m mmcot.features DATASET --vision detr --import_features detr.npy --name_map name_map.json --output DIR
    python -m mmcot.features DATASET --captions MODEL --output DIR

Each distinct picture is computed once, by its content, whatever problems show it. One that cannot be decoded is named
and left out, and the exit code says so. Training and prediction ask `vision_source` for a dataset's pictures. Captions
are `captions.py`'s, towers `vision_mmcot`'s.
"""

import argparse
import os
import sys

from mmcot.pictures.authors import AUTHORS_TOWERS, import_authors_features
from mmcot.pictures.captions import write_captions
from mmcot.pictures.featurizer import DTYPES, PREPROCESSINGS, FeatureOptions, TowerOptions, compute_features
from mmcot.problems.opening import SOURCES, Given
from mmcot.problems.schema import SPLITS
from mmcot.problems.sources import (
    add_dataset_options,
    choose_source,
    load_all_splits,
    reading_options,
    splits_of,
)
from mmcot.recipes.command_line import given_options, refuse_below, refuse_without_effect
from mmcot.storage.paths import check_output_folder, refuse_absent_path
from modeling_mmcot.vision_mmcot import (
    TOWERS,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmcot.features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", nargs="?", help=SOURCES)
    add_dataset_options(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--vision", help=f"a tower's checkpoint (folder or Hub id), or one of {', '.join(TOWERS)}")
    what.add_argument("--captions", metavar="MODEL", help="caption the pictures: an image-text-to-text checkpoint")
    parser.add_argument("--output", required=True, metavar="DIR", help="the store; one that is there is completed")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, help="by default all that there are")
    parser.add_argument(
        "--max_images", type=int, default=1, help="of a ScienceQA problem's pictures, the first so many"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="pictures at a time")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    # Two processes on two cores would wait for each other.
    spare = max(0, min(4, (os.cpu_count() or 1) - 2))
    parser.add_argument("--num_workers", type=int, default=spare, help="processes that read and prepare pictures ahead")
    parser.add_argument("--bf16", action="store_true", help="run the tower in bfloat16")
    parser.add_argument("--preprocessing", choices=PREPROCESSINGS, default="checkpoint")
    parser.add_argument("--vision_tower", choices=TOWERS, help="how the checkpoint's output becomes patches")
    parser.add_argument("--revision", help="of the checkpoint")
    parser.add_argument(
        "--import_features", metavar="FILE", help="the authors' detr.npy, clip.npy, resnet.npy, vit.pth"
    )
    parser.add_argument("--name_map", metavar="FILE", help="with --import_features, their name_map.json")
    parser.add_argument("--prompt", help="with --captions, what the captioner is asked")
    return parser


def main(argv: list[str] | None = None, dataset: Given | None = None) -> None:
    """
    Args:
        argv: the command line; by default this process's.
        dataset: in place of `DATASET`.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if (arguments.import_features is None) != (arguments.name_map is None):
        parser.error("--import_features and --name_map go together")
    if arguments.prompt is not None and arguments.captions is None:
        parser.error("--prompt goes with --captions")
    if arguments.import_features is not None and arguments.vision not in AUTHORS_TOWERS:
        parser.error(f"with --import_features, --vision is one of {', '.join(AUTHORS_TOWERS)}")
    try:
        check_options(arguments, given_options(build_parser(), argv))
        arguments.source = choose_source(arguments, dataset)
        failed = run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(
            "\n".join([*failed, f"error: {len(failed)} pictures were left out, the others are in {arguments.output}"])
        )
    print(f"written: {arguments.output}")


def check_options(arguments: argparse.Namespace, said: set[str]) -> None:
    """
    Raises:
        ValueError: an option is no number that it can be, or has no effect beside the others; nothing is at a path.
    """
    refuse_below(arguments, 1, "batch_size")
    refuse_below(arguments, 0, "num_workers", "max_images")
    of_a_tower = ("preprocessing", "vision_tower", "revision", "num_workers", "bf16")
    if arguments.import_features is not None:
        refuse_without_effect(said, (*of_a_tower, "batch_size"), "--import_features reads features, and runs no tower")
    if arguments.captions is not None:
        refuse_without_effect(said, (*of_a_tower, "dtype"), "--captions runs a captioner, and no tower")
    refuse_absent_path(arguments.vision or arguments.captions, "a checkpoint's folder, or an id of the Hub (USER/NAME)")
    check_output_folder(arguments.output, "--output")


def run(arguments: argparse.Namespace) -> list[str]:
    imports = arguments.import_features is not None
    problems = load_all_splits(
        arguments.source,
        arguments.splits or splits_of(arguments.source),
        arguments.max_images,
        not imports,
        **reading_options(arguments),
    )
    if imports:
        import_authors_features(
            problems,
            arguments.output,
            arguments.vision,
            arguments.import_features,
            arguments.name_map,
            arguments.dtype,
        )
        return []
    if arguments.captions is not None:
        return write_captions(problems, arguments.output, arguments.captions, arguments.prompt, arguments.batch_size)
    tower = TowerOptions(
        arguments.vision, arguments.preprocessing, arguments.revision, arguments.vision_tower, arguments.bf16
    )
    options = FeatureOptions(arguments.dtype, arguments.batch_size, arguments.num_workers)
    return compute_features(problems, arguments.output, tower, options)


if __name__ == "__main__":
    main()
