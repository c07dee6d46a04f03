"""HTTP client of a `vllm serve` process: generation and weight updates over its public routes, and checks of both."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from tealightning.errors import UserError
from tealightning.functional.log_probs import token_log_probs
from tealightning.rollouts.base import EngineContext, RolloutEngine
from tealightning.rollouts.transformers import eval_mode
from tealightning.types import SamplingConfig

_CONNECT_SECONDS = 10.0
_FLAG_OF_ROUTE = {
    "/inference/v1/generate": "start it with --enable-scale-out",
    "/v1/models": "is this the address of a vLLM server",
}


class ServerError(RuntimeError):
    """The server cannot be reached, refuses, or does not do what it should; the message says in which phase."""


class VLLMClient:
    """One server at `http://host:port`. Safe to use from several threads.

    Has the four methods with which vLLM's own weight-transfer backends drive a server (`VLLMWeightSyncClient`).

    Args:
        api_key: Sent as a bearer token; None = none.
        timeout_seconds: Longest wait for an answer.
        connections: Most requests at a time.
        explain: Called when the connection breaks; what it returns ends the message.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 600.0,
        connections: int = 64,
        explain: Callable[[], str] = str,
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self._connections = connections
        self._explain = explain
        # Prompts and key are for this server alone: no proxy or .netrc of the environment, no redirects. A connection
        # of its own for each request: the server closes idle ones, which would be a race with training.
        self._http = httpx.Client(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(timeout_seconds, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,
        )

    def is_healthy(self) -> bool:
        """Whether it answers and its engine lives."""
        try:
            return self._http.get(f"{self.url}/health", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    def max_model_len(self) -> int:
        """Longest prompt + completion in tokens that it serves."""
        return int(self._call("GET", "/v1/models", "asking for its models")["data"][0]["max_model_len"])

    def world_size(self) -> int:
        """Number of its workers, over all GPUs and replicas."""
        return int(self._call("GET", "/get_world_size", "asking for its world size")["world_size"])

    def generate(self, bodies: list[dict[str, Any]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(number of the request, its choices in order of their index) of each request to `/inference/v1/generate`, as
        they are answered. After one that fails, a ServerError, those not yet sent are not sent."""
        threads = ThreadPoolExecutor(max_workers=min(self._connections, len(bodies)))
        ask = partial(self._call, "POST", "/inference/v1/generate", "generating")
        numbers = {threads.submit(ask, body): number for number, body in enumerate(bodies)}
        try:
            for future in as_completed(numbers):
                yield numbers[future], sorted(future.result()["choices"], key=lambda choice: choice["index"])
        finally:  # without waiting: after an error, the others may take until their timeout
            threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is generated inside: what was being generated has ended, and what comes waits."""
        resume = partial(self._call, "POST", "/resume", "resuming it after a weight update")
        self._call("POST", "/pause?mode=wait", "waiting for its last requests before a weight update")
        try:
            yield
        except BaseException:
            with suppress(ServerError):  # the first error tells more
                resume()
            raise
        resume()

    def parameter_names(self) -> list[str] | None:
        """The model's own parameters; None if the server was started without this package's extension of workers."""
        body = {"method": "checkpoint_parameter_names", "timeout": self.timeout_seconds}
        try:
            return self._call("POST", "/collective_rpc", "asking for its parameters", body)["results"][0]  # type: ignore[no-any-return]
        except ServerError as error:
            if "is not implemented" in str(error):
                return None
            raise

    def load_checkpoint(self, folder: Path) -> list[str]:
        """Have every worker load the safetensors file in `folder`, a path on the server's own file system, and return
        the parameters that did not get all of their elements. Needs the extension."""
        body = {"method": "load_checkpoint", "args": [str(folder)], "timeout": self.timeout_seconds}
        answer = self._call("POST", "/collective_rpc", "loading the new weights", body)
        return sorted({name for incomplete in answer["results"] for name in incomplete})

    def reload_weights(self, folder: Path) -> None:
        """`load_checkpoint` without the extension: vLLM does not say what was loaded."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}, "timeout": self.timeout_seconds}
        self._call("POST", "/collective_rpc", "loading the new weights", body)

    def reset_prefix_cache(self) -> None:
        """Drop what was computed with the old weights."""
        if not self._call("POST", "/reset_prefix_cache", "dropping its prefix cache")["success"]:
            raise ServerError(f"The vLLM server at {self.url} could not drop its prefix cache: a request still runs.")

    def set_weight_version(self, version: str) -> None:
        """Every completion tells the version that sampled it."""
        self._call("POST", "/update_weight_version", "labelling its weights", {"new_version": version})

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        route = "/init_weight_transfer_engine"
        self._call("POST", route, "connecting for weight transfer", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("POST", "/start_weight_update", "starting a weight update")

    def update_weights(self, update_info: Any) -> None:
        self._call("POST", "/update_weights", "receiving weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = {} if weight_version is None else {"weight_version": weight_version}
        self._call("POST", "/finish_weight_update", "finishing a weight update", body)

    def _call(self, method: str, route: str, phase: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer, None if there is none. A ServerError names the phase and what the server says."""
        where = f"The vLLM server at {self.url}"
        try:
            answer = self._http.request(method, self.url + route, json=body)
        except httpx.TimeoutException as error:
            raise ServerError(f"{where} did not answer within {self.timeout_seconds:g} s while {phase}.") from error
        except httpx.TransportError as error:
            reason = f"{where} cannot be reached while {phase} ({type(error).__name__})."
            raise ServerError(f"{reason} {self._explain()}".rstrip()) from error
        if answer.status_code == 404:
            advice = _FLAG_OF_ROUTE.get(route, "start it with VLLM_SERVER_DEV_MODE=1")
            raise ServerError(f"{where} has no {route}: {advice}?")
        if answer.status_code == 401:
            raise ServerError(f"{where} refuses the API key: set rollout.engine.api_key_env.")
        if not answer.is_success:
            reason = f"{where} answered {answer.status_code} while {phase}: {_message(answer)}"
            raise ServerError(f"{reason} {self._explain()}".rstrip())
        return answer.json() if answer.content else None


def _message(answer: httpx.Response) -> str:
    """What a failed answer says."""
    try:
        error = answer.json().get("error", answer.text)
    except (ValueError, AttributeError):
        return answer.text[:2000]
    return str(error.get("message", error) if isinstance(error, dict) else error)[:2000]


def is_local(url: str | None) -> bool:
    """Whether `url` is of this machine's loopback interface; None is."""
    return url is None or httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")


def api_key_from(variable: str | None) -> str | None:
    """The key in an environment variable, which must be set."""
    if variable is not None and not os.environ.get(variable):
        raise UserError(f"rollout.engine.api_key_env names {variable}, and that variable is not set.")
    return None if variable is None else os.environ[variable]


# ---------------------------------------------------------------- checks

_PROMPT = [1, 2, 3, 4]  # ids that every model has; 0 is often the padding, whose embedding is 0


def check_length(client: VLLMClient, context: EngineContext) -> None:
    """Refuse, with a ServerError, a server that takes shorter sequences than `max_model_len`."""
    length = client.max_model_len()
    if length < context.max_model_len:
        raise ServerError(
            f"The vLLM server at {client.url} serves {length} tokens and rollout.max_model_len is "
            f"{context.max_model_len}: start it with --max-model-len {context.max_model_len}."
        )


def check_log_probs_mode(client: VLLMClient) -> None:
    """Refuse, with a ServerError, a server whose log-probs are not those that it samples with, after temperature and
    top-k."""
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
    """Of the 2 tokens (more if tied, as happens in bfloat16) that top-k leaves, the likeliest first. Their
    probabilities sum to 1, and their differences are inversely proportional to the temperature."""
    sampling = {"top_k": 2, "logprobs": 8, "max_tokens": 1, "ignore_eos": True, "seed": 0, "temperature": temperature}
    ((_, (choice,)),) = client.generate([{"token_ids": _PROMPT, "sampling_params": sampling}])
    (token,) = choice["logprobs"]["content"]
    by_id = {entry["token_id"]: entry["logprob"] for entry in token["top_logprobs"]}
    return sorted((value for value in by_id.values() if value > -1000), reverse=True)  # the others have -9999


def check_policy(engine: RolloutEngine, context: EngineContext) -> None:
    """Refuse, with a ServerError, a server that runs another model, 0.5 nats a token off the policy: coarsely, because
    rounding is no error, and training measures at every step."""
    sampling = SamplingConfig(max_new_tokens=max(1, min(8, context.max_model_len - len(_PROMPT))))
    ((completion,),) = engine.generate([_PROMPT], num_samples=1, sampling=sampling, seeds=[0])
    policy = context.policy
    ids = torch.tensor([[*_PROMPT, *completion.token_ids]], device=next(policy.parameters()).device)
    with torch.no_grad(), eval_mode(policy):
        expected = token_log_probs(policy(ids).logits[0, len(_PROMPT) - 1 : -1].float(), ids[0, len(_PROMPT) :]).cpu()
    difference = float((expected - torch.tensor(completion.log_probs)).abs().mean())
    if not difference < 0.5:
        raise ServerError(
            f"With the policy's weights, the vLLM server's log-probs are off by {difference:.2f} nats a token: it "
            f"serves another model than {context.policy_path}, or some of its weights did not change."
        )


def check_versions(client: VLLMClient, choices: Sequence[dict[str, Any]], expected: str) -> None:
    """Refuse, with a ServerError, completions of other weights than those labelled `expected`, the last pushed."""
    for choice in choices:
        versions = {span["version"] for span in choice["weight_versions"] or []}
        if versions != {expected}:
            raise ServerError(
                f"The vLLM server at {client.url} sampled with weights labelled {sorted(versions)} instead of "
                f"{expected!r}: was it restarted, or does another trainer use it?"
            )
