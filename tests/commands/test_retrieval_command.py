"""`python -m mmcot.retrieval` and `mmcot retrieval`, as a user runs them."""

import json

import pytest
from conftest import run_script
from passage_files import TEXTS, scienceqa, write_jsonl

from mmcot.retrieval.__main__ import main


@pytest.fixture
def files(tmp_path):
    rows = [{"id": name, "text": text, "source": "a test"} for name, text in TEXTS.items()]
    corpus = write_jsonl(tmp_path / "passages.jsonl", *rows)
    lectures = {"t1": ("train", "A magnet has two poles."), "e1": ("test", "A magnet has two poles.")}
    return corpus, scienceqa(tmp_path / "problems", **lectures, v1=("val", "Validation."), e2=("test", ""))


@pytest.mark.slow
def test_builds_searches_and_evaluates_index(files, tmp_path):
    corpus, problems = files
    build = ("build", "--corpus", corpus, "--lectures", problems, "--output", tmp_path / "index")
    result = run_script("-m", "mmcot.retrieval", *build, "--stemmer", "english", "--stop_words", "english")
    assert "6 passages  a test" in result.stdout and "1 passages  ScienceQA, lectures of the" in result.stdout
    assert f"index: {tmp_path / 'index'} (0.0 MB)" in result.stdout
    search = ("search", tmp_path / "index", "--query", "cell walls?", "--query", "…", "--k", "2")
    result = run_script("-m", "mmcot", "retrieval", *search)
    assert "cell walls?: 1 passages" in result.stdout and "[cells; a test]" in result.stdout
    assert "…: 0 passages" in result.stdout and "DEBUG" not in result.stderr
    first, second = json.loads(run_script("-m", "mmcot", "retrieval", *search, "--json").stdout)
    assert (first["query"], first["passages"][0]["id"], second["passages"]) == ("cell walls?", "cells", [])
    evaluate = ("evaluate", tmp_path / "index", "--dataset", problems, "--split", "test", "--k", "1,3")
    result = run_script("-m", "mmcot.retrieval", *evaluate)
    assert "1 test problems; 1 others have no gold lecture" in result.stdout
    assert "in the corpus: the gold of 1 problems" in result.stdout and "recall@3   100.00" in result.stdout
    result = json.loads(run_script("-m", "mmcot.retrieval", *evaluate, "--exclude_verbatim", "--json").stdout)
    assert result["measures"]["recall@3"] == {"mean": 0.0, "interval": None}


def test_evaluates_gold_passages_by_id(files, tmp_path):
    corpus, _ = files
    main(["build", "--corpus", str(corpus), "--output", str(tmp_path / "index")])
    rows = [
        {"id": name, "question": question, "choices": ["a", "b"], "answer": 0, "split": "test", "passage": passage}
        for name, question, passage in [("1", "cell wall", "cells"), ("2", "compass", "three")]
    ]
    dataset = write_jsonl(tmp_path / "problems.jsonl", *rows)
    command = ["evaluate", str(tmp_path / "index"), "--dataset", str(dataset), "--gold", "passage", "--json"]
    result = json.loads(run_script("-m", "mmcot.retrieval", *command).stdout)
    assert (result["n"], result["gold_in_corpus"], result["measures"]["recall@1"]["mean"]) == (2, 2, 50.0)
    write_jsonl(dataset, *[{**row, "passage": "gone"} for row in rows])
    with pytest.raises(SystemExit, match="error: column 'passage' names 1 passages that the index does not have: gone"):
        main(command)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("build --output INDEX", "no corpus is given"),
        ("build --corpus absent.jsonl --output INDEX", "corpus absent.jsonl does not exist"),
        ("build --corpus CORPUS --output CORPUS", "is a file; expected a folder"),
        ("build --corpus CORPUS --corpus CORPUS --output INDEX", "'poles' occurs twice"),
        ("build --corpus CORPUS --output INDEX --encoder ./absent", "./absent: no such file or folder"),
        ("search --query a", "the searcher bm25 needs the option index"),
        ("search INDEX --query a", "is not an index"),
        ("search INDEX --query a --searcher web", "index has no effect on the searcher web"),
        ("search INDEX --query a --timeout 3", "timeout has no effect on the searcher bm25"),
        ("search --searcher http --url http://127.0.0.1:9/{query} --query a --cache INDEX", "cannot be reached"),
        ("evaluate INDEX --dataset absent.jsonl", "is not an index"),
    ],
)
def test_exits_with_error_message_for_invalid_arguments(files, tmp_path, argv, message):
    words = argv.replace("INDEX", str(tmp_path / "index")).replace("CORPUS", str(files[0])).split()
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(words)


def test_refuses_malformed_k_and_fields(capsys):
    for argv in (["evaluate", "i", "--dataset", "d", "--k", "0,1"], ["search", "--query", "a", "--fields", "text"]):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
    assert "; expected " in capsys.readouterr().err


def test_reports_skipped_search(tmp_path):
    command = (
        "search",
        "--searcher",
        "http",
        "--url",
        "http://127.0.0.1:9/{query}",
        "--query",
        "a",
        "--cache",
        tmp_path,
    )
    result = run_script("-m", "mmcot.retrieval", *command, "--on_search_error", "skip")
    assert "a: 0 passages" in result.stdout and "failed for 1 of 1 queries" in result.stderr


def test_evaluates_gold_passages_of_study_problems(tmp_path, capsys):
    main(["build", "--corpus", "study", "--output", str(tmp_path / "index")])
    capsys.readouterr()
    template = "{{ question }} {{ choices | join(' ') }}"
    command = ["evaluate", str(tmp_path / "index"), "--dataset", "study:fact", "--split", "val"]
    main([*command, "--gold", "gold_passages", "--query_template", template, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["gold_in_corpus"] == result["n"] == 500 and result["without_gold"] == 0
    assert 0 < result["measures"]["recall@10"]["mean"] < 50  # the animal is in the picture only
