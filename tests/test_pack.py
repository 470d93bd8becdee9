"""pack.py: what is packed is the run, and lift.py takes it where there is none."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import person

import lift
import pack
from checkpoints import WEIGHTS, Run
from hipart import Config
from survival import write
from train import Training, load_hipart, load_lifter


def run_at(path, data=Run.data):
    return Run(path, Config(), Training(), torch.device("cpu"), data=str(data))


def check(folder):
    """The numbers of a folder come out of its own weights, to 0.1 px and 0.1 mm."""
    run, samples = run_at(folder), dict(np.load(folder / "samples.npz"))
    expected = json.loads((folder / "numbers.json").read_text())
    found = pack.errors(samples, load_hipart(run), load_lifter(run, "generated"))
    assert found == pytest.approx(expected, abs=0.1)
    return samples, found


@pytest.fixture(scope="module")
def packed(tiny_run, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "weights"
    folder.mkdir()
    (folder / "stage3_sparse_0.pt").write_text("of an earlier run")
    pack.pack(run_at(tiny_run / "runs/tiny", tiny_data / "tiny"), folder)
    assert [p.name for p in folder.parent.iterdir()] == ["weights"]
    assert not (folder / "stage3_sparse_0.pt").exists()
    return folder


def test_a_packed_run_makes_the_numbers_of_the_run(packed, tiny_run):
    samples, found = check(packed)
    assert found["mpjpe_mm"] > 1 and found["fine_px"] > 1
    size = {folder: sum((folder / f"{name}.pt").stat().st_size for name in pack.CHECKPOINTS)
            for folder in (packed, tiny_run / "runs/tiny")}
    assert size[packed] < 0.4 * size[tiny_run / "runs/tiny"]
    # The errors, once more from their definition, in float64.
    run = run_at(packed)
    x_s, conf = torch.from_numpy(samples["x_s"]), torch.from_numpy(samples["conf"])
    x_d, x_f = load_hipart(run).densify(x_s, conf)
    y = load_lifter(run, "generated")(torch.cat([x_s, x_d, x_f], 1), conf)
    off = np.float64(y - torch.from_numpy(samples["y"]))
    assert found["mpjpe_mm"] == pytest.approx(np.linalg.norm(off, axis=-1).mean())
    off = np.float64(x_f - torch.from_numpy(samples["x_f"])) * samples["w"] / 2
    assert found["fine_px"] == pytest.approx(np.linalg.norm(off, axis=-1).mean(), rel=1e-5)


def test_lift_takes_the_packed_models_where_no_run_is(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluate.WEIGHTS", packed)
    people = [person("h36m17").ravel().tolist()]
    write(tmp_path / "one.json", json.dumps(
        [dict(image_id=1, keypoints=people[0], score=1.0)]))
    monkeypatch.setattr("sys.argv", ["lift.py", "one.json", "--layout", "h36m17"])
    lift.main()
    assert "come with the project" in capsys.readouterr().out
    assert (tmp_path / "runs/weights/keypoints/one/poses.npz").exists()
    shutil.copytree(packed, tmp_path / "runs/standard")  # a run of one's own comes first
    lift.main()
    assert "come with the project" not in capsys.readouterr().out
    assert (tmp_path / "runs/standard/keypoints/one/poses.npz").exists()


def test_the_weights_that_come_with_the_project_are_small_and_make_their_numbers():
    _, found = check(WEIGHTS)
    assert found["mpjpe_mm"] < 100 and found["fine_px"] < 12
    assert sum(f.stat().st_size for f in WEIGHTS.iterdir()) <= 8e6
