"""The Triton kernels against the roofline: `python -m dspark_server.evaluation.kernels [--fp8] [--filtered]`.

Prints, for Qwen3-8B on an H100 and steps of 1 to 256 tokens, the least time each kernel's bytes and FLOPs allow, beside
that of the step's matrix products. Nothing here is measured.
"""

import argparse

import torch
from dspark_kernels.triton.costs import Cost, step_costs
from dspark_kernels.triton.launch import H100 as GPU
from dspark_kernels.triton.shapes import QWEN3_8B as MODEL

from dspark_server.evaluation.roofline import H100, QWEN3_8B

STEPS = ((1, 1), (1, 8), (2, 8), (4, 8), (8, 8), (16, 8), (32, 8), (256, 1))  # requests, query tokens of each


def seconds(cost: Cost) -> float:
    """Seconds of moving its bytes or of computing its FLOPs, whichever is longer, at the accelerator's peak."""
    return max(cost.bytes / H100.bandwidth, cost.flops / H100.peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1024, help="tokens of context of each request")
    parser.add_argument("--fp8", action="store_true", help="a KV cache of e4m3")
    parser.add_argument("--filtered", action="store_true", help="every request with top-k and top-p")
    arguments = parser.parse_args()
    cache = torch.float8_e4m3fn if arguments.fp8 else None
    each = [
        {c.kernel: c for c in step_costs(MODEL, *step, arguments.context, GPU, cache, arguments.filtered)}
        for step in STEPS
    ]
    print(f"{QWEN3_8B.name} on an {H100.name}, {arguments.context} tokens of context: µs of a step (MB moved; GFLOP)\n")
    print("| B = requests x queries | " + " | ".join(f"{r * q} = {r} x {q}" for r, q in STEPS) + " |")
    print("| --- |" + " --- |" * len(STEPS))
    for kernel in dict.fromkeys(name for costs in each for name in costs):
        cells = (_cell(costs.get(kernel)) for costs in each)
        print(f"| {kernel} | " + " | ".join(cells) + " |")
    products = [
        QWEN3_8B.target.seconds(requests * queries, H100)
        + (QWEN3_8B.draft.seconds(requests * QWEN3_8B.gamma, H100) if queries > 1 else 0.0)
        for requests, queries in STEPS
    ]
    print("| matrix products of both models | " + " | ".join(f"{1e6 * floor:.0f}" for floor in products) + " |")
    shares = (sum(map(seconds, costs.values())) / floor for costs, floor in zip(each, products, strict=True))
    print("| kernels / products, % | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
    launches = (sum(cost.launches for cost in costs.values()) for costs in each)
    print("| kernel launches | " + " | ".join(map(str, launches)) + " |")


def _cell(cost: Cost | None) -> str:
    if cost is None:
        return ""
    bound = "" if cost.bytes / H100.bandwidth >= cost.flops / H100.peak else " compute"
    flops = f"; {1e-9 * cost.flops:.1f}" if cost.flops else ""
    return f"{1e6 * seconds(cost):.1f}{bound} ({1e-6 * cost.bytes:.1f}{flops})"


if __name__ == "__main__":
    main()
