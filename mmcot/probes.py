"""Measures how much the answers depend on the rationale, the picture and the content of the choices.

    python -m mmcot.probes RUN_OR_HUB_DIR --dataset demo --split test [--limit N] [--occlusion N] [--output FILE]

A model may ignore its own chain of thought. Therefore the last stage answers again with a rationale that is dropped,
truncated, taken from another problem or shuffled word by word, and with the choices in another order. The whole system
answers again without the picture, and with another problem's picture. With `--occlusion`, it also answers with parts of
the pictures hidden (`mmcot/analysis/occlusion.py`). Predictions are made as in `mmcot.predict`.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset

from mmcot.analysis.occlusion import format_occlusion, measure_occlusion
from mmcot.analysis.probes import format_probes, probe
from mmcot.prediction.provenance import weights_of
from mmcot.prediction.system import load_inputs, load_system
from mmcot.problems.digests import digest_of_problems
from mmcot.problems.opening import SOURCES, Given
from mmcot.problems.schema import SPLITS, require_answers
from mmcot.problems.sources import add_dataset_options, choose_source, non_default_options
from mmcot.problems.subsets import add_selection_options
from mmcot.recipes.command_line import refuse_below
from mmcot.storage.files import write_json
from mmcot.storage.paths import check_output_file


def main(argv: list[str] | None = None, dataset: Given | None = None) -> None:
    """
    Probe a system and print the table.

    Args:
        argv: the command line; by default that of this process.
        dataset: the problems, in place of `--dataset`.
    """
    parser = argparse.ArgumentParser(prog="python -m mmcot.probes", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run folder, a folder in the Hub's layout, or a Hub id")
    parser.add_argument("--dataset", help=SOURCES)
    add_dataset_options(parser)
    parser.add_argument("--split", default="test", choices=SPLITS)
    add_selection_options(parser)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--features", metavar="DIR", help="features of the pictures, as mmcot.features wrote them")
    parser.add_argument("--captions", metavar="FILE", help="captions.json, as mmcot.features --captions wrote it")
    parser.add_argument(
        "--occlusion", type=int, metavar="N", help="also hide regions of the pictures of the first N problems with any"
    )
    parser.add_argument("--output", metavar="FILE", help="also write the table as JSON")
    arguments = parser.parse_args(argv)
    PartialState(cpu=not torch.accelerator.is_available())
    try:
        arguments.source = choose_source(arguments, dataset)
        refuse_below(arguments, 1, "batch_size", "occlusion")
        if arguments.output is not None:
            check_output_file(arguments.output)
        processor, models = load_system(arguments.model)
        problems, store = load_inputs(arguments, processor, models)
        require_answers(problems)
        if store is not None and not store.needs_files:
            raise ValueError(
                f"{arguments.features} identifies features by problem id, so pictures cannot be withheld or swapped."
            )
        occluded = None if arguments.occlusion is None else problems_to_occlude(problems, arguments.occlusion)
        if occluded is not None and (store is not None or not processor.stages.see_pictures):
            raise ValueError("--occlusion needs a system that sees pictures, and their files: omit --features.")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    results = probe(processor, models, problems, arguments.batch_size, store)
    hidden = None if occluded is None else measure_occlusion(processor, models, occluded, arguments.batch_size)
    if PartialState().is_main_process:
        if arguments.output is not None:
            weights = weights_of(arguments.model, processor)
            origin = {"dataset": arguments.dataset, "split": arguments.split, **non_default_options(arguments)}
            origin |= {"weights": weights, "problems_digest": digest_of_problems(problems)}
            write_json(
                Path(arguments.output), {**origin, "probes": results, **({"occlusion": hidden} if hidden else {})}
            )
        print(format_probes(results))
        if hidden is not None:
            print(f"\n{format_occlusion(hidden)}")


def problems_to_occlude(problems: Dataset, limit: int) -> Dataset:
    """
    Return the first problems with a picture and choices, at most `limit`.

    Raises:
        ValueError: there are none.
    """
    columns = problems.select_columns(["choices", "images"])
    chosen = [number for number, row in enumerate(columns) if row["images"] and row["choices"]][:limit]
    if not chosen:
        raise ValueError("--occlusion: no selected problem has a picture and choices.")
    return problems.select(chosen)


if __name__ == "__main__":
    main()
