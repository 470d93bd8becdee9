"""Time the kernels against what a user could install.

    python benchmarks/kernels.py [--device cuda] [--seconds 5]

All variants of a row take turns in one process, so that a busy machine slows all of them. Shown are
medians, and how many times as long as ours each peer takes. Peers come with
`pip install -r benchmarks/requirements.txt`; missing ones are left out. The figures go to
benchmarks/results/kernels_DEVICE.json, with machine, versions, commit and date.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import hipart  # noqa: E402
import kernels  # noqa: E402
from benchmarks.machine import machine  # noqa: E402
from kernels import reference  # noqa: E402
from train import PRESETS, Training  # noqa: E402
from training_loop import adamw  # noqa: E402

COMMON_SIZES = [(2048, 2048, 128), (6144, 2048, 128), (65536, 2048, 128), (6144, 8192, 256)]
SEARCH_SIZES = {"cpu": [*COMMON_SIZES, (6144, 512, 64)],
                "cuda": [*COMMON_SIZES, (10**6, 2048, 128)]}
EMA_SIZES = [(6144, 2048, 128), (65536, 2048, 128)]
MEMORY = [("ours", 65536), ("ours", 10**6), ("cdist", 65536)]
STEPS = ["standard", "paper"]
LARGEST_MATRIX = 4 << 30  # bytes that a peer may take for its N x K scores


def interleaved(variants: dict, seconds: float, device: str) -> dict[str, float]:
    """Median milliseconds of every variant.

    They take turns until the time is up, three rounds at least. Each round has an order of its own,
    as what runs after a variant that has emptied the caches is slower for it.
    """
    times, shuffle = {name: [] for name in variants}, random.Random(0).sample
    for run in variants.values():  # warm up: builds, caches, compilation
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, run in shuffle(list(variants.items()), len(variants)):
            times[name].append(milliseconds(run, device))
    return {name: median(t) for name, t in times.items()}


def milliseconds(run, device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


# --------------------------------------------------------------------------------------------------
# The search and its peers


def formula(x, c):
    return ((c * c).sum(1) - 2 * (x @ c.T)).argmin(1)


def chunked(x, c, rows):
    c2 = (c * c).sum(1)
    return torch.cat([(c2 - 2 * (part @ c.T)).argmin(1) for part in x.split(rows)])


def narrower(lanes, x, c):
    os.environ["HIPART_LANES"] = lanes
    kernels.nearest_code(x, c)
    del os.environ["HIPART_LANES"]


def search_variants(x, c, device) -> dict:
    out = {"ours": lambda: kernels.nearest_code(x, c)}
    if device == "cpu":
        out["ours, without AVX-512"] = lambda: narrower("8", x, c)
        out["ours, without AVX2"] = lambda: narrower("4", x, c)
    out["reference implementation"] = lambda: reference.quantize(x, c)
    fits = len(x) * len(c) * 4 < LARGEST_MATRIX
    if fits:
        out["cdist + argmin"] = lambda: torch.cdist(x, c).argmin(1)
        out["c^2 - 2xc, argmin"] = lambda: formula(x, c)
        out["bare mm, no argmin"] = lambda: torch.mm(x, c.T)
    if fits and device == "cuda":
        compiled = torch.compile(formula, dynamic=False)
        out["torch.compile of c^2 - 2xc"] = lambda: compiled(x, c)
    rows = 128 if device == "cpu" else 8192
    out[f"c^2 - 2xc, chunks of {rows} rows"] = lambda: chunked(x, c, rows)
    return out | others_libraries(x, c, device, fits)


def others_libraries(x, c, device, fits) -> dict:
    """Each is left out where it is not installed."""
    out = {}
    if device == "cpu":
        try:
            import faiss

            faiss.omp_set_num_threads(torch.get_num_threads())
            index = faiss.IndexFlatL2(c.shape[1])
            index.add(c.numpy())
            out["faiss-cpu IndexFlatL2"] = lambda: index.search(x.numpy(), 1)
        except ImportError:
            pass
    else:
        try:
            from flash_kmeans.assign_euclid_triton import euclid_assign_triton

            x2, batch = (x * x).sum(1)[None], c[None]
            out["flash-kmeans assignment"] = lambda: euclid_assign_triton(x[None], batch, x2)
        except ImportError:
            pass
    try:
        from vector_quantize_pytorch import VectorQuantize

        vq = VectorQuantize(dim=c.shape[1], codebook_size=len(c)).to(device).eval()
        if fits:
            out["vector-quantize-pytorch, eval"] = lambda: vq(x[None])
    except ImportError:
        pass
    return out


# --------------------------------------------------------------------------------------------------
# The EMA update, and a whole training step


def ema_variants(N, K, D, device) -> dict:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g).to(device)
    idx = torch.randint(K, (N,), generator=g).to(device)

    def state():
        codebook, total = (torch.randn(K, D, device=device) for _ in range(2))
        return codebook, torch.ones(K, device=device), total

    ours, added, hot = state(), state(), state()

    def apply(state, n, s):
        reference.ema_apply_(*state, n, s, None, 0.99, 1e-5, 0.0)

    def index_add():
        s = torch.zeros(K, D, device=device).index_add_(0, idx, x)
        apply(added, torch.bincount(idx, minlength=K).float(), s)

    def one_hot():
        onehot = torch.nn.functional.one_hot(idx, K).float()
        apply(hot, onehot.sum(0), onehot.T @ x)

    return {"ours": lambda: kernels.ema_update_(*ours, x, idx),
            "index_add_": index_add, "one_hot.T @ x": one_hot}


def reference_search(x, codebook):
    return reference.quantize(x, codebook)[0]


def reference_apply(codebook, count, total, n, s, decay, eps, restart_below, candidates):
    return reference.ema_apply_(codebook, count, total, n, s, candidates, decay, eps, restart_below)


def replace_kernels(search, statistics, apply):
    hipart.nearest_code, hipart.code_statistics, hipart.ema_apply_ = search, statistics, apply


def usual_search(x, codebook):
    return torch.cdist(x, codebook).argmin(1)


def step_variants(preset: str, device: str) -> dict:
    """One training step of stage 1: forward, backward, optimiser, codebooks."""
    model_options, training_options = PRESETS[preset]
    c, training = hipart.Config(**model_options), Training(**training_options)
    x = torch.randn(training.batch_1, 96, 2, device=device)

    def step(*functions):
        torch.manual_seed(0)
        model = hipart.MSST(c).to(device).train()
        optimizer = adamw(model, training.lr_1, training.weight_decay_1)
        a = torch.randint(c.n_actions, (len(x),), device=device)
        many = torch.randn(max(c.K_s, c.K_d) // 16 + 64, 96, 2, device=device)
        model.initialize_codebooks(many, len(x))

        def run():
            replace_kernels(*functions)
            loss, _, output = model.loss(x, x[:, ::2], a)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            model.update_codebooks(output)

        return run

    update = reference.code_statistics, reference_apply
    return {"ours": step(kernels.nearest_code, kernels.code_statistics, kernels.ema_apply_),
            "reference implementation": step(reference_search, *update),
            "cdist + argmin, index_add_": step(usual_search, *update)}


def thread_variants() -> dict:
    x, c = torch.randn(6144, 128), torch.randn(2048, 128)
    threads = torch.get_num_threads()

    def with_threads(n):
        torch.set_num_threads(n)
        kernels.nearest_code(x, c)

    out = {"ours": lambda: with_threads(threads)}
    if threads > 1:
        out["1 thread"] = lambda: with_threads(1)
    return out


def extra_memory(N: int, variant: str) -> float:
    """MB that one call adds to the peak memory of a fresh process (Linux), with its result."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import kernels, torch

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

x, c = torch.randn({N}, 128), torch.randn(2048, 128)
run = dict(ours=kernels.nearest_code, cdist=lambda x, c: torch.cdist(x, c).argmin(1))[{variant!r}]
run(x[:64], c)
before = peak()
run(x, c)
print((peak() - before) / 1024)
"""
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# --------------------------------------------------------------------------------------------------
# The report


def show(title: str, times: dict[str, float]) -> None:
    print(f"\n{title}\n| variant | ms | times ours |\n| --- | ---: | ---: |")
    for name, t in times.items():
        print(f"| {name} | {t:.3g} | {t / times['ours']:.2f} |")
    sys.stdout.flush()


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=("cpu", "cuda"))
    p.add_argument("--seconds", type=float, default=5, help="time for each row")
    p.add_argument("--results", default=ROOT / "benchmarks" / "results", type=Path)
    args = p.parse_args()
    device, seconds = args.device, args.seconds
    torch.set_float32_matmul_precision("high")  # as train.py does: a peer may use TF32
    torch.manual_seed(0)
    backend, why = kernels.backend(device)
    report = dict(machine=machine(device) | dict(backend=backend), search={}, ema={}, threads={},
                  step={}, memory={})
    print(json.dumps(report["machine"]))
    if backend == "reference":
        raise SystemExit(f"no compiled kernels for {device}: {why}")
    for N, K, D in SEARCH_SIZES[device]:
        x, c = torch.randn(N, D, device=device), torch.randn(K, D, device=device)
        times = interleaved(search_variants(x, c, device), seconds, device)
        report["search"][f"{N},{K},{D}"] = times
        show(f"nearest code, N = {N}, K = {K}, D = {D}", times)
    for N, K, D in EMA_SIZES:
        times = interleaved(ema_variants(N, K, D, device), seconds, device)
        report["ema"][f"{N},{K},{D}"] = times
        show(f"EMA update, N = {N}, K = {K}, D = {D}", times)
    if device == "cpu":
        threads = torch.get_num_threads()
        report["threads"] = times = interleaved(thread_variants(), seconds, device)
        torch.set_num_threads(threads)
        show(f"threads, N = 6144, K = 2048, D = 128 (ours: {threads})", times)
        for variant, N in MEMORY:
            report["memory"][f"{variant}, N = {N}"] = mb = extra_memory(N, variant)
            print(f"extra memory at N = {N}, K = 2048, D = 128, {variant}: {mb:.0f} MB")
    for preset in STEPS:
        try:
            times = interleaved(step_variants(preset, device), 2 * seconds, device)
        finally:
            replace_kernels(kernels.nearest_code, kernels.code_statistics, kernels.ema_apply_)
        report["step"][preset] = times
        show(f"one training step of stage 1, {preset}: {1000 / times['ours']:.1f} steps/s", times)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"kernels_{device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
