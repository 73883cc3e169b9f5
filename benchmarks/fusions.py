"""Time training steps and generation with each fusion, against `gated` in the same run; count parameters and FLOPs.

    python -m benchmarks.fusions [--shape small] [--output FILE]

Training steps are those of `benchmarks/training.py` (rationale stage, real texts, random features of DETR's shape).
Generation is greedy, for the sources of the same batches, 32 tokens each. The parameters are counted for all shapes of
FLAN-T5, without weights. Prints a JSON object.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.setting import DETR, FLAN_T5, SHAPES, our_model, report, summary, timed
from benchmarks.training import batches_of, examples_of, stepper
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration
from modeling_mmcot.fusion_mmcot import FUSIONS

NUM_BATCHES, REPEATS, NEW_TOKENS = 2, 5, 32
LIMIT = 3e9  # parameters, of the whole model
FORMS: dict[str, dict[str, Any]] = {name: {} for name in FUSIONS} | {
    "resampler": {"num_latents": 16},
    "flamingo": {"every": 1},
    "flamingo, every 4": {"every": 4},
    "flamingo, every 8": {"every": 8},
}


def settings(form: str) -> dict[str, Any]:
    """Return the configuration's fields for a row of `FORMS`."""
    return {"fusion": form.partition(",")[0], "fusion_options": FORMS[form] or None}


def count_parameters() -> dict[str, dict[str, Any]]:
    """Return the parameters of each fusion and of the whole model, in millions, by shape."""
    counts: dict[str, dict[str, Any]] = {}
    for shape, sizes in SHAPES.items():
        for form in FORMS:
            # FLAN-T5's output head is not tied to its embeddings.
            texts = {**FLAN_T5, **sizes, "scale_decoder_outputs": False}
            config = MMCoTConfig(**texts, vision_hidden_size=DETR[1], **settings(form))
            with torch.device("meta"):
                model = MMCoTForConditionalGeneration(config)
            own = sum(value.numel() for name, value in model.named_parameters() if ".fusion." in name)
            total = sum(value.numel() for value in model.parameters())
            counts.setdefault(form, {})[shape] = {
                "fusion_millions": round(own / 1e6, 1),
                "total_millions": round(total / 1e6, 1),
                "is_below_limit": total < LIMIT,
            }
    return counts


def generator(model: MMCoTForConditionalGeneration) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return a function that generates `NEW_TOKENS` tokens for each row: without an end token, all are equally long."""
    model.generation_config.eos_token_id = None

    def run(batch: dict[str, torch.Tensor]) -> None:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)

    return run


def flops_of(model: MMCoTForConditionalGeneration, batches: list[dict[str, torch.Tensor]]) -> int:
    """Return the FLOPs of forward passes, which PyTorch counts from the shapes of matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for batch in batches:
            model(**batch, skip_logits=True)
    return counter.get_total_flops()


def measure(shape: str) -> dict[str, Any]:
    batches, _ = batches_of(examples_of("rationale"), "rationale", NUM_BATCHES)
    models = {form: our_model(shape, **settings(form)) for form in FORMS}
    flops = {form: flops_of(model.eval(), batches) for form, model in models.items()}
    generators = {form: generator(model) for form, model in models.items()}
    generation = timed(
        {form: lambda run=run: [run(batch) for batch in batches] for form, run in generators.items()}, REPEATS
    )
    steppers = {form: stepper(model, skip_logits=True) for form, model in models.items()}
    training = timed(
        {form: lambda run=run: [run(batch) for batch in batches] for form, run in steppers.items()}, REPEATS
    )
    return {
        form: {
            "forward_flops / gated": round(flops[form] / flops["gated"], 3),
            **{
                f"{name} / gated": round(statistics.median(seconds[form]) / statistics.median(seconds["gated"]), 2)
                for name, seconds in (("training", training), ("generation", generation))
            },
            "training_seconds": summary(training[form]),
            "generation_seconds": summary(generation[form]),
        }
        for form in FORMS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=list(SHAPES))
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to this file")
    arguments = parser.parse_args()
    report("fusions", {"parameters": count_parameters(), arguments.shape: measure(arguments.shape)}, arguments.output)


if __name__ == "__main__":
    main()
