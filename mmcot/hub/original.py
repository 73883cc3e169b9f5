"""Converts the authors' checkpoints (amazon-science/mm-cot, `T5ForMultimodalGeneration`) to folders of this package.

T5's tensors keep their names; the fusion's tensors are renamed. A checkpoint that differs from the model in its
config.json is refused, and nothing is written.
"""

import pickle
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mmcot.hub.export import write_hub_folder
from mmcot.pictures.authors import AUTHORS_TOWERS
from mmcot.pictures.featurizer import load_image_processor
from mmcot.problems.schema import first_few
from mmcot.storage.files import read_json
from mmcot.storage.folders import replaced_folder
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.pictures_mmcot import build_image_processor
from modeling_mmcot.stage_mmcot import PAPER_TEMPLATES, Stage
from modeling_mmcot.vision_mmcot import TOWERS, load_vision_tower

RENAMED = {
    "encoder.image_dense.": "encoder.fusion.vision_projection.",
    "encoder.mha_layer.": "encoder.fusion.attention.",
    "encoder.gate_dense.": "encoder.fusion.joint_gate.",
}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
DOWNLOADED = ("*.json", "*.safetensors", "*.bin", "*.model")

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- multimodal-cot
- custom_code
---

# Multimodal chain-of-thought, converted

The weights of the authors of Multimodal Chain-of-Thought (Zhang et al. 2023, arXiv 2302.00923), from `{source}`, in
the format of mmcot. The root contains the answer stage, `rationale/` the rationale stage. The weights were trained on
ScienceQA, whose licence is CC BY-NC-SA 4.0. mmcot did not train them and has not scored them.

```python
from transformers import pipeline

answer = pipeline("multimodal-cot", model=REPO, trust_remote_code=True)
answer({{"image": "picture.png", "question": "…", "choices": ["…", "…"], "context": ""}})
```
"""


def convert(
    source: str,
    out_dir: str | Path,
    vision: str,
    stage_folders: list[str] | None = None,
    prompt_formats: list[str] | None = None,
    attach_tower: str | None = None,
) -> list[str]:
    """
    Convert a checkpoint, or the checkpoints of both stages.

    Args:
        source: a folder in the authors' layout, or a Hub id, `USER/NAME` or `USER/NAME/FOLDER`.
        out_dir: the folder to write; it must not exist.
        vision: the kind of features that the checkpoint was trained on, a name in `AUTHORS_TOWERS`.
        stage_folders: the folders of the rationale and the answer stage within `source`, to write one folder in the
            Hub's layout.
        prompt_formats: with `stage_folders`, the authors' names of the prompt formats that the stages were trained on.
        attach_tower: a checkpoint of the picture tower, so that the model reads pixels.

    Returns:
        The lines of a report on the mapped tensors.

    Raises:
        ValueError: the checkpoint does not fit; the message names files and tensors.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise ValueError(f"{out_dir} exists already; name a new folder.")
    folder = original_folder(source, stage_folders)
    report: list[str] = []
    tower = load_vision_tower(attach_tower) if attach_tower is not None else None
    if stage_folders is None:
        model = convert_model(folder, vision, tower, report)
        processor = build_processor(folder, [], vision, attach_tower)
        with replaced_folder(out_dir) as unfinished:
            model.save_pretrained(unfinished)
            if processor is not None:
                processor.save_pretrained(unfinished)
        return report
    stages = paper_stages(prompt_formats or ["QCM-E", "QCMG-A"])
    processor = build_processor(folder / stage_folders[-1], stages, vision, attach_tower)
    if processor is None:
        raise ValueError(f"{folder / stage_folders[-1]} has no tokenizer ({' or '.join(TOKENIZER_FILES)}).")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as temporary:
        for stage, name in zip(stages, stage_folders, strict=True):
            report.append(f"{name}: the {stage.name} stage")
            model = convert_model(folder / name, vision, tower, report)
            model.generation_config.update(max_new_tokens=stage.max_target_length)
            model.save_pretrained(Path(temporary) / stage.name)
        saved = {stage.name: Path(temporary) / stage.name for stage in stages}
        card = CARD.format(source=source)
        write_hub_folder(
            out_dir,
            processor,
            saved,
            lambda hub_folder: (hub_folder / "README.md").write_text(card, encoding="utf-8"),
        )
    return report


def original_folder(source: str, stage_folders: list[str] | None) -> Path:
    """Return the local folder of a source, after downloading it from the Hub if necessary."""
    if Path(source).is_dir():
        return Path(source)
    repo_id, within = "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:])
    folders = [f"{within}/{name}".strip("/") for name in stage_folders or [""]]
    patterns = [f"{name}/{pattern}".lstrip("/") for name in folders for pattern in DOWNLOADED]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns)) / within
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{source} is neither a folder nor a Hub repository that can be downloaded: {error}"
        ) from error


def convert_model(folder: Path, vision: str, tower, report: list[str]) -> MMCoTForConditionalGeneration:
    """Load a checkpoint of the authors as a model of this package, with a frozen tower if one is given."""
    config = read_config(folder, vision)
    tensors = read_tensors(folder)
    with torch.device("meta"):
        expected = MMCoTForConditionalGeneration(config)
    state = map_tensors(tensors, expected, folder, report)
    model = MMCoTForConditionalGeneration(config).to(state["shared.weight"].dtype)
    model.load_state_dict(state)
    if tower is not None:
        model.config.freeze_vision = model.encoder.config.freeze_vision = True
        name = AUTHORS_TOWERS[vision]
        # Another implementation of the same tower, e.g. timm's ViT, gets no name: `find_tower` uses its model type.
        model.attach_tower(tower, name if TOWERS[name].model_type == tower.config.model_type else None)
    return model.eval()


def read_config(folder: Path, vision: str) -> MMCoTConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; expected a checkpoint in the authors' layout.")
    original = read_json(file)
    if original.get("model_type") != "t5":
        raise ValueError(f"{file}: model_type is {original.get('model_type')!r}; expected 't5'.")
    tower = TOWERS[AUTHORS_TOWERS[vision]]
    fields = {name: value for name, value in original.items() if name not in ("architectures", "model_type")}
    return MMCoTConfig.from_dict(
        {
            **fields,
            "fusion": "gated_mha",
            "vision_tower": AUTHORS_TOWERS[vision],
            "vision_hidden_size": tower.hidden_size,
            "num_vision_tokens": tower.num_patches,
            "zeros_for_missing_pictures": True,
        }
    )


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint: safetensors or a pickle of tensors only, one file or shards with an index."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_tensor_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index}: weight_map is {weight_map!r}; expected a mapping of tensor names to files.")
            tensors: dict[str, torch.Tensor] = {}
            for shard in sorted(set(weight_map.values())):
                tensors.update(read_tensor_file(folder / shard))
            absent = sorted(weight_map.keys() - tensors.keys())
            if absent:
                raise ValueError(f"{index}: the shards do not contain {first_few(absent)}.")
            return tensors
    raise ValueError(f"{folder} has no weights; expected {' or '.join(WEIGHT_FILES)}, or shards with an index file.")


def read_tensor_file(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is damaged, or contains objects other than tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"{file}: expected a mapping of names to tensors.")
    return tensors


def map_tensors(
    tensors: dict[str, torch.Tensor], expected: MMCoTForConditionalGeneration, folder: Path, report: list[str]
) -> dict[str, torch.Tensor]:
    """Rename the tensors, check names and shapes against the expected model, and add the mapping to `report`."""
    mapped = {renamed(name): tensor for name, tensor in tensors.items()}
    tied = expected._tied_weights_keys
    for copy, original in tied.items():
        if original not in mapped and copy in mapped:  # safetensors stores a shared tensor under one name
            mapped[original] = mapped[copy]
    for copy, original in tied.items():
        if copy in mapped and original in mapped and not torch.equal(mapped[copy], mapped[original]):
            raise ValueError(f"{folder}: {copy} differs from {original}, but config.json ties them.")
        if copy not in mapped and original in mapped:
            mapped[copy] = mapped[original]
    ignored = set(expected._keys_to_ignore_on_load_unexpected or [])
    mapped = {name: tensor for name, tensor in mapped.items() if name not in ignored}
    shapes = {name: tensor.shape for name, tensor in expected.state_dict().items()}
    faults = {
        "missing": sorted(shapes.keys() - mapped.keys()),
        "surplus": sorted(mapped.keys() - shapes.keys()),
        "of another shape than in config.json": [
            f"{name} {tuple(mapped[name].shape)} instead of {tuple(shapes[name])}"
            for name in sorted(shapes.keys() & mapped.keys())
            if mapped[name].shape != shapes[name]
        ],
    }
    if any(faults.values()):
        descriptions = "\n".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"{folder} is not the model that its config.json describes. Tensors that are\n{descriptions}")
    unchanged = [name for name in tensors if renamed(name) == name]
    report.append(f"{len(unchanged)} tensors of T5 keep their names")
    for old, new in RENAMED.items():
        count = sum(name.startswith(old) for name in tensors)
        report.append(f"{old}* -> {new}* ({count} tensors)")
    return mapped


def renamed(name: str) -> str:
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def paper_stages(prompt_formats: list[str]) -> list[Stage]:
    """Build the rationale and the answer stage as the authors run them, from the names of their prompt formats."""
    columns = ["question", "context", "choices", "caption", "images"]
    rationale, answer = prompt_formats
    return [
        Stage("rationale", columns, "rationale", **PAPER_TEMPLATES[rationale]),
        Stage("answer", [*columns, "rationale"], "answer_text", **PAPER_TEMPLATES[answer], max_target_length=64),
    ]


def build_processor(folder: Path, stages: list[Stage], vision: str, attach_tower: str | None) -> MMCoTProcessor | None:
    """Build the processor, with the authors' preprocessing if there is a tower; None if the folder has no tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    image_processor = None
    if attach_tower is not None:
        paper = TOWERS[AUTHORS_TOWERS[vision]].paper_image_processor
        image_processor = build_image_processor(paper) if paper else load_image_processor(attach_tower)
    return MMCoTProcessor(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), image_processor, stages)
