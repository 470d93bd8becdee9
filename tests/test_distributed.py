"""Two processes train what one trains: gradients, codebooks to the bit, samples, resuming, tables.

ranks.py does it, once for all tests, and says how; here is what must come out.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import RUN_SIZES, write_tiny
from test_train import assert_same

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tiny_data, tmp_path_factory):
    """The folder with all that ranks.py has found."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, HERE / "ranks.py", tiny_data / "tiny", folder],
                          env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def results(found, name, ranks=2):
    """What each process found; all must have ended well."""
    for rank in range(ranks):
        assert said(found, name, rank)[1] == 0, said(found, name, rank)[0]
    return [torch.load(found / f"{name}_{rank}.pt", weights_only=True) for rank in range(ranks)]


def said(found, name, rank=0):
    """The last words of a process, and its exit status."""
    text = (found / f"{name}_{rank}.txt").read_text()
    words, status = re.fullmatch(r"(.*)status (\d+)\n", text, re.S).groups()
    return re.split(r"[\r\n]", words.strip())[-1].strip(), int(status)


def saved(found, run, name):
    return torch.load(found / run / f"runs/tiny/{name}.pt", weights_only=True)


# --------------------------------------------------------------------------------------------------
# One step


@pytest.mark.parametrize("loss", ["msst", "hiarm", "one_pass", "regressor", "mlp", "spatial"])
def test_gradients_of_two_processes_are_those_of_the_whole_batch(found, loss):
    alone = results(found, "gradients_alone", 1)[0][loss]
    for rank in results(found, "gradients"):
        assert rank[loss].keys() == alone.keys() and len(alone) > 5
        for name, gradient in alone.items():
            torch.testing.assert_close(rank[loss][name], gradient, atol=1e-6, rtol=1e-6)


def test_kmeans_sees_the_rows_of_all_processes(found):
    """Each process has four of the eight clusters, and the codes begin as rows of the first one."""
    one, two = results(found, "kmeans")
    assert_same(one, two)
    near = torch.cdist(one["centres"], one["codebook"]).min(1).values
    assert float(near[4:].min()) < 0.1  # a code of the second process's
    mean = (one["codebook"] * one["count"][:, None]).sum(0) / one["count"].sum()
    torch.testing.assert_close(mean, one["centres"].mean(0), atol=0.5, rtol=0)


def test_all_processes_settle_on_one_number_of_epochs_whatever_their_clocks_say(found):
    one, two = results(found, "clocks")
    assert one == two == dict(epochs=10)


def test_all_processes_together_see_each_sample_once(found):
    """As one process does, in as many steps, which each takes half of."""
    alone = results(found, "epoch_alone", 1)[0]
    one, two = results(found, "epoch")
    assert len(one["y"]) == len(two["y"]) == one["steps"] == len(alone["y"]) == 8
    assert {len(y) for y in one["y"] + two["y"]} == {4} and {len(y) for y in alone["y"]} == {8}
    both, whole = ({row.numpy().tobytes() for y in ys for row in y}
                   for ys in (one["y"] + two["y"], alone["y"]))
    assert both == whole and len(whole) == 64


# --------------------------------------------------------------------------------------------------
# Codebooks


def test_codebooks_never_differ_by_a_bit(found):
    """Every update of both codebooks in 64 steps, with restarts of dead codes, and the ten
    iterations of k-means before."""
    one, two = results(found, "sixty")
    assert one == two
    restarts = [n for n, _ in one]
    assert len(one) == 2 * (64 - RUN_SIZES["warmup_free"]) + 2 * 10
    assert sum(restarts[20:]) > 50, "hardly a code has restarted"
    assert len({bits for _, bits in one[20:]}) == len(one) - 20  # and they move


def test_a_single_bit_is_noticed(found):
    for rank in range(2):
        words, status = said(found, "spoiled", rank)
        assert status == 2 and "models of the 2 processes differ" in words
    assert saved(found, "spoiled", "stage1")["epoch"] == 1  # the checkpoint before


# --------------------------------------------------------------------------------------------------
# Runs


NAMES = {1: "stage1", 2: "stage2", 3: "stage3_generated_0"}


def test_a_batch_that_cannot_be_shared_is_refused(found):
    words, status = said(found, "odd_batch")
    assert status == 2 and "2 processes cannot share batches of 7" in words


def test_where_one_process_ends_the_others_say_so(found):
    words, status = said(found, "full_disk", 0)
    assert status == 1 and "No space left on device" in words
    words, status = said(found, "full_disk", 1)
    assert status == 1 and "another process of this run has ended" in words
    assert "Traceback" not in (found / "full_disk_1.txt").read_text()


def test_one_process_writes_the_log(found):
    results(found, "trained")
    rows = [json.loads(line) for line in open(found / "two/runs/tiny/log.jsonl")]
    epochs = [(row["model"], row["epoch"]) for row in rows]
    assert len(epochs) == len(set(epochs)) == 3 + 2 + 2 + 2 * 2 + 5 * 4
    assert "%|" in (found / "trained_0.txt").read_text()  # bars
    assert (found / "trained_1.txt").read_text() == "status 0\n"
    names = {p.name for p in (found / "two/runs/tiny").iterdir()}
    assert not [name for name in names if "tmp" in name]


@pytest.mark.parametrize("stage", NAMES)
def test_ctrl_c_for_one_process_stops_all_and_resume_is_bit_for_bit(found, stage):
    for rank in range(2):
        words, status = said(found, f"cut_{stage}", rank)
        assert status == 130 and "`torchrun --nproc_per_node=2 train.py " in words
    words, status = said(found, f"alone_{stage}")
    assert status == 2 and re.search(
        rf"{NAMES[stage]}.pt is trained by 2 processes, not by 1: .*torchrun --nproc_per_node=2",
        words)
    results(found, f"went_on_{stage}")
    one, other = (saved(found, run, NAMES[stage]) for run in ("two", "cut"))
    assert one.pop("seconds") > 0 and other.pop("seconds") > 0
    assert_same(one, other)


@pytest.mark.parametrize("name", NAMES.values())
def test_each_process_has_a_seed_of_its_own(found, name):
    one, two = saved(found, "two", name)["ranks"]
    assert not torch.equal(one["cpu"], two["cpu"])


def flat(numbers, path=""):
    """{path: number} of nested dictionaries; what is not known is -1."""
    if not isinstance(numbers, dict):
        return {path: -1.0 if numbers is None else numbers}
    return {k: v for key in numbers for k, v in flat(numbers[key], f"{path}/{key}").items()}


def test_two_processes_evaluate_as_one_does(found):
    """31 samples and a last block of one. Where joints are interpolated, some poses are far from
    all that the model knows, and 16 steps carry the rounding of a block's size on."""
    results(found, "evaluation.json")
    results(found, "evaluation.json_alone", 1)
    one, two = (json.loads(path.read_text()) for path in
                (found / "two/runs/tiny/evaluation.json", found / "evaluation.json"))
    one, two = ({**flat(r["splits"]), **flat(r["codebooks"])} for r in (one, two))
    far = {path for path in one if "generated interpolated" in path}
    assert len(one) - len(far) > 1000 and one.keys() == two.keys()
    for path, value in one.items():
        assert two[path] == pytest.approx(value, rel=1e-4 if path in far else 1e-5), path
    assert (found / "evaluation.json_1.txt").read_text() == "status 0\n"


def test_two_processes_hide_joints_as_one_does(found):
    results(found, "occlusion.md")
    results(found, "occlusion.md_alone", 1)
    one, two = (path.read_text() for path in
                (found / "two/runs/tiny/occlusion.md", found / "occlusion.md"))
    assert one == two


def test_torchrun_itself(tmp_path):
    """The real command, from another folder: stage 1, its table and its figures."""
    write_tiny(tmp_path / "data/tiny")
    sizes = [part for k, v in RUN_SIZES.items() for part in (f"--{k}", str(v))]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         HERE.parent / "train.py", "--preset", "paper", "--name", "tiny", "--data", "data/tiny",
         "--device", "cpu", "--stage", "1", *sizes],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "preset paper on 2 x cpu" in done.stdout and "reconstruction error" in done.stdout
    assert len(torch.load(tmp_path / "runs/tiny/stage1.pt", weights_only=True)["ranks"]) == 2
