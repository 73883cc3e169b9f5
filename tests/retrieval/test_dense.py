"""Dense and hybrid search, with a tiny encoder of random weights."""

import re
import shutil
import sys

import numpy as np
import pytest
from passage_files import TEXTS, build, corpus, ids

from mmcot.retrieval.dense import DenseSearcher, HybridSearcher, fuse
from modeling_mmcot.retrieval_mmcot import BM25Searcher, Passage, search_passages, words_of


def write_encoder(folder, seed=0):
    """A sentence-transformers model with the words of `TEXTS` as its vocabulary, created without a download."""
    pytest.importorskip("faiss", reason="needs mmcot[dense]")
    pytest.importorskip("sentence_transformers", reason="needs mmcot[dense]")
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({word for text in TEXTS.values() for word in words_of(text)})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words) + 5, initializer_range=1.0, **sizes)).save_pretrained(folder / "bert")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "e")


@pytest.fixture(scope="module")
def index(encoder, tmp_path_factory):
    # The last passage repeats the first one's text, and therefore has the same vector.
    passages = [*corpus(), Passage("again", "", TEXTS["poles"], "a test")]
    return build(tmp_path_factory.mktemp("dense"), passages, encoder=str(encoder))


def test_dense_search_ranks_by_cosine(index, encoder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(encoder))
    texts = [f"\n{text}" for text in [*TEXTS.values(), TEXTS["poles"]]]
    vectors, query = model.encode(texts), model.encode("the letter N shows north")
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    [found] = search_passages(DenseSearcher(index), ["the letter N shows north"], 99)
    names = [*TEXTS, "again"]
    assert [passage.id for passage in found] == [names[row] for row in np.argsort(-cosines.round(5), kind="stable")]
    assert [passage.score for passage in found] == pytest.approx(sorted(cosines, reverse=True), abs=1e-5)
    assert abs(names.index("again") - names.index("poles")) > 1  # equal scores keep the order of the corpus
    order = [passage.id for passage in found]
    assert order.index("again") == order.index("poles") + 1


def test_hybrid_search_ranks_by_reciprocal_rank_fusion(index):
    query, k = "poles of magnets", 4
    bm25, dense = (search_passages(kind(index), [query], 100)[0] for kind in (BM25Searcher, DenseSearcher))
    expected = {}
    for ranking in (bm25, dense):
        for rank, passage in enumerate(ranking, start=1):
            expected[passage.id] = expected.get(passage.id, 0) + 1 / (60 + rank)
    [found] = search_passages(HybridSearcher(index), [query], k)
    assert {passage.id: passage.score for passage in found} == pytest.approx(
        dict(sorted(expected.items(), key=lambda entry: -entry[1])[:k])
    )


def test_fuse_matches_hand_computed_scores():
    first, second = ([Passage(name, "", name, "") for name in names] for names in ("ab", "cb"))
    assert [(passage.id, round(passage.score, 6)) for passage in fuse((first, second))] == [
        ("b", round(2 / 62, 6)),
        ("a", round(1 / 61, 6)),
        ("c", round(1 / 61, 6)),
    ]


def test_refuses_index_without_vectors(tmp_path):
    with pytest.raises(ValueError, match="has no vectors; build it with --encoder MODEL"):
        DenseSearcher(build(tmp_path))


def test_refuses_encoder_with_other_weights(tmp_path):
    encoder = write_encoder(tmp_path / "e")
    folder = build(tmp_path, encoder=str(encoder))
    assert ids(search_passages(DenseSearcher(folder), ["poles"], 1))
    shutil.rmtree(tmp_path / "e")
    write_encoder(tmp_path / "e", seed=1)
    with pytest.raises(ValueError, match=re.escape("has other weights than the one that wrote the vectors")):
        DenseSearcher(folder)


def test_refuses_vectors_of_another_corpus(index, encoder, tmp_path):
    other = build(tmp_path, encoder=str(encoder))
    shutil.copy(index / "vectors.faiss", other)
    with pytest.raises(ValueError, match=r"vectors.faiss: 7 vectors for 6 passages"):
        DenseSearcher(other)


@pytest.mark.parametrize("module", ["faiss", "sentence_transformers"])
def test_missing_package_error_names_extra(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}: pip install 'mmcot\[dense\]'"):
        build(tmp_path, encoder="any/model")
    assert not (tmp_path / "index").exists()
