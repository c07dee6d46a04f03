"""Save the trained policy in Hugging Face format."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError

from tealightning.errors import UserError
from tealightning.reliability.files import run_folder, whole_folder


class ExportPolicy(Callback):
    """When training ends, writes `<run folder>/policy`: safetensors weights, config and tokenizer, as
    `AutoModelForCausalLM.from_pretrained` and vLLM load them. The folder is there once it is complete; until then an
    older one keeps its place.

    Args:
        folder: Name inside the run's folder.
    """

    def __init__(self, folder: str = "policy") -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """
        Raises:
            ValueError: if the disk does not take it.
        """
        target = run_folder(trainer) / self.folder
        if not trainer.is_global_zero:
            pl_module.export(str(target))  # gathers the weights, writes nothing
            return
        try:
            with whole_folder(target) as new:
                pl_module.export(str(new))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The trained policy could not be written to {target}: {error}. Nothing of it is there, and an older "
                "one is as it was. Free space on that disk and go on from the last checkpoint: without steps left to "
                "train, that writes the policy."
            ) from error
        rank_zero_info(f"Trained policy: {target}")
