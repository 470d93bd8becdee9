"""How fuzz.py mutates files: in their bytes, or in what they are made of, which is JSON values,
words, opcodes of pickles, headers of arrays, members of archives, or tensors."""

import io
import json
import os
import pickle
import pickletools
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

WORK = Path(tempfile.mkdtemp(prefix="fuzz_"))
MARK = WORK / "executed"  # what no file may leave
SECRET = WORK / "secret"  # a file whose content no message may show

TEXTS = ["", "x", "\x1b[31mred\nline\u2028\ud800", "x" * 100_000, "../../etc/passwd", "$^$", "..",
         "\u5b57" * 100, "-1", "nan", "\u0663"]  # fmt: skip
VALUES = [None, True, -1, 0, 3, 0.5, 1e300, np.nan, np.inf, 1 << 63, -(1 << 63), 10**400, [], {},
          [[]], [[1], [1, 2]], [None] * 17, *TEXTS]  # fmt: skip
WRITTEN = {  # what stands in a JSON file where one of these texts would be
    "@deep@": "[" * 100_000 + "]" * 100_000, "@digits@": "9" * 5000, "@large@": "1e999",
    "@many@": f"[{'[],' * 500_000}{{}}]",
}  # fmt: skip
BYTES = [b"NaN", b"1e999", b"null", b"{}", b"[", b'"', b"\xff\xfe", b"\0", bytes(64)]
WORDS = ["}", "{", "JOINT x", "End Site { OFFSET 0 1 0 }", "-1", "1e999", "CHANNELS 99999", "nan",
         "CHANNELS 3 Xrotation Xrotation Xrotation", "Frames: 0", "Frames: 999999999999", "OFFSET",
         "Frame Time: 1e-9", "MOTION", *TEXTS]  # fmt: skip
BONES = ["End Site { OFFSET 0 1 0 } " * 60_000, "JOINT a { OFFSET 0 1 0 " * 4000 + "} " * 4000,
         "End Site { " * 60_000 + "} " * 60_000]  # fmt: skip
SHAPES = ["(-1, 17, 2)", "(18446744073709551616,)", "(1000000000000, 17, 3)", "(1.5,)", "()",
          "(0,)", "(1099511627776, 0, 17, 2)", "None", "[5, 17, 2]", "(True,)",
          "(" * 3000]  # fmt: skip
DTYPES = ["'|O'", "'>f8'", "'<f2'", "'|b1'", "'<U100000'", "'|V16'", "'<M8[s]'", "'<c16'",
          "'f,f'", "[('a', '<f4')]", "'<f99'", "'|S0'", "None", "','"]  # fmt: skip
TENSORS = [torch.zeros(0), torch.tensor(np.nan), torch.zeros(3, dtype=torch.complex64),
           torch.zeros(1).expand(1 << 40), torch.zeros(1 << 40, device="meta"), (1, 2), b"x",
           torch.full((16, 8), np.nan), torch.ones(2, dtype=torch.int8),
           torch.eye(3).to_sparse()]  # fmt: skip


def call(module, name, text, how="c%s\n%s\n(V%s\ntR"):
    """Opcodes of a pickle that call a function with a text."""
    return (how % (module, name, text)).encode("latin1")


TOUCH, OPEN = f"touch {MARK}", f"open({str(MARK)!r}, 'w')"
LONG = b"X" + (1 << 20).to_bytes(4, "little") + b"y" * (1 << 20)  # a text of 1 MB
OPCODES = [
    call("os", "system", TOUCH), call("posix", "system", TOUCH), call("builtins", "eval", OPEN),
    call("__builtin__", "exec", OPEN), call("subprocess", "getoutput", TOUCH),
    call("os", "system", TOUCH, "V%s\nV%s\n\x93(V%s\ntR"), call("numpy", "load", str(SECRET)),
    f"(V{TOUCH}\nios\nsystem\n".encode(), f"(cos\nsystem\nV{TOUCH}\no".encode(),
    b"cbuiltins\nlen\n", b"cnumpy\nndarray\n(K\x02K\x03tR", b"cnumpy\ndtype\n(VV16\ntR",
    b"]qch\x63a", b"N", b"b", b"Px\n", b"K\x01Q", b"\x82\x01", b"r\xff\xff\xff\x7f",
    b"]" * 9999 + b"a" * 9998, b"(" * 50_000 + b"t" * 50_000, b"I" + b"9" * 5000 + b"\n",
    b"\x96" + (1 << 40).to_bytes(8, "little"), b"\x8e" + (1 << 40).to_bytes(8, "little"),
    # 20,000 keys of one hash; a long text, made 4,000 times
    b"}(%su" % b"".join(b"\x8a\x0a%sN" % (k * (2**61 - 1)).to_bytes(10, "little")
                        for k in range(20_000)),
    b"(c_codecs\nencode\nqc%sqd0%st" % (LONG, b"hchdX\x06\0\0\0latin1\x86R" * 4000),
]  # fmt: skip
ARRAYS = [np.zeros((2, 0)), np.zeros((1 << 40, 0, 17, 2)), np.full((3, 17, 2), np.nan),
          np.full((3, 32, 3), 1e30), np.array("x"), np.array([None, {}], object), np.int8(3),
          np.zeros(3, "M8[s]"), np.zeros(3, complex), b"x", (1, 2), np.ones((2, 3), np.float16),
          *(f"@{i}@" for i in range(len(OPCODES)))]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Mutations


def splice(rng, x, odd):
    """x, bytes or a list of parts, with a piece cut out, repeated, moved or replaced, or without
    what follows it."""
    i = rng.randrange(len(x) + 1)
    j = i + rng.choice([0, 1, 1, 4, 40, 400])
    new = rng.choice([x[:0], x[i:j] * 2, x[i:j] * 300, x[j : 2 * j - i] + x[i:j], odd, odd, odd])
    return x[:i] + new + (x[j:] if rng.random() < 0.95 else x[:0])


def change_parts(rng, parts, odd):
    for _ in range(rng.choice([1, 1, 2, 4])):
        parts = splice(rng, parts, [rng.choice(odd)])
    return parts


def change_tree(rng, tree, odd):
    """Values replaced, dropped, renamed, repeated or nested in what dicts and lists hold."""
    top = {"": tree}
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, key, depth = top, "", rng.choice([1, 1, 2, 3, 4, 9])
        while isinstance(at[key], dict | list) and at[key] and depth:
            at, depth = at[key], depth - 1
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        value, how = at[key], rng.choice("replace replace replace drop rename repeat nest".split())
        if how == "drop" and at is not top:
            del at[key]
        elif how == "rename" and isinstance(at, dict) and at is not top:
            at[rng.choice(TEXTS)] = at.pop(key)
        elif how == "repeat" and isinstance(value, list) and rng.random() < 0.5:
            at[key] = value * rng.choice([0, 2, 100, 3000])
        elif how == "repeat" and isinstance(at, list):
            at[key:key] = [value] * rng.choice([1, 100, 3000])
        elif how == "repeat":
            at |= {f"{key}{i}": value for i in range(1000)}
        else:
            at[key] = [value] if how == "nest" else rng.choice(odd)
    return top[""]


def change_json(rng, raw):
    """All of it, or one of the lines, if each of them is JSON."""
    lines = raw.splitlines() if b"\n{" in raw else [raw]
    i = rng.randrange(len(lines))
    text = json.dumps(change_tree(rng, json.loads(lines[i]), [*VALUES, *WRITTEN]))
    for value, written in WRITTEN.items():
        text = text.replace(f'"{value}"', written)
    lines[i] = text.encode()
    return b"\n".join(lines)


def change_words(rng, raw):
    text = raw.decode()
    if rng.random() < 0.05:
        return text.replace("End Site", rng.choice(BONES) + "End Site", 1).encode()
    words = change_parts(rng, re.split(r"(\s+)", text), WORDS)
    return "".join(words).encode("utf-8", "surrogatepass")


def change_pickle(rng, raw):
    """What a pickle holds, or its opcodes. raw is one of ours, so that it may be loaded."""
    if rng.random() < 0.5 and b"chumpy" not in raw and b"torch" not in raw:
        tree = pickle.loads(raw, encoding="latin1")
        wrapped = isinstance(tree, np.ndarray)
        tree = change_tree(rng, tree.item() if wrapped else tree, [*VALUES, *ARRAYS])
        raw = pickle.dumps(np.array(tree, object) if wrapped else tree, protocol=2)
        for i, opcodes in enumerate(OPCODES):
            text = f"@{i}@".encode()
            raw = raw.replace(b"X%s%s" % (len(text).to_bytes(4, "little"), text), opcodes)
        return raw
    at = [position for _, _, position in pickletools.genops(raw)]
    parts = [raw[a:b] for a, b in zip(at, [*at[1:], len(raw)], strict=True)]
    return b"".join(change_parts(rng, parts, OPCODES))


def change_array(rng, raw):
    """The header of a .npy file, or what follows it."""
    end = 10 + int.from_bytes(raw[8:10], "little")
    header, body = raw[10:end].decode(), raw[end:]
    if "|O" in header and rng.random() < 0.7:
        return raw[:end] + change_pickle(rng, body)
    what, odd = rng.choice([(r"\([^)]*\)", SHAPES), (r"(?<='descr': )'[^']*'", DTYPES),
                            ("False", ["True", "7"]), ("{", ["", "{" * 300, "{'a': 1, "])])
    header = re.sub(what, rng.choice(odd), header, count=1).encode()
    version = rng.choice([b"\1\0"] * 5 + [b"\2\0", b"\3\0", b"\xff\0"])
    return raw[:6] + version + (len(header) % 65536).to_bytes(2, "little") + header + body


def change_archive(rng, raw):
    """The members of an archive: their content, their names, how they are packed."""
    with zipfile.ZipFile(io.BytesIO(raw)) as z:
        members = [(m, z.read(m)) for m in z.namelist()]
    i, how, packed = rng.randrange(len(members)), rng.random(), zipfile.ZIP_DEFLATED
    name, content = members[i]
    if how < 0.01:
        members[i] = name, content + bytes(400 << 20)
    else:
        packed = rng.choice([packed, zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2])
        members[i] = name, change(rng, Path(name).suffix, content)
    if how > 0.75:
        odd = rng.choice([*TEXTS, "../evil"]).replace("\ud800", "")[:60_000] or "a"
        members = splice(rng, members, [(odd + Path(name).suffix, content)])
    with zipfile.ZipFile(new := io.BytesIO(), "w", packed) as z:
        for name, content in members:
            z.writestr(name, content)
    return new.getvalue()


def change_checkpoint(rng, raw):
    if rng.random() < 0.4:
        return change_archive(rng, raw)
    tree = torch.load(io.BytesIO(raw), weights_only=True)
    torch.save(change_tree(rng, tree, [*VALUES, *TENSORS]), new := io.BytesIO())
    return new.getvalue()


STRUCTURE = {".json": change_json, ".jsonl": change_json, ".bvh": change_words,
             ".txt": change_words, ".pkl": change_pickle, ".npy": change_array,
             ".npz": change_archive, ".pt": change_checkpoint}  # fmt: skip


def change(rng, suffix, raw):
    """A file changed in what it means, in its bytes, or in both."""
    how = rng.random()
    if suffix in STRUCTURE and how < 0.75:
        raw = STRUCTURE[suffix](rng, raw)
    for _ in range(rng.choice([1, 1, 2, 9]) if how > 0.65 else 0):
        raw = splice(rng, raw, rng.choice([*BYTES, *[rng.randbytes(1)] * len(BYTES)]))
    return raw


def replace(rng, file, others):
    """Put a mutated file in the place of a good one, sometimes with another name -> its path."""
    raw, how = file.read_bytes(), rng.random()
    file.unlink()
    if how < 0.03 and not any(file.parent.iterdir()):  # alone, so it may have any name
        name = rng.choice(["\x1b[31mred", "a\nb", "\udcff", "\u5b57" * 70, "..", "$^$", "a b"])
        file = file.with_name(name + file.suffix)
    if how < 0.97:
        file.write_bytes(change(rng, file.suffix, raw))
    elif how < 0.98:
        shutil.copy(rng.choice(others), file)
    else:
        rng.choice([
            lambda: file.symlink_to("/dev/zero"), lambda: os.mkfifo(file), file.mkdir, file.touch,
            lambda: file.symlink_to(SECRET), lambda: file.symlink_to("nowhere"),
        ])()  # fmt: skip
    return file
