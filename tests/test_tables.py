"""tables.py: averages of made-up rows, and tables of made-up summaries."""

import re

import numpy as np
import pytest

import tables
from hipart import Config
from tables import number, ratio, report, short_table, summarize, table
from train import INPUTS

# How many times the error of the short (a) each input has.
FACTORS = dict(zip(INPUTS, (1.0, 0.5, 0.8, 0.4, 0.9, 0.5, 0.2), strict=True))
# Seconds and samples of all trainings
ABOUT = {name: dict(seconds=float(i), samples=1000 * i) for i, name in enumerate((
    "stage1", "stage2", "regressor", *(f"stage3_{name}_0" for name in INPUTS)), 1)}


def test_summarize_tells_the_mean_of_actions_from_the_mean_of_frames():
    rows = dict(error=np.array([1.0, 1, 1, 5, 9]), action=np.array([0.0, 0, 0, 2, -1]),
                occluded=np.array([1.0, 0, 0, 0, 1]))  # fmt: skip
    s = summarize(rows, ["jump", "kick", "walk"])["error"]
    assert s["per_action"] == {"unknown": 9, "jump": 1, "walk": 5}  # no kick, no line for it
    assert s["actions"] == 5 and s["frames"] == pytest.approx(17 / 5)
    assert s["occluded"] == 5 and s["clear"] == pytest.approx(7 / 3)


def test_summarize_never_makes_up_a_number():
    rows = dict(error=np.array([np.nan, 2, np.nan]), action=np.array([0.0, 1, 0]),
                occluded=np.array([1.0, 0, 1]))  # fmt: skip
    s = summarize(rows, ["jump", "kick"])["error"]
    assert s == dict(actions=2, frames=2, occluded=None, clear=2,
                     per_action={"jump": None, "kick": 2})  # fmt: skip


def test_number():
    assert number([3.14159]) == "3.1" and number([3.14159], 3) == "3.142"
    assert number([1.0, 3.0]) == "2.0 ± 1.4"
    assert number([]) == number([None]) == "-"


def test_table_is_aligned_markdown():
    text = table(["name", "x"], [["a", "1.0"], ["longer", "-"]])
    assert text == "| name   |   x |\n| ------ | --: |\n| a      | 1.0 |\n| longer |   - |"


def made_up(with_mesh=(True, True, True, False), a=100.0):
    """The summary of a split of four samples in which (a) is `a` mm off wherever there is true
    dense and fine, and twice as much elsewhere."""
    known = np.array(with_mesh)
    rows = dict(action=np.array([0.0, 0, 1, 1]), occluded=np.array([1.0, 0, 0, 0]),
                alignment=np.full(4, 0.5))  # fmt: skip
    for name, factor in FACTORS.items():
        error = np.where(known, a, 2 * a) * factor
        if name.startswith("ground_truth"):
            error = np.where(known, error, np.nan)
        if name.startswith("sparse"):
            rows[f"mpjpe_with_mesh/{name}/0"] = np.where(known, error, np.nan)
        rows |= {f"mpjpe/{name}/0": error, f"pa_mpjpe/{name}/0": error / 2}
        for label in (name, f"{name} interpolated"):
            rows |= {f"visible/{label}/0": error, f"missing/{label}/0": error}
    for kind in ("detected", "clean"):
        for source in tables.SOURCES:
            rows |= {f"px/{kind}/{source}": np.full(4, 7.0), f"percent/{kind}/{source}": np.ones(4)}
        rows |= {f"accuracy_{level}/{kind}": np.full(4, 50.0) for level in "sd"}
    return summarize(rows, ["jump", "walk"])


def test_ratios_are_over_the_same_samples():
    s = made_up()
    assert s["mpjpe/sparse/0"]["actions"] == pytest.approx(125)  # one sample of 4 is 200 off
    assert ratio(s, "sparse_long", 1) == "1.00" and ratio(s, "generated", 1) == "1.60"
    assert ratio(s, "sparse", 1) == "2.00" and ratio(s, "generated", 1, "sparse") == "0.80"
    assert ratio(s, "ground_truth", 1, "sparse") == "0.40"  # not 40 / 125
    assert ratio(s, "sparse_clean", 1) == "1.00" and ratio(s, "ground_truth_clean", 1) == "0.40"
    nowhere = made_up(with_mesh=[False] * 4)
    assert ratio(nowhere, "ground_truth", 1) == "-" and ratio(nowhere, "generated", 1) == "1.60"


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_short_table_has_seven_rows_and_three_numbers_for_every_split():
    lines = cells(short_table(dict(test=made_up(), occ=made_up(a=10)), 1, ABOUT))
    assert lines[0][1:] == ["test: MPJPE", "PA-MPJPE", "ratio", "occ: MPJPE", "PA-MPJPE", "ratio",
                            "training, s", "samples"]  # fmt: skip
    assert [line[0] for line in lines[2:]] == list(INPUTS.values()) and len(lines) == 2 + 7
    assert lines[4][1:] == ["100.0", "50.0", "1.60", "10.0", "5.0", "1.60",
                            str(1 + 2 + 6), "2,000 + 6,000"]  # fmt: skip
    assert lines[5][1:4] == ["40.0", "20.0", "0.80"] and lines[5][-2:] == ["7", "7,000"]


def test_what_every_input_costs():
    seeds = ABOUT | {f"stage3_{name}_1": dict(seconds=100.0, samples=0) for name in INPUTS}
    assert tables.costs(ABOUT, "sparse") == dict(lifter=(4, 4000))
    assert tables.costs(seeds, "sparse_long") == dict(lifter=(52.5, 2500))  # and not (a)'s others
    assert tables.costs(ABOUT, "generated") == dict(
        stage1=(1, 1000), densifier=(2, 2000), lifter=(6, 6000))
    assert tables.costs(ABOUT, "regressor") == dict(densifier=(3, 3000), lifter=(8, 8000))
    lines = cells(tables.cost_table(ABOUT))
    assert lines[4][1:] == ["9", "1", "2", "6", "1,000", "2,000", "6,000"]
    assert lines[6][1:] == ["11", "-", "3", "8", "-", "3,000", "8,000"]


META = dict(splits={"val": dict(n=4), "test": dict(n=4, with_mesh=3), "unseen": dict(n=4)})
CODEBOOKS = dict(fine_px=6.5, dense_px=6.0, perplexity_s=30.0, perplexity_d=40.0, dead_s=0.0,
                 dead_d=0.25, action_accuracy=0.5)  # fmt: skip


@pytest.mark.parametrize("stages, headings, first", [
    (1, ["Tokenizer and"], "tokenizer"),
    (2, ["Where the 2D", "2D error of the fine pose on `test`", "2D error of the fine pose on `uns",
         "Tokenizer and"], "px (% of standing height)"),
    (3, ["In short", "Training time", "3D error on `test`", "3D error on `unseen`", "Where the 2D",
         "2D error of the fine pose on `test`", "2D error of the fine pose on `uns",
         "Tokenizer and"], "mm, mean of actions"),
])  # fmt: skip
def test_a_report_has_the_sections_of_its_stages(stages, headings, first):
    summaries = {name: made_up() for name in META["splits"]}
    codebooks = {name: CODEBOOKS for name in META["splits"]}
    shown, text = report("# Title", META, stages, 1, summaries, codebooks, Config(),
                         ABOUT)
    found = re.findall(r"^## (.*)$", text, re.M)
    assert len(found) == len(headings)
    assert all(a.startswith(b) for a, b in zip(found, headings, strict=True))
    assert text.startswith("# Title\n") and shown in text and shown.startswith(f"| {first}")
    if stages == 3:
        assert "new bodies, familiar motion; 3 of 4 samples have true dense and fine" in text
        assert "(unseen motion) Millimetres." in text


def test_the_papers_numbers_are_those_of_the_detector():
    assert tables.paper_mpjpe({}) == tables.PAPER_MPJPE
    for detector, expected in (
            ("data_2d_h36m_gt.npz", dict(sparse="37.6", generated="28.3")),
            ("data_2d_h36m_sh_ft_h36m.npz", dict(generated="49.3")),
            ("data_2d_h36m_cpn_ft_h36m_dbb.npz", tables.PAPER_MPJPE), ("mine.npz", {})):
        meta = dict(source="h36m", sources={"2D joints": detector})
        assert tables.paper_mpjpe(meta) == expected
