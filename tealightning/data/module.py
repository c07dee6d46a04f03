"""Lightning data module: from files or hub data sets to loaders of prompts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from tealightning.checks import check_text
from tealightning.data.loader import EvaluationLoader, PromptLoader
from tealightning.data.prompts import PromptSet, build_prompt_set
from tealightning.data.sources import parse_source, read_rows
from tealightning.errors import UserError
from tealightning.text.chat import ChatFormatter, ChatTemplate, check_template
from tealightning.types import Split

_PHASES: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"), "validate": ("val",), "test": ("test",), None: ("train", "val", "test"),
}  # fmt: skip


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Errors about what `setting` names begin with it."""
    try:
        yield
    except UserError as error:
        told = f"{setting}.{error}" if setting == "data" else f"{setting}: {error}"
        raise type(error)(told).with_traceback(error.__traceback__) from error.__cause__


class PromptDataModule(pl.LightningDataModule):
    """Prompts for training, validation and test; generation happens elsewhere.

    A source is the path of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, perhaps compressed (`.gz`), or a
    folder or hub id of a data set: `prompts.jsonl`, `prompts.csv@[:90%]`, `org/name`, `org/name:config@train[:1000]`.

    Args:
        train: Source of training prompts.
        val: Source of validation prompts; None = no validation.
        test: Source of test prompts.
        prompt_column: Column with the prompt: a text, or a list of messages `{"role": ..., "content": ...}`. All other
            columns reach the reward as metadata.
        id_column: Column with a unique identifier; None = `id` if there is one, else the row's number.
        system_prompt: Put before every prompt that has no system message. Engines see it; rewards see the prompt as it
            is in the data.
        chat_template: `auto` (the tokenizer's, if it has one), true (it must have one), false (prompts are plain text
            to be continued, control tokens included) or the path of a Jinja file.
        chat_template_kwargs: Arguments of the chat template, such as `enable_thinking: false`. A column of this name
            adds to them for its prompt.
        tools_column: Column with the tools of a prompt, a list of JSON schemas for the chat template; None = no tools.
        tokenizer: Folder or hub id; None = the policy's. A tokenizer object may be assigned to the attribute.
        batch_size: Training prompts per rank and step.
        val_batch_size: Validation and test prompts per rank and batch; None = `batch_size`.
        max_prompt_tokens: Longer prompts are dropped, with a warning that counts them; None = keep all.
        seed: Seed of the shuffle.
    """

    def __init__(
        self,
        *,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        prompt_column: str = "prompt",
        id_column: str | None = None,
        system_prompt: str | None = None,
        chat_template: ChatTemplate = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        tools_column: str | None = "tools",
        tokenizer: str | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_prompt_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        limits = {"batch_size": batch_size, "val_batch_size": val_batch_size, "max_prompt_tokens": max_prompt_tokens}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        if seed < 0:
            raise UserError(f"seed must be at least 0, got {seed}.")
        check_template(chat_template)
        if system_prompt is not None:
            check_text("system_prompt", system_prompt)
        self.sources: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        self.prompt_column = prompt_column
        self.id_column = id_column
        self.system_prompt = system_prompt
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs
        self.tools_column = tools_column
        self.tokenizer: Any = tokenizer
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed
        self.prompt_sets: dict[Split, PromptSet] = {}
        self._train_loader: PromptLoader | None = None

    def prepare_data(self) -> None:
        """Download hub data once per machine, before every rank reads it."""
        for phase, source in self.sources.items():
            with _named(f"data.{phase}"):
                if source is not None and not parse_source(source).is_file:
                    read_rows(source)

    def setup(self, stage: str | None = None) -> None:
        """Read, check and encode the splits that `stage` uses ("fit", "validate", "test"; None = all that are set).

        Raises:
            FileNotFoundError, ValueError: if the stage's source is not set, or cannot be read, checked or encoded.
        """
        phases = _PHASES[stage]
        if stage is not None and self.sources[phases[0]] is None:
            raise UserError(f"data.{phases[0]} is not set: give it a file or a data set of the hub.")
        formatter = self._formatter()
        for phase in phases:
            if (source := self.sources[phase]) is not None:
                with _named(f"data.{phase}"):
                    self.prompt_sets[phase] = build_prompt_set(
                        read_rows(source),
                        source=source,
                        formatter=formatter,
                        prompt_column=self.prompt_column,
                        id_column=self.id_column,
                        system_prompt=self.system_prompt,
                        max_prompt_tokens=self.max_prompt_tokens,
                        check_metadata=self._checks_of_rewards(),
                    )
        self._train_loader = None
        if stage == "fit":
            self._check_steps()

    def train_dataloader(self) -> PromptLoader:
        """The training stream. The same one until the next `setup`, so that asking again does not start it anew."""
        if self._train_loader is None:
            overfit = getattr(self.trainer, "overfit_batches", 0)
            settings: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed, "overfit": overfit}
            self._train_loader = PromptLoader(self.prompt_sets["train"], **settings, **self._ranks())
        return self._train_loader

    def val_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        """Every validation prompt once; an empty list without validation, which Lightning then skips."""
        return self._evaluation_loader("val") if "val" in self.prompt_sets else []

    def test_dataloader(self) -> EvaluationLoader:
        """Every test prompt once."""
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Where the training stream stands. Lightning saves the loader's own state too, but does not restore it from a
        checkpoint that was written at the end of an epoch."""
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the training stream, where there is one; called after `setup`."""
        if "train" in state and "train" in self.prompt_sets:  # not when a checkpoint is only evaluated
            self.train_dataloader().load_state_dict(state["train"])

    def _evaluation_loader(self, phase: Split) -> EvaluationLoader:
        return EvaluationLoader(self.prompt_sets[phase], batch_size=self.val_batch_size, **self._ranks())

    def _check_steps(self) -> None:
        """Whether there are prompts for a step, and validations within an epoch, before a model is loaded."""
        with _named("data.batch_size"):
            steps = len(self.train_dataloader())
        if self.trainer is None or "val" not in self.prompt_sets:
            return
        share, batches = self.trainer.limit_val_batches, len(self._evaluation_loader("val"))
        if isinstance(share, float) and 0 < share * batches < 1:
            raise UserError(
                f"trainer.limit_val_batches={share} of {batches} batches is none: at least {1 / batches:.2g}."
            )
        if self.trainer.check_val_every_n_epoch is None:
            return
        limit, interval = self.trainer.limit_train_batches, self.trainer.val_check_interval
        steps = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        if isinstance(interval, int) and interval > steps and self.trainer.limit_val_batches:
            raise UserError(
                f"trainer.val_check_interval must be at most {steps}, the steps of an epoch, got {interval}; or set "
                "trainer.check_val_every_n_epoch=null, and it counts steps over epochs."
            )

    def _formatter(self) -> ChatFormatter:
        tokenizer = self.tokenizer
        if tokenizer is None:
            tokenizer = getattr(self.trainer and self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise UserError("no tokenizer: set data.tokenizer, or use a module that has the attribute `tokenizer`.")
        if isinstance(tokenizer, str):
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
            except (OSError, ValueError) as error:
                raise UserError(f"data.tokenizer {tokenizer!r} is no folder or hub id of one: {error}") from error
        with _named("data"):
            formatter = ChatFormatter(
                tokenizer,
                self.chat_template,
                chat_template_kwargs=self.chat_template_kwargs,
                tools_column=self.tools_column,
            )
        if self.system_prompt is not None and not formatter.uses_template:
            raise UserError(
                "data.system_prompt needs a chat template, and prompts are used as plain text here: put it into the "
                "prompts, or set data.chat_template."
            )
        formatter.warn_of_template(self.system_prompt)
        return formatter

    def _checks_of_rewards(self) -> list[Callable[[dict[str, Any]], None]]:
        """`check_metadata` of the rewards that the trainer's callbacks hold, for training or as gold."""
        callbacks = self.trainer.callbacks if self.trainer else []  # type: ignore[attr-defined]
        rewards: list[Any] = [getattr(callback, name, None) for callback in callbacks for name in ("reward", "gold")]
        return [reward.check_metadata for reward in rewards if hasattr(reward, "check_metadata")]

    def _ranks(self) -> dict[str, int]:
        """Which share of the prompts is this process's, as Lightning says: ranks that split one model share prompts."""
        kwargs = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        return {"rank": kwargs["rank"], "world_size": kwargs["num_replicas"]}
