"""A known answer that travels with a system: what each stage computed for one small problem where it was exported.

The pipeline computes it again when it is loaded, and raises an error that names the difference: other weights, another
template, a library that computes something else. This file knows no dataset.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .inference_mmcot import choose_answers, encode, generate_finite
from .loading_mmcot import hub_options, stage_model
from .processing_mmcot import MMCoTProcessor
from .stage_mmcot import GOLD_COLUMNS, Stage

logger = logging.get_logger(__name__)

FILE = "known_answer.json"
CHOICES = ["red", "blue"]
TARGET = "The answer is (A)."
MAX_NEW_TOKENS = 8
NUM_LOGITS = 8  # of each position, evenly spread over the vocabulary
NUM_POSITIONS = 4
# By how much of the largest logit another machine or version may differ: by the rounding of the model's dtype.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def known_answer(models: Mapping[str, PreTrainedModel], processor: MMCoTProcessor) -> dict[str, Any]:
    """What each stage computes for the problem: its source, some logits, greedy tokens, and the choices' scores."""
    return {
        "versions": versions(),
        "stages": {stage.name: of_stage(models, processor, stage) for stage in processor.stages},
    }


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


@torch.no_grad()
def of_stage(models: Mapping[str, PreTrainedModel], processor: MMCoTProcessor, stage: Stage) -> dict[str, Any]:
    problem = {name: f"A {name}." for name in stage.reads if name not in (*GOLD_COLUMNS, "images")}
    problem = {**problem, "question": "Which color is it?", "choices": CHOICES}
    with stage_model(models, stage.name) as model:
        inputs = dict(processor(problem, stage=stage.name))
        inputs.update(picture_inputs(model, processor, stage))
        encoded = encode(model, inputs)
        labels = processor.encode_texts([TARGET])["input_ids"][:, :NUM_POSITIONS].to(model.device)
        logits = model(**encoded, labels=labels).logits[0].float()
        greedy = {"num_beams": 1, "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
        texts, _ = generate_finite(model, processor, stage, [problem], encoded, **greedy)
        spread = torch.linspace(0, logits.shape[-1] - 1, NUM_LOGITS).long()
        found = {
            "source": stage.render_source(problem),
            "dtype": str(model.dtype).removeprefix("torch."),
            "generation": generation_settings(model.generation_config),
            "logits": [[round(value, 6) for value in row] for row in logits[:, spread].tolist()],
            "greedy": texts[0],
        }
        if stage.answers:
            found["scores"] = choose_answers(model, processor, stage, [problem], encoded)[0]["scores"]
    return found


def generation_settings(config: GenerationConfig) -> dict[str, Any]:
    """Settings of `generate` that are compared; versions of transformers differ in what an unset one is."""
    unset = {"max_new_tokens": None, "num_beams": 1, "do_sample": False, "length_penalty": 1.0, "eos_token_id": None}
    unset |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    found = {name: getattr(config, name, None) for name in unset}
    return {name: unset[name] if value is None else value for name, value in found.items()}


def picture_inputs(model: PreTrainedModel, processor: MMCoTProcessor, stage: Stage) -> dict[str, torch.Tensor]:
    """A drawn picture, or features where the model has no tower; nothing for a stage that sees none."""
    width = model.config.vision_hidden_size
    if "images" not in stage.reads or width is None:
        return {}
    if processor.image_processor is None:
        return {"vision_features": torch.linspace(-1, 1, 4 * width).view(1, 4, width)}
    return processor.prepare_pictures([Image.linear_gradient("L").resize((96, 64)).convert("RGB")], 1)


def write_known_answer(folder: str | os.PathLike, models: Mapping[str, PreTrainedModel], processor) -> None:
    """Into a folder that holds the whole system, whose weights' files it names by their SHA-256."""
    weights = {name: sha256(path) for name, path in weights_of(folder).items()}
    known = {**known_answer(models, processor), "weights": weights}
    with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
        json.dump(known, file, indent=1)
        file.write("\n")


def weights_of(folder: str | os.PathLike) -> dict[str, str]:
    """The safetensors files of the folder and its subfolders, by their names from the folder on."""
    paths = {}
    for parent, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            if name.endswith(".safetensors"):
                path = os.path.join(parent, name)
                paths[os.path.relpath(path, folder).replace(os.sep, "/")] = path
    return paths


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_known_answer(root: PreTrainedModel, models: Mapping[str, PreTrainedModel], processor) -> None:
    """
    Compare with the repository's known answer, where it has one.

    Raises:
        ValueError: a file of weights is another than that of the export, or a stage computes something else: by how
            much, and with which versions.
    """
    repository, path = root.name_or_path, known_answer_file(root)
    if path is None:
        return
    known = read_known_answer(path, processor.stages.names)
    # The files that were loaded lie beside it; the names that it holds open nothing.
    found = weights_of(os.path.dirname(path))
    for name, digest in known["weights"].items():
        if name not in found:
            raise ValueError(
                f"{repository}: its known answer names {name}, which does not lie beside it: other weights were loaded "
                f"(a variant?). check=False loads them all the same."
            )
        if sha256(found[name]) != digest:
            raise ValueError(
                f"{repository}: {name} is not the file that was exported with its known answer: it is damaged or was "
                f"replaced. Download it again (force_download=True); of weights of your own, write the system with "
                f"pipe.save_pretrained, or load it with check=False."
            )
    if getattr(root, "is_quantized", False):
        logger.warning(
            "Only the files of %s are checked: quantization changes its numbers by more than a fault would.", repository
        )
        return
    for stage in processor.stages:
        difference = differs(known["stages"][stage.name], of_stage(models, processor, stage))
        if difference is not None:
            exported = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
            here = ", ".join(f"{name} {version}" for name, version in versions().items())
            raise ValueError(
                f"{repository}: the {stage.name} stage does not compute what it computed when it was exported: "
                f"{difference}. Exported with {exported}; here {here}. check=False loads it all the same."
            )


def read_known_answer(path: str, stages: list[str]) -> dict[str, Any]:
    """
    Raises:
        ValueError: the file is no known answer of these stages.
    """
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        for stage in stages:
            differs(known["stages"][stage], known["stages"][stage])  # itself: all that a comparison reads is there
        is_whole = all(isinstance(known[name], dict) for name in ("weights", "versions"))
    except (AttributeError, KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"{path} is damaged, or of another version of mmcot: expected a known answer of the stages "
            f"{', '.join(stages)}. Download it again (force_download=True), or load with check=False."
        )
    return known


def known_answer_file(root: PreTrainedModel) -> str | None:
    """The path of the known answer; None for a model from no repository, or from one that has none."""
    if not root.name_or_path:
        return None
    options = {name: value for name, value in hub_options(root).items() if name != "force_download"}
    return cached_file(root.name_or_path, FILE, _raise_exceptions_for_missing_entries=False, **options)


def differs(known: dict[str, Any], found: dict[str, Any]) -> str | None:
    """What differs by more than rounding, in words; None where nothing does."""
    if found["source"] != known["source"]:
        return f"its source is {found['source']!r}, and was {known['source']!r}"
    if found["generation"] != known["generation"]:
        return f"it generates by {found['generation']}, and did by {known['generation']}"
    expected, logits = torch.tensor(known["logits"]), torch.tensor(found["logits"])
    if logits.shape != expected.shape:
        return f"its logits are of shape {tuple(logits.shape)}, and were {tuple(expected.shape)}"
    dtypes = [getattr(torch, answer["dtype"]) for answer in (known, found)]
    tolerance = max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in dtypes)
    error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not error <= tolerance:
        return f"its logits differ by {error:.2g} of the largest, and rounding explains {tolerance:g}"
    if dtypes == [torch.float32, torch.float32] and found["greedy"] != known["greedy"]:
        return f"it writes {found['greedy']!r}, and wrote {known['greedy']!r}"
    scores, others = found.get("scores", []), known.get("scores", [])
    error = max((abs(one - other) for one, other in zip(scores, others, strict=True)), default=0.0)
    if not error <= tolerance:
        return f"its scores differ by {error:.2g}, and rounding explains {tolerance:g}"
    return None
