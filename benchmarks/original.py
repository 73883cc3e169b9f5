"""Run the authors' model (amazon-science/mm-cot, model.py) in its own environment, on inputs of the benchmarks.

`run` starts this file as a script with the Python of DIR/.venv, which imports nothing of this repository. The script
builds the authors' model of a given shape with random weights, runs training steps or generation, and prints the
seconds of each repeat.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(directory: str, task: str, batch: dict, shape: dict, repeats: int = 5) -> list[float]:
    """
    Run the authors' model on a batch.

    Args:
        directory: folder with the authors' files and a `.venv`.
        task: `training` (a step on the batch) or `generation` (of texts that end at `batch["lengths"]`).
        batch: `input_ids`, `attention_mask`, `vision_features`, and `labels` or `lengths`.

    Returns:
        Seconds of each repeat; training has one warm-up run before, generation has none.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batch.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in batch.items()}, file)
        command = [
            Path(directory) / ".venv/bin/python",
            Path(__file__).resolve(),
            task,
            file,
            json.dumps(shape),
            str(repeats),
        ]
        result = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the original's code failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def main(task: str, file: str, shape: str, repeats: str) -> None:
    sys.path.insert(0, str(Path.cwd()))
    import torch
    from model import T5ForMultimodalGeneration
    from safetensors.torch import load_file
    from transformers import StoppingCriteria, StoppingCriteriaList, T5Config

    batch = load_file(file)
    images = batch["vision_features"]
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
        **json.loads(shape),
    )
    model = T5ForMultimodalGeneration(config, patch_size=tuple(images.shape[1:]))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "image_ids": images}

    class EndsAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] - 1 >= int(batch["lengths"].max())

    def generate() -> None:
        model.eval()
        model.generate(**inputs, max_length=513, eos_token_id=None, stopping_criteria=StoppingCriteriaList([EndsAt()]))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)

    def step() -> None:
        model.train()
        model(**inputs, labels=batch["labels"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    work, warm_up = (step, 1) if task == "training" else (generate, 0)
    seconds = []
    for _ in range(warm_up + int(repeats)):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds[warm_up:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
