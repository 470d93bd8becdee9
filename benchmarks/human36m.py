"""How long and in how much memory prepare_data.py reads a Human3.6M of full size (--source h36m).

    python benchmarks/human36m.py

Human3.6M is licensed, so what is read is made up: random motion of a made-up body of SMPL's size,
in the files' own layouts, by the builder of tests/test_human36m.py. It has 210 sequences of 1860
frames, seen by 4 cameras, and a fit for every fifth frame. S11's Directions is left out, as always.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import smpl_content  # noqa: E402
from test_human36m import write_source  # noqa: E402


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--frames", type=int, default=1860, help="frames of each sequence")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = folder / "files"
        files.mkdir()
        print("writing the files (this takes longer than reading them)", flush=True)
        write_source(files, smpl_content(), args.frames, every=5)
        size = sum(f.stat().st_size for f in files.iterdir())
        began = time.perf_counter()
        command = ["prepare_data.py", "--source", "h36m", "--folder", str(files)]
        command += ["--out", str(folder / "data")]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        seconds = time.perf_counter() - began
        meta = json.loads((folder / "data/h36m/meta.json").read_text())
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    splits = {s: {k: v[k] for k in ("n", "with_mesh")} for s, v in meta["splits"].items()}
    result = {
        "splits": splits,
        "files_mb": round(size / 1e6),
        "seconds": round(seconds),
        "peak_memory_gb": round(memory, 2),
        "cores": len(os.sched_getaffinity(0)),
        "date": str(date.today()),
        "versions": meta["versions"],
    }
    print(json.dumps(result, indent=1))
    args.results.mkdir(exist_ok=True)
    (args.results / "human36m.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
