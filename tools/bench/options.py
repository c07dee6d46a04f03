"""Command-line options that the benchmarks of training steps share."""

import argparse
from pathlib import Path
from typing import Any

from bench.steps import ENGINES, Shape, Variant
from bench.timing import CLOCKS
from bench.world import CACHE, SIZES, World, build_world
from tealightning.estimators import build_estimator


def add_shape_options(parser: argparse.ArgumentParser, *, estimators: list[str]) -> None:
    """Sizes, engine, estimators and how often to measure."""
    parser.add_argument("--size", default="10m", choices=SIZES, help="of the models (see docs/benchmarks.md)")
    parser.add_argument("--model", type=Path, help="folder of a policy to use in place of a model of --size")
    parser.add_argument("--playground", type=Path, default=Path("runs/prose"), help="folder of a prose world")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps the models")
    parser.add_argument("--prompts", type=int, default=8, help="P, prompts a step")
    parser.add_argument("--group-size", type=int, default=16, help="m, rollouts a prompt")
    parser.add_argument("--prompt-tokens", type=int, help="tokens of each prompt; unset = the prose world's prompts")
    parser.add_argument("--tokens", type=int, default=64, help="T, tokens of each rollout")
    parser.add_argument(
        "--engine", default="transformers", choices=ENGINES, help="none: random tokens and rewards, training alone"
    )
    parser.add_argument("--estimators", nargs="+", default=estimators, metavar="NAME", help="take turns, one a step")
    parser.add_argument("--alpha", type=float, default=0.25, help="of direct and tea")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--repeats", type=int, default=5, help="recorded steps of each estimator")
    parser.add_argument("--warm-up", type=int, default=1, help="steps of each estimator before them")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: seconds computed, for busy machines")


def world_of(options: argparse.Namespace) -> World:
    """The models and prompts; ends the program with a message if there is no prose world."""
    try:
        return build_world(
            options.size,
            playground=options.playground,
            cache=options.cache,
            model=options.model,
            prompt_tokens=options.prompt_tokens,
        )
    except ValueError as error:
        raise SystemExit(str(error)) from None


def shape_of(options: argparse.Namespace) -> Shape:
    """P, m and T."""
    return Shape(prompts=options.prompts, group_size=options.group_size, tokens=options.tokens)


def variants_of(options: argparse.Namespace) -> list[Variant]:
    """One for each estimator; `alpha` goes to those that extrapolate a tail."""
    extra = {name: {"alpha": options.alpha} if name in ("direct", "tea") else {} for name in options.estimators}
    return [
        Variant(name=name, estimator=build_estimator(name, **kwargs), shape=shape_of(options))
        for name, kwargs in extra.items()
    ]


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON line says of the options: all but the folders."""
    kept = {key: value for key, value in vars(options).items() if key not in ("playground", "cache", "model")}
    return kept if options.model is None else kept | {"size": options.model.name}


def describe(world: World, options: argparse.Namespace) -> str:
    """One line above a table."""
    return (
        f"{world.size} ({world.parameters / 1e6:.1f} M parameters), {options.engine} engine, P = {options.prompts}, "
        f"m = {options.group_size}, prompts of {options.prompt_tokens or world.longest_prompt()} tokens"
        f"{'' if options.prompt_tokens else ' at most'}, T = {options.tokens}; medians of {options.repeats}, "
        f"{options.clock} clock"
    )
