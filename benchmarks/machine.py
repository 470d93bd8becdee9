"""On what a figure was measured: machine, versions, commit and date."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine(device: str = "cpu") -> dict:
    def ask(*command):
        answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    return dict(
        device=torch.cuda.get_device_name() if device == "cuda" else processor(),
        cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads(),
        torch=torch.__version__, cuda=torch.version.cuda, python=platform.python_version(),
        commit=ask("git", "rev-parse", "--short", "HEAD"),
        changed_files=bool(ask("git", "status", "--porcelain")),
        date=datetime.date.today().isoformat())


def memory(key: str) -> float:
    """MB of a line of /proc/self/status (Linux): VmRSS is the memory in use, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024
