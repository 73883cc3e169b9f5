"""`ResumableLog` resumes a log that a kill truncated, and refuses a file with another header without changing it."""

import json

import pytest

from mmcot.storage.resumable_log import OtherHeader, ResumableLog, read_log

HEADER = {"model": "Größe", "sizes": (1, 2)}


def write(file, *entries):
    log = ResumableLog(file, HEADER)
    log.append(*entries)
    log.close()
    return log.entries


@pytest.fixture
def file(tmp_path):
    return tmp_path / "made" / "log.jsonl"


def test_second_call_reads_entries_of_first(file):
    assert write(file, [1], {"a": "ü"}) == []
    assert write(file, [3]) == [[1], {"a": "ü"}]
    assert read_log(file, HEADER) == [[1], {"a": "ü"}, [3]]
    header, *_ = file.read_text().splitlines()
    assert json.loads(header) == {"model": "Größe", "sizes": [1, 2]}


def test_kill_at_any_byte_loses_only_unfinished_line(file):
    write(file, [1], {"a": "ü"})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        left = write(file)
        assert left == [[1], {"a": "ü"}][: max(0, whole[:length].count(b"\n") - 1)]
        write(file, *[[1], {"a": "ü"}][len(left) :])
        assert file.read_bytes() == whole


def test_accepts_same_header_in_another_encoding(file):
    """Earlier versions wrote the header in UTF-8 instead of ASCII escapes."""
    file.parent.mkdir()
    file.write_text(json.dumps(HEADER, ensure_ascii=False) + "\n[1]\n", encoding="utf-8")
    assert write(file, [2]) == [[1]] and read_log(file, HEADER) == [[1], [2]]


@pytest.mark.parametrize("content", ['{"model": "other"}\n[1]\n', '{"model": "ot', "a letter", "[1]\n"])
def test_refuses_another_header_and_keeps_file(file, content):
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(OtherHeader, match="log.jsonl"):
        ResumableLog(file, HEADER)
    assert file.read_text() == content


def test_error_names_line_that_is_not_json(file):
    file.parent.mkdir()
    file.write_text("[1]\n{\n")
    with pytest.raises(ValueError, match="log.jsonl, line 2: not valid JSON"):
        read_log(file)


def test_appends_to_log_without_header(file):
    assert read_log(file) == []
    log = ResumableLog(file)
    log.append(["a"], ["b"])
    log.close()
    assert file.read_bytes() == b'["a"]\n["b"]\n' and ResumableLog(file).entries == [["a"], ["b"]]
