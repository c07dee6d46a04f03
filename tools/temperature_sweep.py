"""Best-of-n of the quickstart's policies at several deployment temperatures: is spread cheaper to buy when sampling?

    tealightning quickstart
    python tools/temperature_sweep.py        # writes docs/results/maze-temperature.csv

Every policy in runs/quickstart samples the same held-out mazes; rewards are those of `MazeReward`.
"""

import argparse
import csv
import json
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.statistics import mean_over_prompts
from tealightning.worlds import MazeReward, load_playground
from tealightning.worlds.policy import sample_completions

NS = (1, 4, 16, 64, 128)


def rewards_of(policy: Path, rows: list[dict[str, str]], *, temperature: float, max_moves: int) -> torch.Tensor:
    """[Q, 128] float64."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    repeated = [row for row in rows for _ in range(max(NS))]
    prompts = [row["prompt"] for row in repeated]
    torch.manual_seed(0)
    paths = sample_completions(
        model, tokenizer, prompts, max_new_tokens=max_moves, temperature=temperature, batch_size=1024
    )
    scores = MazeReward().score(prompts, paths, repeated)
    return torch.tensor(scores, dtype=torch.float64).view(len(rows), -1)


def main() -> None:
    """Sample, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("runs/playground"))
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart/runs"))
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.3, 0.5, 0.7, 1.0, 1.3, 2.0])
    parser.add_argument("--mazes", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("docs/results/maze-temperature.csv"))
    options = parser.parse_args()
    world = load_playground(options.world)
    rows = [json.loads(line) for line in world.test_prompts.read_text(encoding="utf-8").splitlines()[: options.mazes]]
    policies = {"start": world.policy}
    policies |= {name: next(options.runs.glob(f"{name}/*/policy")) for name in ("grpo", "tea")}
    jobs = [(name, temperature) for name in policies for temperature in options.temperatures]
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "temperature", "n", "mean", "se"])
        for name, temperature in track(jobs, description="Sampling"):
            moves = world.manifest["config"]["max_moves"]
            rewards = rewards_of(policies[name], rows, temperature=temperature, max_moves=moves)
            estimate = mean_over_prompts(best_of_n(rewards, NS))
            for i, n in enumerate(NS):
                writer.writerow([name, temperature, n, f"{estimate.mean[i]:.4f}", f"{estimate.standard_error[i]:.4f}"])


if __name__ == "__main__":
    main()
