"""BM25 search in an index, and the checks of every searcher's results."""

import json
import logging
import math
import shutil
import sys
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, run_isolated
from passage_files import TEXTS, build, corpus, ids, searcher_of

from modeling_mmcot import retrieval_mmcot
from modeling_mmcot.retrieval_mmcot import BM25Searcher, Passage, SearchError, highest, search_passages, words_of

QUERIES = ["Which poles attract?", "cell wall of a plant", "N", "3", "the force of a magnet", "poles poles N air"]


def scores_by_formula(query: str, texts: dict[str, str], k1: float = 1.5, b: float = 0.75) -> dict[str, float]:
    """Kamphuis et al. 2020, table 1, "Lucene (accurate)", computed directly in float64."""
    documents = {name: Counter(words_of(text)) for name, text in texts.items()}
    average = sum(sum(document.values()) for document in documents.values()) / len(documents)
    scores = dict.fromkeys(texts, 0.0)
    for term in words_of(query):
        df = sum(term in document for document in documents.values())
        idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        for name, document in documents.items():
            norm = k1 * (1 - b + b * sum(document.values()) / average)
            scores[name] += idf * document[term] / (document[term] + norm)
    return scores


@pytest.fixture
def searcher(tmp_path):
    return searcher_of(tmp_path, stemmer="none", stop_words="none")


@pytest.mark.parametrize("query", QUERIES)
def test_scores_match_published_formula(searcher, query):
    expected = {name: score for name, score in scores_by_formula(query, TEXTS).items() if score > 0}
    [found] = search_passages(searcher, [query], len(TEXTS))
    assert [passage.id for passage in found] == sorted(expected, key=lambda name: -expected[name])
    assert {passage.id: passage.score for passage in found} == pytest.approx(expected, rel=1e-5)


def test_finds_tokens_of_one_character(searcher):
    found = ids(search_passages(searcher, ["N", "3", "S"], 6))
    assert [set(names) for names in found] == [{"poles", "same", "maps"}, {"three"}, {"poles"}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("CO₂ and H₂O", ["co2", "and", "h2o"]),
        ("_____ 3.5 ÉTÉ", ["3", "5", "été"]),
        ("?! —", []),
        ("磁石 N", ["磁石", "n"]),
    ],
)
def test_splits_text_into_normalized_words(text, words):
    assert words_of(text) == words


def test_query_without_known_term_finds_no_passages(searcher):
    assert search_passages(searcher, ["zebra", "poles", "…?"], 3)[::2] == [[], []]


def test_found_passage_keeps_fields_of_corpus(tmp_path):
    given = Passage("p", "Title: “Näher”", "first line\nsecond line", "book (CC BY 4.0)", problem_ids=("1", "2"))
    [[found]] = search_passages(searcher_of(tmp_path, [given]), ["näher"], 1)
    assert (found.id, found.title, found.text, found.source) == (given.id, given.title, given.text, given.source)
    assert found.problem_ids == ("1", "2") and found.score > 0 and found.query is found.date is None


def test_ranks_equal_scores_in_corpus_order(tmp_path):
    names = [f"p{number}" for number in (5, 3, 9, 1, 7, 0, 8)]
    searcher = searcher_of(tmp_path, corpus(**dict.fromkeys(names, "the same words"), other="same other words"))
    for k in range(1, len(names) + 1):
        assert ids(search_passages(searcher, ["words same"], k)) == [names[:k]]


@pytest.mark.parametrize("block", [1, 2, 4])
def test_block_size_does_not_change_results(searcher, monkeypatch, block):
    expected = [search_passages(searcher, QUERIES, k) for k in (1, 2, 6)]
    monkeypatch.setattr(retrieval_mmcot, "BLOCK", block)
    assert [search_passages(searcher, QUERIES, k) for k in (1, 2, 6)] == expected


def test_blocks_keep_corpus_order_of_equal_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval_mmcot, "BLOCK", 2)
    names = [f"p{number}" for number in (5, 3, 9, 1, 7, 0, 8)]
    searcher = searcher_of(tmp_path, corpus(**dict.fromkeys(names, "the same words")))
    assert ids(search_passages(searcher, ["words"], 4)) == [names[:4]]


def test_highest_ranks_positive_scores_and_keeps_order_of_equal_ones():
    scores = np.array([0, 2, 1, 2, 0, 3, 1], dtype=np.float32)
    assert highest(scores, 4).tolist() == [5, 1, 3, 2]
    assert highest(scores, 7).tolist() == highest(scores, 99).tolist() == [5, 1, 3, 2, 6]
    assert highest(np.zeros(3, dtype=np.float32), 2).tolist() == []


def test_returns_all_matches_if_k_exceeds_corpus(searcher):
    assert len(search_passages(searcher, ["poles"], 1000)[0]) == 3


@pytest.mark.parametrize("stemmer", ["none", "english"])
def test_search_uses_stemmer_and_stop_words_of_index(tmp_path, stemmer):
    searcher = searcher_of(tmp_path, stemmer=stemmer, stop_words="english")
    found = ids(search_passages(searcher, ["magnetic pole", "the and of", "attracting", "A"], 6))
    assert set(found[0]) == ({"poles"} if stemmer == "none" else {"poles", "same", "long"})
    assert found[1] == []  # only stop words
    assert found[2] == ([] if stemmer == "none" else ["poles"])
    assert set(found[3]) == {"cells", "three", "maps"}  # the letter of a choice is no stop word


def test_threads_find_same_passages(tmp_path):
    searcher = searcher_of(tmp_path, stemmer="english")
    expected = search_passages(BM25Searcher(tmp_path / "index"), QUERIES, 3)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: search_passages(searcher, QUERIES, 3), range(64)))
    assert all(passages == expected for passages in found)


def test_search_does_not_load_all_passages_and_terms(tmp_path):
    fillers = {number: " ".join(f"word{number}x{place}" for place in range(100)) for number in range(2000)}
    texts = {f"p{number}": f"poles term{number} {filler}" for number, filler in fillers.items()}
    folder = build(tmp_path, corpus(**texts))
    assert min((folder / name).stat().st_size for name in ("passages.jsonl", "terms.txt")) > 2_000_000
    tracemalloc.start()
    try:
        search_passages(BM25Searcher(folder), ["poles term77", "term5"], 10)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_search_memory_does_not_grow_with_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval_mmcot, "BLOCK", 500)
    peaks = []
    for number in (1_000, 40_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        searcher = searcher_of(folder, corpus(**{f"p{row}": "poles of magnets" for row in range(number)}))
        search_passages(searcher, ["magnets poles"], 5)
        tracemalloc.start()
        search_passages(searcher, ["magnets poles"], 5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 40_000


class Given:
    """A searcher that returns the result of a function `answer(queries, k)` and records its calls."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def search(self, queries, k):
        self.asked.append((queries, k))
        return self.answer(queries, k)


def passage(name: str, score: float = 1.0) -> Passage:
    return Passage(name, "", "text", "source", score)


def test_does_not_search_for_empty_queries():
    searcher = Given(lambda queries, k: [[passage(query)] for query in queries])
    assert ids(search_passages(searcher, ["", "a", " ?! ", "b"], 2)) == [[], ["a"], [], ["b"]]
    assert searcher.asked == [(["a", "b"], 2)]
    assert search_passages(searcher, ["", "…"], 2) == [[], []] and len(searcher.asked) == 1


def test_sorts_passages_by_score_and_keeps_order_of_equal_ones():
    given = [passage("low", 0.5), passage("first", 2.0), passage("second", 2.0)]
    assert ids(search_passages(Given(lambda queries, k: [given]), ["q"], 3)) == [["first", "second", "low"]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda queries, k: [[]], "Given returned 1 lists for 2 queries; expected one list for each query"),
        (lambda queries, k: None, "Given returned None for 2 queries"),
        (lambda queries, k: [["text"], []], r"Given returned \['text'\] for the query 'one'; expected Passages"),
        (lambda queries, k: [[], [passage("p")] * 3], "Given returned 3 passages for 'two'; expected 2 at most"),
        (lambda queries, k: [[passage("p", math.nan)], []], "Given gave passage 'p' the score nan"),
    ],
)
def test_refuses_invalid_results_of_searcher(answer, message):
    with pytest.raises(ValueError, match=message):
        search_passages(Given(answer), ["one", "two"], 2)


def test_on_error_skip_does_not_skip_invalid_results():
    with pytest.raises(ValueError, match="Given returned None for 1 queries"):
        search_passages(Given(lambda queries, k: None), ["one"], 2, on_error="skip")


@pytest.mark.parametrize("k", [0, -1, 2.0, None, True])
def test_refuses_k_that_is_no_positive_integer(searcher, k):
    with pytest.raises(ValueError, match=f"k is {k!r}; expected a number of passages"):
        search_passages(searcher, ["poles"], k)


def test_refuses_invalid_queries_and_on_error(searcher):
    for queries in ("poles", [None]):
        with pytest.raises(ValueError, match="expected a list of texts"):
            search_passages(searcher, queries, 1)
    with pytest.raises(ValueError, match="on_error is 'ignore'; expected one of raise, skip"):
        search_passages(searcher, ["poles"], 1, "ignore")


def fails_for_b(queries, k):
    if "b" in queries:
        raise KeyError("down")
    return [[passage(query)] for query in queries]


def test_error_names_failing_searcher():
    with pytest.raises(SearchError, match="Given failed for 3 queries: KeyError: 'down'"):
        search_passages(Given(fails_for_b), ["a", "b", "c"], 1)


def test_skipped_failure_has_no_passages_and_is_counted(caplog):
    with caplog.at_level(logging.WARNING):
        found = search_passages(Given(fails_for_b), ["a", "b", "c"], 1, on_error="skip")
    assert ids(found) == [["a"], [], ["c"]]
    assert "failed for 1 of 3 queries, which have no passages" in caplog.text and "down" in caplog.text


def change(folder, **entries):
    file = folder / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": 0}, "index.json: format is 0; this version of mmcot reads format 1"),
        (
            {"versions": {"bm25s": "0.2.9"}},
            r"built with bm25s 0.2.9; 0.3.* is installed. pip install 'bm25s==0.2.\*', or build",
        ),
        ({"token_pattern": r"\w\w+"}, r"token_pattern is '\\\\w\\\\w\+'; expected"),
    ],
)
def test_refuses_index_of_another_version(tmp_path, entries, message):
    folder = build(tmp_path)
    change(folder, **entries)
    with pytest.raises(ValueError, match=message):
        BM25Searcher(folder)


def test_refuses_index_of_another_corpus(tmp_path):
    folder = build(tmp_path)
    digest = json.loads((folder / "index.json").read_text())["corpus"]
    assert BM25Searcher(folder, corpus=digest)
    with pytest.raises(ValueError, match=f"the index is of the corpus {digest}; expected sha256:other"):
        BM25Searcher(folder, corpus="sha256:other")


@pytest.mark.parametrize("name", retrieval_mmcot.ENTRIES)
def test_refuses_manifest_without_entry(tmp_path, name):
    file = build(tmp_path) / "index.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != name}))
    with pytest.raises(ValueError, match=f"index.json has no '{name}'"):
        BM25Searcher(file.parent)
    for text in ("[]", "{", ""):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"format is None|not valid JSON"):
            BM25Searcher(file.parent)


@pytest.mark.parametrize("name", ["passages.offsets.npy", "data.csc.index.npy"])
def test_refuses_index_with_pickle(tmp_path, name):
    folder = build(tmp_path)
    np.save(folder / name, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    files = json.loads((folder / "index.json").read_text())["files"]
    change(folder, files={**files, name: (folder / name).stat().st_size})
    with pytest.raises(ValueError, match=r"allow_pickle|Python objects"):
        BM25Searcher(folder)


@pytest.mark.parametrize("name", retrieval_mmcot.INDEX_FILES)
def test_names_truncated_or_missing_file(tmp_path, name):
    file = build(tmp_path) / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name}: {size - 1} bytes; the manifest says {size}"):
        BM25Searcher(file.parent)
    file.unlink()
    with pytest.raises(ValueError, match=f"{name}: None bytes"):
        BM25Searcher(file.parent)


def test_refuses_folder_without_index(tmp_path):
    with pytest.raises(ValueError, match=r"is not an index: it has no index.json"):
        BM25Searcher(tmp_path)


@pytest.mark.parametrize(("module", "package"), [("bm25s", "bm25s"), ("Stemmer", "PyStemmer")])
def test_names_missing_package(tmp_path, monkeypatch, module, package):
    folder = build(tmp_path, stemmer="english")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs .*{package}: pip install bm25s PyStemmer"):
        BM25Searcher(folder)


def test_module_file_searches_without_repository(tmp_path):
    folder = build(tmp_path)
    shutil.copy(REPOSITORY / "modeling_mmcot" / "retrieval_mmcot.py", tmp_path)
    code = """
    sys.path.insert(0, sys.argv[1])
    from retrieval_mmcot import BM25Searcher, search_passages
    print(json.dumps([passage.id for passage in search_passages(BM25Searcher("index"), ["N poles"], 2)[0]]))
    """
    expected = ids(search_passages(BM25Searcher(folder), ["N poles"], 2))[0]
    assert run_isolated(code, tmp_path, str(Path(tmp_path))) == expected
