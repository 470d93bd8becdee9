"""`python -m kernels`: which implementation serves which device, why, and a check that it gives the twin's bits."""

import time

import torch

from . import backend, code_statistics, quantize, reference


def main() -> None:
    began = time.perf_counter()
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        name, why = backend(device)
        print(f"{device}: {name} ({why})")
    print(f"ready after {time.perf_counter() - began:.1f} s, {torch.get_num_threads()} threads, torch {torch.__version__}")
    torch.manual_seed(0)
    K = 2001
    for device in devices:
        x, codebook = torch.randn(2503, 37) + 1000, torch.randn(K, 37) + 1000
        codebook[:40] = codebook[0]  # forty ties,
        codebook[1000:2000] = codebook[:1000]  # and every one of these another
        x[:900] = codebook[0] + 0.01 * torch.randn(900, 37)  # more rows near them than the GPU's lists have room for
        expected_idx, expected_d = reference.quantize(x, codebook)
        idx, codes, d = quantize(x.to(device), codebook.to(device))
        n, s = code_statistics(x.to(device), idx, K)
        expected_n, expected_s = reference.code_statistics(x, expected_idx, K)
        pairs = [(idx, expected_idx), (d, expected_d), (codes, codebook[expected_idx]), (n, expected_n), (s, expected_s)]
        right = all(torch.equal(ours.cpu(), twins) for ours, twins in pairs)
        print(f"{device}: self-check {'passed: the same bits as the twin' if right else 'FAILED'}")
        if not right:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
