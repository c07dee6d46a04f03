"""Pool of many rollouts per prompt: joined from batches or files of rewards, score vectors, halves and groups of it."""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tealightning.errors import UserError
from tealightning.estimators import AdvantageEstimator
from tealightning.functional.max_at_k import max_at_k_loo_weights
from tealightning.types import PromptBatch, RolloutBatch


class RolloutPool(NamedTuple):
    """M rollouts of each of Q prompts, from one policy that did not change meanwhile."""

    ids: list[str]  # Q prompts, unique
    rewards: Tensor  # [Q, M] float64; NaN = could not be scored
    batches: Sequence[RolloutBatch] = ()  # each [P_b, M] rewards, in the order of `ids`; on the CPU


def pool_of(batches: Sequence[PromptBatch]) -> RolloutPool:
    """Join batches whose rollouts are attached, all with the same number a prompt."""
    rollouts = [batch.rollouts.to("cpu") for batch in batches if batch.rollouts is not None]
    ids = [prompt_id for batch in batches for prompt_id in batch.ids]
    return RolloutPool(ids=ids, rewards=torch.cat([each.rewards.double() for each in rollouts]), batches=rollouts)


def write_rewards(path: Path, pool: RolloutPool) -> None:
    """Write a line a prompt: `{"id": ..., "rewards": [M numbers]}`, null for a rollout that could not be scored."""
    with path.open("w", encoding="utf-8") as file:
        for prompt_id, rewards in zip(pool.ids, pool.rewards.tolist(), strict=True):
            scored = [reward if math.isfinite(reward) else None for reward in rewards]
            file.write(json.dumps({"id": prompt_id, "rewards": scored}, ensure_ascii=False) + "\n")


def read_rewards(path: Path) -> RolloutPool:
    """Read the rewards in a file; prompts may have different numbers of them, NaN fills up.

    Either CSV with columns `prompt_id` and `reward` (empty = not scored), or JSON lines `{"rewards": [...], "id": ...}`
    a prompt, with `key` for `id` or neither (null or NaN = not scored). Samples of one prompt are pooled.
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
    return UserError(f"{place}: a reward is a number, or null (in CSV: empty) if not scored; got {value!r}.")


class LinearProjection:
    """A random projection of the gradient of every `nn.Linear` weight, seeded.

    The gradient of a weight [out, in] for one rollout is `sum_t delta_t a_t^T` (a_t the input at token t, delta_t the
    gradient of the log-prob by the output). With Gaussian `U [out, k]` and `V [in, k]` its projection is

        U^T (sum_t delta_t a_t^T) V / k = (Delta U)^T (A V) / k,    k^2 numbers,

    which never forms the gradient. Over seeds it is unbiased for inner products: `E <PG, PH> = <G, H>`, exactly.
    Frozen weights and those of other modules (embeddings, norms, biases, `Conv1D`) are left out: all gradients are
    compared on what is covered. A weight that several modules share has one block; a tied head counts as a head.
    """

    def __init__(self, policy: nn.Module, *, size: int = 8, seed: int = 0) -> None:
        self.layers = {name: m for name, m in policy.named_modules() if isinstance(m, nn.Linear)}
        self.layers = {name: m for name, m in self.layers.items() if m.weight.requires_grad}
        if not self.layers:
            raise UserError("the policy has no trainable nn.Linear, which is what gradients are projected from.")
        self._blocks: dict[int, tuple[slice, Tensor, Tensor]] = {}
        covered = 0
        for name, layer in self.layers.items():
            if id(layer.weight) not in self._blocks:
                first = len(self._blocks) * size**2
                # a seed that depends on the layer's name and not on the other layers
                key = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 2)
                draws = [torch.randn(n, size, generator=generator, dtype=torch.float64) for n in layer.weight.shape]
                left, right = draws[0].to(layer.weight), (draws[1] / size).to(layer.weight)
                self._blocks[id(layer.weight)] = (slice(first, first + size**2), left, right)
                covered += layer.weight.numel()
        self.num_features = len(self._blocks) * size**2  # D
        # share of the policy's trainable parameters
        self.covered = covered / sum(each.numel() for each in policy.parameters() if each.requires_grad)

    def block(self, layer: nn.Linear) -> tuple[slice, Tensor, Tensor]:
        """Where in the D features the layer's weight is, its U [out, k], and its V [in, k] divided by k."""
        return self._blocks[id(layer.weight)]


def score_vectors(
    policy: nn.Module,
    rollouts: RolloutBatch,
    projection: LinearProjection,
    *,
    max_tokens: int = 16_384,
    on_progress: Callable[[int], Any] = lambda rows: None,
) -> Tensor:
    """`s_i = P grad log pi(y_i | x)` [B, D] of every rollout, under the distribution that it was sampled from; float32
    on the CPU (float64 for a float64 policy).

    One forward and one backward pass per micro-batch of at most `max_tokens` padded tokens: sequences never interact,
    so the gradients of the sum of their log-probs by a layer's outputs are each rollout's own. No weight's gradient is
    computed, and the policy is as before afterwards. `on_progress` gets the number of rollouts of each micro-batch.
    """
    from tealightning.training.micro_batches import split_rows
    from tealightning.training.scoring import score_through_logits

    dtype = torch.promote_types(next(iter(projection.layers.values())).weight.dtype, torch.float32)
    scores = torch.zeros(len(rollouts.completion_ids), projection.num_features, dtype=dtype)
    device = next(policy.parameters()).device
    lengths = rollouts.prompt_lengths, rollouts.completion_lengths
    micro_batches = split_rows(*lengths, torch.arange(len(scores)), max_tokens=max_tokens)
    rollouts = rollouts.to(device)
    with _only_activations(policy), torch.enable_grad():
        for rows in micro_batches:
            sums = torch.zeros(len(rows), projection.num_features, dtype=dtype, device=device)
            with _adding_to(sums, projection):
                score_through_logits(policy, rollouts, rows.to(device)).log_probs.sum().backward()
            scores[rows] = sums.cpu()
            on_progress(len(rows))
    return scores


@contextmanager
def _adding_to(sums: Tensor, projection: LinearProjection) -> Iterator[None]:
    """Hooks that add each rollout's projected gradient to its row of `sums` [rows, D] during backward."""

    def forward_hook(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        activation = inputs[0].detach()
        if activation.ndim < 3 or len(activation) != len(sums):
            raise UserError(
                f"a Linear of the policy got an input of shape {tuple(activation.shape)}, and [{len(sums)}, tokens, "
                f"{activation.shape[-1]}] was expected: policies that flatten or route tokens cannot be projected."
            )
        slot, left, right = projection.block(layer)
        seen = (activation @ right).flatten(1, -2)  # [rows, t, k]
        if not output.requires_grad:  # the first layers: no parameter before them requires a gradient now
            output.requires_grad_(True)

        def backward_hook(delta: Tensor) -> None:
            moved = (delta @ left).flatten(1, -2)
            block = torch.einsum("rti,rtj->rij", moved.to(sums.dtype), seen.to(sums.dtype))
            sums[:, slot] += block.flatten(1)

        output.register_hook(backward_hook)

    with ExitStack() as hooks:
        for layer in projection.layers.values():
            hooks.enter_context(layer.register_forward_hook(forward_hook))
        yield


@contextmanager
def _only_activations(policy: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, no recomputation of activations) and no gradients of parameters."""
    training = [module for module in policy.modules() if module.training]
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    policy.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


THINNED = 1024  # most coordinates of simulated steps: enough for a cosine, and every layer has some of them


class Half(NamedTuple):
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
    """h, the size of the halves of every prompt's scored rollouts: half the fewest, not below `smallest`."""
    size = int(torch.isfinite(rewards).sum(dim=1).min()) // 2
    if size < smallest:
        raise UserError(
            f"pool: halves of {smallest} scored rollouts a prompt are needed (N, and the largest m), got {size}: "
            f"raise --pool to {2 * smallest} or more, or lower -N or -m."
        )
    return size


def split_halves(rewards: Tensor, scores: Tensor, size: int, generator: torch.Generator) -> tuple[Half, Half]:
    """Two disjoint random halves of `size` scored rollouts a prompt, of rewards [Q, M] and scores [Q, M, D]."""
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
        self.products = torch.stack([each @ each.mT for each in scores])  # [Q, G, m, m], in each group
        self.thinned = scores[..., :: half.stride].contiguous()  # [Q, G, m, D'], the coordinates of simulated steps

    def weights(self, estimator: AdvantageEstimator) -> Tensor:
        """`A_i/m`, the factor of each rollout's score vector in its group's gradient: [Q, G, m] float64."""
        rewards = self.half.rewards[:, : self.num_groups * self.m].unflatten(1, (self.num_groups, self.m))
        return (estimator(rewards.flatten(0, 1)) / self.m).view(rewards.shape)

    def gradients(self, weights: Tensor) -> Tensor:
        """`sum_i weights_i s_i` of every group, thinned: [Q, G, D']."""
        factors = weights.to(self.thinned.dtype)[:, :, None]
        return torch.stack([torch.bmm(each, scores)[:, 0] for each, scores in zip(factors, self.thinned, strict=True)])

    def mean_and_noise(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the groups' gradients [Q, D] and trace of the covariance of one group's [Q], both float64: as groups
        are independent, their sample variance `(sum_g |e_g|^2 - G |mean|^2)/(G - 1)`; NaN for a single group."""
        shares = weights.new_zeros(self.half.rewards.shape)
        shares[:, : self.num_groups * self.m] = weights.flatten(1)
        shares = (shares / self.num_groups).to(self.half.scores.dtype)
        mean = torch.stack([each @ scores for each, scores in zip(shares, self.half.scores, strict=True)]).double()
        lengths = torch.einsum("qgi,qgij,qgj->q", weights, self.products.double(), weights)
        if self.num_groups < 2:
            return mean, torch.full_like(lengths, float("nan"))
        return mean, (lengths - self.num_groups * mean.square().sum(dim=-1)).clamp(min=0) / (self.num_groups - 1)
