"""Peak memory of the loss (output layer, log-probs, entropy, backward) as a ratio to the same through logits.

    python tools/bench_memory.py
    python tools/bench_memory.py --tokens 1024 4096 16384 --vocabularies 32000 128000 --hidden 1024 --device cuda

Both run in turn in one process; memory is what a run adds at its peak to what the layer's input and weight take (on a
CPU from the kernel's count of resident memory, Linux only). A table and one JSON line, with seconds beside the bytes.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from bench.peak_memory import check_peaks, peak_mib, reset_peak
from bench.timing import environment
from torch import Tensor

from tealightning.functional.log_probs import linear_log_probs, token_entropy, token_log_probs


def through_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """What the loss costs when all logits exist."""
    logits = torch.nn.functional.linear(hidden, weight)
    with torch.no_grad():
        token_entropy(logits)
    return token_log_probs(logits, token_ids)


def without_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """What training does."""
    return linear_log_probs(hidden, weight, token_ids, with_entropy=True)[0]


def peak(loss: Callable[..., Tensor], layer: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """(MiB that forward and backward add at their peak, seconds)."""
    hidden, weight, _ = layer
    hidden.grad = weight.grad = None
    before = reset_peak(hidden.device)
    started = time.perf_counter()
    loss(*layer).mean().backward()
    top = peak_mib(hidden.device)  # waits for a GPU
    return top - before, time.perf_counter() - started


def measure(tokens: int, vocabulary: int, width: int, device: str) -> dict[str, float]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device).requires_grad_()
    token_ids = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    layer = (hidden, weight, token_ids)
    peak(without_logits, (hidden[:2].detach().requires_grad_(), weight, token_ids[:2]))  # libraries load lazily
    ours, seconds = peak(without_logits, layer)
    naive, naive_seconds = peak(through_logits, layer)
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "mib": round(ours, 1),
        "naive_mib": round(naive, 1),
        "ratio": round(ours / naive, 3),
        "time_ratio": round(seconds / naive_seconds, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="completion tokens")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8_000, 32_000, 128_000])
    parser.add_argument("--hidden", type=int, default=256, help="width of the output layer's input")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    check_peaks(options.device)
    print(f"hidden size {options.hidden}, float32, {options.device}, torch {torch.__version__}\n")
    print(f"{'tokens':>7} {'vocabulary':>10} {'MiB':>9} {'naive MiB':>10} {'ratio':>7} {'time ratio':>10}")
    rows = []
    for vocabulary in options.vocabularies:
        for tokens in options.tokens:
            rows.append(row := measure(tokens, vocabulary, options.hidden, options.device))
            print(
                f"{tokens:>7} {vocabulary:>10} {row['mib']:>9.1f} {row['naive_mib']:>10.1f} {row['ratio']:>7.3f} "
                f"{row['time_ratio']:>10.3f}"
            )
    line = {"bench": "memory", "size": f"hidden {options.hidden}", "engine": options.device, "rows": rows}
    print("\n" + json.dumps(line | environment()))


if __name__ == "__main__":
    main()
