"""Measure BM25 over an index on disk: the time of queries, and the memory to build and to search the index.

    python -m benchmarks.retrieval [--passages 10000 100000 1000000] [--work DIR] [--output FILE]

The time is that of 1,000 real questions with their choices over two school books (`../shared`). Memory is measured
on synthetic passages: 60 words by Zipf's law, and one word that no other passage has, so that the vocabulary grows
with the corpus. Each build and each search runs in its own process. The search process imports only the shipped file
`modeling_mmcot/retrieval_mmcot.py`, and neither torch nor transformers. Prints a JSON object.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.setting import machine
from mmcot.retrieval.corpora import read_corpora
from mmcot.retrieval.evaluation import QUERY_TEMPLATE, render_query
from mmcot.retrieval.index import build_index
from mmcot.storage.files import write_json
from modeling_mmcot.retrieval_mmcot import BM25Searcher, Passage, search_passages

BOOKS = "../shared/corpora/passages.jsonl"
QUESTIONS = "../shared/scienceqa/problems_trainval_qa.json"
NUM_QUERIES, K, REPEATS = 1000, 5, 5
NUM_WORDS, VOCABULARY = 60, 50_000

# Runs in a fresh process. A thread reads `RssAnon` every millisecond; the largest value counts.
SEARCH = """
import importlib.util, json, sys, threading
def memory(name):
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith(name))
spec = importlib.util.spec_from_file_location("retrieval_mmcot", "modeling_mmcot/retrieval_mmcot.py")
module = sys.modules["retrieval_mmcot"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.import_bm25s()
before = memory("RssAnon")
searcher = module.BM25Searcher(sys.argv[1])
queries, opened, samples, finished = json.load(sys.stdin), memory("RssAnon"), [], threading.Event()
def watch():
    while not finished.wait(0.001):
        samples.append(memory("RssAnon"))
watcher = threading.Thread(target=watch)
watcher.start()
found = sum(map(len, module.search_passages(searcher, queries, 5)))
finished.set()
watcher.join()
largest = max(samples)
assert "torch" not in sys.modules
mapped = memory("RssFile")
print(json.dumps({"imported": before, "opened": opened, "largest": largest, "RssFile": mapped, "found": found}))
"""

# Runs in a fresh process. The time excludes imports and the generation of passages; memory is the peak resident memory.
BUILD = """
import json, sys, time
def peak_memory():
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("VmHWM"))
from benchmarks.retrieval import synthetic_passages
from mmcot.retrieval.index import build_index
imported = peak_memory()
passages = synthetic_passages(int(sys.argv[2]))
read = peak_memory()
start = time.perf_counter()
manifest = build_index(passages, sys.argv[1])
seconds = time.perf_counter() - start
memory = {"imported": imported, "with_passages": read, "largest": peak_memory()}
print(json.dumps({"seconds": seconds, **memory, "disk": sum(manifest["files"].values()) / 1e6}))
"""


def synthetic_passages(number: int) -> list[Passage]:
    """Return passages of words by Zipf's law, each with one word of its own."""
    rng = np.random.default_rng(0)
    passages = []
    for row in range(number):
        ranks = np.minimum(rng.zipf(1.2, NUM_WORDS), VOCABULARY)
        text = " ".join([f"own{row}", *(f"w{rank}" for rank in ranks.tolist())])
        passages.append(Passage(f"p{row}", "", text, "synthetic"))
    return passages


def synthetic_queries(number: int) -> list[str]:
    """Return queries of 20 words by Zipf's law and one word that only one passage has."""
    rng = np.random.default_rng(1)
    words = np.minimum(rng.zipf(1.2, (NUM_QUERIES, 20)), VOCABULARY)
    own = rng.integers(number, size=NUM_QUERIES)
    return [" ".join([f"own{row}", *map("w{}".format, ranks)]) for row, ranks in zip(own, words.tolist(), strict=True)]


def real_queries() -> list[str]:
    problems = json.loads(Path(QUESTIONS).read_text())
    rows = [{"id": name, **problem} for name, problem in list(problems.items())[:NUM_QUERIES]]
    return [render_query(QUERY_TEMPLATE, row) for row in rows]


def time_queries(folder: Path) -> dict:
    """Return the seconds to build an index, to open it, and to search all queries in one call of a new searcher."""
    passages = read_corpora([BOOKS])
    start = time.perf_counter()
    build_index(passages, folder)
    build = time.perf_counter() - start
    queries, opening, times = real_queries(), [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        searcher = BM25Searcher(folder)
        opening.append(time.perf_counter() - start)
        start = time.perf_counter()
        search_passages(searcher, queries, K)
        times.append(time.perf_counter() - start)
    return {
        "passages": len(passages),
        "queries": len(queries),
        "k": K,
        "build_s": round(build, 3),
        "open_s": round(statistics.median(opening), 4),
        "queries_s": round(statistics.median(times), 3),
        "all_queries_s": [round(seconds, 3) for seconds in times],
    }


def run(code: str, *arguments: str, stdin: str = "") -> dict:
    command = [sys.executable, "-c", code, *arguments]
    return json.loads(subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout)


def measure_memory(folder: Path, number: int) -> dict:
    """Return the time and the memory (MB) to build an index and to search it."""
    built = run(BUILD, str(folder), str(number))
    start = time.perf_counter()
    searched = run(SEARCH, str(folder), stdin=json.dumps(synthetic_queries(number)))
    searched["seconds"] = time.perf_counter() - start
    shutil.rmtree(folder)
    rounded = [{name: round(value, 1) for name, value in values.items()} for values in (built, searched)]
    return {"passages": number, "build": rounded[0], "search": rounded[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--work", metavar="DIR", help="folder for the indexes, which are removed at the end")
    parser.add_argument("--output", metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        setting = {**machine(), "bm25s": version("bm25s"), "numpy": version("numpy")}
        result = {"setting": setting, "time": time_queries(Path(work) / "books")}
        result["memory"] = [measure_memory(Path(work) / "synthetic", number) for number in arguments.passages]
    if arguments.output:
        write_json(arguments.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
