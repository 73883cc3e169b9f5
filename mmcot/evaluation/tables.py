"""Formats the results of `metrics.py` and `comparison.py` as aligned text, Markdown or CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mmcot.evaluation.comparison import two_places
from mmcot.evaluation.metrics import CLASSES

RATIONALE_NAMES = {"bleu1": "BLEU-1", "bleu4": "BLEU-4", "rougeL": "ROUGE-L", "similarity": "similarity"}

Row = tuple[str, list[str]]  # a title, and a cell for each class


def format_table(scores: Mapping[str, Any]) -> str:
    """Return the scores as aligned text: one column per class, then the rationale scores and the calibration."""
    classes = [name for name in CLASSES if scores["class_n"][name]]
    rows: list[Row] = [("", classes), ("problems", [str(scores["class_n"][name]) for name in classes])]
    for key in ("accuracy", "decoded_accuracy"):
        if key in scores:
            rows.append((key.replace("_", " "), [two_places(scores[key][name]) for name in classes]))
            rows.extend(interval_rows([scores["intervals"][key][name] for name in classes]))
    lines = align_rows(rows)
    if "check" in scores:
        lines.append(f"{'check':<16}  {format_check(scores['check'])}")
    rationale = "   ".join(f"{RATIONALE_NAMES[key]} {two_places(value)}" for key, value in scores["rationale"].items())
    lines.append(f"{'rationale':<16}  {rationale}")
    if scores["calibration"] is not None:
        figures = f"ECE {scores['calibration']['ece']:.4f}   Brier {scores['calibration']['brier']:.4f}"
        lines.append(f"{'calibration':<16}  {figures}")
    lines += [line for column, by_value in scores.get("by", {}).items() for line in ["", *lines_by(column, by_value)]]
    return "\n".join(lines)


def format_check(check: Mapping[str, Any]) -> str:
    before, after, verdict = (
        two_places(check[name]) for name in ("accuracy_before", "accuracy_after", "verdict_accuracy")
    )
    sent_back = f"{check['sent_back']} of {check['n']} problems sent back"
    return f"{sent_back}   accuracy before {before}, after {after}   right verdicts {verdict}"


def lines_by(column: str, by_value: Mapping[str, Any]) -> list[str]:
    """Return a line of aligned text with the scores for each value of a column."""
    rows: list[tuple[str, ...]] = [(f"by {column}", "n", "accuracy", "95 %, from", "to")]
    for name, one in by_value.items():
        low, high = one["interval"] or (None, None)
        rows.append((name, str(one["n"]), *map(two_places, (one["accuracy"], low, high))))
    width = max(16, *(len(row[0]) + 2 for row in rows))
    return [f"{title:<{width}}" + "".join(f"{cell:>12}" for cell in cells) for title, *cells in rows]


def format_comparison(compared: Mapping[str, Any]) -> str:
    classes = [name for name in CLASSES if compared[name]]
    columns = [compared[name] for name in classes]
    rows: list[Row] = [("", classes), ("problems", [str(column["n"]) for column in columns])]
    rows.extend((key, [two_places(column[key]) for column in columns]) for key in ("first", "second", "difference"))
    rows.extend(interval_rows([column["interval"] for column in columns]))
    rows.append(("McNemar's p", [p_value(column["p"]) for column in columns]))
    return "\n".join(align_rows(rows))


def p_value(p: float | None) -> str:
    """Return a p-value with four decimal places, or `<0.0001` for a smaller one, because no p-value is 0."""
    if p is None:
        return "-"
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def format_spread(result: Mapping[str, Any], count: int) -> str:
    classes = [name for name in CLASSES if result[name]]
    rows: list[Row] = [(f"{count} seeds", classes)]
    for key, title in (("mean", "mean accuracy"), ("sd", "standard dev.")):
        rows.append((title, [two_places(result[name][key]) for name in classes]))
    return "\n".join(align_rows(rows))


def interval_rows(intervals: list[Sequence[float] | None]) -> list[Row]:
    bounds = [interval or (None, None) for interval in intervals]
    return [
        ("  95 %, from", [two_places(low) for low, _ in bounds]),
        ("  to", [two_places(high) for _, high in bounds]),
    ]


def align_rows(rows: list[Row]) -> list[str]:
    return [f"{title:<16}" + "".join(f"{cell:>8}" for cell in cells) for title, cells in rows]


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
