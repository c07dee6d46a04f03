"""Keep noise of libraries off the screen."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")


def quiet_startup() -> None:
    """Before anything heavy is imported: no warnings about what is done on purpose, no advertising."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    # Nothing is loaded by worker processes here: prompts are read from memory-mapped files.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Policies stay in eval mode on purpose: training scores tokens exactly as sampling did.
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(is_no_advertisement)  # the same filter is added once


@contextlib.contextmanager
def without_announcements() -> Iterator[None]:
    """Lightning does not say what it found and set: for trainers that are built to be looked at."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", *_LOGGERS)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def is_no_advertisement(record: logging.LogRecord) -> bool:
    """False for Lightning's recommendations of further products ("💡 Tip: ...")."""
    return "💡 Tip" not in record.getMessage()


def quiet_transformers() -> None:
    """No progress bars for reading and writing weights; downloads from the hub keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    were_disabled = are_progress_bars_disabled()
    disable_progress_bar()
    if not were_disabled:
        enable_progress_bars()
