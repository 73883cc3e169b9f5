"""Compare two ways to score a problem's choices: all targets packed into one decoder pass, or a pass for each choice.

    python -m benchmarks.scoring

The result determines `MAX_PACKED_LENGTH`, the length above which separate passes are faster. Settings: the shapes of
FLAN-T5-small and the demonstration, random weights, sources of 100 tokens, batches of 1 and 8 problems, weights packed
as in the pipeline, medians of 7 repeats in turns. Prints a JSON object.
"""

import torch
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.setting import our_model, ratio, report, timed
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, modeling_mmcot
from modeling_mmcot.generation_mmcot import pack_choices, packed_linears

# configs/demo/two_stages.yaml
DEMO = {
    "vocab_size": 1000,
    "decoder_start_token_id": 0,
    **{"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
}
TARGETS = [(4, 8), (4, 40), (4, 80), (4, 120), (4, 200), (26, 4), (26, 10), (26, 16), (26, 24), (26, 40)]
LIMITS = {"packed": 10**9, "one by one": 0}


@torch.inference_mode()
def compare(shape: str, batch_size: int, choices: int, tokens: int) -> dict:
    """Return the speed-up by packing, and the largest difference between the scores."""
    model = our_model(shape) if shape == "small" else MMCoTForConditionalGeneration(MMCoTConfig(**DEMO))
    model.eval()
    labels = torch.randint(3, 1000, (batch_size, choices, tokens))
    states = BaseModelOutput(last_hidden_state=torch.randn(batch_size, 100, model.config.d_model))
    mask = torch.ones(batch_size, 100)

    def score(limit: int) -> torch.Tensor:
        modeling_mmcot.MAX_PACKED_LENGTH = limit
        return model.score_choices(labels, mask, states)

    with packed_linears(model):
        seconds = timed({name: lambda limit=limit: score(limit) for name, limit in LIMITS.items()}, repeats=7)
    scores = [score(limit) for limit in LIMITS.values()]
    return {
        "packed length": pack_choices(labels, 0).input_ids.shape[1],
        "milliseconds": {name: round(1000 * sorted(times)[len(times) // 2], 1) for name, times in seconds.items()},
        "packed is faster by": ratio(seconds["one by one"], seconds["packed"]),
        "largest difference": float((scores[0] - scores[1]).abs().max()),
    }


def main() -> None:
    result = {
        f"{shape}, {batch_size} x {choices} choices of {tokens}": compare(shape, batch_size, choices, tokens)
        for shape in ("demo", "small")
        for batch_size in (1, 8)
        for choices, tokens in TARGETS
    }
    report("scoring", result, None)


if __name__ == "__main__":
    main()
