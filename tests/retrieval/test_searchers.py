"""The table of searchers, and the options that each takes."""

import pytest
from passage_files import build

from mmcot.retrieval.searchers import SEARCHERS, open_searcher
from modeling_mmcot.retrieval_mmcot import BM25Searcher


def test_opens_searcher_by_name(tmp_path):
    assert list(SEARCHERS) == ["bm25", "dense", "hybrid", "http", "web"]
    assert isinstance(open_searcher("bm25", index=build(tmp_path), url=None), BM25Searcher)
    searcher = open_searcher("http", url="http://a.example/{query}", cache=tmp_path)
    assert type(searcher) is SEARCHERS["http"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bing", {}, "searcher is 'bing'; expected one of bm25, dense, hybrid, http, web"),
        (
            "bm25",
            {"index": "i", "url": "http://a"},
            "url has no effect on the searcher bm25; its options: index, corpus",
        ),
        (
            "http",
            {"url": "http://a/{query}", "index": "i"},
            "index has no effect on the searcher http; its options: url",
        ),
        ("bm25", {}, "the searcher bm25 needs the option index"),
        ("http", {"url": None}, "the searcher http needs the option url"),
    ],
)
def test_refuses_options_without_effect_and_names_missing_ones(name, options, message):
    with pytest.raises(ValueError, match=message):
        open_searcher(name, **options)
