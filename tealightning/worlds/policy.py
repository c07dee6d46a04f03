"""Small language models trained from scratch: tokenizers, architecture, optimizers, training and sampling."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tealightning.errors import UserError

EOS = "<|eos|>"
PAD = "<|pad|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE, so that every text has tokens and decodes to itself; nothing is added to a text.

    Merges never cross the start of a word, so a text cut before a word has the tokens of its first part.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return fast_tokenizer(tokenizer, max_positions)


def fast_tokenizer(tokenizer: Tokenizer, max_positions: int) -> PreTrainedTokenizerFast:
    """A tokenizer for transformers, with an end-of-text and a distinct padding token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of each text, never cut."""
    return tokenizer(list(texts), verbose=False)["input_ids"]


def check_sizes(config: Any) -> None:
    """Refuse a world's configuration whose `hidden_size` is not made of whole heads."""
    if config.hidden_size % config.head_size:
        raise UserError(f"hidden_size must be a multiple of head_size={config.head_size}, got {config.hidden_size}.")


def llama_config(tokenizer: PreTrainedTokenizerFast, sizes: Any, *, layers: int, max_positions: int) -> LlamaConfig:
    """Architecture of a world's models, whose configuration `sizes` is; untied embeddings."""
    heads = sizes.hidden_size // sizes.head_size
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=sizes.head_size,
        max_position_embeddings=max_positions,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )


def new_policy(architecture: LlamaConfig) -> LlamaForCausalLM:
    """An untrained policy without sampling defaults; its weights are drawn from torch's global random stream."""
    model = LlamaForCausalLM(architecture)
    special = dict(eos_token_id=architecture.eos_token_id, pad_token_id=architecture.pad_token_id)
    model.generation_config = GenerationConfig(**special)
    return model


def train_policy(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    architecture: LlamaConfig,
    *,
    steps: int,
    batch_size: int,
    sequence_length: int,
    lr: float,
    muon_lr: float,
    seed: int,
    progress: bool,
) -> LlamaForCausalLM:
    """Next-token training on texts, joined by end-of-text tokens in a new random order every epoch.

    A step takes `batch_size` rows of `sequence_length` tokens; for the learning rates see `train`.
    """
    torch.manual_seed(seed)
    model = new_policy(architecture)
    rows = _endless_rows(tokenize(texts, tokenizer), tokenizer.eos_token_id, batch_size, sequence_length + 1, seed=seed)
    bar = "Policy" if progress else None
    return train(
        model, lambda _: next_token_loss(model, next(rows)), steps=steps, adamw_lr=lr, muon_lr=muon_lr, description=bar
    )


def next_token_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross-entropy of `rows` [B, T] in nats per token."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _endless_rows(texts: list[list[int]], eos: int, batch_size: int, length: int, *, seed: int) -> Iterator[Tensor]:
    rng = random.Random(seed)
    width = batch_size * length
    stream: list[int] = []
    while True:
        for ids in rng.sample(texts, len(texts)):
            stream += [*ids, eos]
            while len(stream) >= width:
                yield torch.tensor(stream[:width]).view(batch_size, -1)
                stream = stream[width:]


@torch.no_grad()
def sample_completions(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    description: str | None = None,
) -> list[str]:
    """Sample one completion per prompt from the plain softmax at `temperature`, with torch's global random stream.

    A completion ends before its end-of-text token. `description` is the text of a progress bar; None = no bar.
    """
    sampling = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,  # transformers would keep only the 50 most likely tokens
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompt_ids, eos = tokenize(prompts, tokenizer), tokenizer.eos_token_id
    completions: list[str] = []
    starts = range(0, len(prompt_ids), batch_size)
    for start in track(starts, description=description or "", disable=description is None):
        batch = tokenizer.pad({"input_ids": prompt_ids[start : start + batch_size]}, return_tensors="pt")
        sampled = model.generate(**batch, generation_config=sampling)[:, batch["input_ids"].shape[1] :]
        for ids in sampled.tolist():
            completions.append(tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids))
    return completions


def train(
    model: Any,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    adamw_lr: float,
    muon_lr: float,
    weight_decay: float = 0.1,
    float32: bool = False,
    description: str | None,
) -> Any:
    """Follow the clipped gradients of `loss(step)`: Muon on the layers' matrices, AdamW on the rest; returns `model`.

    Muon (Jordan et al., 2024) orthogonalises each matrix's momentum. From scratch on a small corpus it reaches in 300
    steps a held-out loss for which AdamW needs several times as many. The learning rates are peaks: a linear warm-up
    over the first 5%, then cosine decay to a tenth. `muon_lr` is on AdamW's scale. Norms have no weight decay.
    `float32`: see `Float32Muon`. `description` is the text of a progress bar; None = no bar.
    """
    named = list(model.named_parameters())
    layers = [p for name, p in named if p.dim() >= 2 and ".layers." in name]
    matrices = [p for name, p in named if p.dim() >= 2 and ".layers." not in name]  # embeddings and heads
    vectors = [p for _, p in named if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    muon: Any = Float32Muon if float32 else partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=adamw_lr, betas=(0.9, 0.95)),
        muon(layers, lr=muon_lr, weight_decay=weight_decay),
    ]
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    model.train()
    for step in track(range(steps), description=description or "", disable=description is None):
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


class Float32Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` in float32, with Nesterov momentum .95: a CPU without bfloat16 products needs a twentieth of
    the time."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=0.95))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; there is no closure."""
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalized(parameter.grad.lerp(momentum, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix with about the singular vectors of `matrix` and singular values near 1, by five Newton-Schulz steps."""
    x = matrix / matrix.norm().clamp_min(1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x
