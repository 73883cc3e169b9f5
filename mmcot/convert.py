"""Converts the authors' checkpoints (amazon-science/mm-cot, `T5ForMultimodalGeneration`) to folders of this package.

    python -m mmcot.convert ORIGINAL_DIR OUT_DIR --vision vit --stage_folders RATIONALE ANSWER --attach_tower vit

T5's tensors keep their names, and the fusion's tensors are renamed. No tensor is dropped, added or truncated: if the
tensors of a checkpoint do not match its config.json exactly, the checkpoint is refused and no file is written.
"""

import argparse
import sys

from mmcot.hub.original import convert
from mmcot.pictures.authors import AUTHORS_TOWERS
from mmcot.recipes.command_line import refuse_without_effect
from mmcot.storage.paths import check_output_folder, refuse_absent_path
from modeling_mmcot.stage_mmcot import PAPER_TEMPLATES


def main(argv: list[str] | None = None) -> None:
    """
    Convert a checkpoint.

    Args:
        argv: the command line; by default that of this process.
    """
    parser = argparse.ArgumentParser(prog="python -m mmcot.convert", description=__doc__.splitlines()[0])
    parser.add_argument("original_dir", help="the authors' folder, or a Hub id: USER/NAME or USER/NAME/FOLDER")
    parser.add_argument("out_dir", help="the folder to write")
    parser.add_argument(
        "--vision", required=True, choices=AUTHORS_TOWERS, help="the tower that computed its training features"
    )
    parser.add_argument(
        "--stage_folders",
        nargs=2,
        metavar=("RATIONALE", "ANSWER"),
        help="the stages' folders in ORIGINAL_DIR; both stages are written to OUT_DIR in the Hub's layout",
    )
    parser.add_argument(
        "--prompt_formats",
        nargs=2,
        choices=PAPER_TEMPLATES,
        metavar=("RATIONALE", "ANSWER"),
        help="with --stage_folders, the formats that the stages were trained on (default: QCM-E QCMG-A)",
    )
    parser.add_argument("--attach_tower", metavar="CHECKPOINT", help="add this pre-trained picture tower to the model")
    arguments = parser.parse_args(argv)
    try:
        if arguments.stage_folders is None:
            refuse_without_effect(
                [name for name, value in vars(arguments).items() if value is not None],
                ("prompt_formats",),
                "it sets the formats of the two --stage_folders",
            )
        # A Hub id may include a folder of the repository: USER/NAME/FOLDER.
        is_id = not arguments.original_dir.startswith((".", "/", "~")) and arguments.original_dir.count("/") == 2
        if not is_id:
            refuse_absent_path(arguments.original_dir, "the authors' folder, or a Hub id (USER/NAME)")
        if arguments.attach_tower is not None:
            refuse_absent_path(arguments.attach_tower, "a tower's folder, or a Hub id (USER/NAME)")
        check_output_folder(arguments.out_dir, "OUT_DIR")
        report = convert(
            arguments.original_dir,
            arguments.out_dir,
            arguments.vision,
            arguments.stage_folders,
            arguments.prompt_formats,
            arguments.attach_tower,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join([*report, f"written: {arguments.out_dir}"]))


if __name__ == "__main__":
    main()
