"""Prompt data: sources, data module and loaders."""

from tealightning.data.loader import EvaluationLoader, PromptLoader
from tealightning.data.module import PromptDataModule

__all__ = ["EvaluationLoader", "PromptDataModule", "PromptLoader"]
