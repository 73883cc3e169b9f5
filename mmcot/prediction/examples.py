"""Tokenize the sources and targets of a stage once, cache the tokens on disk, and collate them into batches.

The cache key covers all inputs: the problems, the stage's templates and lengths, the tokenizer, the code and the
library versions (`caches.py`). Pictures are not cached here; the collator reads them, in DataLoader workers if there
are any. This module is independent of the model.
"""

import functools
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.pixel_store import PixelStore
from mmcot.prediction.batching import Lengths
from mmcot.problems.progress_bars import without_dataset_bars
from mmcot.storage.caches import code_digest, load_or_compute, versions_of
from mmcot.storage.digests import sha256_of_file
from mmcot.storage.files import cache_folder
from modeling_mmcot import MMCoTProcessor, processing_mmcot, stage_mmcot
from modeling_mmcot.stage_mmcot import Stage


def tokenized(problems: Dataset, stage: Stage, processor: MMCoTProcessor, with_targets: bool) -> Dataset:
    """
    Tokenize problems for a stage.

    Args:
        problems: rows with the columns that the stage reads and, for targets, the columns that its target is made from.

    Returns:
        A row for each problem: `id` and `images` unchanged, `input_ids`, `is_shortened` (whether the source exceeded
        the stage's limit) and, with targets, `labels` and `is_cut` (whether the target exceeded the stage's limit).
    """
    key = Hasher.hash((problems._fingerprint, asdict(stage), tokenizer_state(processor.tokenizer), with_targets))
    producers = (
        code_digest(processing_mmcot, stage_mmcot, tokenize),
        versions_of("tokenizers", "transformers", "jinja2"),
    )
    key = Hasher.hash((key, producers))
    file = cache_folder() / "examples" / f"{key}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = problems.remove_columns("images")
    make = functools.partial(
        texts.map,
        tokenize,
        batched=True,
        fn_kwargs={"stage": stage, "processor": processor, "with_targets": with_targets},
        remove_columns=texts.column_names,
        cache_file_name=str(file),
        new_fingerprint=key,
        desc=f"tokenizing for the {stage.name} stage",
    )
    examples = load_or_compute(make, file, len(problems))
    with without_dataset_bars():
        return datasets.concatenate_datasets([problems.select_columns(["id", "images"]), examples], axis=1)


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Serialize the state that determines the tokens of a text, without the padding and truncation of earlier calls."""
    if not hasattr(tokenizer, "backend_tokenizer"):  # ByT5's tokenizer, which is written in Python
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        parts = {"class": type(tokenizer).__name__, "special": special, "files": vocabulary_files(tokenizer)}
        return json.dumps({**parts, "vocabulary": tokenizer.get_vocab()}, sort_keys=True)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**state, "truncation": None, "padding": None})


def vocabulary_files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the digests of the vocabulary files that the tokenizer saves; a byte-level tokenizer has none."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_vocabulary(folder)
        return [sha256_of_file(file) for file in sorted(Path(folder).iterdir())]


def tokenize(columns: dict[str, list], stage: Stage, processor: MMCoTProcessor, with_targets: bool) -> dict[str, list]:
    problems = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    sources = processor.tokenizer([stage.render_source(problem) for problem in problems], verbose=False)["input_ids"]
    is_shortened = [len(source) > stage.max_source_length for source in sources]
    for index, problem in enumerate(problems):
        if is_shortened[index]:
            sources[index] = processor.tokenizer(processor.fit_source(problem, stage))["input_ids"]
    examples = {"input_ids": sources, "is_shortened": is_shortened}
    if with_targets:
        targets = [stage.render_target(problem) for problem in problems]
        full, truncated = (
            processor.tokenizer(targets, verbose=False, **limits)["input_ids"]
            for limits in ({}, {"truncation": True, "max_length": stage.max_target_length})
        )
        examples["labels"] = truncated
        examples["is_cut"] = [len(target) > stage.max_target_length for target in full]
    return examples


def lengths_of(examples: Dataset) -> list[Lengths]:
    """Return the number of source and target tokens of each example."""
    sources = map(len, examples["input_ids"])
    targets = map(len, examples["labels"]) if "labels" in examples.column_names else [0] * len(examples)
    return list(zip(sources, targets, strict=True))


class StageCollator:
    """Collates examples into tensors and reads their pictures, as pixels or as features."""

    def __init__(self, processor: MMCoTProcessor, stage: Stage, pictures: FeatureStore | PixelStore | None = None):
        self.tokenizer = processor.tokenizer
        self.pictures = pictures if stage.sees_pictures else None

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.collate_texts(examples)
        if self.pictures is not None:
            batch.update(self.pictures.batch(examples))
        return batch

    def collate_texts(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = dict(self.tokenizer.pad({"input_ids": [row["input_ids"] for row in examples]}, return_tensors="pt"))
        if "labels" in examples[0]:
            labels = [torch.tensor(row["labels"]) for row in examples]
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return batch
