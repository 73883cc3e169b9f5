"""Time both stages over real problems: against the original's method with and without its cache, and plain T5.

    python -m benchmarks.inference                     # all measurements except the following
    python -m benchmarks.inference --original DIR      # also the authors' code: DIR contains it and its .venv
    python -m benchmarks.inference --scale             # only cost and memory by the number of problems

All systems read the pictures as features. Without a cache the original's method takes ten minutes for 24 problems, so
its decoder runs only at every sixteenth text length, and each time is multiplied by sixteen; `--original` checks this
estimate against a complete run of the authors' code over 8 problems.
Prints a JSON object. DIR: see benchmarks.training.
"""

import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput

from benchmarks import original
from benchmarks.setting import (
    ANSWER_LENGTH,
    BATCH_SIZE,
    DATASET,
    DETR,
    SHAPES,
    EndsAt,
    GoldTextModel,
    RandomFeatures,
    our_model,
    padded,
    parse_arguments,
    plain_t5,
    problems,
    processor,
    ratio,
    report,
    summary,
    timed,
)
from mmcot.prediction.examples import StageCollator
from mmcot.prediction.predictor import PredictOptions, predict_stage
from mmcot.problems.schema import with_column, without_gold
from modeling_mmcot.generation_mmcot import packed_linears
from modeling_mmcot.inference_mmcot import choose_answers, encode, generate_texts
from modeling_mmcot.stage_mmcot import Stage

STRIDE = 16
FEW, MANY = 24, 200  # numbers of problems of the two comparisons
TRIED = 32  # number of problems that select the batch size of plain T5
LONG_REPEATS = 3  # for measurements that take about a minute, to limit the total to a quarter of an hour
OUR_BATCH_SIZE = 64
GENERATED_SIZES, SCORED_SIZES = (250, 1000), (250, 4000)


class Texts:
    """Problems with the tokens of each stage's source and of the gold rationale."""

    def __init__(self, rows):
        self.rows = rows
        tools = processor()
        with_gold = with_column(rows, "rationale", list(rows["gold_rationale"]))
        self.sources = {
            stage.name: [
                tools.tokenizer(tools.fit_source(row, stage))["input_ids"]
                for row in (with_gold if stage.answers else rows).remove_columns("images")
            ]
            for stage in tools.stages
        }
        gold = tools.tokenizer(list(rows["gold_rationale"]), truncation=True, max_length=512)["input_ids"]
        self.lengths = {"rationale": [len(text) for text in gold], "answer": [ANSWER_LENGTH] * len(gold)}


def first_problems(count: int, with_pictures: bool):
    rows = problems("test")
    return rows.select([index for index in range(len(rows)) if rows[index]["images"] or not with_pictures][:count])


def ours(rows, batch_size: int) -> Callable[[], dict]:
    """Return a function that runs both stages as `mmcot.predict` does."""
    tools, texts = processor(), Texts(rows)
    model = our_model("small", GoldTextModel).set_gold_texts(
        tools.tokenizer, texts.sources["rationale"], list(rows["gold_rationale"])
    )
    rows_without_gold = without_gold(rows).remove_columns("gold_rationale")

    def run() -> dict:
        predictions: dict[str, dict] = {}
        for stage in tools.stages:
            predict_stage(
                model, tools, stage, rows_without_gold, predictions, PredictOptions(batch_size), RandomFeatures()
            )
        return predictions

    return run


def original_batches(texts: Texts) -> list[dict]:
    """Return the original's batches of both stages: in the order of the problems, with sources padded to 512."""
    features, batches = RandomFeatures(), []
    for stage, sources in texts.sources.items():
        for start in range(0, len(sources), BATCH_SIZE):
            ids = padded(sources[start : start + BATCH_SIZE], 0, 512)
            rows = [texts.rows[index] for index in range(start, start + len(ids))]
            pictures = [features.features_of(row["id"]) if row["images"] else torch.zeros(DETR) for row in rows]
            batches.append(
                {
                    "input_ids": ids,
                    "attention_mask": (ids != 0).long(),
                    "vision_features": torch.stack(pictures),
                    "lengths": torch.tensor(texts.lengths[stage][start : start + len(ids)]),
                }
            )
    return batches


@torch.no_grad()
def original_with_cache(model, batches: list[dict]) -> None:
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "lengths"}
        lengths = batch["lengths"].tolist()
        model.generate(**inputs, stopping_criteria=[EndsAt(lengths)], max_new_tokens=max(lengths))


@torch.no_grad()
def original_without_cache(model, batches: list[dict]) -> float:
    """Return estimated seconds: of sixteen text lengths, the middle one is run, and its time counts sixteen times."""
    seconds = 0.0
    for batch in tqdm(batches, desc="original's method", leave=False):
        start = time.perf_counter()
        inputs = {name: value for name, value in batch.items() if name != "lengths"}
        states = BaseModelOutput(model.encoder(**inputs).last_hidden_state)
        seconds += time.perf_counter() - start
        steps = int(batch["lengths"].max())
        for first in range(0, steps, STRIDE):
            num_steps = min(STRIDE, steps - first)
            so_far = torch.zeros(len(batch["lengths"]), first + (num_steps + 1) // 2, dtype=torch.long)
            start = time.perf_counter()
            logits = model(
                encoder_outputs=states,
                attention_mask=batch["attention_mask"],
                decoder_input_ids=so_far,
                use_cache=False,
            ).logits
            logits[:, -1].argmax(dim=-1)
            seconds += num_steps * (time.perf_counter() - start)
    return seconds


def plain(texts: Texts, batch_size: int) -> Callable[[], None]:
    """Return a function that runs both stages with plain T5: sorted by length, padded to the longest, with cache."""
    model = plain_t5("small").eval()
    model.generation_config.eos_token_id = None

    @torch.no_grad()
    def run() -> None:
        for stage, sources in texts.sources.items():
            order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                ids = padded([sources[index] for index in indices], 0)
                lengths = [texts.lengths[stage][index] for index in indices]
                model.generate(
                    input_ids=ids,
                    attention_mask=(ids != 0).long(),
                    stopping_criteria=[EndsAt(lengths)],
                    max_new_tokens=max(lengths),
                )

    return run


def best_batch_size(make: Callable[[int], Callable], sizes: tuple[int, ...]) -> tuple[int, dict[int, float]]:
    """Return the fastest batch size and the seconds of each, from one run per size."""
    seconds = {size: timed({str(size): make(size)}, repeats=1, warm_up=0)[str(size)][0] for size in sizes}
    return min(seconds, key=seconds.get), seconds


def measure_few(directory: str | None) -> dict:
    rows = first_problems(FEW, with_pictures=True)
    texts = Texts(rows)
    batches = original_batches(texts)
    model = our_model("small", fusion="gated_mha", zeros_for_missing_pictures=True).eval()
    model.generation_config.eos_token_id = None
    work = {"ours": ours(rows, FEW), "with cache": lambda: original_with_cache(model, batches)}
    seconds = timed(work, LONG_REPEATS, warm_up=0)
    without_cache = [original_without_cache(model, batches)]
    result = {
        "problems": FEW,
        "seconds": {
            "ours": summary(seconds["ours"]),
            "original's method with its cache": summary(seconds["with cache"]),
            "original's method": without_cache[0],
        },
        "original's method / ours": ratio(without_cache, seconds["ours"]),
        "original's method with its cache / ours": ratio(seconds["with cache"], seconds["ours"]),
    }
    if directory is not None:
        # One batch of 8 of each stage suffices to check that the work is the same.
        few = [batches[0], batches[len(batches) // 2]]
        theirs = [original.run(directory, "generation", batch, SHAPES["small"], 1) for batch in few]
        baseline = [original_without_cache(model, [batch]) for batch in few]
        result["seconds"]["the original itself, 8 problems"] = theirs
        result["seconds"]["our baseline, the same"] = baseline
        result["our baseline / the original itself"] = ratio([sum(baseline)], [sum(map(sum, theirs))])
    return result


def measure_many() -> dict:
    rows = first_problems(MANY, with_pictures=False)
    some = Texts(rows.select(range(TRIED)))
    size, by_size = best_batch_size(lambda size: plain(some, size), (8, 16, 32))
    work = {"ours": ours(rows, OUR_BATCH_SIZE), "plain T5": plain(Texts(rows), size)}
    seconds = timed(work, LONG_REPEATS, warm_up=0)
    return {
        "problems": MANY,
        "batch_sizes": {"ours": OUR_BATCH_SIZE, "plain T5": size},
        f"seconds of plain T5 over {TRIED} problems by batch size": by_size,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "plain T5 / ours": ratio(seconds["plain T5"], seconds["ours"]),
    }


def measure_scoring() -> dict:
    """Compare scoring the choices with generating the answer, by our model, for a batch of 8 of the answer stage."""
    rows = first_problems(BATCH_SIZE, with_pictures=False)
    texts, tools = Texts(rows), processor()
    stage = tools.stage("answer")
    model = our_model("small", GoldTextModel).set_gold_texts(
        tools.tokenizer, texts.sources["rationale"], list(rows["gold_rationale"])
    )
    examples = [
        {"input_ids": source, "id": row["id"], "images": row["images"]}
        for source, row in zip(texts.sources["answer"], rows, strict=True)
    ]
    problem_rows = [{**row, "rationale": row["gold_rationale"]} for row in rows.remove_columns("images")]
    return {
        f"batch of {size}": score_and_generate(model, tools, stage, problem_rows[:size], examples[:size])
        for size in (BATCH_SIZE, 1)
    }


def score_and_generate(model, tools, stage: Stage, problem_rows: list[dict], examples: list[dict]) -> dict:
    inputs = StageCollator(tools, stage, RandomFeatures())(examples)
    encoded = encode(model, inputs)
    work = {
        "scored": lambda: choose_answers(model, tools, stage, problem_rows, encoded),
        "generated": lambda: generate_texts(model, tools, encoded),
        "encoded": lambda: encode(model, inputs),
    }
    with packed_linears(model):  # as in mmcot.predict
        seconds = timed(work, repeats=15, warm_up=3)
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "generated / scored": ratio(seconds["generated"], seconds["scored"]),
    }


def measure_scale() -> dict:
    """Measure the cost of a real token, and memory, by the number of problems of real lengths, in one pass each."""
    data = json.loads((Path(DATASET) / "problems_trainval_qa.json").read_text())
    generator, gold = random.Random(0), list(problems("train")["gold_rationale"])
    rows = [
        {
            **{name: data[problem_id][name] for name in ("question", "choices")},
            **{"id": problem_id, "context": data[problem_id]["hint"], "caption": "", "images": []},
            "gold_rationale": generator.choice(gold),
        }
        for problem_id in generator.sample(sorted(data), max(SCORED_SIZES))
    ]
    generation, scoring = processor().stages
    return {
        "generating": {size: one_pass(rows[:size], generation) for size in GENERATED_SIZES},
        "scoring": {size: one_pass(rows[:size], scoring) for size in SCORED_SIZES},
    }


def one_pass(rows: list[dict], stage: Stage) -> dict[str, float]:
    table, tools = Dataset.from_list(rows), processor()
    texts = Texts(table)
    model = our_model("small", GoldTextModel).set_gold_texts(
        tools.tokenizer, texts.sources["rationale"], list(table["gold_rationale"])
    )
    predictions = {row["id"]: {"rationale": row["gold_rationale"]} for row in rows}
    start = time.perf_counter()
    predict_stage(model, tools, stage, table.remove_columns("gold_rationale"), predictions, pictures=RandomFeatures())
    seconds = time.perf_counter() - start
    tokens = sum(map(len, texts.sources[stage.name])) + sum(texts.lengths[stage.name])
    return {
        "microseconds_a_token": round(seconds / tokens * 1e6, 1),
        "peak_resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.scale:
        result = {"scale": measure_scale()}
    else:
        result = {
            "scoring": measure_scoring(),
            "few": measure_few(arguments.original),
            "many": measure_many(),
        }
    report("inference", result, arguments.output)


if __name__ == "__main__":
    main()
