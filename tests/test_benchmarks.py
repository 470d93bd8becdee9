"""The benchmarks that ask for no quiet machine run from end to end, with tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path, name, *options):
    """What a benchmark prints, and what it writes."""
    command = [sys.executable, ROOT / f"benchmarks/{name}.py", "--results", tmp_path, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {"device", "threads", "torch", "commit", "date"} <= report["machine"].keys()
    return done.stdout, report


def test_generate(tmp_path):
    printed, report = run(tmp_path, "generate", "--preset", "standard", "--batch", "1", "2",
                          "--seconds", "0")
    for rows in report["sizes"]["standard"].values():
        assert rows.keys() == {"plain loop", "rollout", "densify"}
        assert rows["densify"]["times_densify"] == 1 and rows["densify"]["turns"] == 3
        assert all(r["ms"] > 0 and r["poses_per_second"] > 0 for r in rows.values())
    assert printed.count("| densify |") == 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory(tmp_path):
    _, report = run(tmp_path, "memory", "--poses", "5000", "--steps", "40", "--limit", "16")
    assert list(report["densify"]) == ["5000"]
    assert all(r["beside"] < 16 for r in report["densify"].values())
    assert report["trainings"].keys() == {"stage1", "stage2", "stage3_ground_truth_0"}
    assert all(len(noted) >= 10 and min(noted) > 50 for noted in report["trainings"].values())


def test_steps(tmp_path):
    variants = ["line by line", "line by line, bfloat16"]
    _, report = run(tmp_path, "steps", "--device", "cpu", "--preset", "tiny", "--seconds", "0",
                    "--variant", *variants)
    for rows in report["presets"]["tiny"].values():
        assert list(rows) == variants
        plain, bfloat16 = rows.values()
        assert plain["slowest"] <= plain["steps_per_second"] <= plain["fastest"]
        assert plain["loss"] == pytest.approx(bfloat16["loss"], rel=0.05)
    assert report["presets"]["tiny"].keys() == {"stage_1", "stage_2"}
