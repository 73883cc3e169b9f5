"""The GPU benchmark: its small form on a CPU, from the command to the JSON file; failing cases; theoretical limits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).parent.parent
CPU = gpu.Setting(torch.device("cpu"), small=True, demo=None)


@pytest.mark.slow
def test_small_form_on_cpu_writes_rows_of_every_section(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--output", str(output)]
    done = subprocess.run([*command, "--minutes", "15"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["form"] == "small" and result["device"] == "cpu" and result["matrix_peak_flops"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    rows = result["rows"]
    assert {row["section"] for row in rows} == set(gpu.SECTIONS)
    for row in rows:
        assert row["error"] is None and row["name"] in done.stdout
        assert row["figure"] > 0 or row["unit"] == "probability", row
        assert row["unit"] == "probability" or row["baseline"] > 0, row
        assert row["section"] == "demonstration" or row["limit"] is None, row
    variants = " ".join(row["name"] for row in rows)
    assert all(word in variants for word in ("LoRA", "DETR", "ViT", "eager", "checkpointing", "compiled", "static"))


def test_records_failed_case_in_row_and_exit_status(tmp_path, monkeypatch, capsys):
    def fail() -> list[gpu.Row]:
        raise torch.OutOfMemoryError("too large")

    row = gpu.Row("leaving", "fine", 2.0, "problems a second")
    cases = {
        "pictures": lambda setting: iter([("large", fail)]),
        "leaving": lambda setting: iter([("x", lambda: [row])]),
    }
    monkeypatch.setattr(gpu, "SECTIONS", cases)
    output = tmp_path / "gpu.json"
    threads = torch.get_num_threads()
    options = ["--device", "cpu", "--sections", "pictures", "leaving", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    assert gpu.main() == 1
    first, second = json.loads(output.read_text())["rows"]
    assert first["error"] == "OutOfMemoryError: too large" and first["figure"] is None
    assert second["figure"] == 2.0 and "too large" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu", *options, "--minutes", "0"])
    assert gpu.main() == 1
    assert all("not run" in row["error"] for row in json.loads(output.read_text())["rows"])
    torch.set_num_threads(threads)


def test_flops_match_torch_counter():
    batch = gpu.make_batch(CPU, "tiny", (128, 128), (64, 64), 3, "DETR")
    model = gpu.build_model(CPU, "tiny", "DETR").eval()
    model.set_attn_implementation("eager")  # torch does not count a CPU's fused attention
    with torch.no_grad(), gpu.FlopCounterMode(display=False) as counter:
        model(**batch.inputs, labels=batch.labels)
    shape, sources, targets = gpu.SHAPES["tiny"], batch.source_lengths, batch.target_lengths
    expected = gpu.encoder_flops(shape, sources) + gpu.fusion_flops(shape, sources, "DETR")
    expected += gpu.decoder_flops(shape, sources, targets)
    # Added because torch counts the whole square of the decoder's self-attention, and the benchmark the causal half.
    inner = shape["num_heads"] * shape["d_kv"]
    expected += 2 * shape["num_decoder_layers"] * sum(target * target * inner for target in targets)
    assert counter.get_total_flops() == pytest.approx(expected)


def test_computes_limits_only_for_known_device():
    peak, bandwidth = gpu.PEAKS["NVIDIA H100 80GB HBM3"]
    known = gpu.Setting(torch.device("cpu"), True, None, peak, bandwidth)
    batch = gpu.rationale_batch(known, "tiny")
    assert 0 < gpu.generation_limit(known, gpu.SHAPES["tiny"], batch) < 1e-3
    labels = gpu.choice_labels("tiny", len(batch.source_lengths), known.device)
    assert 0 < gpu.scoring_limit(known, "tiny", batch, labels) < 1e-3
    assert gpu.generation_limit(CPU, gpu.SHAPES["tiny"], batch) is None
    units = {row.unit for row in gpu.training_rows(known, "training", "tiny", "full", "DETR", "eager")}
    assert units == {"problems a second", "model TFLOP/s", "share"}
