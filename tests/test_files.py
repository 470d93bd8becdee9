"""sources/files.py: opening, quoting and naming what others made."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sources.files import NAME_BYTES, open_regular, read_bytes, read_json, safe_name, shown

ODD = ["", ".", "..", "...", "../..", "/etc/passwd", "a/b", "a\\b", "\x00", "\n", "..json",
       "-rf", "\udc80", "字" * 100, "é" * 80, ".hidden", "a" * 3000, " ", "a:b",
       "con\x1b[31m"]  # fmt: skip


@given(st.lists(st.sampled_from(ODD) | st.text(max_size=120), max_size=30))
def test_names_are_safe_and_differ(texts):
    taken = set()
    for text in texts:
        name = safe_name(text, taken)
        assert name not in taken and 0 < len(name.encode()) <= NAME_BYTES
        assert not name.startswith(".") and name.isprintable()
        assert os.path.basename(name) == name and os.path.normpath(name) == name
        taken.add(name)


def test_good_names_stay():
    assert safe_name("clip_01.b-2") == "clip_01.b-2" and safe_name("走る") == "走る"
    assert safe_name("a b", {"a_b", "a_b_2"}) == "a_b_3"
    long = safe_name("字" * 100)  # three bytes each
    assert long == "字" * 26 and safe_name("字" * 99, {long}) == long + "_2"


@given(st.sampled_from(ODD) | st.text() | st.integers() | st.floats() | st.lists(st.integers()))
def test_what_is_shown_is_one_short_line(content):
    text = shown(content)
    assert len(text) <= 100 and text.isprintable()
    assert len(shown("x" * 5000, 4096)) == 4096


def test_values_are_shown_and_endless_lists_are_not():
    endless = []
    endless.extend([endless] * 9)
    assert [shown(x) for x in ("a\nb", 5, 2.5, None)] == ["a\\nb", "5", "2.5", "None"]
    assert shown(endless) == "list" and shown(10**5000) == "a number of more than 64 bits"


def test_only_regular_files_are_opened(tmp_path):
    path, pipe = tmp_path / "a", tmp_path / "pipe"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    assert read_bytes(path, 5) == read_bytes(tmp_path / "link") == b"12345"
    with open_regular(path) as f:
        assert f.read() == b"12345"
    with pytest.raises(ValueError, match="more than 0 MB; split it"):
        read_bytes(path, 4)
    os.mkfifo(pipe)
    (tmp_path / "zero").symlink_to("/dev/zero")
    for endless in (pipe, tmp_path / "zero"):
        with pytest.raises(ValueError, match="no regular file"):
            read_bytes(endless)
        with pytest.raises(ValueError, match="no regular file"):
            read_json(endless)


def test_json_is_counted_before_it_is_made(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": [1, 2.5]}] * 10))
    assert read_json(path) == [{"a": [1, 2.5]}] * 10
    small = ("[" + "{}," * 50_000 + "{}]", 10 << 20), ("[1" + ",1" * 99_999 + "]", 3 << 20)
    for text, memory in small:
        path.write_text(text)
        with pytest.raises(ValueError, match="MB of memory, .* split it"):
            read_json(path, memory=memory)
        assert len(read_json(path)) > 50_000


@pytest.mark.parametrize("raw", [b"", b"secret", b"\xff\xfe", b"[" * 10**5, b"9" * 10**4,
                                 b'{"a": "\x01secret"}', b'"\\ud800', b"nul"])
def test_what_is_no_json_is_not_quoted(tmp_path, raw):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="a.json is not a JSON file that can be read: ") as e:
        read_json(path)
    assert "secret" not in str(e.value) and str(e.value).isprintable()
