"""Transformers engine: `generate` of the trainer's own policy, no second copy of the weights."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tealightning.checks import check_integer
from tealightning.errors import UserError
from tealightning.functional.log_probs import filter_logits
from tealightning.registry import register
from tealightning.rollouts import generation_request as request
from tealightning.rollouts.base import EngineContext, RolloutEngine, TokenIds
from tealightning.training.padding import reads_padding
from tealightning.training.policy_weights import is_sharded
from tealightning.training.scoring import read_prompts
from tealightning.types import Completion, SamplingConfig

BLOCK = 128  # tokens of the vocabulary whose probabilities are added up first


@register
class TransformersEngine(RolloutEngine):
    """Samples from the trainer's live policy, so that its weights are never stale.

    Sample i of prompt p is a function of `seeds[p] + i` and the weights, whatever else is in the batch (up to
    rounding), so seeds must be far apart: see `prompt_seed`. A prompt is computed once for all its samples in a batch.

    Args:
        batch_size: Most completions at a time. One needs a key-value cache of prompt + completion and a few times V
            floats for the next token's distribution.
    """

    shares_weights = True

    def __init__(self, *, batch_size: int = 256) -> None:
        self.batch_size = check_integer("rollout.engine.batch_size", batch_size, 1)
        self._context: EngineContext | None = None
        self._use_cache = self._share_prompts = True

    def start(self, context: EngineContext) -> None:
        """Take over the policy; one that is sharded is refused with a ValueError, and a cache that changes what the
        policy says is not used."""
        if is_sharded(context.policy):
            raise UserError(
                "TransformersEngine samples with the trainer's own policy, and ranks cannot sample at their own pace "
                "with one that is sharded over them: use --rollout.engine=VLLMEngine with ModelParallelStrategy."
            )
        with torch.no_grad(), eval_mode(context.policy):
            self._use_cache = cache_is_right(context.policy)
            self._share_prompts = self._use_cache and shared_prompts_are_right(context.policy)
        if not self._use_cache:
            warnings.warn(
                f"{type(context.policy).__name__} of this transformers says something else with its key-value cache "
                "than without: completions are generated without it, more slowly.",
                stacklevel=2,
            )
        self._context = context

    def generate(
        self, prompt_token_ids: TokenIds, *, num_samples: int, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        context = self._context
        if context is None:
            raise RuntimeError("TransformersEngine.generate was called before start().")
        request.check_requests(prompt_token_ids, num_samples, sampling, seeds, context.max_model_len)
        rule = request.end_rule(context, sampling)
        by_length = sorted(range(len(seeds)), key=lambda p: len(prompt_token_ids[p]))  # little padding
        rows = [(p, i) for p in by_length for i in range(num_samples)]
        completions: dict[tuple[int, int], Completion] = {}
        with torch.no_grad(), eval_mode(context.policy):
            # Together are rows of any length, or, where a model would read padding, of one.
            unpadded = reads_padding(context.policy)
            for _, same in groupby(rows, key=lambda row: unpadded and len(prompt_token_ids[row[0]])):
                for chunk in _chunks(list(same), self.batch_size):
                    uniforms = torch.stack([_uniforms(seeds[p] + i, sampling.max_new_tokens) for p, i in chunk])
                    prompts = [prompt_token_ids[p] for p, _ in chunk]
                    caching = {"use_cache": self._use_cache, "share_prompts": self._share_prompts}
                    done = _complete(context, prompts, uniforms, sampling, rule, **caching)
                    completions.update(zip(chunk, done, strict=True))
        return [[completions[p, i] for i in range(num_samples)] for p in range(len(seeds))]

    def sync_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing to do: it samples from the trainer's own parameters."""

    def close(self) -> None:
        self._context = None


def _chunks(rows: list[Any], size: int) -> Iterator[list[Any]]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _complete(
    context: EngineContext,
    prompts: TokenIds,
    uniforms: Tensor,
    sampling: SamplingConfig,
    rule: request.EndRule,
    *,
    use_cache: bool,
    share_prompts: bool,
) -> list[Completion]:
    """One completion for each of R prompts; `uniforms` [R, max_new_tokens] float64 decide the tokens. With
    `share_prompts` each different prompt is computed once."""
    policy, pad = context.policy, context.tokenizer.pad_token_id
    if not isinstance(pad, int) or pad >= policy.get_input_embeddings().num_embeddings:
        pad = next(iter(rule.token_ids), 0)  # masked, so any id will do
    sampler = _Sampler(uniforms.to(context.device), sampling)
    stopping = _StopStrings(context.tokenizer, rule.strings, sampler)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # the sampler has chosen already
        num_beams=1,
        eos_token_id=rule.token_ids or None,
        pad_token_id=pad,
        use_cache=use_cache,
    )
    input_ids = request.padded(prompts, pad, side="left").to(context.device)
    mask = request.padded([[1] * len(ids) for ids in prompts], 0, side="left").to(context.device)
    given = {"past_key_values": _cached(policy, input_ids, mask)} if share_prompts and input_ids.shape[1] > 1 else {}
    generate(
        policy,
        input_ids,
        config,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([sampler]),
        stopping_criteria=StoppingCriteriaList([stopping] if rule.strings else []),
        **given,
    )
    return _cut(sampler, stopping.ended_at, context, rule)


def _cached(policy: Any, input_ids: Tensor, mask: Tensor) -> Any:
    """Keys and values of all tokens of the prompts [R, tp] but the last, with which `generate` begins."""
    distinct, prompt_of = torch.cat([mask, input_ids], dim=1)[:, :-1].unique(dim=0, return_inverse=True)
    width = mask.shape[1]
    _, cache = read_prompts(policy, distinct[:, width:], distinct[:, : width - 1].bool())
    cache.reorder_cache(prompt_of)
    return cache


def generate(policy: Any, input_ids: Tensor, config: GenerationConfig, **kwargs: Any) -> Any:
    """`policy.generate` with `config` alone: it takes what a caller leaves unset from the model folder's defaults."""
    defaults, policy.generation_config = policy.generation_config, config
    try:
        return policy.generate(input_ids, generation_config=config, **kwargs)
    finally:
        policy.generation_config = defaults


def cache_is_right(policy: Any) -> bool:
    """Whether a policy says the same with its cache as without, to a tenth of how far its logits are apart: much more
    than the rounding of any data type. In transformers 5.19 RWKV does not in batches, and MiniMax not after padding."""
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)
    config.return_dict_in_generate = config.output_logits = True
    device = next(policy.parameters()).device
    prompts = [[0, 1], [1, 0] if reads_padding(policy) else [1]]
    ids, mask = (request.padded(rows, 0, side="left").to(device) for rows in (prompts, [[1] * len(p) for p in prompts]))
    made = generate(policy, ids, config, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        cached = torch.stack([logits[row] for logits in made.logits[1:]]).float()
        whole = policy(made.sequences[row : row + 1, 2 - len(prompt) :], use_cache=False).logits[0, -3:-1].float()
        apart = (whole - whole.mean(dim=-1, keepdim=True)).norm()
        if (cached - whole).norm() > 0.1 * apart:  # where they are NaN, it is not the cache's fault
            return False
    return True


def shared_prompts_are_right(policy: Any) -> bool:
    """Whether a policy says the same where its prompts were computed once for several completions: to a thousandth of
    how far its logits are apart, a tenth in half precision."""
    if reads_padding(policy):  # it keeps a state of its own, which a trial could disturb
        return False
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)
    config.return_dict_in_generate = config.output_logits = True
    prompts = [[0, 1, 1, 0, 1, 0]] * 2 + [[1, 0]] * 2
    device = next(policy.parameters()).device
    ids, mask = (request.padded(rows, 0, side="left").to(device) for rows in (prompts, [[1] * len(p) for p in prompts]))
    plain = generate(policy, ids, config, attention_mask=mask)
    try:
        shared = generate(policy, ids, config, attention_mask=mask, past_key_values=_cached(policy, ids, mask))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # models fail at a cache that they are given in many ways, and can do without
        return False
    share = 0.1 if policy.dtype in (torch.bfloat16, torch.float16) else 1e-3
    goes_on = torch.ones(len(ids), dtype=torch.bool, device=device)
    for step, (expected, found) in enumerate(zip(plain.logits, shared.logits, strict=True)):
        apart = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
        if (goes_on & ((found - expected).norm(dim=-1) > share * apart)).any():
            return False
        position = ids.shape[1] + step  # after another token, which rounding can make, there is nothing to compare
        goes_on &= plain.sequences[:, position] == shared.sequences[:, position]
    return True


def _cut(sampler: "_Sampler", ended_at: list[int], context: EngineContext, rule: request.EndRule) -> list[Completion]:
    """The completions in what was recorded: a row runs on with the batch after its end."""
    ends = set(rule.token_ids)
    samples: list[tuple[list[int], list[float], bool]] = []
    for ids, log_probs, end in zip(sampler.token_ids.tolist(), sampler.log_probs.tolist(), ended_at, strict=True):
        by_token = next((t + 1 for t, token in enumerate(ids[: sampler.steps]) if token in ends), sampler.steps)
        length = min(by_token, end)
        samples.append((ids[:length], log_probs[:length], ids[length - 1] not in ends and length < end))
    return request.completions_of(context.tokenizer, samples, rule)


class _Sampler(LogitsProcessor):
    """Chooses the next tokens by inverse CDF and leaves `generate` one token with a score above -inf, so that it draws
    no random numbers, and records the log-prob of each sampled token where it is known."""

    def __init__(self, uniforms: Tensor, sampling: SamplingConfig) -> None:
        self.uniforms = uniforms  # [R, T] float64 in [0, 1)
        self.sampling = sampling
        self.filters = sampling.top_k > 0 or sampling.top_p < 1
        self.steps = 0
        self._probs: Tensor | None = None
        self.token_ids = torch.zeros(uniforms.shape, dtype=torch.int64, device=uniforms.device)
        self.log_probs = torch.zeros(uniforms.shape, dtype=torch.float32, device=uniforms.device)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        logits = scores.float()
        if self.sampling.temperature != 1:
            logits = logits / self.sampling.temperature
        if self.filters:  # the most likely token passes them anyway
            logits = filter_logits(logits, logits.argmax(dim=-1), top_k=self.sampling.top_k, top_p=self.sampling.top_p)
        self._probs = torch.empty_like(logits) if self._probs is None else self._probs
        probs = torch.softmax(logits, dim=-1, out=self._probs)  # new memory for each token would take longer
        tokens = inverse_cdf(probs, self.uniforms[:, self.steps])[:, None]
        if int(tokens.max()) >= probs.shape[-1]:  # where nothing is larger than NaN
            raise UserError(
                "the policy's logits are NaN or infinite, so there is nothing to sample from: its weights are no "
                "numbers any more (too high a learning rate?) or were none when they were loaded."
            )
        self.token_ids[:, self.steps] = tokens[:, 0]
        self.log_probs[:, self.steps] = probs.gather(-1, tokens)[:, 0].log()
        self.steps += 1
        return scores.fill_(float("-inf")).scatter_(-1, tokens, 0.0)  # a copy of `generate`'s own


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """[R] int64, the smallest v with `sum(probs[:v + 1]) > u * sum(probs)`; never one of probability 0.

    `probs` are [R, V], `uniforms` [R] float64 in [0, 1). The float64 sums are those of blocks of the vocabulary, whose
    own are rounded to float32, and then those within the block that was hit: all V of them would take longer than all
    else here.
    """
    if rest := -probs.shape[-1] % BLOCK:
        probs = nn.functional.pad(probs, (0, rest))
    blocks = probs.unflatten(-1, (-1, BLOCK))
    mass = blocks.sum(dim=-1).double()
    cdf = mass.cumsum(dim=-1)
    target = _below(uniforms[:, None] * cdf[:, -1:], cdf[:, -1:])
    block = torch.searchsorted(cdf, target, right=True).clamp(max=mass.shape[-1] - 1)  # NaN: beyond the last
    inside = blocks.take_along_dim(block[:, :, None], dim=1)[:, 0].cumsum(dim=-1, dtype=torch.float64)
    before = cdf.gather(-1, block) - mass.gather(-1, block)
    found = torch.searchsorted(inside, _below((target - before).clamp(min=0), inside[:, -1:]), right=True)
    return (block * BLOCK + found)[:, 0]


def _below(target: Tensor, total: Tensor) -> Tensor:
    """`target`, or the next number below `total` where rounding has made it no smaller."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


class _StopStrings(StoppingCriteria):
    """Ends a row at the first token with which the text of its completion contains a stop string."""

    def __init__(self, tokenizer: Any, strings: list[str], sampler: _Sampler) -> None:
        self.tokenizer = tokenizer
        self.strings = strings
        self.sampler = sampler
        rows, longest = sampler.uniforms.shape
        self.ended_at = [longest + 1] * rows  # tokens kept; beyond the longest = not matched
        # A token holds at least a byte, so the newest match lies within that many tokens; a few more for special tokens
        # in between, which have no text, and for the leading space that some tokenizers drop when they decode.
        self.window = max((len(s.encode()) for s in strings), default=0) + 8

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        steps = self.sampler.steps
        recent = self.sampler.token_ids[:, max(0, steps - self.window) : steps]
        texts = self.tokenizer.batch_decode(recent, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        hits = [request.first_match(text, self.strings) is not None for text in texts]
        self.ended_at = [min(end, steps) if hit else end for end, hit in zip(self.ended_at, hits, strict=True)]
        return torch.tensor(hits, device=input_ids.device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
