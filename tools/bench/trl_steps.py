"""Steps of TRL's GRPOTrainer, timed like those of `bench.steps`, and the settings that it is compared with."""

import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

from bench.steps import Shape
from bench.timing import PhaseClock, now
from bench.world import World

MISSING = """TRL cannot be imported ({error}). It is needed for this comparison only:
    pip install "tealightning[bench]"
or, where that would replace the installed torch,
    pip install --no-deps --target /tmp/trl trl==1.16.0 accelerate==1.15.0
    PYTHONPATH=/tmp/trl python tools/bench_peer.py"""


def check_trl() -> str:
    """TRL's version.

    Raises:
        SystemExit: with the ways to install it, if it cannot be imported.
    """
    try:
        import trl
        from trl import GRPOTrainer  # noqa: F401 - imports accelerate
    except ImportError as error:
        raise SystemExit(MISSING.format(error=error)) from None
    return trl.__version__


def build_trl(
    world: World,
    shape: Shape,
    *,
    engine: str,
    steps: int,
    warm_up: int,
    lr: float,
    importance_correction: bool,
    max_tokens: int,
    between: Callable[[], None],
) -> tuple[Any, list[dict[str, float]]]:
    """A GRPOTrainer that makes one update on each batch of rollouts, and the list that its `train` fills. A forward and
    backward pass has as many rollouts as fit into `max_tokens`, of those that divide a step.

    Each row has the seconds of a step: `whole`, `generate` (with vLLM the weight sync included) and `reward`.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import GRPOTrainer

    if engine == "vllm":
        _let_vllm_run_on_cpus()
    total = warm_up + steps + 1
    rollouts, longest = shape.prompts * shape.group_size, world.longest_prompt() + shape.tokens
    pass_rows = max(n for n in range(1, rollouts + 1) if rollouts % n == 0 and (n == 1 or n * longest <= max_tokens))
    texts = list(islice(cycle(world.prompts), shape.prompts))
    tokenizer = AutoTokenizer.from_pretrained(world.policy)
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})  # TRL needs one; this one is not in the vocabulary
    trainer = GRPOTrainer(
        model=world.policy,
        reward_funcs=world.reward_model,
        args=grpo_config(
            per_device_train_batch_size=pass_rows,
            gradient_accumulation_steps=rollouts // pass_rows,
            num_generations=shape.group_size,
            max_completion_length=shape.tokens,
            max_steps=total,
            learning_rate=lr,
            weight_decay=0.01,
            shuffle_dataset=False,
            use_vllm=engine == "vllm",
            vllm_mode="colocate",
            vllm_max_model_length=longest,
            vllm_importance_sampling_correction=importance_correction,
        ),
        train_dataset=Dataset.from_dict({"prompt": texts * total}),
        processing_class=tokenizer,
    )
    clock = PhaseClock()
    clock.time(trainer, "_generate", "generate")
    clock.time(trainer, "_calculate_rewards", "reward")
    rows: list[dict[str, float]] = []
    trainer.add_callback(_step_timer(clock, rows, warm_up=warm_up, between=between))
    trainer.remove_callback(PrinterCallback)
    return trainer, rows


def grpo_config(**settings: Any) -> Any:
    """GRPO as it is compared with: TRL's defaults in float32 on a CPU, a constant learning rate, nothing saved."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="tealightning-bench-trl-"),
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )


def _step_timer(clock: PhaseClock, rows: list[dict[str, float]], *, warm_up: int, between: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        """From the start of a step to the start of the next, less the time of `between`."""

        started = 0.0
        whole = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ended = now()
            if state.global_step > warm_up:
                rows.append({"whole": self.whole + ended - self.started} | self.phases)
            clock.take()
            self.whole, self.started = 0.0, now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.whole += now() - self.started
            self.phases = clock.take()
            if state.global_step > warm_up:
                between()
            self.started = now()

    return StepTimer()


def _let_vllm_run_on_cpus() -> None:
    """TRL loads weights into the live model, which fails on CPUs, where vLLM keeps them in another layout; and it lets
    vLLM choose type and memory. On GPUs nothing is changed."""
    from functools import partial

    import trl.generation.vllm_generation as generation
    from vllm import LLM
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    generation.LLM = partial(LLM, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**30)

    def sync_weights(self: Any) -> None:
        named = [(name, parameter.detach()) for name, parameter in self.model.named_parameters(remove_duplicate=False)]
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
        self.llm.reset_prefix_cache()

    generation.VLLMGeneration.sync_weights = sync_weights
