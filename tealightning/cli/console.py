"""Keep the noise of libraries off the screen."""

import io
import logging
import os
import sys
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


class _CurrentStderr(io.TextIOBase):
    """Writes to what `sys.stderr` is at the time."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def log_to_current_stderr() -> None:
    """Let libraries log to `sys.stderr` as it is at the time and not as it was when they were imported: a progress bar
    replaces it to put what is written above itself."""
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler and handler.stream in (sys.stderr, sys.__stderr__):
                handler.setStream(_CurrentStderr())
