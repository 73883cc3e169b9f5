"""Shared parts of the speed benchmarks: problems, model shapes, text lengths, timing, description of the machine.

The problems are real (`../shared/scienceqa`, with captions). The models have FLAN-T5's shapes and random weights, and
the pictures are random features of DETR's shape. Random weights never end a text, so each generated rationale is
replaced by its gold rationale and ends at that length; the answer stage thus reads texts of real lengths.
"""

import argparse
import json
import os
import platform
import statistics
import time
import zlib
from collections.abc import Callable
from datetime import date
from pathlib import Path

import psutil
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, StoppingCriteria, T5Config, T5ForConditionalGeneration

from mmcot.problems.schema import with_column
from mmcot.problems.sources import load_problems
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.inference_mmcot import group_by_length
from modeling_mmcot.stage_mmcot import PAPER_TEMPLATES, Stage

DATASET = "../shared/scienceqa"
TOKENIZER = "../shared/t5_tokenizer"
REPEATS = 5
BATCH_SIZE = 8
ANSWER_LENGTH = 8  # tokens of "The answer is (A).", with eos

# google/flan-t5-*: https://huggingface.co/google/flan-t5-small/blob/main/config.json and so on.
SHAPES = {
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32},
}
FLAN_T5 = {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1, "decoder_start_token_id": 0}
DETR = (100, 256)


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    return {
        "date": date.today().isoformat(),
        "cpu": f"{psutil.cpu_count()} cores, {model}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def gemm_flops(dtype: torch.dtype = torch.float32) -> float:
    """Return FLOP/s of a product of two 2048 x 2048 matrices, as a practical peak of the machine."""
    left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    seconds = timed({"gemm": lambda: left @ right}, repeats=15)["gemm"]
    return 2 * 2048**3 / statistics.median(seconds)


def timed(work: dict[str, Callable], repeats: int = REPEATS, warm_up: int = 1) -> dict[str, list[float]]:
    """Return seconds of each repeat; the functions run in turns, so that disturbances of the machine affect all."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    rounds = tqdm(total=(warm_up + repeats) * len(work), desc=", ".join(work), leave=False)
    with rounds:
        for number in range(warm_up + repeats):
            for name, run in work.items():
                start = time.perf_counter()
                run()
                if number >= warm_up:
                    seconds[name].append(time.perf_counter() - start)
                rounds.update()
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "n": len(seconds)}


def ratio(slow: list[float], fast: list[float]) -> float:
    return round(statistics.median(slow) / statistics.median(fast), 2)


def stages() -> list[Stage]:
    columns = ["question", "context", "choices", "caption", "images"]
    return [
        Stage("rationale", columns, "rationale", **PAPER_TEMPLATES["QCM-E"]),
        Stage("answer", [*columns, "rationale"], "answer_text", **PAPER_TEMPLATES["QCMG-A"], max_target_length=64),
    ]


def processor() -> MMCoTProcessor:
    return MMCoTProcessor(AutoTokenizer.from_pretrained(TOKENIZER), None, stages())


def problems(split: str):
    """Load a split with a column `gold_rationale`, in the format that the rationale stage writes."""
    loaded = load_problems(DATASET, split, max_images=1)
    rationale = stages()[0]
    texts = [rationale.render_target(row) for row in loaded.remove_columns("images")]
    return with_column(loaded, "gold_rationale", texts)


def our_model(shape: str, kind: type = MMCoTForConditionalGeneration, **config) -> MMCoTForConditionalGeneration:
    torch.manual_seed(0)
    defaults = {"fusion": "gated", "vision_hidden_size": DETR[1]}
    return kind(MMCoTConfig(**FLAN_T5, **SHAPES[shape], **{**defaults, **config}))


def plain_t5(shape: str) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**FLAN_T5, **SHAPES[shape]))


class RandomFeatures:
    """Random features of DETR's shape for each problem with a picture, seeded by problem id."""

    def features_of(self, problem_id: str) -> torch.Tensor:
        return torch.randn(DETR, generator=torch.Generator().manual_seed(zlib.crc32(problem_id.encode())))

    def batch(self, problems: list[dict]) -> dict[str, torch.Tensor]:
        has_picture = torch.tensor([bool(problem["images"]) for problem in problems])
        if not has_picture.any():
            return {}
        features = torch.stack([self.features_of(problem["id"]) for problem in problems])
        return {"vision_features": features, "vision_mask": has_picture[:, None].expand(-1, DETR[0])}


class EndsAt(StoppingCriteria):
    """Each row ends at its own length, in tokens without the start token."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return input_ids.shape[1] - 1 >= self.lengths.to(input_ids.device)


class GoldTextModel(MMCoTForConditionalGeneration):
    """Our model with generated texts replaced by gold ones, which end at the gold length."""

    def set_gold_texts(
        self, tokenizer: PreTrainedTokenizerBase, sources: list[list[int]], texts: list[str]
    ) -> "GoldTextModel":
        """Set the gold text of each source; for any other source, `generate` writes `ANSWER_LENGTH` tokens."""
        tokens = tokenizer(texts, truncation=True, max_length=512)["input_ids"]
        self.gold = {tuple(source): text for source, text in zip(sources, tokens, strict=True)}
        self.sources: list[tuple[int, ...]] = []  # in the order of encoding
        self.encoder.register_forward_pre_hook(self.record_sources, with_kwargs=True)
        self.generation_config.eos_token_id = None
        return self.eval()

    def record_sources(self, module, args, kwargs) -> None:
        rows, mask = kwargs["input_ids"], kwargs["attention_mask"].bool()
        self.sources.extend(tuple(row[real].tolist()) for row, real in zip(rows, mask, strict=True))

    def generate(self, attention_mask: torch.Tensor, **kwargs) -> torch.LongTensor:
        order = [row for rows in group_by_length(attention_mask.sum(dim=1).tolist()) for row in rows]
        sources = dict(zip(order, self.sources[-len(order) :], strict=True))
        texts = [self.gold.get(sources[row], [0] * ANSWER_LENGTH) for row in range(len(order))]
        lengths = [len(text) for text in texts]
        limits = {"stopping_criteria": [EndsAt(lengths)], "max_new_tokens": max(lengths)}
        super().generate(attention_mask=attention_mask, **kwargs, **limits)
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)


def padded(rows: list[list[int]], value: int, length: int | None = None) -> torch.LongTensor:
    length = length or max(map(len, rows))
    return torch.tensor([row[:length] + [value] * (length - len(row)) for row in rows])


def parse_arguments(description: str) -> argparse.Namespace:
    """Parse the options of benchmarks that can include the authors' code or vary the number of problems."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", metavar="DIR", help="folder with the authors' code and its .venv")
    parser.add_argument("--scale", action="store_true", help="only cost and memory by the number of problems")
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to this file")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return parser.parse_args()


def report(name: str, result: dict, output: str | None) -> None:
    """Print the result as JSON, and also write it to `output` if given."""
    text = json.dumps({"benchmark": name, **result, "machine": machine()}, indent=2)
    if output is not None:
        Path(output).write_text(text + "\n")
    print(text)
