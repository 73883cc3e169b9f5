"""Training that stops on a signal or a disk error: the message, whole checkpoints, and resuming to the same result.

SIGKILL is in test_training.py.
"""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY, TINY_RECIPE, run_script
from safetensors.torch import load_file

STAGES = ("rationale", "answer")


def build_command(dataset, folder, *options):
    words = ("train.py", "--config", TINY_RECIPE, "--dataset", dataset, "--output_dir", folder, *options)
    return [sys.executable, *map(str, words)]


def start_training(dataset, folder, *options, **settings):
    return subprocess.Popen(
        build_command(dataset, folder, *options), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, **settings
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.01)


def run_training(dataset, folder, *options, check=True):
    return run_script(*build_command(dataset, folder, *options)[1:], check=check)


def equals_uninterrupted_run(folder, tiny_run):
    names = [f"{stage}/model.safetensors" for stage in STAGES] + [
        f"predictions/{split}.json" for split in ("val", "test")
    ]
    return all((folder / name).read_bytes() == (tiny_run / name).read_bytes() for name in names)


@pytest.fixture
def unfinished_run(tiny_run, tmp_path):
    """A copy of the tiny run, as a kill after the last checkpoint of the last stage leaves it."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    shutil.rmtree(folder / "hub")
    for file in ("train_results.json", "model.safetensors"):
        (folder / "answer" / file).unlink()
    for split in ("val", "test"):
        (folder / "predictions" / f"{split}.json").unlink()
    return folder


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_exits_with_143(tiny_run, tiny_dataset, tmp_path):
    folder = tmp_path / "run"
    process = start_training(tiny_dataset, folder)
    wait_for(folder / "rationale" / "checkpoint-4", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143 and "Traceback" not in errors
    saved = max((folder / "rationale").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert f"saved in {saved}. The same command resumes from it" in errors
    assert not (folder / "rationale" / "train_results.json").exists()
    run_training(tiny_dataset, folder)
    assert equals_uninterrupted_run(folder, tiny_run)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["changed", "missing", "list"])
def test_passes_over_damaged_checkpoint_only_on_request(unfinished_run, tiny_run, tiny_dataset, damage):
    newest = unfinished_run / "answer" / "checkpoint-24"
    file = newest / ("files.json" if damage == "list" else "optimizer.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content) if damage != "missing" else file.unlink()
    result = run_training(tiny_dataset, unfinished_run, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    words = {"changed": "optimizer.pt has sha256", "missing": "optimizer.pt is missing", "list": "list of files"}
    assert f"{newest} is damaged: " in result.stderr and words[damage] in result.stderr
    assert newest.is_dir() and not (unfinished_run / "answer" / "model.safetensors").exists()
    run_training(tiny_dataset, unfinished_run, "--pass_over_damaged_checkpoints", "true")
    assert equals_uninterrupted_run(unfinished_run, tiny_run)


@pytest.mark.slow
def test_full_disk_keeps_earlier_checkpoints(unfinished_run, tiny_run, tiny_dataset):
    """A limit on the file size simulates a full disk: the optimizer's state exceeds it, the weights do not."""
    stage = unfinished_run / "answer"
    shutil.rmtree(stage / "checkpoint-24")
    before = {file: file.read_bytes() for file in (stage / "checkpoint-20").iterdir()}
    sizes = [(stage / "checkpoint-20" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")]
    limit = sum(sizes) // 2
    assert sizes[0] < limit < sizes[1]
    result = run_script(
        "-c",
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        f"sys.argv = sys.argv[1:]; runpy.run_path('train.py', run_name='__main__')",
        *build_command(tiny_dataset, unfinished_run)[1:],
        check=False,
    )
    assert result.returncode == 1, result.stderr[-3000:]
    assert f"The checkpoint of step 24 could not be written to {stage}" in result.stderr
    assert sorted(path.name for path in stage.glob("*point*")) == ["checkpoint-20"]
    assert not (stage / "unfinished").exists()
    assert {file: file.read_bytes() for file in (stage / "checkpoint-20").iterdir()} == before
    run_training(tiny_dataset, unfinished_run)
    assert equals_uninterrupted_run(unfinished_run, tiny_run)


@pytest.mark.slow
def test_lost_output_folder_ends_the_run_and_is_not_recreated(tiny_dataset, tmp_path):
    folder = tmp_path / "run"
    process = start_training(tiny_dataset, folder)
    wait_for(folder / "rationale" / "checkpoint-4", process)
    folder.rename(tmp_path / "moved")
    _, errors = process.communicate()
    assert process.returncode == 1 and f"could not be written to {folder / 'rationale'}" in errors
    assert not folder.exists()


@pytest.mark.slow
def test_non_finite_loss_stops_and_names_the_problems_of_its_batch(tiny_dataset, tmp_path):
    result = run_training(tiny_dataset, tmp_path / "run", "--learning_rate", "1e30", check=False)
    assert result.returncode == 1
    (message,) = [line for line in result.stderr.splitlines() if "error: The loss is " in line]
    named = message.split("for the problems ")[1].split(". ")[0].split(", ")
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    assert len(named) == 4 and set(named) <= {row["id"] for row in rows if row["split"] == "train"}


@pytest.mark.slow
def test_best_checkpoint_is_kept_and_loaded_at_end(tiny_dataset, tmp_path):
    options = ("--load_best_model_at_end", "true", "--eval_steps", "4", "--save_total_limit", "1", "--max_steps", "8")
    run_training(tiny_dataset, tmp_path / "run", *options)
    for stage in STAGES:
        (checkpoint,) = (tmp_path / "run" / stage).glob("checkpoint-*")
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] is None, "it would be a path of this machine"
        assert checkpoint.name == f"checkpoint-{state['best_global_step']}"
        best, final = (load_file(folder / "model.safetensors") for folder in (checkpoint, checkpoint.parent))
        assert all(torch.equal(final[name], weight) for name, weight in best.items())
