"""Builds, searches and evaluates an index of passages.

    python -m mmcot.retrieval build --corpus passages.jsonl --lectures DATASET --output INDEX
    python -m mmcot.retrieval search INDEX --query "Which poles attract each other?" --k 3
    python -m mmcot.retrieval search --searcher http --url "http://localhost:8888/?format=json&q={query}" --query …
    python -m mmcot.retrieval evaluate INDEX --dataset DATASET --split test --k 1,5,10 [--exclude_verbatim]

The searchers are in `retrieval/searchers.py`, the rules against leaks in `retrieval/exclusion.py`; docs/retrieval.md
describes both.
"""

import argparse
import json
import logging
from dataclasses import asdict
from typing import Any

from mmcot.evaluation.uncertainty import mean_interval
from mmcot.problems.opening import SOURCES
from mmcot.problems.schema import SPLITS
from mmcot.problems.sources import add_dataset_options, load_problems, reading_options
from mmcot.retrieval.corpora import read_corpora
from mmcot.retrieval.evaluation import LECTURE, QUERY_TEMPLATE, Ranks, check_gold_ids, count_in_corpus, find_ranks
from mmcot.retrieval.index import STOP_WORDS, IndexSettings, build_index
from mmcot.retrieval.searchers import SEARCHERS, open_searcher
from mmcot.storage.paths import check_output_folder, refuse_absent_path
from modeling_mmcot.retrieval_mmcot import ON_ERROR, BM25Searcher, Passage, Searcher, search_passages

LIVE_OPTIONS = ("url", "fields", "cache", "interval", "timeout")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmcot.retrieval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="write the index of one or several corpora")
    build.set_defaults(run=run_build)
    build.add_argument(
        "--corpus", action="append", default=[], metavar="PATH", help="a .jsonl file, a folder of texts, or study"
    )
    build.add_argument("--lectures", metavar="SOURCE", help=f"add the lectures of the training split of {SOURCES}")
    add_dataset_options(build)
    build.add_argument("--output", required=True, metavar="INDEX", help="the folder of the index")
    build.add_argument(
        "--stemmer", default=IndexSettings.stemmer, metavar="LANGUAGE", help="a language of PyStemmer, or none"
    )
    build.add_argument("--stop_words", choices=STOP_WORDS, default=IndexSettings.stop_words)
    build.add_argument("--encoder", metavar="MODEL", help="a sentence-transformers model, for dense and hybrid search")
    search = commands.add_parser("search", help="print the passages that are found for queries")
    search.set_defaults(run=run_search)
    add_searcher_options(search)
    search.add_argument("--query", action="append", required=True, metavar="TEXT", help="can be repeated")
    search.add_argument("--k", type=int, default=5, help="the maximum number of passages for each query")
    search.add_argument("--json", action="store_true", help="print JSON in place of a table")
    evaluate = commands.add_parser("evaluate", help="measure how often searches find the gold passage of a problem")
    evaluate.set_defaults(run=run_evaluate)
    add_searcher_options(evaluate)
    evaluate.add_argument("--dataset", required=True, metavar="SOURCE", help=SOURCES)
    add_dataset_options(evaluate)
    evaluate.add_argument("--split", default="test", choices=SPLITS)
    evaluate.add_argument(
        "--gold", default=LECTURE, metavar="COLUMN", help="lecture, gold_passages, or an own column with ids"
    )
    evaluate.add_argument("--query_template", default=QUERY_TEMPLATE, metavar="JINJA")
    evaluate.add_argument("--k", type=parse_ks, default=[1, 5, 10], metavar="K,…", help="default: 1,5,10")
    evaluate.add_argument("--exclude_verbatim", action="store_true", help="drop passages that equal the gold lecture")
    evaluate.add_argument("--json", action="store_true", help="print JSON in place of a table")
    return parser


def add_searcher_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", nargs="?", metavar="INDEX", help="the folder that `build` wrote")
    parser.add_argument("--searcher", choices=SEARCHERS, default="bm25")
    parser.add_argument("--url", help="for http: the address, with {query} in it")
    parser.add_argument("--fields", type=parse_fields, metavar="OURS=THEIRS,…", help="for http: paths in an answer")
    parser.add_argument("--cache", metavar="DIR", help="for http and web: the folder of cached answers")
    parser.add_argument("--interval", type=float, metavar="SECONDS", help="for http and web: minimum between requests")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for http and web: maximum for one answer")
    parser.add_argument("--on_search_error", choices=ON_ERROR, default="raise", help="skip: warn, without passages")


def parse_ks(text: str) -> list[int]:
    """Parse `1,5,10`."""
    ks = sorted({int(part) if part.strip().isdecimal() else 0 for part in text.split(",")})
    if ks[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers of 1 or more, such as 1,5,10")
    return ks


def parse_fields(text: str) -> dict[str, str]:
    """Parse `text=body,source=href`."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}; expected OURS=THEIRS,…, such as text=body,source=href")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def main(argv: list[str] | None = None) -> None:
    """
    Build, search or evaluate.

    Args:
        argv: the arguments; by default those of the command line.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


def searcher_of(arguments: argparse.Namespace) -> Searcher:
    return open_searcher(arguments.searcher, **{name: getattr(arguments, name) for name in ("index", *LIVE_OPTIONS)})


def run_build(arguments: argparse.Namespace) -> None:
    check_output_folder(arguments.output, "--output")
    if arguments.encoder is not None:
        refuse_absent_path(arguments.encoder, "a folder of sentence-transformers, or a Hub id (USER/NAME)")
    settings = IndexSettings(arguments.stemmer, arguments.stop_words, arguments.encoder)
    passages = read_corpora(arguments.corpus, arguments.lectures, **reading_options(arguments))
    manifest = build_index(passages, arguments.output, settings)
    for source, number in manifest["sources"].items():
        print(f"{number:>9,} passages  {source}")
    print(f"index: {arguments.output} ({sum(manifest['files'].values()) / 1e6:.1f} MB)")


def run_search(arguments: argparse.Namespace) -> None:
    found = search_passages(searcher_of(arguments), arguments.query, arguments.k, arguments.on_search_error)
    if arguments.json:
        results = [
            {"query": query, "passages": [asdict(passage) for passage in passages]}
            for query, passages in zip(arguments.query, found, strict=True)
        ]
        print(json.dumps(results, ensure_ascii=False, indent=2))
        return
    for query, passages in zip(arguments.query, found, strict=True):
        print(f"{query}: {len(passages)} passages")
        for rank, passage in enumerate(passages, start=1):
            print(f"{rank:>3}  {passage.score:8.3f}  {describe(passage)}")


def describe(passage: Passage) -> str:
    text = " ".join(f"{passage.title}: {passage.text}".split())
    return f"{text[:100]}{'…' if len(text) > 100 else ''}  [{passage.id}; {passage.source}]"


def run_evaluate(arguments: argparse.Namespace) -> None:
    searcher = searcher_of(arguments)
    columns = (arguments.gold,)
    problems = load_problems(
        *(arguments.dataset, arguments.split), pictures=False, extra_columns=columns, **reading_options(arguments)
    ).remove_columns("images")
    in_corpus = None
    if isinstance(searcher, BM25Searcher):
        if arguments.gold != LECTURE:
            check_gold_ids(searcher, problems, arguments.gold)
        in_corpus = count_in_corpus(searcher, problems, arguments.gold, arguments.exclude_verbatim)
    options = (arguments.gold, arguments.query_template, arguments.exclude_verbatim, arguments.on_search_error)
    ranks = find_ranks(searcher, problems, max(arguments.k), *options)
    result = {"dataset": arguments.dataset, "split": arguments.split, "searcher": arguments.searcher}
    result |= {"gold": arguments.gold, "exclude_verbatim": arguments.exclude_verbatim, "gold_in_corpus": in_corpus}
    result |= summarize(ranks, arguments.k)
    print(json.dumps(result, indent=2) if arguments.json else format_result(result))


def summarize(ranks: Ranks, ks: list[int]) -> dict[str, Any]:
    """Return the mean of each measure with its 95 % bootstrap interval, in percent."""
    measures = {}
    for name, values in ranks.measures(ks).items():
        interval = mean_interval(values)
        bounds = None if interval is None else [round(100 * bound, 2) for bound in interval]
        measures[name] = {"mean": round(100 * sum(values) / len(values), 2), "interval": bounds}
    return {"n": len(ranks.ranks), "without_gold": ranks.num_without_gold, "measures": measures}


def format_result(result: dict[str, Any]) -> str:
    lines = [f"{result['n']} {result['split']} problems; {result['without_gold']} others have no gold {result['gold']}"]
    if result["gold_in_corpus"] is not None:
        lines.append(f"in the corpus: the gold of {result['gold_in_corpus']} problems")
    for name, measure in result["measures"].items():
        interval = "" if measure["interval"] is None else "  [{:.2f}, {:.2f}]".format(*measure["interval"])
        lines.append(f"{name:<10}{measure['mean']:7.2f}{interval}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
