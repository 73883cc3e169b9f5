"""Training that stops early: exit codes, messages, and resuming, also from a moved run folder."""

import json
import shutil
import signal

import pytest
from conftest import run_script
from safetensors.torch import load_file
from test_interruption import build_command, equals_uninterrupted_run, run_training, start_training, wait_for

from mmcot.storage.checkpoints import UNFINISHED, checkpoint_to_resume, finish_checkpoint

# A larger loss counts as better, so that the first checkpoint is the best one.
FIRST_IS_BEST = (
    "--load_best_model_at_end",
    "true",
    "--metric_for_best_model",
    "eval_loss",
    "--greater_is_better",
    "true",
)
FIRST_IS_BEST += ("--eval_steps", "4", "--save_steps", "4", "--save_total_limit", "1", "--max_steps", "12")


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_exits_with_130(tiny_run, tiny_dataset, tmp_path):
    folder = tmp_path / "run"
    process = start_training(tiny_dataset, folder)
    wait_for(folder / "rationale" / "checkpoint-4", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors
    assert "SIGINT: the rationale stage stopped at step" in errors and "The same command resumes from it" in errors
    run_training(tiny_dataset, folder)
    assert equals_uninterrupted_run(folder, tiny_run)


@pytest.mark.slow
def test_ctrl_c_before_training_exits_without_traceback(tiny_dataset, tmp_path):
    """The signal arrives after the run folder is created, while problems are tokenized."""
    # Restored, because a shell starts background jobs, and so perhaps these tests, with SIGINT ignored.
    settings = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = start_training(tiny_dataset, tmp_path / "run", **settings)
    wait_for(tmp_path / "run" / "recipe.yaml", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors and "The same command resumes" in errors


@pytest.mark.slow
def test_moved_run_keeps_its_best_checkpoint(tiny_dataset, tmp_path):
    options = FIRST_IS_BEST
    process = start_training(tiny_dataset, tmp_path / "run", *options)
    wait_for(tmp_path / "run" / "rationale" / "checkpoint-8", process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    best = load_file(tmp_path / "run" / "rationale" / "checkpoint-4" / "model.safetensors")
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    (tmp_path / "run").rename(moved)
    result = run_training(tiny_dataset, moved, *options)
    assert "does not exist anymore" not in result.stderr
    final = load_file(moved / "rationale" / "model.safetensors")
    assert all((final[name] == weight).all() for name, weight in best.items())


@pytest.mark.slow
def test_refuses_to_resume_without_best_checkpoint(tiny_dataset, tmp_path):
    options = FIRST_IS_BEST
    process = start_training(tiny_dataset, tmp_path / "run", *options)
    wait_for(tmp_path / "run" / "rationale" / "checkpoint-8", process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    shutil.rmtree(tmp_path / "run" / "rationale" / "checkpoint-4")
    result = run_training(tiny_dataset, tmp_path / "run", *options, check=False)
    assert result.returncode == 1 and "checkpoint-4 is missing, the best checkpoint so far" in result.stderr


@pytest.mark.slow
def test_drop_last_refuses_fewer_problems_than_a_batch(tiny_dataset, tmp_path):
    options = ("--dataloader_drop_last", "true", "--per_device_train_batch_size", "1000")
    result = run_training(tiny_dataset, tmp_path / "run", *options, check=False)
    assert result.returncode == 1 and "SIGTERM" not in result.stderr
    assert "training examples, but a batch over all processes has 1000" in result.stderr


@pytest.mark.slow
def test_refuses_to_resume_without_optimizer_state(tiny_dataset, tmp_path):
    options = ("--save_only_model", "true", "--save_steps", "4")
    process = start_training(tiny_dataset, tmp_path / "run", *options)
    wait_for(tmp_path / "run" / "rationale" / "checkpoint-4", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143 and "save_only_model saves no optimizer" in errors
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*.safetensors")}
    result = run_training(tiny_dataset, tmp_path / "run", *options, check=False)
    assert result.returncode == 1 and "was saved with save_only_model, without optimizer and schedule" in result.stderr
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*.safetensors")} == before


def write_checkpoint(folder, text):
    folder.mkdir(parents=True)
    (folder / "weights").write_text(text)
    return folder


@pytest.mark.parametrize("killed_after", [1, 2])
def test_checkpoint_survives_a_kill_while_it_is_saved_again(tmp_path, monkeypatch, killed_after):
    checkpoint = tmp_path / "checkpoint-4"
    finish_checkpoint(write_checkpoint(tmp_path / UNFINISHED / "checkpoint-4", "first"), checkpoint)
    again = write_checkpoint(tmp_path / UNFINISHED / "checkpoint-4", "again")
    rename, renamed = type(tmp_path).rename, []

    def killed(path, target):
        renamed.append(path)
        if len(renamed) == killed_after:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            finish_checkpoint(again, checkpoint)
    assert checkpoint_to_resume(tmp_path) == str(checkpoint)
    assert (checkpoint / "weights").read_text() == ("first" if killed_after == 1 else "again")


@pytest.mark.slow
def test_refuses_second_command_on_the_same_run(tiny_run, tiny_dataset, tmp_path):
    folder = tmp_path / "run"
    process = start_training(tiny_dataset, folder)
    wait_for(folder / "rationale" / "checkpoint-4", process)
    process.send_signal(signal.SIGSTOP)  # so that it still runs when the second one starts
    second = run_training(tiny_dataset, folder, check=False)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate()
    assert second.returncode == 1 and f"{folder} is being written by another command" in second.stderr
    assert process.returncode == 0, errors[-3000:]
    assert equals_uninterrupted_run(folder, tiny_run)


@pytest.mark.slow
def test_counts_shortened_sources_and_targets(tiny_dataset, tmp_path):
    """One of the training problems has a context of 20,000 words, another one a long solution."""
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    training = [row for row in rows if row["split"] == "train"]
    training[0]["context"] = "word " * 20_000
    training[1]["solution"] = "word " * 5_000
    dataset = tiny_dataset.with_name("long.jsonl")
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_script(*build_command(dataset, tmp_path / "run", "--max_steps", "2")[1:])
    summary = json.loads((tmp_path / "run" / "rationale" / "train_results.json").read_text())
    of, sources, targets = (summary["shortened"]["train"][name] for name in ("of", "sources", "targets"))
    assert (of, sources) == (len(training), 1) and 0 < targets <= of  # the tiny recipe limits targets to 12 tokens
    for kind, count in (("sources", 1), ("targets", targets)):
        assert f"rationale stage: the {kind} of {count} of {of} train problems are longer than" in result.stderr
