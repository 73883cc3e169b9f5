"""Runs the stages over a split: `python -m mmcot.predict RUN_OR_HUB_DIR --dataset demo --split test --output FILE`.

Free-running: the gold columns are taken away before anything else happens, so no prompt can hold one. What a stage does
with a batch is `pipeline_mmcot.run_stage`; this file only walks over problems, on one process or several.
"""

import argparse
import logging
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mmcot.feature_store import FeatureStore
from mmcot.files import write_json
from mmcot.problems import SPLITS, check_pictures, join_captions, load_problems, read_pictures, without_gold
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.pictures_mmcot import as_pictures
from modeling_mmcot.pipeline_mmcot import run_stage
from modeling_mmcot.processing_mmcot import Stage

logger = logging.getLogger(__name__)


def predict_stage(
    model: PreTrainedModel,
    processor: MMCoTProcessor,
    stage: Stage,
    problems: Dataset,
    predictions: dict[str, dict],
    batch_size: int = 32,
    decode_answer: bool = False,
    store: FeatureStore | None = None,
) -> None:
    """
    Add the columns that a stage writes to `predictions`, for every problem, on every process alike.

    Args:
        problems: rows of the schema; gold columns may be there and are not looked at.
        predictions: by problem id, what the earlier stages wrote; a missing id is a problem with nothing written yet.
        store: features of the problems' pictures, in place of the pictures.
    """
    model.eval()
    problems = without_gold(problems)
    state = PartialState()
    with state.split_between_processes(list(range(len(problems)))) as indices:
        written, shortened = [], 0
        starts = range(0, len(indices), batch_size)
        for start in tqdm(starts, desc=f"{stage.name} stage", disable=not state.is_main_process, leave=False):
            rows = [problems[index] for index in indices[start : start + batch_size]]
            pictures = read_vision_inputs(rows, stage, store)
            rows = [{**row, **predictions.get(row["id"], {})} for row in rows]
            shortened += sum(processor.is_too_long(stage.render_source(row), stage) for row in rows)
            ids = [row["id"] for row in rows]
            columns = run_stage(model, processor, stage, rows, decode_answer=decode_answer, **pictures)
            written.extend(zip(ids, columns, strict=True))
    log_shortened(stage, sum(gather_object([shortened])), len(problems), "problems to predict")
    for problem_id, columns in gather_object(written):
        predictions.setdefault(problem_id, {}).update(columns)


def read_vision_inputs(rows: list[dict], stage: Stage, store: FeatureStore | None) -> dict:
    """What `run_stage` is given of the pictures of a batch: themselves, or their features out of a store."""
    if "images" not in stage.reads:
        return {"images": None}
    if store is not None:
        return {"images": None, "vision_inputs": store.batch(rows)}
    # One problem after another: what is kept of a picture is bounded, what it is decoded from is not.
    return {"images": [as_pictures(read_pictures(row)) for row in rows]}


def log_shortened(stage: Stage, count: int, total: int, which: str) -> None:
    if count and PartialState().is_main_process:
        logger.warning(
            f"{stage.name} stage: the sources of {count} of {total} {which} are longer than {stage.max_source_length} "
            f"tokens and are shortened"
        )


def load_system(model: str) -> tuple[MMCoTProcessor, dict[str, PreTrainedModel]]:
    """The processor and each stage's model, from a finished run, a folder in the Hub's layout or a Hub id."""
    folder = Path(model)
    if (folder / "hub").is_dir():
        model = str(folder / "hub")
    elif folder.is_dir() and not (folder / "processor_config.json").is_file():
        raise ValueError(
            f"{folder} is neither a finished run (it has no hub/) nor a model folder (it has no processor_config.json)."
        )
    processor = MMCoTProcessor.from_pretrained(model)
    names = [stage.name for stage in processor.stages]
    subfolders = dict.fromkeys(names[-1:], "") | {name: name for name in names[:-1]}
    state = PartialState()
    models = {
        name: MMCoTForConditionalGeneration.from_pretrained(model, subfolder=subfolders[name]).to(state.device)
        for name in names
    }
    return processor, models


def predict(
    processor: MMCoTProcessor,
    models: dict[str, PreTrainedModel],
    problems: Dataset,
    batch_size: int = 32,
    decode_answer: bool = False,
    store: FeatureStore | None = None,
) -> dict[str, dict]:
    """The predictions of all stages, by problem id, in the order of the dataset."""
    predictions: dict[str, dict] = {problem_id: {} for problem_id in problems["id"]}
    for stage in processor.stages:
        predict_stage(models[stage.name], processor, stage, problems, predictions, batch_size, decode_answer, store)
    return predictions


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmcot.predict", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run folder, a folder in the Hub's layout, or a Hub id")
    parser.add_argument("--dataset", required=True, help="demo, a ScienceQA folder, or a .jsonl / .parquet file")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--output", required=True, help="the predictions file to write")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--decode_answer", action="store_true", help='read a generated "The answer is (B)." too')
    parser.add_argument("--features", metavar="DIR", help="features of the pictures, as mmcot.features wrote them")
    parser.add_argument("--captions", metavar="FILE", help="captions.json, as mmcot.features --captions wrote it")
    arguments = parser.parse_args(argv)
    try:
        processor, models = load_system(arguments.model)
        problems, store = load_inputs(arguments, processor, models)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    predictions = predict(processor, models, problems, arguments.batch_size, arguments.decode_answer, store)
    if PartialState().is_main_process:
        write_json(arguments.output, predictions)
        print(f"{len(predictions)} predictions: {arguments.output}")


def reads_images(processor: MMCoTProcessor) -> bool:
    return any("images" in stage.reads for stage in processor.stages)


def load_inputs(
    arguments: argparse.Namespace, processor: MMCoTProcessor, models: dict[str, PreTrainedModel]
) -> tuple[Dataset, FeatureStore | None]:
    """The problems, and where asked for the store of their pictures' features; both are found to fit the models."""
    store = FeatureStore(arguments.features) if arguments.features is not None else None
    max_images = min(model.config.max_images for model in models.values())
    needs_files = store is None or store.needs_files
    problems = load_problems(arguments.dataset, arguments.split, max_images, needs_files)
    if arguments.captions is not None:
        problems = join_captions(problems, arguments.captions)
    if store is None:
        if processor.image_processor is None and reads_images(processor) and any(problems["images"]):
            raise ValueError(f"{arguments.model} has no picture tower, and problems have pictures: give --features.")
        check_pictures(problems)
        return problems, None
    store.check_problems(problems)
    for model in models.values():
        store.check_model(model, processor.image_processor)
    return problems, store


if __name__ == "__main__":
    main()
