"""Check that a vLLM server does what rollouts rest on."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from tealightning.functional.log_probs import token_log_probs
from tealightning.rollouts.base import EngineContext, RolloutEngine
from tealightning.rollouts.vllm_client import ServerError, VLLMClient
from tealightning.types import SamplingConfig

_PROMPT = [1, 2, 3, 4]  # ids that every model has; 0 is often the padding, whose embedding is 0


def check_length(client: VLLMClient, context: EngineContext) -> None:
    """
    Raises:
        ServerError: if the server serves fewer tokens than `max_model_len`.
    """
    length = client.max_model_len()
    if length < context.max_model_len:
        raise ServerError(
            f"The vLLM server at {client.url} serves {length} tokens and rollout.max_model_len is "
            f"{context.max_model_len}: start it with --max-model-len {context.max_model_len}."
        )


def check_log_probs_mode(client: VLLMClient) -> None:
    """
    Raises:
        ServerError: if the server's log-probs are not those after temperature and top-k.
    """
    warm, cold = (_log_probs_of_two(client, temperature) for temperature in (2.0, 1.0))
    normalised = all(abs(math.fsum(map(math.exp, values)) - 1) < 1e-2 for values in (warm, cold))
    gaps = [values[0] - values[-1] for values in (warm, cold)]
    if not normalised or abs(2 * gaps[0] - gaps[1]) > 0.02 * (1 + gaps[1]):
        raise ServerError(
            f"The vLLM server at {client.url} does not return the log-probs that it samples with (of the likeliest "
            f"tokens under top_k=2, at temperature 2: {warm}, at 1: {cold}): start it with --logprobs-mode "
            "processed_logprobs."
        )


def _log_probs_of_two(client: VLLMClient, temperature: float) -> list[float]:
    """Of the 2 tokens that top-k leaves, the likeliest first; of more, if they are tied, as happens in bfloat16. Their
    probabilities sum to 1, and their differences are inversely proportional to the temperature."""
    sampling = {"top_k": 2, "logprobs": 8, "max_tokens": 1, "ignore_eos": True, "seed": 0, "temperature": temperature}
    ((_, (choice,)),) = client.generate([{"token_ids": _PROMPT, "sampling_params": sampling}])
    (token,) = choice["logprobs"]["content"]
    by_id = {entry["token_id"]: entry["logprob"] for entry in token["top_logprobs"]}
    return sorted((value for value in by_id.values() if value > -1000), reverse=True)  # the others have -9999


def check_policy(engine: RolloutEngine, context: EngineContext) -> None:
    """That the server runs this model. Coarse, because rounding is no error here: training measures at every step.

    Raises:
        ServerError: if its log-probs are 0.5 nats a token off the policy's.
    """
    sampling = SamplingConfig(max_new_tokens=max(1, min(8, context.max_model_len - len(_PROMPT))))
    ((completion,),) = engine.generate([_PROMPT], num_samples=1, sampling=sampling, seeds=[0])
    policy = context.policy
    training = [module for module in policy.modules() if module.training]
    ids = torch.tensor([[*_PROMPT, *completion.token_ids]], device=next(policy.parameters()).device)
    policy.eval()
    with torch.no_grad():
        expected = token_log_probs(policy(ids).logits[0, len(_PROMPT) - 1 : -1].float(), ids[0, len(_PROMPT) :]).cpu()
    for module in training:
        module.training = True
    difference = float((expected - torch.tensor(completion.log_probs)).abs().mean())
    if not difference < 0.5:
        raise ServerError(
            f"With the policy's weights, the vLLM server's log-probs are off by {difference:.2f} nats a token: it "
            f"serves another model than {context.policy_path}, or some of its weights did not change."
        )


def check_versions(client: VLLMClient, choices: Sequence[dict[str, Any]], expected: str) -> None:
    """
    Raises:
        ServerError: if a completion was sampled with other weights than the last that were pushed.
    """
    for choice in choices:
        versions = {span["version"] for span in choice["weight_versions"] or []}
        if versions != {expected}:
            raise ServerError(
                f"The vLLM server at {client.url} sampled with weights labelled {sorted(versions)} instead of "
                f"{expected!r}: was it restarted, or does another trainer use it?"
            )
