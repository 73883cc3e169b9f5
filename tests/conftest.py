"""Fixtures that several test files share: data, tiny models with random weights, the run of a tiny recipe."""

import functools
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from preloaded import run_python
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from mmcot.pictures.featurizer import FeatureOptions, TowerOptions, compute_features
from mmcot.problems.demo import generate
from mmcot.problems.sources import load_all_splits
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration
from modeling_mmcot.fusion_mmcot import FUSIONS

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
TINY_RECIPE = REPOSITORY / "tests" / "tiny.yaml"

TINY_TEXT = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
TINY_VISION = {
    "model_type": "vit",
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def shared(path: str) -> Path:
    """Return the path of a file in `../shared`, or skip the test if that file is absent."""
    file = SHARED / path
    if not file.exists():
        pytest.skip(f"{file} is not on this machine: the data beside the repository is needed")
    return file


def tiny_model(seed: int = 0, **config) -> MMCoTForConditionalGeneration:
    """
    A model with random weights. A larger `initializer_factor` makes generated texts differ visibly. The gates of
    Flamingo's layers, which start at 0, are opened, so that pictures have an influence.
    """
    torch.manual_seed(seed)
    model = MMCoTForConditionalGeneration(MMCoTConfig(**{**TINY_TEXT, "vision_config": TINY_VISION, **config}))
    model.generation_config.update(max_new_tokens=12)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.ones_(parameter)
    return model.eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 61 words w0 to w60, for models with the vocabulary of `TINY_TEXT`."""
    tokens = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(61))]
    words = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


# The first fusion of each place. With the others, tests of the whole model are slow tests, to save time.
FIRST_FUSIONS = {fusion.place: name for name, fusion in reversed(FUSIONS.items())}.values()


@pytest.fixture(
    params=[pytest.param(name, marks=[] if name in FIRST_FUSIONS else pytest.mark.slow) for name in FUSIONS]
)
def build(request):
    """`tiny_model` with each of the fusions."""
    return functools.partial(tiny_model, fusion=request.param)


@pytest.fixture
def batch():
    """Three problems: the second has a shorter text, the third has no picture."""
    torch.manual_seed(2)
    input_ids = torch.randint(3, 60, (3, 9))
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 6:], attention_mask[1, 6:] = 0, 0
    pixel_mask = torch.ones(3, 1, 32, 32, dtype=torch.bool)
    pixel_mask[2] = False
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(3, 1, 3, 32, 32),
        "pixel_mask": pixel_mask,
    }


@pytest.fixture
def labels():
    torch.manual_seed(3)
    labels = torch.randint(3, 60, (3, 6))
    labels[1, 2:] = -100
    return labels


@torch.no_grad()
def log_probability(model, inputs, target):
    """Log-probability of the tokens of `target`, `(target_length,)`, in one pass. `inputs` contain one problem."""
    log_probs = model(**inputs, labels=target[None]).logits[0].log_softmax(dim=-1)
    return log_probs.gather(1, target[:, None]).sum()


def run_script(*command, check: bool = True, cwd: Path = REPOSITORY, is_fresh: bool = False, **environment: str):
    """Run a command in a new process. With `is_fresh`, that process imports every library itself, as a user's does."""
    words, environment = list(map(str, command)), {**os.environ, **environment}
    if is_fresh:
        words = [sys.executable, *words]
        result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    else:
        result = run_python(*words, cwd=cwd, env=environment)
    if check and result.returncode != 0:
        raise AssertionError(
            f"{command} ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
        )
    return result


# A process that runs this code can import neither our packages nor the libraries that only training needs.
ISOLATION = """
import importlib.util, json, sys
not_needed = {"trl", "peft", "datasets", "accelerate", "nltk", "rouge", "torchvision", "timm"}
for name in not_needed - set(sys.argv.pop().split()):
    sys.modules[name] = None
for name in ("mmcot", "modeling_mmcot", "configuration_mmcot"):
    assert importlib.util.find_spec(name) is None, name
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoProcessor
from transformers import pipeline
"""


def run_isolated(code, cwd, *arguments, needs=""):
    """
    Run code in isolated mode (`-I`), in another folder, offline, with an empty cache. Returns its last line, parsed.
    `needs` names the blocked libraries that a tower requires, separated by spaces.
    """
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cwd / "hf_home"),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "2",
    }
    words = ("-I", "-c", ISOLATION + textwrap.dedent(code), *arguments, needs)
    result = run_python(*words, cwd=cwd, env=environment)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def pipeline_problems(dataset: Path) -> list[dict]:
    """The test problems of a JSONL file, in the form that the pipeline takes."""
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    return [
        {
            "image": [str(dataset.parent / name) for name in row["images"]] or None,
            **{name: row[name] for name in ("id", "question", "choices", "context")},
        }
        for row in rows
        if row["split"] == "test"
    ]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """A function that makes a folder with `make(folder)`, once for all processes of pytest-xdist."""
    parent = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        parent = parent.parent / "made_once"
        parent.mkdir(exist_ok=True)

    def make_once(name, make):
        folder, marker = parent / name, parent / f"{name}.made"
        with FileLock(parent / f"{name}.lock"):
            if not marker.exists():
                make(folder)
                marker.touch()
        return folder

    return make_once


def write_tiny_dataset(folder: Path):
    folder.mkdir()
    rows = list(itertools.islice(generate("val"), 72))
    with (folder / "problems.jsonl").open("w") as file:
        for number, row in enumerate(rows):
            names = []
            for picture in row["images"]:
                names.append(f"{row['id']}.png")
                (folder / names[-1]).write_bytes(picture["bytes"])
            split = "train" if number < 40 else "val" if number < 52 else "test"
            file.write(json.dumps({**row, "images": names, "split": split}) + "\n")


@pytest.fixture(scope="session")
def tiny_dataset(make_once) -> Path:
    """A JSONL file of 72 demonstration problems in three splits, with their pictures beside it."""
    return make_once("dataset", write_tiny_dataset) / "problems.jsonl"


DETR = {
    "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    **{"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5, "num_labels": 7},
}


@pytest.fixture(scope="session")
def detr(tmp_path_factory):
    """A detection checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("detr")
    torch.manual_seed(0)
    DetrForObjectDetection(DetrConfig(**DETR)).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**{name: value for name, value in TINY_VISION.items() if name != "model_type"})).save_pretrained(
        folder
    )
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def all_problems(tiny_dataset):
    return load_all_splits(str(tiny_dataset), ("train", "val", "test"), 1, True)


@pytest.fixture(scope="session")
def store(detr, all_problems, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "detr"
    assert (
        compute_features(all_problems, folder, TowerOptions(str(detr)), FeatureOptions(dtype="float32", batch_size=4))
        == []
    )
    return folder


def content(folder):
    """The bytes of each file of a feature store."""
    return {name: (folder / name).read_bytes() for name in ("manifest.json", "rows.bin", "rows.jsonl")}


@pytest.fixture(scope="session")
def tiny_run(tiny_dataset, make_once, tmp_path_factory) -> Path:
    """The finished run of `tests/tiny.yaml`, trained by `train.py`."""
    command = ("train.py", "--config", TINY_RECIPE, "--dataset", tiny_dataset, "--output_dir")
    finished = make_once("tiny", lambda folder: run_script(*command, folder))
    return shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "tiny")


LORA = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q", "v", "wi_0", "--learning_rate", "0.02")


@pytest.fixture(scope="session")
def adapter_recipe(tiny_dataset, tmp_path_factory) -> Path:
    """The tiny recipe with FLAN-T5's architecture: gated feed-forward layers and an untied output head."""
    values = yaml.safe_load(TINY_RECIPE.read_text())
    values["dataset"] = str(tiny_dataset)
    values["text_config"].update(feed_forward_proj="gated-gelu", scale_decoder_outputs=False)
    file = tmp_path_factory.mktemp("recipe") / "adapters.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="session")
def adapter_run(adapter_recipe, make_once, tmp_path_factory) -> Path:
    """A finished run whose stages are adapters of one base."""
    command = ("train.py", "--config", adapter_recipe, *LORA, "--output_dir")
    finished = make_once("adapters", lambda folder: run_script(*command, folder))
    return shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "adapters")


HUB_FEATURES = datasets.Features(  # https://huggingface.co/datasets/derek-thomas/ScienceQA
    {
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("int8"),
        **{
            name: datasets.Value("string")
            for name in ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
        },
    }
)


def hub_rows(size: int) -> list[dict]:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "PNG")
    return [
        {
            "image": {"bytes": file.getvalue(), "path": "image.png"} if number % 2 else None,
            "question": f"Which is the number {number}?",
            "choices": ["one", "two", "three"],
            "answer": number % 3,
            "hint": f"hint {number}",
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "physics",
            "category": "numbers",
            "skill": "count",
            "lecture": "",
            "solution": f"It is {number}.",
        }
        for number in range(size)
    ]


@pytest.fixture(scope="session")
def hub_dataset(tmp_path_factory):
    """Files like those that `hf download` writes for ScienceQA's dataset on the Hub."""
    folder = tmp_path_factory.mktemp("ScienceQA")
    for split in ("train", "validation", "test"):
        dataset = datasets.Dataset.from_list(hub_rows(5), features=HUB_FEATURES)
        dataset.to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def text_recipe(tmp_path):
    """Options for the tiny recipe with a single stage, which reads no pictures."""
    values = yaml.safe_load(TINY_RECIPE.read_text())
    values = {name: value for name, value in values.items() if name not in ("vision_config", "image_processor")}
    values["stages"] = [{**values["stages"][1], "reads": ["question", "context", "choices"], "template": "QCM-A"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
