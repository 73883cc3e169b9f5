"""Scoring a problem's choices: all targets packed in one pass of the decoder against a pass for each choice.

    python -m benchmarks.scoring

From which length on a pass each is faster, and so what `MAX_PACKED_LENGTH` is to be. FLAN-T5-small's shape and the
demonstration's, random weights, a source of 100 tokens, batches of 1 and 8 problems, packed weights as the pipeline has
them, medians of 9 repeats in turns. Prints a JSON object.
"""

import torch
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.setting import SHAPES, our_model, ratio, report, timed
from modeling_mmcot import modeling_mmcot
from modeling_mmcot.generation_mmcot import packed_linears

DEMO = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
TARGETS = [(4, 8), (4, 40), (4, 80), (4, 120), (4, 200), (26, 4), (26, 10), (26, 16), (26, 24), (26, 40), (26, 100)]
LIMITS = {"packed": 10**9, "one by one": 0}


@torch.inference_mode()
def compare(shape: str, batch_size: int, choices: int, tokens: int) -> dict:
    """How much faster packed is than one by one, and by how much the scores differ at most."""
    model = our_model(shape).eval()
    labels = torch.randint(3, 1000, (batch_size, choices, tokens))
    states = BaseModelOutput(last_hidden_state=torch.randn(batch_size, 100, model.config.d_model))
    mask = torch.ones(batch_size, 100)

    def score(limit: int) -> torch.Tensor:
        modeling_mmcot.MAX_PACKED_LENGTH = limit
        return model.score_choices(labels, mask, states)

    with packed_linears(model):
        seconds = timed({name: lambda limit=limit: score(limit) for name, limit in LIMITS.items()}, repeats=9)
    scores = [score(limit) for limit in LIMITS.values()]
    return {
        "packed length": choices * tokens,
        "milliseconds": {name: round(1000 * sorted(times)[len(times) // 2], 1) for name, times in seconds.items()},
        "packed is faster by": ratio(seconds["one by one"], seconds["packed"]),
        "largest difference": float((scores[0] - scores[1]).abs().max()),
    }


def main() -> None:
    SHAPES["demo"] = DEMO
    result = {
        f"{shape}, {batch_size} x {choices} choices of {tokens}": compare(shape, batch_size, choices, tokens)
        for shape in ("demo", "small")
        for batch_size in (1, 8)
        for choices, tokens in TARGETS
    }
    report("scoring", result, None)


if __name__ == "__main__":
    main()
