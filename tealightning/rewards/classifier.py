"""Reward model with one label, scored exactly: no truncation, no squashing, no dependence on the batch."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tealightning.adapter_folder import find_adapter, merged, refuse_quantized
from tealightning.checks import check_choice, check_integer
from tealightning.errors import UserError
from tealightning.pretrained import base_of, check_weights, load_tokenizer, refuse_pickled_weights
from tealightning.registry import register
from tealightning.rewards.base import Metadata, Reward
from tealightning.rewards.sequence_scores import SequenceScorer, longest_sequence
from tealightning.text.chat import ChatFormatter, ChatTemplate, check_template
from tealightning.text.pairs import PairEncoder, pair_form, separates
from tealightning.training.micro_batches import tokens_of_a_pass
from tealightning.types import Prompt

_TRIAL = "The answer is that a score of a short text must not depend on any longer text that is in its batch too"


@register
class SequenceClassifierReward(Reward):
    """The logit of a one-label `AutoModelForSequenceClassification`, with the model's own tokenizer and template.

    The score is read at the sequence's last token, whatever the padding token is. Where the padding token equals
    `eos`, the model's own forward pass would step back over a final `eos`; this one does not (nor does vLLM).

    Args:
        model: Folder or hub id of the reward model.
        tokenizer: Folder or hub id of its tokenizer; None = the one saved with the model.
        dtype: Data type of weights and scores. `bfloat16` has 8 significant bits: scores near 10 are then multiples of
            1/16, and tied maxima tell an estimator of the upper tail nothing.
        batch_size: Most completions of one forward pass.
        batch_tokens: Most tokens of one forward pass, padding included (a longer sequence goes alone); None = 16,384 on
            a GPU and 2,048 on a CPU.
        max_length: Longest prompt and completion together, in tokens; None = what the model was built for. Longer ones
            are unscorable (NaN), never truncated.
        chat_template: `auto` (the tokenizer's, if it has one: prompt and completion become user and assistant
            messages), true, false (completion appended to the prompt's text) or the path of a Jinja file.
        chat_template_kwargs: Arguments of the chat template, such as `enable_thinking: false`.
        pair: Encode prompt and completion as a pair of texts, as encoders that were trained on pairs read them, instead
            of one text. None = false, with a warning if the tokenizer has a form for pairs and no chat template.
        tools_column: Column with the tools of a prompt, a list of JSON schemas for the chat template; None = no tools.
        trust_remote_code: Run model code that ships with the weights.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 64,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        chat_template: ChatTemplate = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        pair: bool | None = None,
        tools_column: str | None = "tools",
        trust_remote_code: bool = False,
    ) -> None:
        check_template(chat_template)
        if pair and chat_template not in ("auto", False):
            raise UserError(f"pair=True uses no chat template: leave out chat_template={chat_template!r}.")
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens), ("max_length", max_length)):
            if value is not None:
                check_integer(name, value, 1)
        self.model_path = model
        self.tokenizer_path = tokenizer or model
        self.dtype = check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.max_length = max_length
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs
        self.pair = pair
        self.tools_column = tools_column
        self.trust_remote_code = trust_remote_code
        self.too_long = 0
        """Completions met so far that were longer than `max_length`."""
        self._model: Any = None
        self._scorer: SequenceScorer | None = None
        self._formatter: ChatFormatter | PairEncoder | None = None

    def check(self) -> None:
        """Read configuration and tokenizer, not the weights; a ValueError says that it is no reward model."""
        check_weights(self.model_path, argument="model")
        self._load_config()
        self._load_formatter()

    def setup(self, device: torch.device) -> None:
        """Load model and tokenizer on `device`; a ValueError says that they cannot be loaded, that the model has no
        trained head of one label, or that there is no template."""
        if self._model is None:
            formatter = self._formatter = self._load_formatter()
            model = self._load_model()
            known = [longest_sequence(model), formatter.tokenizer.model_max_length]
            limit = min((n for n in known if n is not None and 0 < n < 10**9), default=None)
            if limit is not None and self.max_length is not None and self.max_length > limit:
                raise UserError(
                    f"max_length={self.max_length}, but reward model {self.model_path!r} takes {limit} tokens."
                )
            self.max_length = self.max_length or limit
            if self.dtype != "float32":
                warnings.warn(
                    f"Reward model {self.model_path!r} scores in {self.dtype}: scores are rounded and ties in the "
                    "upper tail become likely. Use dtype=float32 where memory allows.",
                    stacklevel=2,
                )
            if isinstance(formatter, ChatFormatter) and not formatter.uses_template and self.pair is None:
                self._warn_of_pairs(formatter.tokenizer)
            scorer = SequenceScorer(model.to(device))
            self._try(scorer, formatter.tokenizer)
            self._model, self._scorer = model, scorer
        self._model.to(device)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], metadata: Metadata) -> Tensor:
        """[B] float64 logits; NaN where prompt and completion together are longer than `max_length`."""
        if self._scorer is None or self._formatter is None:
            raise RuntimeError("SequenceClassifierReward.setup(device) must be called before the first score.")
        types = None
        if isinstance(self._formatter, PairEncoder):
            sequences, types = self._formatter.encode(prompts, completions)
        else:
            sequences = self._formatter.encode_answers(prompts, completions, metadata=metadata)
        scores = torch.full((len(sequences),), float("nan"), dtype=torch.float64)
        lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64)
        scorable = ((lengths > 0) & (lengths <= (self.max_length or math.inf))).nonzero()[:, 0]
        unscorable = len(sequences) - len(scorable)
        if unscorable and not self.too_long:
            warnings.warn(
                f"{unscorable} completions are longer than the {self.max_length} tokens that "
                f"reward model {self.model_path!r} takes (prompt included): they are unscorable (NaN), and so will "
                "later ones be, without this warning.",
                stacklevel=2,
            )
        self.too_long += unscorable
        max_tokens = self.batch_tokens or tokens_of_a_pass(self._model.device)
        for rows in self._scorer.batches(lengths, scorable, max_tokens=max_tokens, max_rows=self.batch_size):
            scores[rows] = self._scorer.scores([sequences[i] for i in rows], types and [types[i] for i in rows])
        return scores

    def close(self) -> None:
        """Drop the model."""
        self._model = self._scorer = self._formatter = None

    def __repr__(self) -> str:
        return f"SequenceClassifierReward({self.model_path!r}, dtype={self.dtype!r}, max_length={self.max_length})"

    def _try(self, scorer: SequenceScorer, tokenizer: Any) -> None:
        """Refuse a model that cannot score a plain text, and find out whether its batches may be padded."""
        texts = [_TRIAL[:length] for length in (10, 20, 30, 50, 80, len(_TRIAL))]
        encoded = {
            len(ids): ids
            for ids in tokenizer(texts, verbose=False)["input_ids"]
            if 0 < len(ids) <= (self.max_length or math.inf)
        }
        if len(encoded) < 2:
            scorer.pads = False
            return
        try:
            difference = scorer.try_padding(list(encoded.values()))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each model has errors of its own for what it lacks
            raise self._unusable(f"it cannot score a text: {type(error).__name__}: {error}") from error
        if difference > 0:
            warnings.warn(
                f"Padding changes the scores of reward model {self.model_path!r} (by {difference:.2g} in a trial): "
                "only completions of one length share a batch. That is exact, and slower.",
                stacklevel=3,
            )

    def _warn_of_pairs(self, tokenizer: Any) -> None:
        if separates(pair_form(tokenizer), tokenizer.bos_token_id):
            warnings.warn(
                f"Reward model {self.model_path!r} reads prompt and completion as one text. If it was trained on "
                "pairs, set pair=true; pair=false says that one text is right, and ends this warning.",
                stacklevel=3,
            )

    def _load_config(self) -> Any:
        from transformers import AutoConfig

        adapter = find_adapter(self.model_path, "model")
        try:
            path = base_of(self.model_path, argument="model")
            config = AutoConfig.from_pretrained(path, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            raise self._unusable(str(error)) from error
        if adapter is not None:
            refuse_quantized(config, adapter)
            config.num_labels = adapter.num_labels or config.num_labels
        if config.num_labels != 1:
            raise self._unusable(f"it has {config.num_labels} labels, and a reward model 1 (num_labels in config.json)")
        return config

    def _load_model(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        refuse_pickled_weights(self.model_path, "model")
        config, adapter = self._load_config(), find_adapter(self.model_path, "model")
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.model_path if adapter is None else adapter.base,
                config=config,
                dtype=getattr(torch, self.dtype),
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                use_safetensors=True,
            )
        except (OSError, ValueError) as error:
            refuse_pickled_weights(self.model_path, "model", error)
            raise self._unusable(str(error)) from error
        if lacking := set(info["missing_keys"]) - set(adapter.shapes if adapter else ()):
            missing = ", ".join(sorted(lacking))
            raise self._unusable(f"it lacks {missing}, which would be random numbers. Is it a reward model?")
        if adapter is not None:
            model = merged(model, adapter)
        model.config.use_cache = False  # one pass: keys and values would only take memory
        return model.requires_grad_(False).eval()

    def _load_formatter(self) -> ChatFormatter | PairEncoder:
        path, trusted = self.tokenizer_path, self.trust_remote_code
        tokenizer = load_tokenizer(path, trust_remote_code=trusted, argument="reward model")
        if self.pair:
            return PairEncoder(tokenizer)
        return ChatFormatter(
            tokenizer,
            self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            tools_column=self.tools_column,
        )

    def _unusable(self, reason: str) -> UserError:
        return UserError(f"model {self.model_path!r} cannot be used as a reward model: {reason}")
