"""Writes the features of pictures to a store (`pictures/feature_store.py`), or imports the authors' feature files.

    python -m mmcot.features DATASET --vision CHECKPOINT_OR_NAME --output DIR [--preprocessing paper] [--dtype float16]
    python -m mmcot.features DATASET --vision detr --import_features detr.npy --name_map name_map.json --output DIR
    python -m mmcot.features DATASET --captions MODEL --output DIR

Each picture is identified by its content and computed once, even if several problems show it. A picture that cannot be
decoded is reported and left out, and the exit code is 1. Training and prediction get the pictures of a dataset from
`featurizer.vision_source`. Captions are in `pictures/captions.py`, towers in `vision_mmcot.py`.
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
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--vision", help=f"a tower's checkpoint (folder or Hub id), or one of {', '.join(TOWERS)}")
    model.add_argument("--captions", metavar="MODEL", help="caption the pictures: an image-text-to-text checkpoint")
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="the folder of the store or the captions; an existing one is completed",
    )
    parser.add_argument("--splits", nargs="+", choices=SPLITS, help="by default all splits of the dataset")
    parser.add_argument(
        "--max_images", type=int, default=1, metavar="N", help="only the first N pictures of a ScienceQA problem"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="pictures in a batch")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    # Two cores are left free, because workers and the main process that share cores wait for each other.
    spare = max(0, min(4, (os.cpu_count() or 1) - 2))
    parser.add_argument("--num_workers", type=int, default=spare, help="processes that read and prepare pictures ahead")
    parser.add_argument("--bf16", action="store_true", help="run the tower in bfloat16")
    parser.add_argument("--preprocessing", choices=PREPROCESSINGS, default="checkpoint")
    parser.add_argument("--vision_tower", choices=TOWERS, help="how the checkpoint's output becomes patches")
    parser.add_argument("--revision", help="the revision of the checkpoint")
    parser.add_argument(
        "--import_features", metavar="FILE", help="the authors' detr.npy, clip.npy, resnet.npy, vit.pth"
    )
    parser.add_argument("--name_map", metavar="FILE", help="with --import_features, the authors' name_map.json")
    parser.add_argument("--prompt", help="with --captions, the prompt of the captioner")
    return parser


def main(argv: list[str] | None = None, dataset: Given | None = None) -> None:
    """
    Compute or import features, or write captions.

    Args:
        argv: the command line; by default that of this process.
        dataset: the problems, in place of `DATASET`.
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
            "\n".join([*failed, f"error: {len(failed)} pictures were left out; the others are in {arguments.output}"])
        )
    print(f"written: {arguments.output}")


def check_options(arguments: argparse.Namespace, given: set[str]) -> None:
    """
    Args:
        given: the names of the options on the command line.

    Raises:
        ValueError: an option is out of range or has no effect together with the others, or a path does not exist.
    """
    refuse_below(arguments, 1, "batch_size")
    refuse_below(arguments, 0, "num_workers", "max_images")
    tower_options = ("preprocessing", "vision_tower", "revision", "num_workers", "bf16")
    if arguments.import_features is not None:
        reason = "--import_features reads features and runs no tower"
        refuse_without_effect(given, (*tower_options, "batch_size"), reason)
    if arguments.captions is not None:
        refuse_without_effect(given, (*tower_options, "dtype"), "--captions runs a captioner and no tower")
    refuse_absent_path(arguments.vision or arguments.captions, "a checkpoint's folder, or a Hub id (USER/NAME)")
    check_output_folder(arguments.output, "--output")


def run(arguments: argparse.Namespace) -> list[str]:
    """Write the store or the captions, and return one error message for each picture that failed."""
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
