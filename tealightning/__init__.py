"""tealightning: post-training of language models for best-of-N deployment, on PyTorch Lightning.

Importing the package loads no engine: `PostTrainingModule` and the rest are imported when first touched.
"""

from importlib import import_module
from typing import Any

from tealightning.registry import register
from tealightning.version import __version__

_LAZY = {
    "PostTrainingModule": "tealightning.training.module",
    "PolicyGradientLoss": "tealightning.training.micro_batches",
    "LoRA": "tealightning.training.lora",
    "PromptDataModule": "tealightning.data",
    "RolloutCallback": "tealightning.callbacks",
    "ResumableCheckpoint": "tealightning.callbacks",
    "BestOfNReport": "tealightning.callbacks",
    "ExportPolicy": "tealightning.callbacks",
    "SampleTable": "tealightning.callbacks",
    "EvaluationRecord": "tealightning.callbacks",
    "Budget": "tealightning.callbacks",
    "HealthChecks": "tealightning.callbacks",
    "Deadlines": "tealightning.callbacks",
    "UnhealthyRun": "tealightning.training.nonfinite",
    "BestOfN": "tealightning.metrics",
    "SamplingConfig": "tealightning.types",
}

__all__ = ["__version__", "register", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tealightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
