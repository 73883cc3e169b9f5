"""Measure how often BM25 finds the gold lecture of ScienceQA's problems, for the study in docs/retrieval.md.

    python -m benchmarks.gold_lectures [--output FILE]

The problems are the real ones of `../shared/scienceqa`; the corpora are the two school books of `../shared/corpora`,
the lectures of the training split, and both. Stemmer and stop words are chosen on validation by the mean reciprocal
rank, averaged over the corpora with lectures; test is measured with that choice. Prints a JSON object without any text
of ScienceQA.
"""

import argparse
import itertools
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset

from benchmarks.setting import DATASET, machine
from mmcot.problems.sources import load_problems
from mmcot.retrieval.__main__ import summarize
from mmcot.retrieval.corpora import read_corpora
from mmcot.retrieval.evaluation import QUERY_TEMPLATE, count_in_corpus, find_ranks
from mmcot.retrieval.index import STOP_WORDS, IndexSettings, build_index
from mmcot.storage.files import write_json
from modeling_mmcot.retrieval_mmcot import BM25Searcher

BOOKS = "../shared/corpora/passages.jsonl"
CORPORA = {"books": ([BOOKS], None), "lectures": ([], DATASET), "books and lectures": ([BOOKS], DATASET)}
STEMMERS = ("none", "english")
SETTINGS = [IndexSettings(*values) for values in itertools.product(STEMMERS, STOP_WORDS)]
WITH_CONTEXT = "{{ question }} {{ context }} {{ choices | join(' ') }}"
TEMPLATES = ["{{ question }}", QUERY_TEMPLATE, WITH_CONTEXT]
KS = [1, 5, 10]


def problems_of(split: str) -> Dataset:
    return load_problems(DATASET, split, pictures=False).remove_columns("images")


def name_of(settings: IndexSettings) -> str:
    return f"stemmer {settings.stemmer}, stop words {settings.stop_words}"


class Study:
    """Measures retrieval. Each index is built once, in the folder `work`."""

    def __init__(self, work: Path):
        self.work = work
        self.passages = {name: read_corpora(*corpus) for name, corpus in CORPORA.items()}

    def searcher(self, corpus: str, settings: IndexSettings) -> BM25Searcher:
        folder = self.work / f"{corpus} {name_of(settings)}"
        build_index(self.passages[corpus], folder, settings)
        return BM25Searcher(folder)

    def measure(
        self, split: str, corpus: str, settings: IndexSettings, template: str = QUERY_TEMPLATE, verbatim: bool = False
    ) -> dict[str, Any]:
        """Return the measures of a split; with `verbatim`, passages that equal the gold lecture are left out."""
        searcher, problems = self.searcher(corpus, settings), problems_of(split)
        ranks = find_ranks(searcher, problems, max(KS), template=template, exclude_verbatim=verbatim)
        in_corpus = count_in_corpus(searcher, problems, exclude_verbatim=verbatim)
        counts = {"passages": len(searcher.passages), "gold_in_corpus": in_corpus}
        return {**counts, **summarize(ranks, KS)}


def run(work: Path) -> dict[str, Any]:
    study = Study(work)
    chosen_on = [corpus for corpus in CORPORA if corpus != "books"]
    validation = {
        name_of(settings): {corpus: study.measure("val", corpus, settings) for corpus in chosen_on}
        for settings in SETTINGS
    }
    mean_rank = {
        name: fmean(result["measures"][f"mrr@{max(KS)}"]["mean"] for result in results.values())
        for name, results in validation.items()
    }
    best = max(SETTINGS, key=lambda settings: mean_rank[name_of(settings)])
    return {
        "setting": {**machine(), "bm25s": version("bm25s"), "PyStemmer": version("PyStemmer")},
        "validation": validation,
        "validation_queries": {
            template: {corpus: study.measure("val", corpus, best, template) for corpus in chosen_on}
            for template in TEMPLATES
        },
        "chosen": name_of(best),
        "test": {
            template: {
                f"{corpus}, {'without copies of the gold lecture' if verbatim else 'all passages'}": study.measure(
                    "test", corpus, best, template, verbatim
                )
                for corpus, verbatim in itertools.product(CORPORA, (False, True))
            }
            for template in (QUERY_TEMPLATE, WITH_CONTEXT)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        result = run(Path(work))
    if arguments.output:
        write_json(arguments.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
