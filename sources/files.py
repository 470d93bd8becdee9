"""Files that others made: opened with care, quoted with care, and named with care.

Every reader in this folder opens files, shows what they say, and makes names of it with these few
functions. docs/data.md says what a file may ask for.
"""

import json
import os
import re
import stat
from collections.abc import Container
from pathlib import Path
from typing import BinaryIO

SHOWN = 100  # characters of a file's content that a message shows
NAME_BYTES = 80  # of a name that becomes part of a path
LARGEST = 256 << 20  # bytes of a file, unless its reader knows better
JSON_MEMORY = 1 << 30  # bytes that the content of a JSON file may take, as estimated


def shown(text: object, most: int = SHOWN) -> str:
    """A text out of a file for a message: on one line, without control characters, and cut.

    For a path, which a message shows in full, `most` is 4096. Of what is no text, a number or a
    path, only the type is shown, since a short file can hold a list that never ends.
    """
    if isinstance(text, int) and abs(text) >= 1 << 64:
        text = "a number of more than 64 bits"
    elif not isinstance(text, str | int | float | Path | None):
        text = type(text).__name__
    text = str(text)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                   for c in text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def safe_name(text: str, taken: Container[str] = ()) -> str:
    """A text as a name in a folder, unlike those that are `taken`.

    Letters, digits, `_`, `-` and dots that do not come first stay. It never names the folder
    itself or another one, and has at most NAME_BYTES bytes.
    """
    name = re.sub(r"[^\w.-]+", "_", text[:1000]).lstrip(".") or "_"
    free, n = _cut(name, NAME_BYTES), 1
    while free in taken:
        n += 1
        end = f"_{n}"
        free = _cut(name, NAME_BYTES - len(end)) + end
    return free


def _cut(name: str, most: int) -> str:
    """As many whole characters as have at most so many bytes."""
    return name.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


def open_regular(path: Path, largest: int = LARGEST) -> BinaryIO:
    """Open a regular file of at most so many bytes, or a link to one.

    Raises ValueError, with half a sentence, on anything else: a pipe or a device has no end.
    """
    at_once = getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for whoever writes into it
    f = open(path, "rb", opener=lambda path, flags: os.open(path, flags | at_once))
    info = os.fstat(f.fileno())
    if stat.S_ISREG(info.st_mode) and info.st_size <= largest:
        return f
    f.close()
    raise ValueError(f"it has more than {largest >> 20} MB; split it"
                     if stat.S_ISREG(info.st_mode) else "it is no regular file")


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """What a regular file holds. Raises ValueError as `open_regular` does."""
    with open_regular(path, largest) as f:
        return f.read(largest)


def read_json(path: Path, largest: int = LARGEST, memory: int = JSON_MEMORY, lines: bool = False):
    """What a JSON file holds; lines: or the list of what it has in its lines.
    Raises ValueError, with one sentence, if it cannot be read, has more than `largest` bytes, or
    would take more than `memory` bytes."""
    name = shown(path, 4096)
    try:
        raw = read_bytes(path, largest)
        # What Python needs at least for an object, a list, an element and a string; counted before
        # anything is made, since a short text can become a hundred times as large.
        needed = sum(raw.count(c) * n for c, n in ((b"{", 240), (b"[", 64), (b",", 34), (b'"', 26)))
        if needed > memory:
            raise ValueError(f"it would take about {needed >> 20} MB of memory, and at most "
                             f"{memory >> 20} MB are allowed; split it")
        text = raw.decode("utf-8-sig")
        try:
            return json.loads(text)
        except ValueError:
            parts = [line for line in text.splitlines() if line] if lines else []
            if len(parts) < 2 or not all(line[0] in "{[" for line in parts):
                raise
            return [json.loads(line) for line in parts]
    except (ValueError, RecursionError, OSError) as e:
        raise ValueError(f"{name} is not a JSON file that can be read: "
                         f"{shown(e.args[-1], 200)}") from e
