"""Saves the trained policy in Hugging Face format."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from tealightning.callbacks.folders import run_folder


class ExportPolicy(Callback):
    """When training ends, writes `<run folder>/policy`: safetensors weights, config and tokenizer, as
    `AutoModelForCausalLM.from_pretrained` and vLLM load them.

    Args:
        folder: Name inside the run's folder.
    """

    def __init__(self, folder: str = "policy") -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        target = run_folder(trainer) / self.folder
        pl_module.export(str(target))  # type: ignore[operator]
        rank_zero_info(f"Trained policy: {target}")
