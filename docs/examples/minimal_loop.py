"""A whole post-training loop without a Trainer: engine, reward, estimator, loss, optimizer step.

    python docs/examples/minimal_loop.py

A tiny policy, built in seconds, learns to use the letter e: watch the best of 128 answers, trained with 16.
"""

import torch

from tealightning.estimators import OptimalTEA
from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.losses import clipped_policy_loss, token_weights
from tealightning.pretrained import load_policy, load_tokenizer
from tealightning.rewards import FunctionReward
from tealightning.rollouts import EngineContext, RolloutCollector, TransformersEngine, prompt_seed
from tealightning.training import micro_batches, scoring
from tealightning.types import PromptBatch, RolloutBatch, SamplingConfig
from tealightning.worlds import build_prose

PROMPTS = ["The", "When a", "It is", "If the file"]


def letters(prompts, completions, metadata):
    """The reward: how often e comes in each completion."""
    return [float(completion.count("e")) for completion in completions]


def backward(policy: torch.nn.Module, rollouts: RolloutBatch, advantages: torch.Tensor) -> None:
    """Add up the gradient of the policy loss over micro-batches of the rollouts that have an advantage."""
    sizes = {"num_tokens": rollouts.completion_lengths.sum(), "num_sequences": torch.tensor(len(advantages))}
    lengths = rollouts.prompt_lengths, rollouts.completion_lengths
    for rows in micro_batches.split_rows(*lengths, advantages.nonzero().squeeze(1), max_tokens=2048):
        scores = scoring.score_completions(policy, rollouts, rows)  # log-probs [rows, t] with gradient
        behaviour = scores.log_probs.detach()  # one step a batch: the policy is the one that sampled
        loss, _ = clipped_policy_loss(scores.log_probs, behaviour, advantages[rows], clip_lower=0.2, clip_upper=0.2)
        (token_weights(scores.mask, "token_mean", constant=1.0, **sizes) * loss).sum().backward()


def main(folder: str = "runs/prose_tiny", *, steps: int = 20) -> list[float]:
    """Train, and return the best of 128 after each step."""
    path = str(build_prose(folder, size="tiny").policy)  # or any causal LM, by folder or hub id
    policy, tokenizer = load_policy(path), load_tokenizer(path)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    batch = PromptBatch(ids=PROMPTS, prompts=list(PROMPTS), token_ids=ids, metadata=[{} for _ in PROMPTS])

    engine = TransformersEngine()
    context = {"policy_path": path, "device": torch.device("cpu"), "max_model_len": 64, "seed": 0}
    engine.start(EngineContext(policy=policy, tokenizer=tokenizer, **context))
    collector = RolloutCollector(engine, FunctionReward(letters), SamplingConfig(max_new_tokens=12), pad_token_id=0)
    estimator = OptimalTEA(target_n=128, alpha=1.0, scale="group_std", scale_weight=0.5)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)

    def rollouts(num_samples: int, step: int) -> RolloutBatch:
        seeds = [prompt_seed(0, f"{num_samples} samples", step, prompt) for prompt in PROMPTS]
        return collector.collect(batch, num_samples=num_samples, seeds=seeds, weights_version=step)[0]

    curve = []
    for step in range(steps):
        sampled = rollouts(16, step)
        optimizer.zero_grad()
        backward(policy, sampled, estimator(sampled.rewards).flatten().float())
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        curve.append(float(best_of_n(rollouts(128, 0).rewards, [128]).mean()))
        print(f"step {step + 1}: best of 128 is {curve[-1]:.2f}")
    return curve


if __name__ == "__main__":
    main()
