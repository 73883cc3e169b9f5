"""Probes: measure how much an answer depends on the written texts, the picture and the content of the choices.

The answer stage answers again with another text (none, the first half, one from another problem, shuffled words) in
each written column that it reads, such as the rationale, and with permuted choices. The whole system answers again
without the picture, and with the picture of another problem.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from mmcot.evaluation.comparison import two_places
from mmcot.evaluation.metrics import percentage
from mmcot.evaluation.uncertainty import mcnemar, mean_interval
from mmcot.pictures.feature_store import FeatureStore
from mmcot.prediction.predictor import PredictOptions, predict, predict_stage
from mmcot.problems.progress_bars import without_dataset_bars
from mmcot.problems.schema import FEATURES
from modeling_mmcot import MMCoTProcessor

SEED = 0

Predictions = dict[str, dict[str, Any]]


def drop_texts(texts: list[str], generator: random.Random) -> list[str]:
    return ["" for _ in texts]


def keep_first_half(texts: list[str], generator: random.Random) -> list[str]:
    return [" ".join(words[: len(words) // 2]) for words in map(str.split, texts)]


def take_from_another(texts: list[str], generator: random.Random) -> list[str]:
    return [texts[index] for index in other_indices(len(texts), generator)]


def shuffle_words(texts: list[str], generator: random.Random) -> list[str]:
    return [" ".join(generator.sample(words, len(words))) for words in map(str.split, texts)]


# Changes of the texts in a column, by the names of their probes.
CHANGES: dict[str, Callable[[list[str], random.Random], list[str]]] = {
    "{column} dropped": drop_texts,
    "{column}'s first half": keep_first_half,
    "another problem's {column}": take_from_another,
    "{column}'s words mixed": shuffle_words,
}


def other_indices(count: int, generator: random.Random) -> list[int]:
    """Return a random permutation without fixed points: each index maps to the next one in a random cycle."""
    cycle = generator.sample(range(count), count)
    return [pair[1] for pair in sorted(zip(cycle, cycle[1:] + cycle[:1], strict=True))]


def with_images(problems: Dataset, images: list[list]) -> Dataset:
    with without_dataset_bars():
        return problems.remove_columns("images").add_column("images", images, feature=FEATURES["images"])


def with_permuted_choices(problems: Dataset, generator: random.Random) -> tuple[Dataset, list[list[int]]]:
    """Permute the choices of each problem that has several; also return the old index of each new choice."""
    orders = []
    for row in problems.select_columns(["choices"]):
        count = len(row["choices"])
        order = list(range(count))
        while count > 1 and order == list(range(count)):
            order = generator.sample(range(count), count)
        orders.append(order)
    rows = list(zip(problems["choices"], problems["answer"], orders, strict=True))
    permuted = problems.remove_columns(["choices", "answer"])
    choices = [[texts[place] for place in order] for texts, _, order in rows]
    answers = [order.index(answer) for _, answer, order in rows]
    with without_dataset_bars():
        permuted = permuted.add_column("choices", choices, feature=FEATURES["choices"])
        return permuted.add_column("answer", answers, feature=FEATURES["answer"]), orders


def probe(
    processor: MMCoTProcessor,
    models: Mapping[str, PreTrainedModel],
    problems: Dataset,
    batch_size: int = 32,
    store: FeatureStore | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Run all probes that apply to a system.

    Args:
        problems: rows with right answers, which no model sees.
        store: the feature store that replaces the pictures, with a digest of each picture's content as key.

    Returns:
        For each probe: the number `n` of affected problems, their original `accuracy` and their `probed` accuracy, both
        in percent, the 95 % `interval` of the difference, McNemar's `p`, and the percentage of answers that `changed`.
        For permuted choices also the percentages of answers that `follow_content` and `follow_letter`.
    """
    answering = processor.stages.answering
    options = PredictOptions(batch_size=batch_size)
    predictions = predict(processor, models, problems, options, store)
    results = {}
    for stage in processor.stages.before(answering).with_models:
        column = stage.writes
        if column not in answering.reads:
            continue
        texts = [predictions[problem_id][column] for problem_id in problems["id"]]
        for name, change in CHANGES.items():
            changed_texts = change(texts, random.Random(SEED))
            written = {
                problem_id: {**predictions[problem_id], column: text}
                for problem_id, text in zip(problems["id"], changed_texts, strict=True)
            }
            predict_stage(models[answering.name], processor, answering, problems, written, options, store)
            results[name.format(column=column)] = difference(problems, predictions, written)
    with_picture = problems.select([row for row, images in enumerate(problems["images"]) if images])
    if processor.stages.see_pictures and len(with_picture) > 1:
        images = with_picture["images"]
        for name, changed in (
            ("picture dropped", [[] for _ in images]),
            ("another problem's picture", [images[index] for index in other_indices(len(images), random.Random(SEED))]),
        ):
            probed = predict(processor, models, with_images(with_picture, changed), options, store)
            results[name] = difference(with_picture, predictions, probed)
    permuted, orders = with_permuted_choices(problems, random.Random(SEED))
    written = {problem_id: dict(columns) for problem_id, columns in predictions.items()}
    predict_stage(models[answering.name], processor, answering, permuted, written, options, store)
    results["choices permuted"] = compare_permuted(problems, orders, predictions, written)
    return results


def difference(problems: Dataset, predictions: Predictions, probed: Predictions) -> dict[str, Any]:
    rows = list(zip(problems["id"], problems["answer"], strict=True))
    before, after = ([columns[name]["answer"] == answer for name, answer in rows] for columns in (predictions, probed))
    interval = mean_interval([int(b) - int(a) for a, b in zip(before, after, strict=True)])
    return {
        "n": len(rows),
        "accuracy": percentage(before),
        "probed": percentage(after),
        "interval": interval and [100 * bound for bound in interval],
        "p": mcnemar(before, after),
        "changed": percentage([predictions[name]["answer"] != probed[name]["answer"] for name, _ in rows]),
    }


def compare_permuted(
    problems: Dataset, orders: list[list[int]], predictions: Predictions, probed: Predictions
) -> dict[str, Any]:
    """
    Compare the answers to permuted choices, mapped back to the original order, with the original answers. Only problems
    with several choices are compared.
    """
    mapped_back = {
        name: {"answer": order[probed[name]["answer"]]} for name, order in zip(problems["id"], orders, strict=True)
    }
    several = problems.select([row for row, order in enumerate(orders) if len(order) > 1])
    names = several["id"]
    return {
        **difference(several, predictions, mapped_back),
        "follow_content": percentage([mapped_back[name]["answer"] == predictions[name]["answer"] for name in names]),
        "follow_letter": percentage([probed[name]["answer"] == predictions[name]["answer"] for name in names]),
    }


def format_probes(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'':<28}" + "".join(f"{title:>10}" for title in ("n", "original", "probed", "from", "to", "changed"))]
    for name, row in results.items():
        low, high = row["interval"] or (None, None)
        cells = [str(row["n"]), *map(two_places, (row["accuracy"], row["probed"], low, high, row["changed"]))]
        lines.append(f"{name:<28}" + "".join(f"{cell:>10}" for cell in cells))
    row = results["choices permuted"]
    lines.append(
        f"With permuted choices {two_places(row['follow_content'])} % of the answers follow the content, "
        f"{two_places(row['follow_letter'])} % keep the letter."
    )
    return "\n".join(lines)
