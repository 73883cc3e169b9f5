"""Builds an index: a folder with passages, terms, BM25 scores and a manifest, written completely or not at all.

The scores are those of bm25s's method `lucene`, the accurate variant of Lucene's BM25 (Kamphuis et al. 2020, "Which
BM25 Do You Mean?", table 1): with N passages, df of them with the term t, tf occurrences of t in the passage, dl terms
in the passage and avgdl terms in an average passage,

    score(t, passage) = log(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * dl / avgdl))

A passage's score for a query is the sum over the query's terms, and a repeated term counts each time. The terms of a
passage are those of its title and its text.
`modeling_mmcot/retrieval_mmcot.py` opens and searches an index; it defines the names of the files.
"""

import json
import logging
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mmcot.retrieval.dense import write_vectors
from mmcot.storage.files import write_json
from mmcot.storage.folders import replaced_folder
from modeling_mmcot.retrieval_mmcot import (
    FORMAT,
    INDEX_FILES,
    MANIFEST,
    PASSAGE_OFFSETS,
    PASSAGES,
    TERM_OFFSETS,
    TERMS,
    TOKEN,
    Analyzer,
    Passage,
    check_manifest,
    import_bm25s,
    installed_version,
    read_manifest,
    words_of,
)

METHOD, K1, B = "lucene", 1.5, 0.75  # bm25s's defaults
STOP_WORDS = ("none", "english")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexSettings:
    """
    The settings of an index. The default terms ranked gold lectures best on validation (docs/retrieval.md).

    Args:
        stemmer: a language of the Snowball stemmers, or `none`.
        stop_words: `english` for Lucene's list without "a", which is also the name of an option or a point; or `none`.
        encoder: a sentence-transformers model (a folder or a Hub id) that computes vectors of the passages; or None.
    """

    stemmer: str = "english"
    stop_words: str = "english"
    encoder: str | None = None

    def __post_init__(self):
        if self.stop_words not in STOP_WORDS:
            raise ValueError(f"stop_words is {self.stop_words!r}; expected one of {', '.join(STOP_WORDS)}.")

    def manifest(self) -> dict[str, Any]:
        """Return the entries of a manifest that determine the terms and their scores."""
        words = import_bm25s().stopwords.STOPWORDS_EN if self.stop_words == "english" else ()
        stemmer = None if self.stemmer == "none" else self.stemmer
        packages = ["bm25s"] if stemmer is None else ["bm25s", "PyStemmer"]
        return {
            "format": FORMAT,
            "token_pattern": TOKEN.pattern,
            "stemmer": stemmer,
            "stop_words": [word for word in words if word != "a"],
            "method": METHOD,
            "k1": K1,
            "b": B,
            "encoder": self.encoder,
            "versions": {name: installed_version(name) for name in packages},
        }


def build_index(passages: list[Passage], folder: str | Path, settings: IndexSettings | None = None) -> dict[str, Any]:
    """
    Write the index of a corpus, unless the folder has it already, and return its manifest.

    Raises:
        ValueError: the folder exists and is not this index, or no passage has a term.
    """
    folder, expected = Path(folder), (settings or IndexSettings()).manifest()
    expected |= {"corpus": corpus_digest(passages), "num_passages": len(passages)}
    if folder.exists():
        return check_same(folder, expected)
    with replaced_folder(folder) as unfinished:
        write_lines(unfinished / PASSAGES, unfinished / PASSAGE_OFFSETS, map(passage_line, passages))
        write_scores(passages, unfinished, Analyzer(expected["stemmer"], expected["stop_words"]))
        if expected["encoder"] is not None:
            write_vectors(passages, unfinished, expected["encoder"])
        files = {name: (unfinished / name).stat().st_size for name in INDEX_FILES}
        manifest = {**expected, "sources": count_sources(passages), "files": files}
        write_json(unfinished / MANIFEST, manifest)
    logger.info("%s: %d passages", folder, len(passages))
    return manifest


def check_same(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """
    Return the manifest of an existing index.

    Raises:
        ValueError: the folder is not an index, or it is an index of another corpus or with other settings.
    """
    manifest = read_manifest(folder)
    for name, value in expected.items():
        if manifest.get(name) != value:
            raise ValueError(
                f"{folder} is an index with {name} {manifest.get(name)!r:.100}; expected {value!r:.100}. Remove it, or "
                f"choose another folder."
            )
    check_manifest(folder, manifest)
    return manifest


def passage_line(passage: Passage) -> bytes:
    """Return the line of a passage in `passages.jsonl`."""
    columns = {"id": passage.id, "title": passage.title, "text": passage.text, "source": passage.source}
    lecture = {"problem_ids": passage.problem_ids} if passage.problem_ids else {}
    return json.dumps(columns | lecture, ensure_ascii=False).encode()


def corpus_digest(passages: Iterable[Passage]) -> str:
    """Return the digest of a corpus: the digest of its `passages.jsonl`."""
    digest = sha256()
    for passage in passages:
        digest.update(passage_line(passage) + b"\n")
    return f"sha256:{digest.hexdigest()}"


def count_sources(passages: Iterable[Passage]) -> dict[str, int]:
    """Return the number of passages of each source."""
    counts: dict[str, int] = {}
    for passage in passages:
        counts[passage.source] = counts.get(passage.source, 0) + 1
    return counts


def write_lines(file: Path, offsets: Path, lines: Iterable[bytes]) -> None:
    """Write lines, and the position of each line's first byte, as `MappedLines` reads them."""
    positions = array("q", [0])
    with file.open("wb") as output:
        for line in lines:
            output.write(line + b"\n")
            positions.append(output.tell())
    np.save(offsets, np.array(positions, dtype=np.int64))


def write_scores(passages: list[Passage], folder: Path, analyzer: Analyzer) -> None:
    """
    Write the terms and their scores.

    Raises:
        ValueError: no passage has a term.
    """
    columns: dict[str, int] = {}
    occurrences = [array("i", columns_of(passage, analyzer, columns)) for passage in passages]
    if not columns:
        raise ValueError(f"none of the {len(passages)} passages has a letter or digit outside of the stop words.")
    # The terms are sorted on disk, so that they are found by bisection.
    terms = sorted(columns)
    write_lines(folder / TERMS, folder / TERM_OFFSETS, (term.encode() for term in terms))
    renumbered: np.ndarray = np.empty(len(terms), dtype=np.int32)
    renumbered[[columns[term] for term in terms]] = np.arange(len(terms))
    occurrences = [array("i", renumbered[np.frombuffer(row, dtype=np.int32)].tobytes()) for row in occurrences]
    scores = import_bm25s().BM25(method=METHOD, k1=K1, b=B)
    numbers = {term: number for number, term in enumerate(terms)}
    scores.index((occurrences, numbers), create_empty_token=False, show_progress=False)
    scores.save(folder, show_progress=False)
    for unused in ("vocab.index.json", "params.index.json"):  # `terms.txt` and the manifest take their place
        (folder / unused).unlink()


def columns_of(passage: Passage, analyzer: Analyzer, columns: dict[str, int]) -> Iterator[int]:
    """Yield the numbers of a passage's terms; a new term gets the next number."""
    for word in words_of(f"{passage.title} {passage.text}"):
        term = analyzer.term_of(word)
        if term is not None:
            yield columns.setdefault(term, len(columns))
