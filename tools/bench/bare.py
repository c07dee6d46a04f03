"""The parts of a training step without a framework: what engine, reward model and autograd cost by themselves."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bench.no_engine import NoEngine
from bench.timing import seconds_of
from bench.world import World
from tealightning.pretrained import load_policy
from tealightning.rollouts import RolloutEngine
from tealightning.types import PromptBatch, RolloutBatch


class BareParts:
    """Generation, reward and training of one batch, each as its library is called by hand.

    Everything is prepared outside the timed calls: padded tensors of the shapes of a batch that was trained on, token
    ids of the reward model's input, an optimizer. Nothing is checked, logged or converted.

    Args:
        world: The models; the policy is loaded a second time and trained beside the trainer's.
        engine: The rollout engine, started; of vLLM's the `LLM` is used, of others the bare policy's `generate`.
        group_size: m.
        lr: Learning rate.
        max_tokens: Most padded tokens of a forward and backward pass.
    """

    def __init__(self, world: World, engine: RolloutEngine, *, group_size: int, lr: float, max_tokens: int) -> None:
        self.policy = load_policy(world.policy)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=lr)
        self.reward_model = AutoModelForSequenceClassification.from_pretrained(world.reward_model).eval()
        self.reward_tokenizer = AutoTokenizer.from_pretrained(world.reward_model)
        self.llm = getattr(engine, "_llm", None)
        self.only_trains = isinstance(engine, NoEngine)
        self.group_size = group_size
        self.max_tokens = max_tokens

    def run(self, batch: PromptBatch) -> dict[str, float]:
        """Seconds of each part on the shapes of `batch`, which has its rollouts."""
        rollouts = batch.rollouts
        assert rollouts is not None, "the step has run"
        if self.llm is not None:
            self.llm.reset_prefix_cache()
        inputs = self._reward_inputs(batch)
        with torch.random.fork_rng():
            if self.only_trains:
                return {"generate": 0.0, "reward": 0.0, "train": seconds_of(lambda: self.train(rollouts))}
            return {
                "generate": seconds_of(lambda: self.generate(batch.token_ids, rollouts)),
                "reward": seconds_of(lambda: self.reward(inputs)),
                "train": seconds_of(lambda: self.train(rollouts)),
            }

    def generate(self, prompts: list[list[int]], rollouts: RolloutBatch) -> None:
        """m completions a prompt."""
        length = rollouts.completion_ids.shape[1]
        if self.llm is not None:
            self._generate_with_vllm(prompts, length)
            return
        mask = rollouts.prompt_mask.long()
        self.policy.generate(rollouts.prompt_ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=length)

    def _generate_with_vllm(self, prompts: list[list[int]], length: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(n=self.group_size, max_tokens=length, logprobs=0, ignore_eos=True, detokenize=False)
        with torch.compiler.set_stance("force_eager"):  # as the engine has it: compiling takes longer than it saves
            self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    def _reward_inputs(self, batch: PromptBatch) -> Any:
        rollouts = batch.rollouts
        assert rollouts is not None
        prompts = [prompt for prompt in batch.prompts for _ in range(rollouts.group_size)]
        texts = [prompt + text for prompt, text in zip(prompts, rollouts.completions, strict=True)]
        return self.reward_tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")

    @torch.no_grad()
    def reward(self, inputs: Any) -> None:
        """One padded forward pass."""
        self.reward_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    def train(self, rollouts: RolloutBatch) -> None:
        """One update."""
        input_ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
        mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
        advantages = torch.linspace(-1, 1, len(input_ids))[:, None]
        weights = rollouts.completion_mask * advantages / rollouts.completion_lengths.sum()
        self.optimizer.zero_grad()
        for rows in torch.arange(len(input_ids)).split(max(1, self.max_tokens // input_ids.shape[1])):
            log_probs = self._log_probs(input_ids[rows], mask[rows].long(), weights.shape[1])
            (-weights[rows] * log_probs).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()

    def _log_probs(self, input_ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """[rows, length] of the last `length` tokens."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = self.policy(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=length + 1,
        )
        log_probs = output.logits[:, :-1].log_softmax(dim=-1)
        return log_probs.gather(-1, input_ids[:, -length:, None]).squeeze(-1)
