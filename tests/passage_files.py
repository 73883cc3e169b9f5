"""Corpora and indexes for tests of retrieval."""

import json

from mmcot.retrieval.index import IndexSettings, build_index
from modeling_mmcot.retrieval_mmcot import BM25Searcher, Passage

TEXTS = {
    "poles": "Opposite poles attract. The north pole N and the south pole S of two magnets pull together.",
    "same": "Like poles repel: N and N push apart.",
    "cells": "Plant cells have a cell wall; animal cells have none.",
    "three": "Option 3 names the third law. A force acts on a body.",
    "long": "Sound travels through air. " * 6
    + "It does not travel through empty space, and poles of magnets are silent.",
    "maps": "A map has a compass rose. Its letter N shows north.",
}


def corpus(**texts: str) -> list[Passage]:
    return [Passage(name, "", text, "a test") for name, text in (texts or TEXTS).items()]


def build(folder, passages=None, **settings):
    """The folder of an index, by default of `TEXTS`."""
    build_index(corpus() if passages is None else passages, folder / "index", IndexSettings(**settings))
    return folder / "index"


def searcher_of(folder, passages=None, **settings) -> BM25Searcher:
    return BM25Searcher(build(folder, passages, **settings))


def ids(found: list[list[Passage]]) -> list[list[str]]:
    return [[passage.id for passage in passages] for passages in found]


def write_jsonl(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def scienceqa(folder, **lectures: tuple[str, str]):
    """A ScienceQA folder with problems `id=(split, lecture)`."""
    folder.mkdir(exist_ok=True)
    problem = {"question": "Which one is it?", "choices": ["a magnet", "a map"], "answer": 0, "skill": "a skill"}
    problems = {
        name: {**problem, "split": split, "lecture": lecture, "solution": f"gold {name}"}
        for name, (split, lecture) in lectures.items()
    }
    splits = {
        split: [name for name, row in problems.items() if row["split"] == split] for split in ("train", "val", "test")
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder
