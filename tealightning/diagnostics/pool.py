"""Pool of many rollouts per prompt: joined from batches, read from files of rewards, split into halves and groups."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tealightning.errors import UserError
from tealightning.estimators import AdvantageEstimator
from tealightning.functional.max_at_k import max_at_k_loo_weights
from tealightning.types import PromptBatch, RolloutBatch


@dataclass(kw_only=True, slots=True)
class RolloutPool:
    """M rollouts of each of Q prompts, from one policy that did not change meanwhile."""

    ids: list[str]  # Q prompts, unique
    rewards: Tensor  # [Q, M] float64; NaN = could not be scored
    # each [P_b, M] rewards, in the order of `ids`; on the CPU
    batches: list[RolloutBatch] = field(default_factory=list)

    @property
    def valid(self) -> Tensor:
        """[Q, M] bool, True = the reward is a finite number."""
        return torch.isfinite(self.rewards)


def pool_of(batches: Sequence[PromptBatch]) -> RolloutPool:
    """Join batches whose rollouts are attached, all with the same number a prompt."""
    rollouts = [batch.rollouts.to("cpu") for batch in batches if batch.rollouts is not None]
    ids = [prompt_id for batch in batches for prompt_id in batch.ids]
    return RolloutPool(ids=ids, rewards=torch.cat([each.rewards.double() for each in rollouts]), batches=rollouts)


# ---------------------------------------------------------------- files of rewards


def write_rewards(path: Path, pool: RolloutPool) -> None:
    """Write a line a prompt: `{"id": ..., "rewards": [M numbers]}`, null for a rollout that could not be scored."""
    with path.open("w", encoding="utf-8") as file:
        for prompt_id, rewards in zip(pool.ids, pool.rewards.tolist(), strict=True):
            scored = [reward if math.isfinite(reward) else None for reward in rewards]
            file.write(json.dumps({"id": prompt_id, "rewards": scored}, ensure_ascii=False) + "\n")


def read_rewards(path: Path) -> RolloutPool:
    """Read the rewards in a file; prompts may have different numbers of them, NaN fills up.

    - `*.csv`: columns `prompt_id` and `reward`, a line a sample; an empty reward could not be scored.
    - otherwise JSON lines: `{"rewards": [...], "id": ...}` a prompt, with `key` for `id`, or without either; null or
      NaN could not be scored.

    Samples of one prompt are pooled wherever they stand. A UserError names file and line of anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is not UTF-8 text: {error.reason}.") from None
    by_id: dict[str, list[float]] = {}
    for prompt_id, rewards in (_csv_lines if path.suffix.lower() == ".csv" else _json_lines)(path, lines):
        by_id.setdefault(prompt_id, []).extend(rewards)
    width = max(map(len, by_id.values()), default=0)
    if width == 0:
        raise UserError(f"{path}: there are no rewards in it.")
    rows = [rewards + [math.nan] * (width - len(rewards)) for rewards in by_id.values()]
    return RolloutPool(ids=list(by_id), rewards=torch.tensor(rows, dtype=torch.float64))


def _json_lines(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, list[float]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: this is not JSON: {error.msg}.") from None
        if not isinstance(row, dict) or not isinstance(row.get("rewards"), list):
            raise UserError(f'{place}: expected {{"rewards": [numbers]}}, got {line.strip()[:60]!r}.')
        for value in row["rewards"]:
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise _not_a_reward(place, value)
        prompt_id = row.get("id", row.get("key", f"line {number}"))
        yield str(prompt_id), [math.nan if value is None else float(value) for value in row["rewards"]]


def _csv_lines(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, list[float]]]:
    reader = csv.DictReader(f"{line}\n" for line in lines)
    columns = reader.fieldnames or ()
    if {"prompt_id", "reward"} - set(columns):
        raise UserError(f"{path}, line 1: expected columns prompt_id and reward, got {columns or 'nothing'}.")
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        if row["reward"] is None:
            raise UserError(f"{place}: expected {len(columns)} columns, as in line 1.")
        try:
            yield row["prompt_id"], [float(row["reward"].strip() or "nan")]
        except ValueError:
            raise _not_a_reward(place, row["reward"]) from None


def _not_a_reward(place: str, value: Any) -> UserError:
    return UserError(
        f"{place}: a reward is a number, or null (in CSV: empty) if it could not be scored; got {value!r}."
    )


# ---------------------------------------------------------------- halves of a pool, in groups of m

THINNED = 1024
"""Most coordinates of simulated steps: enough for a cosine, and every layer has some of them."""


@dataclass(kw_only=True, slots=True)
class Half:
    """Half of a pool."""

    rewards: Tensor  # [Q, h] float64, all finite
    scores: Tensor  # [Q, h, D] float, projected grad log pi of each rollout

    @property
    def stride(self) -> int:
        """Which coordinates simulated steps have: every one, or every second, ..."""
        return -(-self.scores.shape[-1] // THINNED)

    def oracle(self, target_n: int) -> Tensor:
        """[Q, D] float64: the unbiased best-of-N gradient of each prompt, `(1/h) sum_i w_i s_i` with the weights of
        `max_at_k_loo_weights` at k = N."""
        weights = max_at_k_loo_weights(self.rewards, target_n) / self.rewards.shape[1]
        return torch.stack([each @ scores.double() for each, scores in zip(weights, self.scores, strict=True)])


def half_size(rewards: Tensor, *, smallest: int = 0) -> int:
    """h, the size of the halves of every prompt's scored rollouts: half of what the prompt with the fewest has.

    A UserError says what to change if it is below `smallest`, the larger of N and m.
    """
    size = int(torch.isfinite(rewards).sum(dim=1).min()) // 2
    if size < smallest:
        raise UserError(
            f"pool: halves of {smallest} scored rollouts a prompt are needed (N, and the largest m), got {size}: "
            f"raise --pool to {2 * smallest} or more, or lower -N or -m."
        )
    return size


def split_halves(rewards: Tensor, scores: Tensor, size: int, generator: torch.Generator) -> tuple[Half, Half]:
    """Two disjoint random halves of `size` scored rollouts a prompt, of rewards [Q, M] and scores [Q, M, D]; a NaN
    reward is in neither."""
    order = torch.rand(rewards.shape, generator=generator).masked_fill(~torch.isfinite(rewards), 2.0).argsort(dim=1)
    halves = []
    for rows in (order[:, :size], order[:, size : 2 * size]):
        chosen = torch.stack([each[row] for each, row in zip(scores, rows, strict=True)])
        halves.append(Half(rewards=rewards.double().gather(1, rows), scores=chosen))
    return halves[0], halves[1]


class Groups:
    """A half in G disjoint groups of m: neighbours make a group, the order of a half is random."""

    def __init__(self, half: Half, m: int) -> None:
        self.half, self.m = half, m
        self.num_groups = half.rewards.shape[1] // m
        scores = half.scores[:, : self.num_groups * m].unflatten(1, (self.num_groups, m))
        self.products = torch.stack([each @ each.mT for each in scores])
        """[Q, G, m, m] inner products of the score vectors in each group."""
        self.thinned = scores[..., :: half.stride].contiguous()
        """[Q, G, m, D'] the coordinates of simulated steps."""

    def weights(self, estimator: AdvantageEstimator) -> Tensor:
        """`A_i/m`, the factor of each rollout's score vector in its group's gradient: [Q, G, m] float64."""
        rewards = self.half.rewards[:, : self.num_groups * self.m].unflatten(1, (self.num_groups, self.m))
        return (estimator(rewards.flatten(0, 1)) / self.m).view(rewards.shape)

    def gradients(self, weights: Tensor) -> Tensor:
        """`sum_i weights_i s_i` of every group, thinned: [Q, G, D']."""
        factors = weights.to(self.thinned.dtype)[:, :, None]
        return torch.stack([torch.bmm(each, scores)[:, 0] for each, scores in zip(factors, self.thinned, strict=True)])

    def mean_and_noise(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the groups' gradients [Q, D] and trace of the covariance of one group's [Q], both float64.

        The groups are independent, so the noise is their sample variance `(sum_g |e_g|^2 - G |mean|^2)/(G - 1)`; NaN
        for a single group.
        """
        shares = weights.new_zeros(self.half.rewards.shape)
        shares[:, : self.num_groups * self.m] = weights.flatten(1)
        shares = (shares / self.num_groups).to(self.half.scores.dtype)
        mean = torch.stack([each @ scores for each, scores in zip(shares, self.half.scores, strict=True)]).double()
        lengths = torch.einsum("qgi,qgij,qgj->q", weights, self.products.double(), weights)
        if self.num_groups < 2:
            return mean, torch.full_like(lengths, float("nan"))
        return mean, (lengths - self.num_groups * mean.square().sum(dim=-1)).clamp(min=0) / (self.num_groups - 1)
