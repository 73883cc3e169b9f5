"""Probes: how much an answer depends on the rationale, the picture and the content of the choices.

The last stage answers again with its rationale dropped, cut, taken from another problem or with its words mixed, and
with its choices in another order; and the whole system answers again without the picture, and with another problem's.
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


def dropped(texts: list[str], drawn: random.Random) -> list[str]:
    return ["" for _ in texts]


def first_half(texts: list[str], drawn: random.Random) -> list[str]:
    return [" ".join(words[: len(words) // 2]) for words in map(str.split, texts)]


def of_another(texts: list[str], drawn: random.Random) -> list[str]:
    return [texts[index] for index in others(len(texts), drawn)]


def mixed(texts: list[str], drawn: random.Random) -> list[str]:
    return [" ".join(drawn.sample(words, len(words))) for words in map(str.split, texts)]


RATIONALES: dict[str, Callable[[list[str], random.Random], list[str]]] = {
    "rationale dropped": dropped,
    "rationale's first half": first_half,
    "another problem's rationale": of_another,
    "rationale's words mixed": mixed,
}


def others(count: int, drawn: random.Random) -> list[int]:
    """For each of `count` another one, each once: neighbours in a random circle."""
    circle = drawn.sample(range(count), count)
    return [pair[1] for pair in sorted(zip(circle, circle[1:] + circle[:1], strict=True))]


def with_images(problems: Dataset, images: list[list]) -> Dataset:
    with without_dataset_bars():
        return problems.remove_columns("images").add_column("images", images, feature=FEATURES["images"])


def with_permuted_choices(problems: Dataset, drawn: random.Random) -> tuple[Dataset, list[list[int]]]:
    """Each problem's choices in another order, where it has several; and for each the old places of the new choices."""
    orders = []
    for row in problems.select_columns(["choices"]):
        count = len(row["choices"])
        order = list(range(count))
        while count > 1 and order == list(range(count)):
            order = drawn.sample(range(count), count)
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
    Args:
        problems: with their right answers, which no model sees.
        store: features that stand in for their pictures, found by the pictures' content.

    Returns:
        By probe, `n` problems that it concerns, their `accuracy` as they are and `probed`, both in percent, the 95 %
        `interval` of the difference and McNemar's `p`, and the share of answers that `changed`; of permuted choices the
        shares that `follow_content` and `follow_letter`.
    """
    last = processor.stages[-1]
    options = PredictOptions(batch_size=batch_size)
    predictions = predict(processor, models, problems, options, store)
    results = {}
    if len(processor.stages) > 1:
        column = processor.stages[-2].writes
        texts = [predictions[problem_id][column] for problem_id in problems["id"]]
        for name, change in RATIONALES.items():
            changed = change(texts, random.Random(SEED))
            written = {
                problem_id: {**predictions[problem_id], column: text}
                for problem_id, text in zip(problems["id"], changed, strict=True)
            }
            predict_stage(models[last.name], processor, last, problems, written, options, store)
            results[name] = difference(problems, predictions, written)
    seeing = problems.select([row for row, images in enumerate(problems["images"]) if images])
    if processor.stages.see_pictures and len(seeing) > 1:
        images = seeing["images"]
        for name, changed in (
            ("picture dropped", [[] for _ in images]),
            ("another problem's picture", [images[index] for index in others(len(images), random.Random(SEED))]),
        ):
            probed = predict(processor, models, with_images(seeing, changed), options, store)
            results[name] = difference(seeing, predictions, probed)
    permuted, orders = with_permuted_choices(problems, random.Random(SEED))
    written = {problem_id: dict(columns) for problem_id, columns in predictions.items()}
    predict_stage(models[last.name], processor, last, permuted, written, options, store)
    results["choices permuted"] = followed(problems, orders, predictions, written)
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


def followed(
    problems: Dataset, orders: list[list[int]], predictions: Predictions, probed: Predictions
) -> dict[str, Any]:
    """The answers under other letters, brought back to the choices as they were; over problems with several."""
    back = {name: {"answer": order[probed[name]["answer"]]} for name, order in zip(problems["id"], orders, strict=True)}
    several = problems.select([row for row, order in enumerate(orders) if len(order) > 1])
    names = several["id"]
    return {
        **difference(several, predictions, back),
        "follow_content": percentage([back[name]["answer"] == predictions[name]["answer"] for name in names]),
        "follow_letter": percentage([probed[name]["answer"] == predictions[name]["answer"] for name in names]),
    }


def format_probes(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'':<28}" + "".join(f"{title:>10}" for title in ("n", "as it is", "probed", "from", "to", "changed"))]
    for name, row in results.items():
        low, high = row["interval"] or (None, None)
        cells = [str(row["n"]), *map(two_places, (row["accuracy"], row["probed"], low, high, row["changed"]))]
        lines.append(f"{name:<28}" + "".join(f"{cell:>10}" for cell in cells))
    row = results["choices permuted"]
    lines.append(
        f"Of choices in another order {two_places(row['follow_content'])} % of the answers follow the content, "
        f"{two_places(row['follow_letter'])} % stay with the letter."
    )
    return "\n".join(lines)
