"""The shipped code under each supported version of transformers: equal texts and scores. Other versions are refused.

`make test-versions` makes the environments (`tests/make_versions.sh`) and runs the tests in all of them, with the
demonstration, if `make demo` trained it, and with a run of adapters. Without those environments, only the refusals
are tested.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY_RECIPE, run_script
from preloaded import run_python

from mmcot.hub.export import shipped_code
from mmcot.problems.demo import generate
from modeling_mmcot import versions_mmcot

VERSIONS = Path(os.environ.get("MMCOT_VERSIONS", "none")).resolve()
ENVIRONMENTS = sorted(VERSIONS.glob("5.*"), key=lambda folder: tuple(map(int, folder.name.split("."))))
DEMO = REPOSITORY / "runs" / "demo" / "hub"
ANSWERS = """
import sys
if sys.argv[1] != "installed":
    sys.path.insert(0, sys.argv[1])
import json
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoProcessor
from transformers import GenerationConfig, pipeline

classes = (AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForImageTextToText, AutoProcessor)
loaded = [auto.from_pretrained("model", trust_remote_code=True) for auto in classes]
assert all(type(thing).__module__.startswith("transformers_modules.") for thing in loaded)
assert GenerationConfig.from_pretrained("model").eos_token_id == 1
problems = json.load(open("problems.json"))
answer = pipeline("multimodal-cot", model="model", trust_remote_code=True)
results = answer(problems, batch_size=20, decode_answer=True)

rationale = answer.processor.stages[0]
model = answer.models[rationale.name]
inputs = answer.processor(problems[:4], stage=rationale.name)
texts = {}
for name, settings in {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 5},
    "without cache": {"use_cache": False},
}.items():
    torch.manual_seed(0)
    texts[name] = model.generate(**inputs, max_new_tokens=20, **settings).tolist()
assert texts["greedy"] == texts["without cache"]

model.train()
labels = torch.tensor([[5, 6, 7, 1]] * 4)
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
    elif hasattr(module, "dropout") and isinstance(module.dropout, float):
        module.dropout = 0.0
optimizer = torch.optim.SGD(model.requires_grad_(True).parameters(), lr=0.1)
losses = []
for _ in range(2):
    loss = model(**inputs, labels=labels, num_items_in_batch=16).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

# A model from a T5 checkpoint, tied and untied, with each fusion: it has the text weights, its fusion is initialized,
# and it reads one picture of two.
from transformers import T5Config, T5ForConditionalGeneration
size = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
started = []
for head in ({}, {"scale_decoder_outputs": False, "feed_forward_proj": "gated-gelu"}):
    torch.manual_seed(0)
    text_model = T5ForConditionalGeneration(T5Config(**size, **head))
    text_model.save_pretrained("text")
    memory = [torch.full((size["d_model"], size["d_model"]), float("nan")) for _ in range(1000)]
    del memory  # new tensors reuse this memory
    package = type(loaded[1]).__module__.rpartition(".")[0]
    for fusion in sys.modules[f"{package}.fusion_mmcot"].FUSIONS:
        new = type(loaded[1]).from_pretrained("text", vision_hidden_size=10, fusion=fusion)
        assert torch.equal(new.shared.weight, text_model.shared.weight)
        weights = {name: value for name, value in new.named_parameters() if "fusion" in name}
        started.append({name: round(value.square().mean().sqrt().item(), 1) for name, value in weights.items()})
        torch.manual_seed(0)
        for _, value in sorted(new.named_parameters()):  # versions draw the initial weights in another order
            torch.nn.init.normal_(value, std=0.3)
        source = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]])
        pictures = {"vision_features": torch.randn(2, 5, 10), "vision_mask": torch.tensor([[1] * 5, [0] * 5])}
        new.generation_config.update(decoder_start_token_id=0, num_beams=2, max_new_tokens=5)
        texts[f"{fusion} {bool(head)}"] = new.generate(source, attention_mask=(source > 0).long(), **pictures).tolist()
print(json.dumps([transformers.__version__, results, texts, losses, started]))
"""


def run_answers(environment: str, folder: Path) -> list:
    """The output of `ANSWERS` in a new process with the environment's version of transformers."""
    home = folder / f"home-{Path(environment).name}"
    result = subprocess.run(
        [sys.executable, "-I", "-c", ANSWERS, environment],
        cwd=folder,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """200 demonstration problems of the test split, as JSON, their pictures on disk."""
    folder = tmp_path_factory.mktemp("problems")
    rows = []
    for row in islice(generate("test"), 200):
        image = None
        if row["images"]:
            image = str(folder / f"{row['id']}.png")
            Path(image).write_bytes(row["images"][0]["bytes"])
        rows.append({**{name: row[name] for name in ("question", "choices", "context")}, "image": image})
    return json.dumps(rows)


@pytest.fixture(scope="module")
def whole(request, problems, tmp_path_factory):
    """A folder with a repository of whole models and the problems, and the answers of this environment."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(DEMO if DEMO.is_dir() else request.getfixturevalue("tiny_run") / "hub", folder / "model")
    for file in shipped_code():  # because the demonstration may contain earlier code
        shutil.copy(file, folder / "model")
    (folder / "problems.json").write_text(problems)
    return folder, run_answers("installed", folder)


@pytest.fixture(scope="module")
def adapted(tiny_dataset, problems, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    options = ("--use_peft", "true", "--lora_target_modules", "q", "v", "--lora_r", "2", "--learning_rate", "0.01")
    command = ("train.py", "--config", TINY_RECIPE, "--dataset", tiny_dataset, "--output_dir", folder / "run", *options)
    run_script(*command)
    shutil.copytree(folder / "run" / "hub", folder / "model")
    (folder / "problems.json").write_text(problems)
    return folder, run_answers("installed", folder)


@pytest.mark.skipif(not ENVIRONMENTS, reason="needs other versions of transformers: make test-versions")
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("system", ["whole", "adapted"])
def test_each_version_gives_the_same_texts_and_scores(system, environment, request):
    folder, (_, expected, expected_texts, expected_losses, expected_started) = request.getfixturevalue(system)
    found_version, found, texts, losses, started = run_answers(str(environment), folder)
    assert found_version == environment.name != version("transformers")
    furthest = 0.0
    for one, other in zip(found, expected, strict=True):
        one, other = dict(one), dict(other)
        scores, others = one.pop("scores"), other.pop("scores")
        furthest = max([furthest, *(abs(a - b) for a, b in zip(scores, others, strict=True))])
        assert one == other
    print(f"\ntransformers {environment.name}, {system}: {len(found)} problems, scores to {furthest:.0e}")
    assert furthest <= 1e-5
    assert texts == expected_texts
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert started == expected_started


@pytest.mark.parametrize("entry_point", ["AutoConfig", "AutoModel", "AutoProcessor", "pipeline"])
def test_refuses_an_unsupported_transformers_from_each_entry_point(entry_point, tiny_run, tmp_path):
    shutil.copytree(tiny_run / "hub", tmp_path / "model")
    arguments = '("multimodal-cot", model=' if entry_point == "pipeline" else ".from_pretrained("
    code = f"""
import importlib.metadata
from transformers import {entry_point}
true_version = importlib.metadata.version
importlib.metadata.version = lambda name: "6.0.0" if name == "transformers" else true_version(name)
{entry_point}{arguments}"model", trust_remote_code=True)
"""
    assert error_line(code, tmp_path) == (
        "ImportError: mmcot needs transformers>=5.12,<6, but transformers 6.0.0 is installed: "
        "pip install 'transformers>=5.12,<6'"
    )


@pytest.mark.parametrize("environment", sorted(VERSIONS.glob("4.*")), ids=lambda folder: folder.name)
@pytest.mark.parametrize("entry_point", ["AutoConfig", "AutoModel", "AutoProcessor"])
def test_older_transformers_raises_the_version_error_first(entry_point, environment, tiny_run, tmp_path):
    shutil.copytree(tiny_run / "hub", tmp_path / "model")
    code = f"""
import sys
sys.path.insert(0, {str(environment)!r})
from transformers import {entry_point}
{entry_point}.from_pretrained("model", trust_remote_code=True)
"""
    found = error_line(code, tmp_path)
    assert found.startswith(f"ImportError: mmcot needs transformers>=5.12,<6, but transformers {environment.name} is")


def error_line(code: str, folder: Path) -> str:
    """The last line of the error of a process that loads `model`."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "PATH": os.environ["PATH"]}
    result = run_python("-I", "-c", code, cwd=folder, env=environment)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("library", "installed", "is_refused"),
    [
        ("transformers", "5.11.0", True),
        ("transformers", "5.12.0.dev0", False),
        ("transformers", "5.99.1", False),
        ("transformers", "6.0.0.dev0", True),
        ("torch", "2.8.0+cu128", True),
        ("torch", "2.14.1+cu130", False),
        ("peft", "0.18.0", True),
        ("peft", "0.19.0", False),
    ],
)
def test_checks_the_range_of_versions(library, installed, is_refused, monkeypatch):
    monkeypatch.setattr(versions_mmcot, "version", lambda name: installed if name == library else version(name))
    if not is_refused:
        versions_mmcot.check_versions(library)
        return
    with pytest.raises(ImportError, match=f"{library} {re.escape(installed)} is installed: pip install '{library}>="):
        versions_mmcot.check_versions(library)


def test_refuses_an_old_python(monkeypatch):
    monkeypatch.setattr(versions_mmcot.sys, "version_info", (3, 10, 4))
    with pytest.raises(ImportError, match="needs Python 3.11 or newer, but this is 3.10"):
        versions_mmcot.check_versions()
