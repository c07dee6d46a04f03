"""Hand-built rollouts and a tiny random policy, shared by the module's tests."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tealightning.training.policy_weights import whole
from tealightning.types import PromptBatch, RolloutBatch, SamplingConfig

VOCAB = 32


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=0,
            bos_token_id=None,
            initializer_range=0.5,
        )
        return LlamaForCausalLM(config).eval()


def save_tiny_policy(folder: Path) -> str:
    tiny_llama().save_pretrained(folder)
    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t1")), eos_token="t0", pad_token="t0"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_rollouts(rewards, *, seed: int = 0, sampling: dict | None = None) -> RolloutBatch:
    """Random prompts and completions of random lengths; `rollout_log_probs` are zeros on purpose."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.tensor(rewards, dtype=torch.float64)
    size, tp, t = rewards.numel(), 5, 6
    prompt_lengths = torch.randint(1, tp + 1, (rewards.shape[0],), generator=generator)
    prompt_lengths = prompt_lengths.repeat_interleave(rewards.shape[1])
    return RolloutBatch(
        prompt_ids=torch.randint(0, VOCAB, (rewards.shape[0], tp), generator=generator).repeat_interleave(
            rewards.shape[1], dim=0
        ),
        prompt_lengths=prompt_lengths,
        completion_ids=torch.randint(0, VOCAB, (size, t), generator=generator),
        completion_lengths=torch.randint(1, t + 1, (size,), generator=generator),
        rollout_log_probs=torch.zeros(size, t),
        truncated=torch.zeros(size, dtype=torch.bool),
        rewards=rewards,
        completions=["text"] * size,
        sampling=SamplingConfig(max_new_tokens=t, **(sampling or {})),
    )


def make_batch(rollouts: RolloutBatch, first_id: int = 0) -> PromptBatch:
    prompts = rollouts.rewards.shape[0]
    return PromptBatch(
        ids=[f"p{first_id + i}" for i in range(prompts)],
        prompts=["a prompt"] * prompts,
        token_ids=[[1]] * prompts,
        metadata=[{}] * prompts,
        rollouts=rollouts,
    )


def trained(policy) -> list[torch.Tensor]:
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


class KeepGradients(Callback):
    """The gradient of what is trained at each optimizer step, before clipping would be seen by the optimizer."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.gradients.append(torch.cat([whole(p.grad).flatten().clone() for p in trained(pl_module.policy)]))


def run_steps(module, batches, callbacks=(), ckpt_path=None, **trainer_kwargs):
    """Fit on hand-built batches; returns (trainer, gradients of each optimizer step)."""
    keep = KeepGradients()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keep, *callbacks],
        **trainer_kwargs,
    )
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer, keep.gradients
