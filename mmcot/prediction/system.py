"""Load a system (its processor and the model of each stage), and the problems to predict."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel

from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.featurizer import vision_source
from mmcot.prediction.provenance import check_export, loaded_from
from mmcot.problems.schema import (
    join_captions,
)
from mmcot.problems.sources import load_problems, reading_options
from mmcot.problems.subsets import select
from mmcot.storage.paths import refuse_absent_path
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.loading_mmcot import load_stages


def load_system(model: str, dtype: torch.dtype | str = "auto") -> tuple[MMCoTProcessor, Mapping[str, PreTrainedModel]]:
    """
    Load the processor and the model of each stage from a finished run, a folder in the Hub's layout or a Hub id.

    Raises:
        ValueError: the path is absent or is neither a finished run nor a model folder, or the run's stages were
            retrained after the export.
        OSError: the download from the Hub failed, or a file is damaged.
    """
    refuse_absent_path(model, "a finished run, a model folder, or an id of the Hub (USER/NAME)")
    folder, run_folder = Path(model), RunFolder(Path(model))
    model, is_run = loaded_from(model), run_folder.hub.is_dir()
    if not is_run and folder.is_dir() and not (folder / "processor_config.json").is_file():
        raise ValueError(
            f"{folder} is neither a finished run (it has no hub/) nor a model folder (it has no processor_config.json)."
        )
    # Without `trust_remote_code=False`, transformers asks at the terminal whether to run a repository's code.
    processor = MMCoTProcessor.from_pretrained(model, trust_remote_code=False)
    if is_run:
        check_export(run_folder, processor)
    root = MMCoTForConditionalGeneration.from_pretrained(model, dtype=dtype, trust_remote_code=False)
    root = root.to(PartialState().device)
    return processor, load_stages(root, model, processor)


def load_inputs(
    arguments: argparse.Namespace, processor: MMCoTProcessor, models: Mapping[str, PreTrainedModel]
) -> tuple[Dataset, FeatureStore | None]:
    """
    Load the problems and, with `--features`, the feature store of their pictures, and check that they fit the models.

    Raises:
        ValueError: problems or features do not fit the models, or an option provides a column that no stage reads.
    """
    for name, column in (("features", "images"), ("captions", "caption")):
        if getattr(arguments, name) is not None and not processor.stages.read(column):
            raise ValueError(f"--{name} has no effect here: no stage of {arguments.model} reads `{column}`.")
    store = FeatureStore(arguments.features) if arguments.features is not None else None
    max_images = min(model.config.max_images for model in models.values())
    needs_files = store is None or store.needs_files
    reading = reading_options(arguments)
    problems = load_problems(arguments.source, arguments.split, max_images, needs_files, **reading)
    problems = select(problems, arguments.ids, arguments.filter, arguments.limit)
    if arguments.captions is not None:
        problems = join_captions(problems, arguments.captions)
    if store is None:
        if processor.image_processor is None and processor.stages.see_pictures and any(problems["images"]):
            raise ValueError(f"{arguments.model} has no picture tower, but problems have pictures: specify --features.")
        for model in models.values():  # fills the disk cache, and raises errors for broken pictures early
            vision_source(model, processor.image_processor, problems)
        return problems, None
    store.check_problems(problems)
    for model in models.values():
        store.check_model(model, processor.image_processor)
    return problems, store
