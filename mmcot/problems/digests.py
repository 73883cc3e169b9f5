"""Digests of problems: whether they are still what they were when something was trained, predicted or scored.

What is recorded where, and what a difference means, is the affair of those who compare.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from mmcot.pictures.reading import ContentKeys
from mmcot.problems.schema import first_few

HEX_DIGITS = 16  # of each problem: 64 bits, so that a large dataset's stay small on disk

Digests = dict[str, list[str | None]]  # by a problem's id those of its texts and of its pictures


def problem_digests(problems: Iterable[dict]) -> Digests:
    """
    Of each problem by id: the digest of all its columns but the pictures, and that of its pictures' content. The second
    one is None where a picture's file is not at hand.
    """
    key_of = ContentKeys()

    def pictures(row: dict) -> str | None:
        if any(not picture["bytes"] and not Path(picture["path"]).is_file() for picture in row["images"]):
            return None
        return digest([key_of(picture) for picture in row["images"]])

    return {
        row["id"]: [digest({name: value for name, value in row.items() if name != "images"}), pictures(row)]
        for row in problems
    }


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:HEX_DIGITS]


def whole_digest(digests: Digests) -> dict[str, str | None]:
    """Of all problems together, in whatever order: `texts` and `pictures`, the second None where one is."""
    texts, pictures = ([[name, pair[part]] for name, pair in sorted(digests.items())] for part in (0, 1))
    return {"texts": digest(texts), "pictures": None if any(key is None for _, key in pictures) else digest(pictures)}


def difference(before: Digests, now: Digests) -> str | None:
    """What became of the problems, in words with counts; None where they are the same, as far as is known."""
    same_ids = before.keys() & now.keys()
    changed = {
        "have other texts or answers": [name for name in same_ids if before[name][0] != now[name][0]],
        "have other pictures": [
            name for name in same_ids if None not in (before[name][1], now[name][1]) and before[name][1] != now[name][1]
        ],
        "are new": now.keys() - before.keys(),
        "are gone": before.keys() - now.keys(),
    }
    words = [f"{len(names)} {what} ({first_few(in_order(names))})" for what, names in changed.items() if names]
    if not words and list(before) != list(now):
        return f"all {len(now)} are the same, in another order"
    return "; ".join(words) or None


def in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (len(name), name))
