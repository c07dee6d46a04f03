"""The same with Lightning's Trainer: batches, evaluation, checkpoints, loggers and several devices come with it.

python docs/examples/train.py
"""

from functools import partial

import lightning.pytorch as pl
import torch

from tealightning import BestOfNReport, PostTrainingModule, PromptDataModule, RolloutCallback, SamplingConfig
from tealightning.estimators import OptimalTEA
from tealightning.rewards import FunctionReward
from tealightning.rollouts import TransformersEngine  # or VLLMEngine, which samples faster
from tealightning.worlds import build_prose


def letters(prompts, completions, metadata):
    """The reward: how often e comes in each completion."""
    return [float(completion.count("e")) for completion in completions]


def main(folder: str = "runs/prose_tiny", *, steps: int = 20, **trainer_settings) -> pl.Trainer:
    """Train; the report at the end has best-of-n before and after, and the paired difference."""
    world = build_prose(folder, size="tiny")
    module = PostTrainingModule(
        str(world.policy),
        OptimalTEA(target_n=128, alpha=1.0, scale="group_std", scale_weight=0.5),
        optimizer=partial(torch.optim.AdamW, lr=5e-3),
        ns=[1, 4, 16],
    )
    data = PromptDataModule(train=str(world.train_prompts), val=str(world.val_prompts), batch_size=4)
    sampling = SamplingConfig(max_new_tokens=12)
    rollout = RolloutCallback(TransformersEngine(), FunctionReward(letters), group_size=16, sampling=sampling)
    settings = {"max_steps": steps, "max_epochs": -1, "val_check_interval": steps, "check_val_every_n_epoch": None}
    settings |= {"num_sanity_val_steps": -1, "accelerator": "cpu", "logger": False} | trainer_settings
    trainer = pl.Trainer(callbacks=[rollout, BestOfNReport()], **settings)
    trainer.fit(module, data)
    return trainer


if __name__ == "__main__":
    main()
