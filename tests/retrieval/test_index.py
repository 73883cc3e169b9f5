"""Building an index: it is complete or absent, built once, and never replaces another index or other files."""

import json

import bm25s
import numpy as np
import pytest
from passage_files import build, corpus

from mmcot.retrieval.index import IndexSettings, build_index, corpus_digest
from mmcot.storage.digests import digest_of_file
from modeling_mmcot.retrieval_mmcot import INDEX_FILES, MANIFEST, Passage


def content(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_manifest_records_corpus_settings_and_versions(tmp_path):
    passages = [*corpus(), Passage("b", "", "A text.", "a book (CC BY 4.0)")]
    folder = build(tmp_path, passages, stemmer="english", stop_words="english")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["corpus"] == corpus_digest(passages) == digest_of_file(folder / "passages.jsonl")
    assert manifest["sources"] == {"a test": 6, "a book (CC BY 4.0)": 1}
    assert (manifest["format"], manifest["num_passages"], manifest["method"]) == (1, 7, "lucene")
    assert manifest["stemmer"] == "english" and "the" in manifest["stop_words"]
    assert manifest["versions"]["bm25s"] == bm25s.__version__ and "PyStemmer" in manifest["versions"]
    assert {file.name for file in folder.iterdir()} == {MANIFEST, *INDEX_FILES}
    assert manifest["files"] == {name: (folder / name).stat().st_size for name in INDEX_FILES}
    assert str(tmp_path) not in (folder / MANIFEST).read_text()


def test_second_build_leaves_same_index_unchanged(tmp_path):
    before = content(build(tmp_path))
    assert content(build(tmp_path)) == before


def test_builds_of_same_corpus_are_byte_equal(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first, second = ({name: data for name, (data, _) in content(build(tmp_path / name)).items()} for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize(
    ("passages", "settings", "message"),
    [
        (corpus(p="Another text."), {}, "is an index with corpus 'sha256:.*'; expected 'sha256:"),
        (corpus(), {"stemmer": "none"}, "is an index with stemmer 'english'; expected None"),
        (corpus(), {"stop_words": "none"}, r"is an index with stop_words \['an', 'and'.*; expected \[\]"),
    ],
)
def test_refuses_to_replace_another_index(tmp_path, passages, settings, message):
    folder = build(tmp_path)
    before = content(folder)
    with pytest.raises(ValueError, match=message):
        build_index(passages, folder, IndexSettings(**settings))
    assert content(folder) == before


def test_refuses_to_replace_folder_of_other_files(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an index"):
        build(tmp_path)
    assert (tmp_path / "index" / "thesis.txt").read_text() == "mine"


def test_failed_build_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(bm25s.BM25, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_refuses_corpus_without_terms(tmp_path):
    with pytest.raises(ValueError, match="none of the 2 passages has a letter or digit outside of the stop words"):
        build(tmp_path, corpus(a="…?!", b="The of"), stop_words="english")
    assert list(tmp_path.iterdir()) == []


def test_keeps_passage_without_terms(tmp_path):
    folder = build(tmp_path, corpus(a="…?!", b="a text"))
    assert len(np.load(folder / "passages.offsets.npy")) == 3


def test_refuses_unknown_stop_words_and_stemmer(tmp_path):
    with pytest.raises(ValueError, match="stop_words is 'klingon'; expected one of none, english"):
        IndexSettings(stop_words="klingon")
    with pytest.raises(ValueError, match="stemmer is 'klingon'; expected one of .*english"):
        build(tmp_path, stemmer="klingon")
