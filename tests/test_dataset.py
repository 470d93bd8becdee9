"""sources/dataset.py: writing a data set, reading it, and its splits as tensors."""

import json
import math
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import TINY_SIZES

from hipart import detected_pelvis, from_model_frame
from sources import dataset
from sources.dataset import (
    ARRAYS,
    Split,
    append_samples,
    check_folder,
    create_split,
    draw_samples,
    in_model_frame,
    load,
    new_data_set,
)
from sources.detector import NOISE

# --------------------------------------------------------------------------------------------------
# Writing


def test_another_preparation_is_named_and_a_failed_one_gives_back(tmp_path, monkeypatch, capsys):
    (tmp_path / ".set.abcd1234/new").mkdir(parents=True)  # of one that was killed, or still runs
    (tmp_path / ".set.abc").mkdir()  # something else
    (tmp_path / "set").mkdir()
    (tmp_path / "set/meta.json").write_text("earlier")
    replace = os.replace

    def fail(a, b):
        if str(b) == str(tmp_path / "set") and "new" in str(a):
            raise OSError("no space")
        replace(a, b)

    monkeypatch.setattr(dataset.os, "replace", fail)
    with (
        pytest.raises(OSError, match="no space"),
        new_data_set(tmp_path / "set", overwrite=True) as folder,
    ):
        (folder / "meta.json").write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".set.abc", ".set.abcd1234", "set"]
    assert capsys.readouterr().out.count("belongs to another preparation") == 1
    assert (tmp_path / "set/meta.json").read_text() == "earlier"


def test_samples_are_appended_in_order_and_what_lacks_is_zero(tmp_path):
    y = np.arange(5 * 51, dtype=np.float64).reshape(5, 17, 3)
    create_split(tmp_path / "train", 5)
    append_samples(tmp_path / "train", {"y": y[:3], "camera": 2})
    append_samples(tmp_path / "train", {"y": y[3:], "camera": np.array([0, 1])})
    arrays = {name: np.load(tmp_path / "train" / f"{name}.npy") for name in ARRAYS}
    for name, (shape, dtype) in ARRAYS.items():
        assert arrays[name].shape == (5, *shape) and arrays[name].dtype == dtype
    assert np.array_equal(arrays.pop("y"), y) and arrays.pop("camera").tolist() == [2, 2, 2, 0, 1]
    assert not any(a.any() for a in arrays.values())


# --------------------------------------------------------------------------------------------------
# A user's folder


def test_folders_are_searched_through_links_and_loops(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.txt").write_text("")
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("")
    (tmp_path / "in/sub/other.bin").write_text("")
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/sub/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in/a\n\udcff.bin").write_text("")  # a name that no terminal can show
    os.mkfifo(tmp_path / "in/pipe.txt")
    wanted = {"text": ("a text", True), "more": ("more of it", False)}
    found = check_folder(tmp_path / "in", lambda p: "text" if p.suffix == ".txt" else None, wanted)
    assert [p.name for p in found["text"]] == ["a.txt", "b.txt"] and found["more"] == []
    out = capsys.readouterr().out
    for line in ("text: a.txt, link/b.txt", "more: none (not needed); more of it",
                 r"not used: a\n\udcff.bin, sub/other.bin"):
        assert line in out
    with pytest.raises(ValueError, match="in lacks music [(]a tune[)]"):
        check_folder(tmp_path / "in", lambda p: None, {"music": ("a tune", True)})
    with pytest.raises(ValueError, match="nowhere is not there"):
        check_folder(tmp_path / "nowhere", lambda p: None, {})


# --------------------------------------------------------------------------------------------------
# load


def damage_version(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))


def damage_json(folder):
    (folder / "meta.json").write_text("{")


def truncate(size):
    return lambda folder: os.truncate(folder / "test" / "y.npy", size)


def replace_y(change):
    def damage(folder):
        path = folder / "test" / "y.npy"
        np.save(path, change(np.load(path)), allow_pickle=True)

    return damage


def set_nan(y):
    y[5, 3, 1] = np.nan
    return y


@pytest.mark.parametrize("damage, error, message", [
    (shutil.rmtree, FileNotFoundError, "No data set in .*prepare_data.py --name tiny"),
    (lambda f: (f / "test" / "x_f.npy").unlink(), FileNotFoundError,
     "x_f.npy is missing: make it again"),
    (damage_version, ValueError, "format version 99, expected 3"),
    (damage_json, ValueError, "meta.json is not a JSON file that can be read"),
    (truncate(2000), ValueError, "cannot be read, it is truncated"),
    (truncate(0), ValueError, "cannot be read, it is truncated"),
    (replace_y(lambda y: y[:, :16]), ValueError,
     r"float32 \(32, 16, 3\), expected float32 \(32, 17, 3\)"),
    (replace_y(lambda y: y[:31]), ValueError, r"float32 \(31, 17, 3\), expected"),
    (replace_y(lambda y: y.astype(np.float64)), ValueError, "float64 .*, expected float32"),
    (replace_y(set_nan), ValueError, "y.npy holds values that are NaN, infinite or above 10000000"),
    (replace_y(lambda y: y * 0 - 1e30), ValueError, "y.npy holds values that are NaN, infinite"),
    (replace_y(lambda y: y.astype(object)), ValueError, "holds object .*, expected float32"),
])  # fmt: skip
def test_load_refuses_in_one_sentence(tiny_data, tmp_path, damage, error, message):
    shutil.copytree(tiny_data / "tiny", tmp_path / "tiny")
    damage(tmp_path / "tiny")
    with pytest.raises(error, match=message) as caught:
        load(tmp_path / "tiny", "test")
    assert "\n" not in str(caught.value)
    assert f"prepare_data.py --name tiny --out {tmp_path}" in str(caught.value)


def change_meta(**change):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | change))

    return damage


def without(key):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        del meta[key]
        (folder / "meta.json").write_text(json.dumps(meta))

    return damage


def write_meta(text):
    return lambda folder: (folder / "meta.json").write_text(text)


SPLIT, NAN = dict(n=32), float("nan")


@pytest.mark.parametrize("damage, message", [
    *[(write_meta(text), "has format version None, expected 3")
      for text in ("[]", "3", '"text"', "null", "{}")],
    (write_meta("[" * 10**6), "not a JSON file that can be read: "),
    (write_meta("[" + "[]," * 20_000_000 + "[]]"), "not a JSON file that can be read: it "),
    (write_meta("\x1b[31mred\n"), "not a JSON file that can be read: "),
    (change_meta(format_version=[1]), "has format version list, expected 3"),
    (change_meta(format_version="\x1b[31m" + "x" * 10**6), r"version .x1b.31mx+\.\.\., expected 3"),
    *[(without(key), f"expected `{key}` of meta.json")
      for key in ("source", "actions", "image_size", "noise", "splits")],
    (change_meta(source="\x1b[31m; rm -r ~"), "expected `source` of meta.json to be one of demo"),
    (change_meta(source=["demo"]), "expected `source`"),
    (change_meta(actions="walk"), "expected `actions`"), (change_meta(actions=[1]), "`actions`"),
    (change_meta(actions=["walk"]), "action.npy holds actions that meta.json does not name"),
    (change_meta(image_size=[1000]), "`image_size`"), (change_meta(image_size=5), "`image_size`"),
    (change_meta(image_size=[0, 5]), "`image_size`"),
    (change_meta(image_size=[10**4000, 5]), "`image_size`"),
    (change_meta(image_size=[1000, "1000"]), "`image_size`"), (change_meta(noise={}), "`noise`"),
    (change_meta(noise=NOISE | dict(sigma=NAN)), "`noise`"),
    (change_meta(noise=NOISE | dict(conf=[])), "`noise`"),
    (change_meta(noise=NOISE | dict(box_half_size=[0.24, 0.1])), "`noise`"),
    (change_meta(noise=NOISE | dict(sigma_scale=[1] * 16)), "`noise`"),
    (change_meta(joints_14=[17]), "`joints_14`"), (change_meta(joints_14=3), "`joints_14`"),
    (change_meta(splits=["test"]), "`splits`"), (change_meta(splits=dict(test=32)), "`splits`"),
    (change_meta(splits={"test": SPLIT, "../../x": SPLIT}), "`splits`"),
    (change_meta(splits=dict(test=SPLIT, train=SPLIT)), "`splits`"),
    (change_meta(splits={str(i): SPLIT for i in range(21)}), "`splits`"),
    (change_meta(splits=dict(test={})), "`splits.test.n`"),
    *[(change_meta(splits=dict(test=dict(n=n))), "`splits.test.n`")
      for n in (0, -1, 1 << 64, "32")],
    (change_meta(splits=dict(test=SPLIT | dict(about=3))), "`splits.test`"),
    (change_meta(source="h36m"), "`sources` of meta.json.*--source h36m --folder DIR"),
    (change_meta(source="h36m", sources={"2D joints": "gt"}), "`splits.train`"),
], ids=str)  # fmt: skip
def test_any_meta_json_is_refused_in_one_sentence(tiny_data, tmp_path, damage, message):
    shutil.copytree(tiny_data / "tiny", tmp_path / "tiny")
    damage(tmp_path / "tiny")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "tiny", "test")
    assert str(caught.value).isprintable() and "red" not in str(caught.value)
    assert "make it again with `python prepare_data.py" in str(caught.value)


def header(shape, dtype="<f4"):
    """The start of a .npy file, whatever it promises."""

    def damage(folder):
        raw = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        raw = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(raw)) + raw
        (folder / "test/y.npy").write_bytes(raw + bytes(1000))

    return damage


def put(raw):
    return lambda folder: (folder / "test/y.npy").write_bytes(raw)


def zipped(folder):
    np.savez(folder / "test/y.npz", y=np.zeros((32, 17, 3), np.float32))
    os.replace(folder / "test/y.npz", folder / "test/y.npy")


def linked(folder):
    (folder / "test/y.npy").unlink()
    (folder / "test/y.npy").symlink_to("/dev/zero")


@pytest.mark.parametrize("damage, message", [
    (header((32, 17, 3)), "y.npy cannot be read, it is truncated"),
    (header((-32, 17, 3)), "y.npy cannot be read"),
    (header(((1 << 64) + 32, 17, 3)), "y.npy cannot be read"),
    (header((1 << 40, 0, 3)), "y.npy cannot be read"),
    (header("(" * 5000), "y.npy cannot be read"), (header((32, 17, 3), "|O"), "holds object"),
    (header((32, 17, 3), ">f4"), "holds >f4"),
    (header(tuple(range(1, 31))), r"holds float32 .1, 2.*\.\.\., expected"),
    (zipped, "y.npy cannot be read"), (linked, "y.npy is missing"),
    (put(b"\x1b[31mred"), "y.npy cannot be read"),
    (put(b"\x93NUMPY\x01\x00\x08\x00print(1)"), "y.npy cannot be read"),
], ids=range(12))  # fmt: skip
def test_any_array_is_refused_in_one_sentence(tiny_data, tmp_path, damage, message):
    shutil.copytree(tiny_data / "tiny", tmp_path / "tiny")
    damage(tmp_path / "tiny")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(tmp_path / "tiny", "test")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert "make it again with `python prepare_data.py" in str(caught.value)


def test_names_of_meta_json_fit_on_one_line(tiny_data, tmp_path):
    shutil.copytree(tiny_data / "tiny", tmp_path / "tiny")
    meta = load(tiny_data / "tiny", "test")[1]
    odd = ["\x1b[31m\n", "x" * 10**6, *meta["actions"][2:]]
    splits = meta["splits"] | dict(test=dict(n=32, about="\x07" + "y" * 2000))
    change_meta(actions=odd, splits=splits)(tmp_path / "tiny")
    meta = load(tmp_path / "tiny", "test")[1]
    assert meta["actions"][:2] == ["\\x1b[31m\\n", "x" * 97 + "..."]
    assert meta["splits"]["test"]["about"] == "\\x07" + "y" * 993 + "..."


def test_a_picture_shows_any_name(tiny_data, tmp_path):
    arrays, meta = load(tiny_data / "tiny", "test")
    draw_samples(tmp_path / "a.png", arrays, meta | dict(actions=["$^$"] * len(meta["actions"])))
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_file_that_is_cut_short_while_it_is_read(tiny_data, tmp_path):
    """Beyond the end of a mapped file, the system would end the process."""
    shutil.copytree(tiny_data / "tiny", tmp_path / "tiny")
    s = split(tmp_path / "tiny", "val")
    before = s.read(slice(0, 32))
    shutil.rmtree(tmp_path / "tiny/val")  # what is deleted or replaced as a whole stays readable
    assert torch.equal(s.read(slice(0, 32))["y"], before["y"])
    s = split(tmp_path / "tiny", "test")
    os.truncate(tmp_path / "tiny/test/x_f.npy", 5000)
    with pytest.raises(ValueError, match="x_f.npy cannot be read, it is truncated"):
        s.read(slice(0, 32))


def test_load_names_the_source_that_makes_the_set_again(tiny_data, tmp_path):
    shutil.copytree(tiny_data / "tiny", tmp_path / "tiny")
    meta = json.loads((tmp_path / "tiny/meta.json").read_text())
    meta |= {"source": "h36m", "format_version": 1}  # of before has_mesh had its name
    (tmp_path / "tiny/meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="format version 1, expected 3: .*--source h36m --folder"):
        load(tmp_path / "tiny", "test")


def test_load_refuses_an_unknown_split(tiny_data):
    with pytest.raises(ValueError, match="no split 'dev', only train, val, test, unseen"):
        load(tiny_data / "tiny", "dev")


# --------------------------------------------------------------------------------------------------
# Split


@pytest.fixture
def data(tiny_data):
    return f"{tiny_data}/tiny"


def split(data, name="train", limit=0, has_mesh=False):
    return Split(data, name, torch.device("cpu"), limit, has_mesh)


def raw(data, name, key):
    return np.load(f"{data}/{name}/{key}.npy", allow_pickle=False)


def normalised(px, size=(1000, 1000)):
    return px / size[0] * 2 - np.array([1, size[1] / size[0]])


def test_read_gives_the_stored_draw_a_fresh_one_or_the_clean_pose(data):
    val = split(data, "val")
    stored, clean = val.read(slice(0, 32)), val.read(slice(0, 32), clean=True)
    conf = raw(data, "val", "conf")
    expected = normalised(raw(data, "val", "x_s_det")) * (conf > 0)[..., None]
    np.testing.assert_allclose(stored["x_s"].numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(stored["conf"].numpy(), conf)
    expected = normalised(raw(data, "val", "x_s"))
    np.testing.assert_allclose(clean["x_s"].numpy(), expected, atol=1e-5)
    assert bool((clean["conf"] == 1).all())
    for key in ("x_d", "x_f"):
        expected = normalised(raw(data, "val", key))
        np.testing.assert_allclose(stored[key].numpy(), expected, atol=1e-5)
    for key in ("y", "action"):
        np.testing.assert_array_equal(stored[key].numpy(), raw(data, "val", key))
    fresh = [val.read(slice(0, 32), np.random.default_rng(seed)) for seed in (0, 0, 1)]
    for key in ("x_s", "conf"):
        assert torch.equal(fresh[0][key], fresh[1][key])
    assert not torch.equal(fresh[0]["x_s"], fresh[2]["x_s"])
    assert not torch.equal(fresh[0]["x_s"], stored["x_s"])
    for b in (stored, clean, *fresh):
        assert bool((b["x_s"][b["conf"] == 0] == 0).all())
    rows = np.array([3, 7, 31])
    np.testing.assert_array_equal(val.read(rows)["y"].numpy(), raw(data, "val", "y")[rows])


def test_the_third_level_is_read_if_asked_for(data, tmp_path):
    val = Split(data, "val", torch.device("cpu"), limit=8, third_level=True)
    assert "x_192" not in split(data, "val").read(slice(0, 8))
    expected = normalised(raw(data, "val", "x_192"))[np.arange(8) * 4]
    np.testing.assert_allclose(val.read(slice(0, 8))["x_192"].numpy(), expected, atol=1e-5)
    shutil.copytree(data, tmp_path / "tiny")
    (tmp_path / "tiny/val/x_192.npy").unlink()
    split(tmp_path / "tiny", "val")
    with pytest.raises(FileNotFoundError, match="x_192.npy is missing: make it again"):
        Split(tmp_path / "tiny", "val", torch.device("cpu"), third_level=True)


def test_reading_leaves_the_stored_arrays_alone(data):
    val, before = split(data, "val"), raw(data, "val", "y").copy()
    val.read(slice(0, 32))["y"].add_(1)
    np.testing.assert_array_equal(raw(data, "val", "y"), before)
    np.testing.assert_array_equal(val.read(slice(0, 32))["y"].numpy(), before)


def test_blocks_are_all_samples_in_order(data):
    blocks = list(split(data, "val").blocks(size=10))
    assert [len(b["y"]) for b in blocks] == [10, 10, 10, 2]
    together = torch.cat([b["y"] for b in blocks]).numpy()
    np.testing.assert_array_equal(together, raw(data, "val", "y"))


def row_of(data, y):
    """Which stored training sample each y [n, 17, 3] is."""
    keys = {row.tobytes(): i for i, row in enumerate(raw(data, "train", "y"))}
    assert len(keys) == TINY_SIZES["train"] == 64
    return [keys[row.tobytes()] for row in y.numpy()]


@pytest.mark.parametrize("block, size, limit", [
    (8192, 16, 0), (8192, 24, 0), (20, 8, 0), (16, 16, 0), (8192, 16, 37), (8192, 100, 0),
    (32, 7, 50),
])  # fmt: skip
def test_an_epoch_has_every_sample_at_most_once(data, monkeypatch, block, size, limit):
    monkeypatch.setattr(dataset, "BLOCK", block)
    s = split(data, "train", limit)
    assert s.n == (limit or 64)
    torch.manual_seed(0)
    batches = list(s.batches(size, np.random.default_rng(0)))
    assert len(batches) == s.steps(size)
    seen = [row_of(data, b["y"]) for b in batches]
    flat = sum(seen, [])
    used = np.arange(s.n) * 64 // s.n
    assert len(flat) == len(set(flat)) and set(flat) <= set(used.tolist())
    assert np.array_equal(s.rows, used)
    # No more is left over than a batch a block.
    assert len(flat) > s.n - size * math.ceil(s.n / block)
    assert flat != sorted(flat)  # shuffled
    shapes = dict(x_s=(17, 2), conf=(17,), x_d=(48, 2), x_f=(96, 2), y=(17, 3), action=(),
                  height_px=(), has_mesh=(), begins=())  # fmt: skip
    for b, rows in zip(batches, seen, strict=True):
        expected = normalised(raw(data, "train", "x_f")[rows])
        np.testing.assert_allclose(b["x_f"].numpy(), expected, atol=1e-5)
        assert {k: tuple(v.shape[1:]) for k, v in b.items()} == shapes


@pytest.mark.parametrize("block, size", [(20, 8), (21, 16), (63, 16)])
def test_batches_are_full(data, monkeypatch, block, size):
    """A block's remainder must not become a small batch with as much say as a full one."""
    monkeypatch.setattr(dataset, "BLOCK", block)
    sizes = [len(b["y"]) for b in split(data).batches(size, np.random.default_rng(0))]
    assert set(sizes) == {size}


def test_fewer_samples_than_a_batch_are_one_batch(data):
    batches = split(data, limit=5).batches(16, np.random.default_rng(0))
    assert [len(b["y"]) for b in batches] == [5]


@pytest.mark.parametrize("block, size, passes", [(20, 8, 3), (64, 16, 2), (30, 40, 4)])
def test_passes_use_what_was_prepared_again(data, monkeypatch, block, size, passes):
    """Each pass over a block has its samples in another order, and as `vary` makes them."""
    monkeypatch.setattr(dataset, "BLOCK", block)
    s, prepared, varied = split(data), [], []

    def prepare(block):
        prepared.append(block)
        return block

    def vary(block):
        varied.append(block)
        return block | dict(copy=torch.full((len(block["y"]),), len(varied)))

    batches = list(s.batches(size, np.random.default_rng(0), prepare=prepare, vary=vary,
                             passes=passes))
    assert len(batches) == passes * s.steps(size)
    assert [id(b) for b in varied] == [id(b) for b in prepared for _ in range(passes)]
    copies = [b["copy"].unique().tolist() for b in batches]
    assert sorted(sum(copies, [])) == sum(copies, [])  # one pass after another
    seen = {}
    for (copy,), b in zip(copies, batches, strict=True):
        seen.setdefault(copy, []).extend(row_of(data, b["y"]))
    assert len(seen) == len(varied) and all(len(set(v)) == len(v) for v in seen.values())
    assert seen[1] != seen[2]
    of_block = set(row_of(data, prepared[0]["y"]))
    assert all(set(seen[copy]) <= of_block for copy in range(1, passes + 1))


def test_batches_depend_on_the_seeds_alone(data):
    def epoch(order_seed, noise_seed):
        torch.manual_seed(order_seed)
        return list(split(data).batches(16, np.random.default_rng(noise_seed)))

    base = epoch(0, 0)
    for a, b in zip(base, epoch(0, 0), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    other_order, other_noise = epoch(1, 0), epoch(0, 1)
    assert not torch.equal(base[0]["y"], other_order[0]["y"])
    assert torch.equal(base[0]["y"], other_noise[0]["y"])
    assert not torch.equal(base[0]["x_s"], other_noise[0]["x_s"])


def test_a_trailing_slash_in_data_is_no_other_data_set(data):
    assert split(data + "/").n == 64


def test_only_samples_with_a_mesh_are_chosen(data, tmp_path):
    """Where has_mesh is stored, it decides; a limit counts the samples that are left."""
    shutil.copytree(data, tmp_path / "some")
    has_mesh = np.arange(64) % 3 == 0
    np.save(tmp_path / "some/train/has_mesh.npy", has_mesh)
    meta = json.loads((tmp_path / "some/meta.json").read_text())
    meta["splits"]["train"]["with_mesh"] = 22
    (tmp_path / "some/meta.json").write_text(json.dumps(meta))
    whole = split(tmp_path / "some")
    assert whole.n == 64
    block = whole.read(slice(0, 64), np.random.default_rng(0))
    assert np.array_equal(block["has_mesh"].numpy(), has_mesh)
    some = split(tmp_path / "some", has_mesh=True)
    assert np.array_equal(some.rows, np.flatnonzero(has_mesh)) and some.n == 22
    assert np.array_equal(whole.with_mesh().rows, some.rows)
    few = split(tmp_path / "some", limit=5, has_mesh=True)
    assert few.n == 5 and has_mesh[few.rows].all()
    assert split(data).with_mesh().n == 64  # where it is not stored, every sample has one
    assert bool(split(data, "val").read(slice(0, 5))["has_mesh"].all())


def test_in_model_frame_moves_the_three_poses_and_nothing_else(data):
    block = split(data, "val").read(slice(0, 32))
    moved, pelvis = in_model_frame(block), detected_pelvis(block["x_s"], block["conf"])
    assert moved.keys() == block.keys()
    for k in block:
        if k in ("x_s", "x_d", "x_f"):
            assert torch.allclose(from_model_frame(moved[k], pelvis), block[k], atol=1e-6)
            assert not torch.equal(moved[k], block[k])
        else:
            assert moved[k] is block[k]
