"""Dense and hybrid search: vectors of sentence-transformers in a flat faiss index, alone or fused with BM25.

`build --encoder` writes one vector for each passage beside the BM25 files of an index. The vectors have length 1, so
their inner product is the cosine. A search compares the query with all vectors, without approximation. Needs
`mmcot[dense]`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modeling_mmcot.retrieval_mmcot import BM25Searcher, Passage, search_passages

VECTORS = "vectors.faiss"
RANK_CONSTANT = 60  # Cormack et al. 2009, section 2
DEPTH = 100  # passages of each ranking that are fused; k, if k is larger
# Of the first passage's vector, computed again, and its stored vector. Other weights or prompts give a lower cosine.
MIN_COSINE = 0.99


def load_encoder(model: str) -> Any:
    """
    Return a sentence-transformers model.

    Args:
        model: a folder or a Hub id.

    Raises:
        ImportError: the packages are not installed.
    """
    try:
        import faiss  # noqa: F401
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(f"dense search needs {error.name}: pip install 'mmcot[dense]'") from error
    return SentenceTransformer(model)


def embed_passages(encoder: Any, passages: list[Passage]) -> np.ndarray:
    """Return the vectors of passages, `(num_passages, dimension)`."""
    texts = [f"{passage.title}\n{passage.text}" for passage in passages]
    return encoder.encode_document(texts, normalize_embeddings=True, show_progress_bar=False).astype(np.float32)


def write_vectors(passages: list[Passage], folder: Path, model: str) -> None:
    """Write the vectors of a corpus into the folder of its index."""
    vectors = embed_passages(load_encoder(model), passages)
    import faiss

    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    faiss.write_index(flat, str(folder / VECTORS))


class DenseSearcher:
    """
    Searches the vectors of an index. All vectors are loaded into memory: 4 bytes for each passage and dimension.

    Args:
        index: the folder of an index that was built with an encoder.

    Raises:
        ImportError: a package is not installed.
        ValueError: the folder is not such an index, or the encoder is not the one that wrote the vectors.
    """

    def __init__(self, index: str | Path):
        self._corpus = BM25Searcher(index)
        model, file = self._corpus.manifest["encoder"], Path(index) / VECTORS
        if model is None or not file.is_file():
            raise ValueError(f"{index} has no vectors; build it with --encoder MODEL.")
        self._encoder = load_encoder(model)
        import faiss

        self._vectors = faiss.read_index(str(file))
        if self._vectors.ntotal != len(self._corpus.passages):
            raise ValueError(f"{file}: {self._vectors.ntotal} vectors for {len(self._corpus.passages)} passages.")
        first = embed_passages(self._encoder, [self._corpus.passage(0)])[0]
        if first.shape != (self._vectors.d,) or float(first @ self._vectors.reconstruct(0)) < MIN_COSINE:
            raise ValueError(f"{file}: the encoder {model} has other weights than the one that wrote the vectors.")

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Return `k` passages for each query, by the cosine of their vectors and then by position in the corpus."""
        vectors = self._encoder.encode_query(queries, normalize_embeddings=True, show_progress_bar=False)
        scores, positions = self._vectors.search(vectors.astype(np.float32), min(k, self._vectors.ntotal))
        return [
            [
                self._corpus.passage(position, score)
                for score, position in sorted(zip(*rows, strict=True), key=best_first)
            ]
            for rows in zip(scores.tolist(), positions.tolist(), strict=True)
        ]


def best_first(found: tuple[float, int]) -> tuple[float, int]:
    """Return the sort key of a score and a position."""
    return -found[0], found[1]


class HybridSearcher:
    """
    Fuses the rankings of BM25 and of the vectors: a passage's score is the sum of 1 / (60 + rank) over the rankings
    that contain it (reciprocal rank fusion; Cormack, Clarke and Büttcher, SIGIR 2009). Passages with equal scores are
    in the order of BM25's ranking; those that only the vectors find come last.

    Args:
        index: the folder of an index that was built with an encoder.
    """

    def __init__(self, index: str | Path):
        self._searchers = (BM25Searcher(index), DenseSearcher(index))

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Return at most `k` passages for each query."""
        depth = max(k, DEPTH)
        rankings = (search_passages(searcher, queries, depth) for searcher in self._searchers)
        return [fuse(ranked)[:k] for ranked in zip(*rankings, strict=True)]


def fuse(rankings: tuple[list[Passage], ...]) -> list[Passage]:
    """Return the passages of several rankings, sorted by the sum of their reciprocal ranks."""
    scores: dict[str, float] = {}
    passages: dict[str, Passage] = {}
    for ranking in rankings:
        for rank, passage in enumerate(ranking, start=1):
            scores[passage.id] = scores.get(passage.id, 0.0) + 1 / (RANK_CONSTANT + rank)
            passages.setdefault(passage.id, passage)
    order = sorted(scores, key=lambda name: -scores[name])
    return [replace(passages[name], score=scores[name]) for name in order]
