"""Every loading option reaches every stage. New processes without this repository load from the loopback Hub.

The repositories are private and have three commits: the second has other weights, the third has other code. A stage
that loads without the token fails, and a stage from another commit than the root gives other answers.
"""

import json
import shutil
import textwrap
from types import SimpleNamespace

import pytest
from loopback_hub import LoopbackHub, client_environment
from preloaded import run_python
from safetensors.torch import load_file, save_file

from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.known_answer_mmcot import write_known_answer
from modeling_mmcot.loading_mmcot import load_stages

pytestmark = pytest.mark.slow

UPLOAD = """
import sys
from huggingface_hub import HfApi
name, *folders = sys.argv[1:]
api = HfApi()
api.create_repo(name, private=True)
for folder in folders:
    api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["README.md"])  # because a card needs a licence
"""
ASK = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
repository, commits, token, picture = sys.argv[1], sys.argv[2].split(), sys.argv[3], sys.argv[4]
problem = {"question": "Which bar is the tallest?", "choices": ["red", "blue"], "image": picture}
messages = [
    {
        "role": "user",
        "content": [
            {"type": "image", "url": picture},
            {"type": "text", "text": "Which bar is the tallest?\\nA. red\\nB. blue"},
        ],
    },
]

def load(task="multimodal-cot", **options):
    return pipeline(task, model=repository, trust_remote_code=True, **options)
"""


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as running:
        yield running


def copy_with_other_weights(model, folder):
    """Copy the folder with other decoder weights in every stage, and with the known answers of these weights."""
    shutil.copytree(model, folder)
    for file in folder.rglob("*.safetensors"):
        if file.parent == folder and any(folder.rglob("adapter_model.safetensors")):
            continue  # because the adapters record the digest of their base
        weights = load_file(file)
        changed = {name: tensor.roll(1, 0) if ".decoder." in f".{name}" else tensor for name, tensor in weights.items()}
        save_file(changed, file, metadata={"format": "pt"})
    processor = MMCoTProcessor.from_pretrained(folder)
    root = MMCoTForConditionalGeneration.from_pretrained(folder)
    models = load_stages(root, str(folder), processor)
    write_known_answer(folder, models, processor)
    return folder


def copy_with_other_code(model, folder):
    shutil.copytree(model, folder)
    with (folder / "modeling_mmcot.py").open("a") as file:
        file.write("\nIS_NEW = True\n")
    return folder


@pytest.fixture(scope="module", params=["tiny_run", "adapter_run"])
def repository(request, hub, tmp_path_factory):
    """A repository of whole stages or of adapters: its id, its commits from the oldest on, and the uploaded folders."""
    folder = tmp_path_factory.mktemp(request.param)
    first = shutil.copytree(request.getfixturevalue(request.param) / "hub", folder / "first")
    second = copy_with_other_weights(first, folder / "second")
    third = copy_with_other_code(second, folder / "third")
    token = hub.add_user(request.param)
    name = f"{request.param}/secret"
    command = ("-c", UPLOAD, name, first, second, third)
    uploaded = run_python(*command, cwd=folder, env=client_environment(hub, folder / "home", token))
    assert uploaded.returncode == 0, uploaded.stderr
    commits = hub.commits("model", name)[-2::-1]  # without the initial commit
    return SimpleNamespace(name=name, commits=commits, token=token, first=first, second=second)


@pytest.fixture
def ask(hub, repository, tmp_path, tiny_dataset):
    """A function that runs code with an empty cache and no token in the environment, and returns its last line."""

    def run(code):
        picture = next(tiny_dataset.parent.glob("*.png"))
        arguments = [repository.name, " ".join(repository.commits), repository.token, str(picture)]
        command = ("-I", "-c", ASK + textwrap.dedent(code), *arguments)
        result = run_python(*command, cwd=tmp_path, env=client_environment(hub, tmp_path / "home"))
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout.strip().splitlines()[-1])

    return run


def test_token_cache_revision_and_dtype_reach_every_stage(hub, repository, ask, tmp_path):
    sent = len(hub.requests)
    found = ask(f"""
    local = [pipeline("multimodal-cot", model=folder, trust_remote_code=True)(problem)
             for folder in {[str(repository.first), str(repository.second)]}]
    try:
        load()
        refused = None
    except OSError as error:
        refused = str(error)
    def load_cached(**options):
        return load(token=token, model_kwargs=dict(cache_dir="cache"), **options)
    old, new = load_cached(revision=commits[0]), load_cached(revision="main")
    half = load_cached(dtype=torch.bfloat16)
    eager = load(token=token, model_kwargs=dict(cache_dir="cache", attn_implementation="eager"))
    print(json.dumps({{
        "local": local,
        "refused": refused,
        "answers": [old(problem), new(problem)],
        "code": [type(model).__module__.split(".")[-2] for pipe in (old, new) for model in pipe.models.values()],
        "dtypes": [str(model.dtype) for model in half.models.values()],
        "half": half(problem)["answer"],
        "attention": [model.config._attn_implementation for model in eager.models.values()],
    }}))
    """)
    assert repository.name in found["refused"]
    assert found["answers"] == found["local"] and found["local"][0] != found["local"][1]
    old, new = repository.commits[0], repository.commits[-1]
    assert found["code"] == [old, old, new, new]
    assert found["dtypes"] == ["torch.bfloat16"] * 2 and found["half"] in ("red", "blue")
    assert found["attention"] == ["eager", "eager"]
    weights = [path for _, path, status in hub.requests[sent:] if path.endswith(".safetensors") and status < 300]
    assert {path.split("/resolve/")[1].split("/")[0] for path in weights} == {old, new}
    assert list((tmp_path / "cache").rglob("rationale/*.safetensors"))
    assert not list((tmp_path / "home").rglob("*.safetensors")), "a stage's weights are in the default cache"


def test_code_revision_reaches_every_stage(repository, ask):
    found = ask(
        """
    pipe = load(token=token, revision=commits[1], code_revision=commits[2])
    print(json.dumps([pipe(problem), [type(model).__module__.split(".")[-2] for model in pipe.models.values()],
                      [sys.modules[type(model).__module__].IS_NEW for model in pipe.models.values()],
                      type(pipe).__module__.split(".")[-2],
                      pipeline("multimodal-cot", model=sys.argv[5], trust_remote_code=True)(problem)]))
    """.replace("sys.argv[5]", repr(str(repository.second)))
    )
    answer, code, is_new, code_of_pipeline, expected = found
    assert code == [repository.commits[2]] * 2 and is_new == [True] * 2
    assert code_of_pipeline == repository.commits[2]
    assert answer == expected


def test_card_snippets_load_private_repository(repository, ask):
    found = ask("""
    pipe = load("image-text-to-text", token=token)
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True, token=token)
    model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True, token=token)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=40)
    text = processor.decode(outputs[0][inputs["input_ids"].shape[-1]:], skip_special_tokens=True)
    plain = load(token=token)(problem, max_new_tokens=40)
    print(json.dumps([plain, text, pipe(text=messages, max_new_tokens=40, return_full_text=False)]))
    """)
    plain, text, chat = found
    assert text == chat[0]["generated_text"]
    assert text == f"{plain['rationale']} The answer is ({'AB'[plain['answer_index']]}).".lstrip()


def test_quantization_config_reaches_every_stage(repository, ask):
    """The test uses 8 bits, because on a CPU bitsandbytes cannot quantize layers this narrow to 4 bits."""
    found = ask("""
    from transformers import BitsAndBytesConfig
    config = BitsAndBytesConfig(load_in_8bit=True)
    pipe = load(token=token, model_kwargs=dict(quantization_config=config))
    quantized = [
        {name.split(".")[1 if name.startswith("encoder.") else 0] for name, layer in model.named_modules()
          if type(layer).__name__ == "Linear8bitLt"}
        for model in pipe.models.values()
    ]
    print(json.dumps([pipe(problem), list(map(sorted, quantized))]))
    """)
    answer, quantized = found
    assert quantized == [["block", "decoder"]] * 2, "the text model's encoder and decoder, and nothing else"
    assert answer["answer"] in ("red", "blue")
