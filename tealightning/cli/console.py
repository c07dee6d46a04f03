"""Keep the noise of libraries off the screen."""

import logging
import os
import warnings


def quiet_startup() -> None:
    """Before anything heavy is imported: no warnings about what is done on purpose, no advertising."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Prompts are read from memory-mapped files, without worker processes; policies stay in eval mode on purpose:
    # training scores tokens exactly as sampling did.
    for message in (
        "args parameter is intended to run from within Python",
        "does not have many workers",
        r"module\(s\) in eval mode at the start of training",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_advertisement)  # the same filter is added once


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "💡 Tip" not in record.getMessage()


def quiet_transformers() -> None:
    """No progress bars for reading and writing weights; downloads from the hub keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    were_disabled = are_progress_bars_disabled()
    disable_progress_bar()
    if not were_disabled:
        enable_progress_bars()
