"""The known answer of a system: the outputs of each stage for one small problem, recorded at export.

The pipeline recomputes it on loading and raises an error that names the difference, if there is one: other weights,
another template, or a library version with other results. This file does not depend on a dataset.
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
from .processing_mmcot import MMCoTProcessor, as_passages
from .stage_mmcot import GOLD_COLUMNS, Stage

logger = logging.get_logger(__name__)

FILE = "known_answer.json"
CHOICES = ["red", "blue"]
TARGET = "The answer is (A)."
MAX_NEW_TOKENS = 8
NUM_LOGITS = 8  # per position, evenly spaced over the vocabulary
NUM_POSITIONS = 4
# Allowed difference between machines or versions, relative to the largest logit: the rounding of the model's dtype.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def known_answer(models: Mapping[str, PreTrainedModel], processor: MMCoTProcessor) -> dict[str, Any]:
    """Compute the known answer of each stage: source, some logits, greedy text, and the scores of the choices."""
    return {
        "versions": versions(),
        "stages": {
            stage.name: compute_stage_answer(models, processor, stage) for stage in processor.stages.with_models
        },
    }


def versions() -> dict[str, str]:
    """Return the installed versions of torch and transformers."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


@torch.no_grad()
def compute_stage_answer(
    models: Mapping[str, PreTrainedModel], processor: MMCoTProcessor, stage: Stage
) -> dict[str, Any]:
    """Compute the known answer of one stage."""
    problem: dict[str, Any] = {name: f"A {name}." for name in stage.reads if name not in (*GOLD_COLUMNS, "images")}
    retrieved = {other.writes for other in processor.stages.retrieving} & problem.keys()
    problem |= {name: as_passages([problem[name]], name) for name in retrieved}
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
    """Return the settings of `generate` to compare; versions of transformers differ in the values of unset ones."""
    unset = {"max_new_tokens": None, "num_beams": 1, "do_sample": False, "length_penalty": 1.0, "eos_token_id": None}
    unset |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    found = {name: getattr(config, name, None) for name in unset}
    return {name: unset[name] if value is None else value for name, value in found.items()}


def picture_inputs(model: PreTrainedModel, processor: MMCoTProcessor, stage: Stage) -> dict[str, torch.Tensor]:
    """Return a test picture, features for a model without tower, or nothing for a stage that reads no pictures."""
    width = model.config.vision_hidden_size
    if "images" not in stage.reads or width is None:
        return {}
    if processor.image_processor is None:
        return {"vision_features": torch.linspace(-1, 1, 4 * width).view(1, 4, width)}
    return processor.prepare_pictures([Image.linear_gradient("L").resize((96, 64)).convert("RGB")], 1)


def write_known_answer(folder: str | os.PathLike, models: Mapping[str, PreTrainedModel], processor) -> None:
    """Write the known answer and the SHA-256 of each file of weights into a folder that contains the whole system."""
    weights = {name: sha256(path) for name, path in find_weight_files(folder).items()}
    known = {**known_answer(models, processor), "weights": weights}
    with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
        json.dump(known, file, indent=1)
        file.write("\n")


def find_weight_files(folder: str | os.PathLike) -> dict[str, str]:
    """Map relative to full paths of the safetensors files in the folder and its subfolders."""
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
    Compare a loaded system with the known answer in its repository, if there is one.

    Raises:
        ValueError: If a file of weights differs from the exported one, or the outputs of a stage do; the message
            contains the difference and the library versions.
    """
    repository, path = root.name_or_path, known_answer_file(root)
    if path is None:
        return
    known = read_known_answer(path, processor.stages.with_models.names)
    # Only files in the same folder are hashed: a name in the known answer is never used as a path.
    found = find_weight_files(os.path.dirname(path))
    for name, digest in known["weights"].items():
        if name not in found:
            raise ValueError(
                f"{repository}: its known answer names {name}, which is not in the same folder: other weights were "
                f"loaded (a variant?). check=False loads them anyway."
            )
        if sha256(found[name]) != digest:
            raise ValueError(
                f"{repository}: {name} is not the file that was exported with its known answer: it is damaged or was "
                f"replaced. Download it again (force_download=True). If the weights are your own, save the system with "
                f"pipe.save_pretrained, or load it with check=False."
            )
    if getattr(root, "is_quantized", False):
        logger.warning(
            "Only the files of %s are checked, not its outputs: quantization changes them more than an error would.",
            repository,
        )
        return
    for stage in processor.stages.with_models:
        difference = find_difference(known["stages"][stage.name], compute_stage_answer(models, processor, stage))
        if difference is not None:
            exported = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
            here = ", ".join(f"{name} {version}" for name, version in versions().items())
            raise ValueError(
                f"{repository}: the {stage.name} stage does not compute what it computed when it was exported: "
                f"{difference}. Exported with {exported}; here {here}. check=False loads it anyway."
            )


def read_known_answer(path: str, stages: list[str]) -> dict[str, Any]:
    """
    Read the file of a known answer.

    Raises:
        ValueError: If the file is not a known answer of these stages.
    """
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        for stage in stages:
            # A comparison with itself reads every field that a later comparison needs.
            find_difference(known["stages"][stage], known["stages"][stage])
        is_valid = all(isinstance(known[name], dict) for name in ("weights", "versions"))
    except (AttributeError, KeyError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"{path} is damaged, or from another version of mmcot: expected a known answer of the stages "
            f"{', '.join(stages)}. Download it again (force_download=True), or load with check=False."
        )
    return known


def known_answer_file(root: PreTrainedModel) -> str | None:
    """Return the path of the known answer; None without a repository or without a known answer in it."""
    if not root.name_or_path:
        return None
    options = {name: value for name, value in hub_options(root).items() if name != "force_download"}
    return cached_file(root.name_or_path, FILE, _raise_exceptions_for_missing_entries=False, **options)


def find_difference(known: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Describe the first difference that rounding cannot explain; None if there is no such difference."""
    if found["source"] != known["source"]:
        return f"its source is {found['source']!r}, and was {known['source']!r}"
    if found["generation"] != known["generation"]:
        return f"its generation settings are {found['generation']}, and were {known['generation']}"
    expected, logits = torch.tensor(known["logits"]), torch.tensor(found["logits"])
    if logits.shape != expected.shape:
        return f"its logits have the shape {tuple(logits.shape)}, and had {tuple(expected.shape)}"
    dtypes = [getattr(torch, answer["dtype"]) for answer in (known, found)]
    tolerance = max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in dtypes)
    error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not error <= tolerance:
        return f"its logits differ by {error:.2g} times the largest one, and rounding explains at most {tolerance:g}"
    if dtypes == [torch.float32, torch.float32] and found["greedy"] != known["greedy"]:
        return f"it generates {found['greedy']!r}, and generated {known['greedy']!r}"
    scores, others = found.get("scores", []), known.get("scores", [])
    error = max((abs(one - other) for one, other in zip(scores, others, strict=True)), default=0.0)
    if not error <= tolerance:
        return f"its scores differ by {error:.2g}, and rounding explains at most {tolerance:g}"
    return None
