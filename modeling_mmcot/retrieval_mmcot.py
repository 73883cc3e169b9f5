"""Retrieval: queries -> passages, with BM25 over an index on disk, or any object with `search`.

`search_passages` is the only caller of a searcher's `search`: it checks what the searcher returns. `BM25Searcher` opens
a folder that `python -m mmcot.retrieval build` writes. The library bm25s computes and stores the scores. Four parts are
our own: the tokens, the selection of the best passages, and the memory-mapped access to terms and to passages. The
reason is that bm25s 0.3.16 drops tokens of one character, returns passages with score 0, breaks ties arbitrarily, and
loads the vocabulary and the corpus's line numbers into memory. This file imports no other shipped file.
"""

import functools
import importlib.metadata
import json
import logging
import math
import mmap
import re
import sys
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FORMAT = 1  # of an index folder
MANIFEST = "index.json"
PASSAGES, PASSAGE_OFFSETS = "passages.jsonl", "passages.offsets.npy"
TERMS, TERM_OFFSETS = "terms.txt", "terms.offsets.npy"
SCORES = ("data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy")  # bm25s's own names
INDEX_FILES = (PASSAGES, PASSAGE_OFFSETS, TERMS, TERM_OFFSETS, *SCORES)
ENTRIES = ("corpus", "token_pattern", "stemmer", "stop_words", "versions", "files")  # of the manifest
# Runs of letters and digits, also single ones, because questions about magnets and options ask for "3", "N" or "A".
TOKEN = re.compile(r"[^\W_]+")
BLOCK = 65_536  # passages that are scored together, which bounds the memory of a search
ON_ERROR = ("raise", "skip")
INSTALL = "pip install bm25s PyStemmer"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Passage:
    """
    A text that a searcher finds.

    Args:
        id (`str`):
            The id, unique in its corpus.
        title (`str`):
            The title, or an empty text.
        text (`str`):
            The text.
        source (`str`):
            The origin, with its licence if known: the name of a book, or the address of a page.
        score (`float`, *optional*, defaults to 0.0):
            The searcher's score for the query. Scores of different searchers are not comparable.
        query (`str`, *optional*):
            In a live search, the query that found the passage.
        date (`str`, *optional*):
            In a live search, the day of that search, `YYYY-MM-DD`.
        problem_ids (`tuple[str, ...]`, *optional*):
            For a lecture, the training problems that have it.
    """

    id: str
    title: str
    text: str
    source: str
    score: float = 0.0
    query: str | None = None
    date: str | None = None
    problem_ids: tuple[str, ...] = ()


class Searcher(Protocol):
    """The interface of a searcher, for `search_passages`."""

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Return at most `k` passages for each query."""
        ...


class SearchError(OSError):
    """A search failed: the searcher raised an error, or its service is offline, refuses, or answers in another form."""


def search_passages(searcher: Searcher, queries: Sequence[str], k: int, on_error: str = "raise") -> list[list[Passage]]:
    """
    Return the passages of each query, best first. Passages with equal scores keep the searcher's order.

    Args:
        searcher (`Searcher`):
            The searcher. It does not get a query without a letter or digit; such a query has no passages.
        queries (`Sequence[str]`):
            The queries.
        k (`int`):
            The maximum number of passages of a query. There are fewer if the searcher finds fewer.
        on_error (`str`, *optional*, defaults to `"raise"`):
            With `"skip"`, a query whose search fails has no passages, and a warning counts these queries.

    Raises:
        ValueError: If an argument is invalid, or the searcher does not return lists of passages.
        SearchError: If the search fails.
    """
    if type(k) is not int or k < 1:
        raise ValueError(f"k is {k!r}; expected a number of passages, 1 or more.")
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}; expected one of {', '.join(ON_ERROR)}.")
    if isinstance(queries, str) or not all(isinstance(query, str) for query in queries):
        raise ValueError(f"queries is {queries!r:.80}; expected a list of texts.")
    asked = [query for query in queries if words_of(query)]
    search = search_checked if on_error == "raise" else search_one_by_one
    found = iter(search(searcher, asked, k) if asked else [])
    return [next(found) if words_of(query) else [] for query in queries]


def search_checked(searcher: Searcher, queries: list[str], k: int) -> list[list[Passage]]:
    """
    Ask the searcher, and check and order what it returns.

    Raises:
        ValueError: If the searcher does not return one list of at most `k` passages for each query.
        SearchError: If the searcher raises any error.
    """
    name = type(searcher).__name__
    try:
        found = searcher.search(queries, k)
    except SearchError:
        raise
    except Exception as error:
        raise SearchError(f"{name} failed for {len(queries)} queries: {type(error).__name__}: {error}") from error
    if not isinstance(found, list) or len(found) != len(queries):
        number = f"{len(found)} lists" if isinstance(found, list) else f"{found!r:.80}"
        raise ValueError(f"{name} returned {number} for {len(queries)} queries; expected one list for each query.")
    for query, passages in zip(queries, found, strict=True):
        if not isinstance(passages, list) or not all(isinstance(passage, Passage) for passage in passages):
            raise ValueError(f"{name} returned {passages!r:.80} for the query {query!r:.80}; expected Passages.")
        if len(passages) > k:
            raise ValueError(f"{name} returned {len(passages)} passages for {query!r:.80}; expected {k} at most.")
        for passage in passages:
            if not math.isfinite(passage.score):
                raise ValueError(f"{name} gave passage {passage.id!r} the score {passage.score}; expected a number.")
    return [sorted(passages, key=lambda passage: -passage.score) for passages in found]


def search_one_by_one(searcher: Searcher, queries: list[str], k: int) -> list[list[Passage]]:
    """Search each query separately. A query whose search fails has no passages; a warning counts these queries."""
    found: list[list[Passage]] = []
    errors = []
    for query in queries:
        try:
            found += search_checked(searcher, [query], k)
        except SearchError as error:
            found.append([])
            errors.append(error)
    if errors:
        logger.warning(
            "The search failed for %d of %d queries, which have no passages; the first error: %s",
            *(len(errors), len(queries), errors[0]),
        )
    return found


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; characters such as ² or ﬁ become 2 and fi."""
    return TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


class Analyzer:
    """
    Maps the words of a text to the terms of an index.

    Args:
        stemmer (`str`, *optional*):
            A language of the Snowball stemmers, such as `"english"`. Defaults to none.
        stop_words (`Sequence[str]`, *optional*):
            Words that are not indexed.

    Raises:
        ImportError: If the stemmer is not installed.
        ValueError: If there is no such stemmer.
    """

    def __init__(self, stemmer: str | None = None, stop_words: Sequence[str] = ()):
        self.stop_words = frozenset(stop_words)
        self._stemmer = None if stemmer is None else load_stemmer(stemmer)
        self._lock = threading.Lock()  # because PyStemmer's stemmers are not thread-safe

    def term_of(self, word: str) -> str | None:
        """Return the term of a word, or None for a stop word."""
        if word in self.stop_words:
            return None
        if self._stemmer is None:
            return word
        with self._lock:
            return self._stemmer.stemWord(word)


def load_stemmer(language: str) -> Any:
    try:
        import Stemmer
    except ImportError as error:
        raise ImportError(f"The stemmer {language!r} needs PyStemmer: {INSTALL}") from error
    if language not in Stemmer.algorithms():
        raise ValueError(f"stemmer is {language!r}; expected one of {', '.join(Stemmer.algorithms())}.")
    return Stemmer.Stemmer(language)


class MappedLines(Sequence):
    """
    The lines of a file. Each line is read from disk when it is accessed. Several threads may read them.

    Args:
        file (`Path`):
            The file.
        offsets (`Path`):
            A `.npy` file with the position of each line's first byte, and the size of the file: `(num_lines + 1,)`.
    """

    def __init__(self, file: Path, offsets: Path):
        with file.open("rb") as content:
            self._content = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets = np.asarray(np.load(offsets, mmap_mode="r"))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> bytes:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._content[self._offsets[number] : self._offsets[number + 1]].rstrip(b"\n")

    def find(self, line: bytes) -> int | None:
        """Return the number of a line, or None if there is no such line. The lines must be sorted."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self[middle] < line else (low, middle)
        return low if low < len(self) and self[low] == line else None


class BM25Searcher:
    """
    Searches an index on disk with BM25. `mmcot/retrieval/index.py` builds the index and defines the formula.

    Only the terms of recent queries are in memory. Several threads may call one searcher.

    Args:
        index (`str` or `Path`):
            The folder of the index.
        corpus (`str`, *optional*):
            The digest of the expected corpus.

    Raises:
        ImportError: If bm25s, or the stemmer of the index, is not installed.
        ValueError: If the folder is not an index, or an index of another corpus, format or version.
    """

    def __init__(self, index: str | Path, corpus: str | None = None):
        folder = Path(index)
        bm25s = import_bm25s()
        self.manifest = read_manifest(folder)
        check_manifest(folder, self.manifest, corpus)
        self.passages = MappedLines(folder / PASSAGES, folder / PASSAGE_OFFSETS)
        self._terms = MappedLines(folder / TERMS, folder / TERM_OFFSETS)
        self._analyzer = Analyzer(self.manifest["stemmer"], self.manifest["stop_words"])
        scores = bm25s.BM25()
        scores.load_scores(folder, mmap=True, num_docs=len(self.passages))
        # Array views of the mapped files, because each access to an `np.memmap` creates a more expensive object.
        self._scores = {name: np.asarray(scores.scores[name]) for name in ("data", "indices", "indptr")}
        self._column_of = functools.lru_cache(maxsize=65_536)(self._find_column)

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """
        Return at most `k` passages for each query, each with a term of the query, sorted by score and then by position
        in the corpus.
        """
        return [self._search(query, k) for query in queries]

    def passage(self, position: int, score: float = 0.0) -> Passage:
        """Return the passage at a position of the corpus."""
        return passage_of(json.loads(self.passages[position]), score)

    def _search(self, query: str, k: int) -> list[Passage]:
        columns = [column for column in map(self._column_of, words_of(query)) if column is not None]
        positions, scores = self._best(columns, k)
        return [self.passage(*found) for found in zip(positions.tolist(), scores.tolist(), strict=True)]

    def _find_column(self, word: str) -> int | None:
        term = self._analyzer.term_of(word)
        return None if term is None else self._terms.find(term.encode())

    def _best(self, columns: list[int], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and scores of the best `k` passages, each of shape `(num_found,)`."""
        positions, scores = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        for first in range(0, len(self.passages), BLOCK) if columns else ():
            block = self._block_scores(columns, first)
            best = highest(block, k)
            positions, scores = np.append(positions, best + first), np.append(scores, block[best])
            kept = highest(scores, k)  # equal scores are still in the order of their positions
            positions, scores = positions[kept], scores[kept]
        return positions, scores

    def _block_scores(self, columns: list[int], first: int) -> np.ndarray:
        """Return the scores of `BLOCK` passages from position `first` on, `(num_passages_in_block,)`."""
        size = min(BLOCK, len(self.passages) - first)
        scores = np.zeros(size, dtype=np.float32)
        data, indices, indptr = self._scores.values()
        bounds = np.array([first, first + size], dtype=indices.dtype)  # another type would copy all `indices`
        for column in columns:
            start, end = int(indptr[column]), int(indptr[column + 1])
            if size < len(self.passages):
                start, end = (start + np.searchsorted(indices[start:end], bounds)).tolist()
            np.add.at(scores, indices[start:end] - first, data[start:end])
        return scores


def highest(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the positions of the `k` highest scores above 0, best first, and equal scores by position."""
    lowest = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
    candidates = np.flatnonzero(scores >= lowest if lowest > 0 else scores > 0)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k]


def to_dict(passage: Passage) -> dict[str, Any]:
    """Return a passage as a dict for templates and predictions files; `query` and `date` only from a live search."""
    columns = {name: getattr(passage, name) for name in ("id", "title", "text", "source", "score", "query", "date")}
    return {name: value for name, value in columns.items() if value is not None}


def passage_of(columns: dict[str, Any], score: float = 0.0) -> Passage:
    """Return the passage with the columns of a line of `passages.jsonl`."""
    names = ("id", "title", "text", "source")
    return Passage(*(columns[name] for name in names), score, problem_ids=tuple(columns.get("problem_ids", ())))


def import_bm25s() -> Any:
    is_first = "bm25s" not in sys.modules
    try:
        import bm25s
    except ImportError as error:
        raise ImportError(f"BM25 needs the package bm25s: {INSTALL}") from error
    if is_first:
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # its import sets the level to DEBUG
    return bm25s


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Return the manifest of an index.

    Raises:
        ValueError: If the folder has no manifest, or the manifest is invalid.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} is not an index: it has no {MANIFEST}. python -m mmcot.retrieval build writes one.")
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}).") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file}: format is {found!r}; this version of mmcot reads format {FORMAT}. Build it again.")
    absent = [name for name in ENTRIES if name not in manifest]
    if absent:
        raise ValueError(f"{file} has no {absent[0]!r}; expected {', '.join(ENTRIES)}. Build it again.")
    return manifest


def check_manifest(folder: Path, manifest: dict[str, Any], corpus: str | None = None) -> None:
    """
    Check that an index is complete, and that this code and these libraries can search it.

    Raises:
        ValueError: If the index is incomplete, or was built from another corpus, with other tokens or library versions.
    """
    file = folder / MANIFEST
    if corpus is not None and manifest["corpus"] != corpus:
        raise ValueError(f"{file}: the index is of the corpus {manifest['corpus']}; expected {corpus}.")
    if manifest["token_pattern"] != TOKEN.pattern:
        raise ValueError(f"{file}: token_pattern is {manifest['token_pattern']!r}; expected {TOKEN.pattern!r}.")
    for name, built in manifest["versions"].items():
        found = installed_version(name)
        if built.split(".")[:2] != found.split(".")[:2]:  # both libraries change their results in minor versions
            fitting = ".".join(built.split(".")[:2])
            raise ValueError(
                f"{file}: built with {name} {built}; {found} is installed. pip install '{name}=={fitting}.*', or build "
                f"the index again."
            )
    for name in INDEX_FILES:
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        expected = manifest["files"].get(name)
        if size is None or size != expected:
            raise ValueError(f"{folder / name}: {size} bytes; the manifest says {expected}. Build the index again.")


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"The index needs the package {package}: {INSTALL}") from error
