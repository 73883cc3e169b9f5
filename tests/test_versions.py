"""One exported model under two sets of versions: the lowest that requirements.txt admits, and what is installed here.

`make test-lowest` makes the other environment. Of the demonstration where `make demo` trained it, else of a tiny run.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from itertools import islice

import pytest
from conftest import REPOSITORY

from mmcot.demo import generate

LOWEST = os.environ.get("LOWEST_PYTHON")
DEMO = REPOSITORY / "runs" / "demo" / "hub"
ANSWERS = """
import json, sys
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, GenerationConfig, pipeline
for auto in (AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor):
    assert type(auto.from_pretrained("model", trust_remote_code=True)).__module__.startswith("transformers_modules.")
assert GenerationConfig.from_pretrained("model").max_new_tokens > 0
answer = pipeline("multimodal-cot", model="model", trust_remote_code=True)
results = answer(json.load(open("problems.json")), batch_size=20, decode_answer=True)
print(json.dumps([[torch.__version__, transformers.__version__], results]))
"""


@pytest.fixture
def folder(request):
    return DEMO if DEMO.is_dir() else request.getfixturevalue("tiny_run") / "hub"


@pytest.mark.skipif(LOWEST is None, reason="wants another environment: make test-lowest")
def test_the_lowest_versions_give_the_answers_of_these(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    problems = []
    for row in islice(generate("test"), 200):
        image = None
        if row["images"]:
            image = str(tmp_path / f"{row['id']}.png")
            (tmp_path / f"{row['id']}.png").write_bytes(row["images"][0]["bytes"])
        problems.append({**{name: row[name] for name in ("question", "choices", "context")}, "image": image})
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    found = []
    for number, python in enumerate((REPOSITORY / LOWEST, sys.executable)):
        environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / f"home-{number}"), "PATH": os.environ["PATH"]}
        command = [str(python), "-I", "-c", ANSWERS]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        found.append(json.loads(result.stdout.splitlines()[-1]))
    (lowest_versions, lowest), (these_versions, these) = found
    print(f"torch and transformers {lowest_versions} and {these_versions}")
    assert lowest_versions != these_versions and these_versions[1] == version("transformers")
    for one, other in zip(lowest, these, strict=True):
        assert one.pop("scores") == pytest.approx(other.pop("scores"), abs=1e-5)
        assert one == other
