"""The figures of a playground as Markdown: `python -m tealightning.worlds.report runs/playground`."""

import argparse
from typing import Any

from tealightning.worlds.folder import load_playground

FIGURES = {
    "heldout_loss": ("policy, held-out loss per token", ".2f"),
    "heldout_perplexity": ("policy, held-out perplexity per token", ".0f"),
    "reward_pairwise_accuracy": ("reward model, held-out pairs ranked right", ".1%"),
    "reward_sd_within_prompt": ("reward, sd within a prompt", ".2f"),
    "reward_skew_within_prompt": ("reward, skewness within a prompt", "+.2f"),
    "mean_score": ("mean score", ".3f"),
    "arrived_share": ("paths that arrive", ".1%"),
    "zero_share": ("paths that score 0", ".1%"),
    "daring_share": ("daring dishes", ".1%"),
    "failure_share": ("completions that are no dish", ".1%"),
    "distinct_share": ("different dishes among a prompt's", ".1%"),
}
"""Name in the manifest of whichever world has it -> what the table calls it, and how it is printed."""

CURVES = {"best_of_n": "best of n", "best_of_n_of_this_share": "expected of this share of daring dishes"}


def markdown(manifest: dict[str, Any]) -> str:
    """Two tables, from the manifest alone: what was built and how good it is; the best-of-n curve of the policy."""
    figures = manifest["figures"]
    rows = [["figure", "value"], ["policy, parameters", f"{manifest['policy_parameters']:,}"]]
    if "reward_model_parameters" in manifest:
        rows.append(["reward model, parameters", f"{manifest['reward_model_parameters']:,}"])
    if paragraphs := manifest.get("paragraphs"):
        counts = f"{paragraphs['corpus']:,} / {paragraphs['reward']:,}"
        rows.append(["paragraphs for the policy / for the reward model", counts])
    rows.append(["prompts train / val / test", " / ".join(str(count) for count in manifest["prompts"].values())])
    rows += [[text, format(figures[name], spec)] for name, (text, spec) in FIGURES.items() if name in figures]
    rows.append(["build, seconds", f"{manifest['build_seconds']:.0f}"])
    curves = [["n", *figures["best_of_n"]]]
    for name, text in CURVES.items():
        if name in figures:
            curves.append([text, *(f"{value:.2f}" for value in figures[name].values())])
    return f"{_table(rows)}\n\n{_table(curves)}"


def _table(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(args: list[str] | None = None) -> None:
    """Print the tables of the playground in a folder."""
    parser = argparse.ArgumentParser(prog="python -m tealightning.worlds.report", description=main.__doc__)
    parser.add_argument("path", help="folder of the playground")
    print(markdown(load_playground(parser.parse_args(args).path).manifest))


if __name__ == "__main__":
    main()
