"""`python -m kernels`: which implementation serves which device, why, and a check of its bits."""

import time

import torch

from . import backend, code_statistics, quantize, reference


def main() -> None:
    began = time.perf_counter()
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        name, why = backend(device)
        print(f"{device}: {name} ({why})")
    print(f"ready after {time.perf_counter() - began:.1f} s, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")
    torch.manual_seed(0)
    K = 2001
    for device in devices:
        x, codebook = torch.randn(2503, 37) + 1000, torch.randn(K, 37) + 1000
        codebook[:40] = codebook[0]  # forty ties,
        codebook[1000:2000] = codebook[:1000]  # and every one of these another
        x[:900] = codebook[0] + 0.01 * torch.randn(900, 37)  # many rows near the same codes
        x[900] *= 1e9  # overflows float16
        expected_idx, expected_d = reference.quantize(x, codebook)
        expected_n, expected_s = reference.code_statistics(x, expected_idx, K)
        expected = expected_idx, codebook[expected_idx], expected_d, expected_n, expected_s
        idx, codes, d = quantize(x.to(device), codebook.to(device))
        n, s = code_statistics(x.to(device), idx, K)
        got = [t.cpu() for t in (idx, codes, d, n, s)]
        if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
            raise SystemExit(f"{device}: self-check FAILED")
        print(f"{device}: self-check passed: the same bits as the reference implementation")


if __name__ == "__main__":
    main()
