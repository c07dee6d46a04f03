"""The figures of a playground as Markdown: `python -m tealightning.worlds.report runs/playground`."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from tealightning.worlds.folder import load_playground


def markdown(manifest: dict[str, Any]) -> str:
    """Two tables, from the manifest alone: what was built and how good it is; the best-of-n curve of the policy."""
    figures, paragraphs = manifest["figures"], manifest["paragraphs"]
    rows = [
        ("policy, parameters", f"{manifest['policy_parameters']:,}"),
        ("reward model, parameters", f"{manifest['reward_model_parameters']:,}"),
        ("paragraphs for the policy / for the reward model", f"{paragraphs['corpus']:,} / {paragraphs['reward']:,}"),
        ("prompts train / val / test", " / ".join(str(count) for count in manifest["prompts"].values())),
        ("policy, held-out loss (perplexity) per token", _loss(figures)),
        ("reward model, held-out pairs ranked right", f"{figures['reward_pairwise_accuracy']:.1%}"),
        ("reward, sd within a prompt", f"{figures['reward_sd_within_prompt']:.2f}"),
        ("reward, skewness within a prompt", f"{figures['reward_skew_within_prompt']:+.2f}"),
        ("build, seconds", f"{manifest['build_seconds']:.0f}"),
    ]
    curve = figures["best_of_n"]
    return "\n\n".join(
        [_table(("figure", "value"), rows), _table(("n", *curve), [("best of n", *_rounded(curve.values()))])]
    )


def _loss(figures: dict[str, Any]) -> str:
    return f"{figures['heldout_loss']:.2f} ({figures['heldout_perplexity']:.0f})"


def _rounded(values: Iterable[float]) -> list[str]:
    return [f"{value:.2f}" for value in values]


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(args: list[str] | None = None) -> None:
    """Print the tables of the playground in a folder."""
    parser = argparse.ArgumentParser(prog="python -m tealightning.worlds.report", description=main.__doc__)
    parser.add_argument("path", help="folder of the playground")
    print(markdown(load_playground(parser.parse_args(args).path).manifest))


if __name__ == "__main__":
    main()
