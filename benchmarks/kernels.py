"""Time the kernels against what a user could install: `python benchmarks/kernels.py [--device cuda] [--seconds 5]`.

All variants of a row take turns in one process, so that a busy machine slows all of them; shown are medians and how many
times as long as ours each peer takes. Peers come with `pip install -r benchmarks/requirements.txt`; missing ones are left
out. The figures go to benchmarks/results/kernels_DEVICE.json, with machine, versions, commit and date.
"""

import argparse
import datetime
import json
import os
import platform
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
from kernels import reference  # noqa: E402
from train import PRESETS, adamw  # noqa: E402

SEARCH_SIZES = {"cpu": [(2048, 2048, 128), (6144, 2048, 128), (65536, 2048, 128), (6144, 8192, 256), (6144, 512, 64)],
                "cuda": [(2048, 2048, 128), (6144, 2048, 128), (65536, 2048, 128), (10**6, 2048, 128), (6144, 8192, 256)]}
EMA_SIZES = [(6144, 2048, 128), (65536, 2048, 128)]
MEMORY = [("ours", 65536), ("ours", 10**6), ("cdist", 65536)]
STEPS = ["standard", "paper"]
FP16_FLOOR_MS = {(65536, 2048, 128): 0.035, (10**6, 2048, 128): 0.53}  # 990 TFLOP/s, the data sheet of an H200


def interleaved(variants: dict, seconds: float, device: str) -> dict[str, float]:
    """Median milliseconds of every variant; they take turns until the time is up, three rounds at least. Each round has an
    order of its own: what runs after a variant that has emptied the caches or left threads spinning is slower for it."""
    times, shuffle = {name: [] for name in variants}, random.Random(0).sample
    for run in variants.values():  # warm up: builds, caches, compilation
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, run in shuffle(list(variants.items()), len(variants)):
            if device == "cuda":
                began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                began.record()
                run()
                ended.record()
                ended.synchronize()
                times[name].append(began.elapsed_time(ended))
            else:
                began = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: median(t) for name, t in times.items()}


def formula(x, c):
    return ((c * c).sum(1) - 2 * (x @ c.T)).argmin(1)


def chunked(x, c, rows=128):
    c2 = (c * c).sum(1)
    return torch.cat([(c2 - 2 * (part @ c.T)).argmin(1) for part in x.split(rows)])


def narrower(lanes, x, c):
    os.environ["HIPART_LANES"] = lanes
    kernels.nearest_code(x, c)
    del os.environ["HIPART_LANES"]


def search_variants(x, c, device) -> dict:
    N, K = len(x), len(c)
    out = {"ours": lambda: kernels.nearest_code(x, c)}
    if device == "cpu":
        out |= {"ours, without AVX-512": lambda: narrower("8", x, c), "ours, without AVX2": lambda: narrower("4", x, c)}
    out["the twin"] = lambda: reference.quantize(x, c)
    if N * K * 4 < (4 << 30):
        out |= {"cdist + argmin": lambda: torch.cdist(x, c).argmin(1), "c^2 - 2xc, argmin": lambda: formula(x, c),
                "bare mm, no argmin": lambda: torch.mm(x, c.T)}
        if device == "cuda":
            compiled = torch.compile(formula, dynamic=False)
            out["torch.compile of c^2 - 2xc"] = lambda: compiled(x, c)
    out["c^2 - 2xc, chunks of 128 rows" if device == "cpu" else "c^2 - 2xc, chunks of 8192 rows"] = (
        lambda: chunked(x, c, 128 if device == "cpu" else 8192))
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

            x2, c2 = (x * x).sum(1)[None], c[None]
            out["flash-kmeans assignment"] = lambda: euclid_assign_triton(x[None], c2, x2)
        except ImportError:
            pass
    try:
        from vector_quantize_pytorch import VectorQuantize

        vq = VectorQuantize(dim=c.shape[1], codebook_size=K).to(device).eval()
        if N * K * 4 < (4 << 30):
            out["vector-quantize-pytorch, eval"] = lambda: vq(x[None])
    except ImportError:
        pass
    return out


def ema_variants(N, K, D, device) -> dict:
    g = torch.Generator().manual_seed(0)
    x, idx = torch.randn(N, D, generator=g).to(device), torch.randint(K, (N,), generator=g).to(device)

    def state():
        return torch.randn(K, D, device=device), torch.ones(K, device=device), torch.randn(K, D, device=device)

    ours, twin, hot = state(), state(), state()

    def apply(codebook, count, total, n, s):
        reference.ema_apply_(codebook, count, total, n, s, None, 0.99, 1e-5, 0.0)

    def index_add():
        n = torch.bincount(idx, minlength=K).float()
        apply(*twin, n, torch.zeros(K, D, device=device).index_add_(0, idx, x))

    def one_hot():
        onehot = torch.nn.functional.one_hot(idx, K).float()
        apply(*hot, onehot.sum(0), onehot.T @ x)

    return {"ours": lambda: kernels.ema_update_(*ours, x, idx), "index_add_": index_add, "one_hot.T @ x": one_hot}


def step_variants(preset: str, device: str) -> dict:
    """One training step of stage 1: forward, backward, optimiser, codebooks."""
    options = {k: v for k, v in PRESETS[preset].items() if k != "limit"}
    c = hipart.Config(**options)
    x = torch.randn(c.batch_1, 96, 2, device=device)

    def step(search, update):
        torch.manual_seed(0)
        model = hipart.MSST(c).to(device).train()
        optimizer = adamw(model, c.lr_1, c.weight_decay_1, torch.device(device))
        a = torch.randint(c.n_actions, (c.batch_1,), device=device)
        many = torch.randn(max(c.K_s, c.K_d) // 16 + 64, 96, 2, device=device)
        model.initialize_codebooks(many, c.batch_1)

        def run():
            hipart.nearest_code, hipart.ema_update_ = search, update
            loss, _, o = model.loss(x, x[:, ::2], a)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            model.update_codebooks(o)

        return run

    def twin_search(x, codebook):
        return reference.quantize(x, codebook)[0]

    def twin_update(codebook, count, total, x, idx, decay=0.99, eps=1e-5, restart_below=0.0, restart_rows=None):
        candidates = None if restart_rows is None else x[restart_rows]
        return reference.ema_apply_(codebook, count, total, *reference.code_statistics(x, idx, len(codebook)), candidates,
                                    decay, eps, restart_below)

    def usual_search(x, codebook):
        return torch.cdist(x, codebook).argmin(1)

    return {"ours": step(kernels.nearest_code, kernels.ema_update_), "the twin": step(twin_search, twin_update),
            "cdist + argmin, index_add_": step(usual_search, twin_update)}


def extra_memory(N: int, variant: str) -> float:
    """MB that one call adds to the peak memory of a fresh process (Linux), its result included."""
    code = (f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); import kernels\n"
            "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
            f"x, c = torch.randn({N}, 128), torch.randn(2048, 128)\n"
            f"run = dict(ours=kernels.nearest_code, cdist=lambda x, c: torch.cdist(x, c).argmin(1))[{variant!r}]\n"
            "run(x[:64], c); before = peak(); run(x, c); print((peak() - before) / 1024)")
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def show(title: str, times: dict[str, float]) -> None:
    print(f"\n{title}\n| variant | ms | times ours |\n| --- | ---: | ---: |")
    for name, t in times.items():
        print(f"| {name} | {t:.3g} | {t / times['ours']:.2f} |")
    sys.stdout.flush()


def machine(device: str) -> dict:
    def ask(*command):
        answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    return dict(device=torch.cuda.get_device_name() if device == "cuda" else cpu, threads=torch.get_num_threads(),
                backend=kernels.backend(device)[0], torch=torch.__version__, cuda=torch.version.cuda,
                python=platform.python_version(), commit=ask("git", "rev-parse", "--short", "HEAD"),
                changed_files=bool(ask("git", "status", "--porcelain")), date=datetime.date.today().isoformat())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    p.add_argument("--seconds", type=float, default=5, help="time for each row")
    p.add_argument("--results", default=ROOT / "benchmarks" / "results", type=Path)
    args = p.parse_args()
    device, threads = args.device, torch.get_num_threads()
    torch.set_float32_matmul_precision("high")  # as train.py does: a peer may use TF32
    torch.manual_seed(0)
    report = dict(machine=machine(device), search={}, queued={}, ema={}, threads={}, step={}, memory={})
    print(json.dumps(report["machine"]))
    if report["machine"]["backend"] == "reference":
        raise SystemExit(f"no compiled kernels for {device}: {kernels.backend(device)[1]}")
    for N, K, D in SEARCH_SIZES[device]:
        x, c = torch.randn(N, D, device=device), torch.randn(K, D, device=device)
        times = interleaved(search_variants(x, c, device), args.seconds, device)
        report["search"][f"{N},{K},{D}"] = times
        show(f"nearest code, N = {N}, K = {K}, D = {D}", times)
        if device == "cuda" and (N, K, D) in FP16_FLOOR_MS:
            ten = interleaved({"ten calls": lambda x=x, c=c: [kernels.nearest_code(x, c) for _ in range(10)]}, 1, device)
            report["queued"][f"{N},{K},{D}"] = queued = ten["ten calls"] / 10  # the GPU never waits for Python
            floor = FP16_FLOOR_MS[N, K, D]
            print(f"ours: {times['ours'] / floor:.2f} times the fp16 floor of an H200, "
                  f"{queued / floor:.2f} times where calls queue up")
    for N, K, D in EMA_SIZES:
        report["ema"][f"{N},{K},{D}"] = times = interleaved(ema_variants(N, K, D, device), args.seconds, device)
        show(f"EMA update, N = {N}, K = {K}, D = {D}", times)
    if device == "cpu":
        x, c = torch.randn(6144, 128), torch.randn(2048, 128)

        def with_threads(n):
            def run():
                torch.set_num_threads(n)
                kernels.nearest_code(x, c)
            return run

        counts = sorted({1, threads})
        report["threads"] = times = interleaved({"ours" if n == threads else f"{n} thread": with_threads(n) for n in counts},
                                                args.seconds, device)
        torch.set_num_threads(threads)
        show(f"threads, N = 6144, K = 2048, D = 128 (ours: {threads})", times)
        for variant, N in MEMORY:
            report["memory"][f"{variant}, N = {N}"] = mb = extra_memory(N, variant)
            print(f"extra memory at N = {N}, K = 2048, D = 128, {variant}: {mb:.0f} MB")
    ours = hipart.nearest_code, hipart.ema_update_
    for preset in STEPS:
        try:
            report["step"][preset] = times = interleaved(step_variants(preset, device), 2 * args.seconds, device)
        finally:
            hipart.nearest_code, hipart.ema_update_ = ours
        show(f"one training step of stage 1, {preset}: {1000 / times['ours']:.1f} steps/s", times)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"kernels_{device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
