"""Scores as text: what `metrics.py` and `comparison.py` give, in aligned columns, Markdown or CSV."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from mmcot.comparison import two_places
from mmcot.metrics import CLASSES

RATIONALE_NAMES = {"bleu1": "BLEU-1", "bleu4": "BLEU-4", "rougeL": "ROUGE-L", "similarity": "similarity"}


def format_table(scores: Mapping[str, Any]) -> str:
    """The scores as aligned text: one column per class, then the rationales and the calibration."""
    rows = {"": list(CLASSES), "problems": [str(scores["class_n"][name]) for name in CLASSES]}
    for key in ("accuracy", "decoded_accuracy"):
        if key in scores:
            rows[key.replace("_", " ")] = [two_places(scores[key][name]) for name in CLASSES]
            intervals = [scores["intervals"][key][name] or (None, None) for name in CLASSES]
            rows["  95 %, from" + " " * (key != "accuracy")] = [two_places(low) for low, _ in intervals]
            rows["  to" + " " * (key != "accuracy")] = [two_places(high) for _, high in intervals]
    rationale = "   ".join(f"{RATIONALE_NAMES[key]} {two_places(value)}" for key, value in scores["rationale"].items())
    lines = [*aligned(rows), f"{'rationale':<16}  {rationale}"]
    if scores["calibration"] is not None:
        figures = f"ECE {scores['calibration']['ece']:.4f}   Brier {scores['calibration']['brier']:.4f}"
        lines.append(f"{'calibration':<16}  {figures}")
    return "\n".join(lines)


def format_comparison(compared: Mapping[str, Any]) -> str:
    empty = dict.fromkeys(("first", "second", "difference", "p")) | {"n": 0, "interval": (None, None)}
    columns = [compared[name] or empty for name in CLASSES]
    return "\n".join(
        aligned(
            {
                "": list(CLASSES),
                "problems": [str(column["n"]) for column in columns],
                **{key: [two_places(column[key]) for column in columns] for key in ("first", "second", "difference")},
                "  95 %, from": [two_places((column["interval"] or (None, None))[0]) for column in columns],
                "  to": [two_places((column["interval"] or (None, None))[1]) for column in columns],
                "McNemar's p": ["-" if column["p"] is None else f"{column['p']:.4f}" for column in columns],
            }
        )
    )


def format_spread(result: Mapping[str, Any], count: int) -> str:
    rows = {f"{count} seeds": list(CLASSES)}
    for key, title in (("mean", "mean accuracy"), ("sd", "standard dev.")):
        rows[title] = [two_places(None if result[name] is None else result[name][key]) for name in CLASSES]
    return "\n".join(aligned(rows))


def aligned(rows: Mapping[str, list[str]]) -> list[str]:
    return [f"{title:<16}" + "".join(f"{cell:>8}" for cell in cells) for title, cells in rows.items()]


def format_leaderboard(table: list[list[str]], form: str) -> str:
    if form == "csv":
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(table)
        return lines.getvalue().rstrip()
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    if form == "text":
        return "\n".join(
            "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(row))
            for row in (list(zip(row, widths, strict=True)) for row in table)
        )
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (table[0], rule, *table[1:]))
