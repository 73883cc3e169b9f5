"""The values in a card: paths, options and digests. test_publishing.py tests a run's whole card and its code blocks."""

import hashlib

import pytest

from mmcot.hub.card import code_digests, command_options, probe_options, without_paths


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/storage/alice/texts.json", "texts.json"),
        ("~/texts.json", "texts.json"),
        ("../alice/texts.json", "texts.json"),
        ("runs/../../alice/texts.json", "texts.json"),
        ("rationale=/storage/alice/texts.json", "rationale=texts.json"),
        ("rationale=../alice/texts.json", "rationale=texts.json"),
        ("rationale=~alice/texts.json", "rationale=texts.json"),
        ("file:///storage/alice/texts.json", "texts.json"),
        (r"C:\Users\alice\texts.json", "texts.json"),
        ("a=b=/storage/alice/x=1/texts.json", "a=b=texts.json"),
        ("/storage/alice/x=1/texts.json", "texts.json"),
        ("../..", ".."),
        ("train=/storage/alice/a.jsonl,test=/storage/alice/b.jsonl", "train=a.jsonl,test=b.jsonl"),
        *(
            (same, same)
            for same in ("problems.jsonl", "runs/demo", "google/flan-t5-base", "https://x.org/a/b?c=d", "a=b")
        ),
        *((same, same) for same in ("{{ question }} = {{ a }}", "wait... what", "", 3, None, True)),
    ],
)
def test_without_paths_keeps_only_file_names(value, expected):
    assert without_paths(value) == expected
    assert without_paths({"a": [value, {"b": value}]}) == {"a": [expected, {"b": expected}]}


def test_command_contains_no_local_paths():
    options = {
        "target_column": "rationale=/storage/alice/texts.json",
        "limit": 6,
        "bf16": True,
        "files": ["../x/y", "z"],
    }
    assert command_options(options) == "--target_column rationale=texts.json --limit 6 --bf16 --files y z"


def test_probe_command_reads_scored_problems():
    scores = {
        "predict_options": {"decode_answer": True, "captions": "captions.json", "columns": "question=query"},
        "evaluate_options": {"columns": "question=query", "split_seed": 7, "by": ["skill"], "allow_missing": True},
    }
    command = command_options(probe_options(scores))
    assert command == "--columns question=query --split_seed 7 --captions captions.json"


def test_code_digests_are_file_digests(tmp_path):
    (tmp_path / "b_mmcot.py").write_bytes(b"import torch\n")
    (tmp_path / "a_mmcot.py").write_bytes(b"")
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "rationale").mkdir()
    (tmp_path / "rationale" / "c.py").write_bytes(b"")
    found = code_digests(tmp_path)
    assert list(found) == ["a_mmcot.py", "b_mmcot.py"]
    assert found["b_mmcot.py"] == hashlib.sha256(b"import torch\n").hexdigest()
