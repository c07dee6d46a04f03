"""Soak run on the prose world: do memory, open files and step time stay flat, and every metric finite?

    python tools/soak.py                       # 4,200 steps, about 15 minutes on two cores
    python tools/soak.py --steps 20 10 10      # a try

Three parts of one training, each a process of its own that goes on from the last one's checkpoint: one process with
vLLM, two processes (DDP over gloo) with vLLM, one process with the transformers engine. Validation and checkpoints run
all along. Writes `runs/soak/soak.md`, `soak.png` and the rows behind them; the slopes are least-squares ones over the
steps after each part's warm-up, with the standard error from means of ten blocks of steps, which are nearly
independent.
"""

import argparse
import csv
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from tealightning.reporting.provenance import commit
from tealightning.reporting.tables import markdown_table

TOOLS = Path(__file__).parent
ENGINES = {"vllm": "tealightning.rollouts.VLLMEngine", "transformers": "tealightning.rollouts.TransformersEngine"}
BLOCKS = 10
QUANTITIES = {"rss_mib": ("memory", "MiB"), "open_files": ("open files", ""), "seconds": ("step", "s")}


@dataclass(kw_only=True, slots=True)
class Part:
    """A stretch of the run."""

    number: int
    engine: str
    processes: int
    last_step: int


def parts_of(steps: list[int]) -> list[Part]:
    """vLLM on one process, vLLM on two, transformers on one."""
    kinds = (("vllm", 1), ("vllm", 2), ("transformers", 1))
    ends = np.cumsum(steps).tolist()
    return [
        Part(number=number, engine=engine, processes=processes, last_step=end)
        for number, ((engine, processes), end) in enumerate(zip(kinds, ends, strict=True), start=1)
    ]


def config_of(part: Part, folder: Path, config: Path, prompts: int) -> Path:
    """The overlay on `config` that makes one part of it; its file."""
    settings = {
        "data": {"init_args": {"batch_size": prompts // part.processes}},
        "model": {
            "init_args": {
                "ns": [1, 4, 16],
                "optimizer": {
                    "class_path": "torch.optim.AdamW",
                    "init_args": {"lr": 1.0e-4, "weight_decay": 0.0},
                },
            }
        },
        "rollout": {
            "engine": {"class_path": ENGINES[part.engine]},
            "group_size": 12,
            "sampling": {"max_new_tokens": 16},
        },
        "trainer": {
            "max_steps": part.last_step,
            "max_epochs": 100_000,
            "devices": part.processes,
            "accelerator": "cpu",
            "strategy": "ddp" if part.processes > 1 else "auto",
            "val_check_interval": 200,
            "limit_val_batches": 2,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "logs"},
            },
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": 50, "save_last": True},
                },
                {
                    "class_path": "bench.resources.ResourceRecorder",
                    "init_args": {"folder": str(folder), "part": part.number},
                },
            ],
        },
    }
    file = folder / f"part_{part.number}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def run_part(part: Part, folder: Path, config: Path, prompts: int) -> None:
    """Train up to the part's last step, from the checkpoint of the part before.

    Raises:
        subprocess.CalledProcessError: if training fails.
    """
    command = [str(Path(sys.executable).with_name("tealightning")), "fit", "-c", str(config)]
    command += ["-c", str(config_of(part, folder, config, prompts))]
    if part.number > 1:
        command += ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    print(f"part {part.number}: {part.engine}, {part.processes} process(es), to step {part.last_step}", flush=True)
    paths = [str(TOOLS), str(TOOLS.parent), os.environ.get("PYTHONPATH", "")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})


def slope(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Least-squares slope per 1,000 steps of the means of ten blocks, and its standard error."""
    if np.ptp(values) == 0:
        return 0.0, 0.0  # without the rounding of what follows
    x = np.array([block.mean() for block in np.array_split(steps / 1000, BLOCKS)])
    y = np.array([block.mean() for block in np.array_split(values, BLOCKS)])
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    residuals = y - y.mean() - slope * centred
    return slope, float(math.sqrt(residuals @ residuals / (BLOCKS - 2) / (centred @ centred)))


def read_rows(file: Path) -> dict[str, np.ndarray]:
    """Columns of a recorder's file."""
    with file.open(newline="") as rows:
        table = list(csv.DictReader(rows))
    return {name: np.array([float(row[name]) for row in table]) for name in table[0]}


def table_of(folder: Path, parts: list[Part], warm_up: float) -> str:
    """A row for each part and rank: level after the warm-up and slope per 1,000 steps."""
    rows = []
    for part in parts:
        for rank in range(part.processes):
            columns = read_rows(folder / f"part_{part.number}_rank_{rank}.csv")
            after = slice(int(len(columns["step"]) * warm_up), None)
            row = {
                "part": f"{part.engine}, {part.processes} process{'es' * (part.processes > 1)}, rank {rank}",
                "steps": len(columns["step"]),
            }
            for name, (title, unit) in QUANTITIES.items():
                values = columns[name][after]
                per_1000, error = slope(columns["step"][after], values)
                row[f"{title}, median"] = f"{np.median(values):.4g} {unit}".strip()
                row[f"{title}, per 1,000 steps"] = f"{per_1000:+.2g} ± {error:.1g} {unit}".strip()
            rows.append(row)
    return markdown_table(rows)


def count_of_not_finite(folder: Path) -> tuple[int, int]:
    """(values that are not finite, all values) in the logs of every part."""
    bad = total = 0
    for file in sorted((folder / "logs").glob("*/metrics.csv")):
        with file.open(newline="") as rows:
            values = [float(cell) for row in csv.DictReader(rows) for cell in row.values() if cell]
        total += len(values)
        bad += sum(not math.isfinite(value) for value in values)
    return bad, total


def plot(folder: Path, parts: list[Part]) -> Path:
    """Memory, open files and step time over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(QUANTITIES), 1, sharex=True, figsize=(8, 6), layout="constrained")
    for axis, (name, (title, unit)) in zip(axes, QUANTITIES.items(), strict=True):
        for part in parts:
            for rank in range(part.processes):
                columns = read_rows(folder / f"part_{part.number}_rank_{rank}.csv")
                label = f"{part.engine}, {part.processes} process(es), rank {rank}"
                axis.plot(columns["step"], columns[name], linewidth=0.7, label=label)
        axis.set_ylabel(f"{title} [{unit}]" if unit else title)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=7)
    axes[-1].set_xlabel("optimizer step")
    file = folder / "soak.png"
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def empty(folder: Path) -> None:
    """Make `folder`, without what an earlier soak run left in it.

    Raises:
        ValueError: if it holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "part_1.yaml").exists():
        raise ValueError(f"{folder} is not a soak run's folder, and it would be emptied: name another one with --out.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=TOOLS.parent / "configs" / "experiments" / "prose.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="an earlier soak run in it is deleted")
    parser.add_argument("--steps", type=int, nargs=3, default=[3000, 600, 600], help="of each part")
    parser.add_argument("--prompts", type=int, default=2, help="prompts a step, over all processes")
    parser.add_argument("--warm-up", type=float, default=0.5, help="share of each part left out of the slopes")
    options = parser.parse_args()
    empty(options.out)
    code = commit()
    parts = parts_of(options.steps)
    for part in parts:
        run_part(part, options.out, options.config, options.prompts)
    bad, total = count_of_not_finite(options.out)
    text = table_of(options.out, parts, options.warm_up)
    text += f"\n\nValues logged: {total:,}, of them not finite: {bad}. Commit {code}, {os.cpu_count()} CPU cores.\n"
    (options.out / "soak.md").write_text(f"# Soak run\n\n{text}")
    print(text)
    print(f"plot: {plot(options.out, parts)}")


if __name__ == "__main__":
    main()
