"""`ResumableLog`: what a kill leaves is resumed, and what is not the same log is refused and not touched."""

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


def test_a_second_call_has_the_entries_of_the_first(file):
    assert write(file, [1], {"a": "ü"}) == []
    assert write(file, [3]) == [[1], {"a": "ü"}]
    assert read_log(file, HEADER) == [[1], {"a": "ü"}, [3]]
    header, *_ = file.read_text().splitlines()
    assert json.loads(header) == {"model": "Größe", "sizes": [1, 2]}


def test_a_kill_at_any_byte_loses_the_line_in_hand_alone(file):
    write(file, [1], {"a": "ü"})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        left = write(file)
        assert left == [[1], {"a": "ü"}][: max(0, whole[:length].count(b"\n") - 1)]
        write(file, *[[1], {"a": "ü"}][len(left) :])
        assert file.read_bytes() == whole


def test_a_header_that_another_encoder_wrote_is_the_same(file):
    """A journal of an earlier version holds its settings in UTF-8."""
    file.parent.mkdir()
    file.write_text(json.dumps(HEADER, ensure_ascii=False) + "\n[1]\n", encoding="utf-8")
    assert write(file, [2]) == [[1]] and read_log(file, HEADER) == [[1], [2]]


@pytest.mark.parametrize("content", ['{"model": "other"}\n[1]\n', '{"model": "ot', "a letter", "[1]\n"])
def test_another_header_is_refused_and_the_file_is_not_touched(file, content):
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(OtherHeader, match="log.jsonl"):
        ResumableLog(file, HEADER)
    assert file.read_text() == content


def test_a_line_that_is_not_json_is_named(file):
    file.parent.mkdir()
    file.write_text("[1]\n{\n")
    with pytest.raises(ValueError, match="log.jsonl, line 2: not valid JSON"):
        read_log(file)


def test_a_log_without_header(file):
    assert read_log(file) == []
    log = ResumableLog(file)
    log.append(["a"], ["b"])
    log.close()
    assert file.read_bytes() == b'["a"]\n["b"]\n' and ResumableLog(file).entries == [["a"], ["b"]]
