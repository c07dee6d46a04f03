"""Prompts computed once for all of their completions: the same log-probs and gradients, fewer tokens, or not done."""

import warnings
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from module_fixtures import VOCAB, make_batch, make_rollouts, run_steps, save_tiny_policy, tiny_llama, trained
from tool_scripts import tool
from transformers import LlamaForCausalLM

from tealightning import LoRA, PolicyGradientLoss, PostTrainingModule
from tealightning.estimators import build_estimator
from tealightning.training import shared_prompts
from tealightning.training.micro_batches import pass_tokens, split_groups
from tealightning.training.scoring import distinct_prompts, score_completions
from tealightning.training.shared_prompts import can_share_prompts, trial_rollouts
from tealightning.types import RolloutBatch, SamplingConfig

tiny = tool("bench/tiny_models.py")

lengths_of_groups = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 12), min_size=1, max_size=6)), min_size=1, max_size=5
)


def rollouts_of(groups: list[tuple[int, list[int]]], **sampling) -> RolloutBatch:
    """Random tokens; groups of a prompt's length and its completions', all padded to one group size with rollouts that
    tests leave out."""
    generator = torch.Generator().manual_seed(0)
    m, tp = max(len(completions) for _, completions in groups), max(prompt for prompt, _ in groups)
    lengths = torch.tensor([completions + [1] * (m - len(completions)) for _, completions in groups])
    size, t = lengths.numel(), int(lengths.max())
    return RolloutBatch(
        prompt_ids=torch.randint(VOCAB, (len(groups), tp), generator=generator).repeat_interleave(m, dim=0),
        prompt_lengths=torch.tensor([prompt for prompt, _ in groups]).repeat_interleave(m),
        completion_ids=torch.randint(VOCAB, (size, t), generator=generator),
        completion_lengths=lengths.flatten(),
        rollout_log_probs=torch.zeros(size, t),
        truncated=torch.zeros(size, dtype=torch.bool),
        rewards=torch.zeros(len(groups), m, dtype=torch.float64),
        sampling=SamplingConfig(max_new_tokens=t, **sampling),
    )


def rows_of(groups: list[tuple[int, list[int]]]) -> torch.Tensor:
    m = max(len(completions) for _, completions in groups)
    return torch.tensor([p * m + i for p, (_, completions) in enumerate(groups) for i in range(len(completions))])


def splits_of(rollouts: RolloutBatch, rows: torch.Tensor, **limits) -> list[torch.Tensor]:
    lengths = (rollouts.prompt_lengths, rollouts.completion_lengths)
    return split_groups(distinct_prompts(rollouts, rows)[2], *lengths, rows, **limits)


def worth_of(rows: torch.Tensor) -> torch.Tensor:
    return (rows % 5 - 1.5)[:, None]


def gradient(model) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


# ---------------------------------------------------------------- exactness


@settings(deadline=None, max_examples=40)
@given(
    groups=lengths_of_groups,
    max_tokens=st.integers(1, 200),
    sampling=st.sampled_from([{}, {"temperature": 0.7}, {"top_k": 5, "top_p": 0.8}]),
)
def test_every_split_has_the_log_probs_and_the_gradient_of_the_plain_pass(groups, max_tokens, sampling):
    """In float64: padded prompts, ragged and incomplete groups, and groups that are cut."""
    model, rollouts, rows = tiny_llama().double(), rollouts_of(groups, **sampling), rows_of(groups)
    plain = score_completions(model, rollouts, rows, with_entropy=True)
    (worth_of(rows) * plain.log_probs).sum().backward()
    expected = gradient(model)
    place = {int(row): i for i, row in enumerate(rows)}
    for chosen in splits_of(rollouts, rows, max_tokens=max_tokens):
        scores = score_completions(model, rollouts, chosen, with_entropy=True, share_prompts=True)
        (worth_of(chosen) * scores.log_probs).sum().backward()
        where, t = [place[int(row)] for row in chosen], scores.mask.shape[1]
        assert torch.equal(scores.mask, plain.mask[where, :t])
        torch.testing.assert_close(scores.log_probs, plain.log_probs[where, :t], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(scores.entropy, plain.entropy[where, :t], atol=1e-6, rtol=1e-6)
    assert (gradient(model) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "mixtral", "falcon_h1", "bloom"])
def test_other_architectures_have_the_gradient_of_the_plain_pass(name):
    """Learned positions, windows shorter than the prompts, experts, a recurrent state beside attention, ALiBi."""
    model, groups = tiny.build(name), [(20, [9, 1, 4]), (5, [2, 7, 7])]
    rollouts, rows, gradients = rollouts_of(groups), rows_of(groups), []
    for share in (False, True):
        scores = score_completions(model, rollouts, rows, share_prompts=share)
        (worth_of(rows) * scores.log_probs).sum().backward()
        gradients.append(gradient(model))
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
def test_training_ends_at_the_weights_of_the_plain_pass(tmp_path, precision, lora):
    """With reference, inner epochs, skipped rollouts and micro-batches."""
    ends = []
    for share in (False, True):
        torch.manual_seed(0)
        module = PostTrainingModule(
            save_tiny_policy(tmp_path),
            build_estimator("tea", target_n=16, alpha=0.5),
            loss=PolicyGradientLoss(kl_coef=0.1),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
            inner_epochs=2,
            micro_batch_tokens=30,
            lora=lora,
            share_prompts=share,
        )
        batches = [make_batch(make_rollouts([[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, 0.5, 0.25]], seed=i)) for i in range(2)]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Prompts are computed anew")
            _, gradients = run_steps(module, batches, precision=precision)
        ends.append((torch.cat([p.detach().flatten() for p in trained(module.policy)]), torch.stack(gradients)))
    tolerance = 1e-6 if precision == "64-true" else 0.05
    (weights, gradients), (others, other_gradients) = ends
    assert gradients.norm() > 0.1
    assert (gradients - other_gradients).norm() < tolerance * gradients.norm()
    assert (weights - others).norm() < tolerance * weights.norm()


def test_two_prompts_that_padding_makes_alike_stay_two():
    rollouts = rollouts_of([(3, [2, 2]), (2, [2, 2])])
    rollouts.prompt_ids[:] = torch.tensor([7, 7, 7])  # as if 7 were the padding
    ids, lengths, prompt_of = distinct_prompts(rollouts, torch.arange(4))
    assert lengths[prompt_of].tolist() == [3, 3, 2, 2]
    assert ids.shape == (2, 3)


def test_each_prompt_goes_through_the_model_once():
    model, groups = tiny_llama(), [(20, [9, 9, 9]), (10, [9, 9, 9])]
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].numel()))
    score_completions(model, rollouts_of(groups), rows_of(groups), share_prompts=True)
    assert seen == [2 * 20, 6 * 8]


# ---------------------------------------------------------------- micro-batches


@given(groups=lengths_of_groups, max_tokens=st.integers(1, 400), max_rows=st.sampled_from([None, 1, 3]))
def test_split_groups_partitions_within_the_budget_longest_first(groups, max_tokens, max_rows):
    rollouts, rows = rollouts_of(groups), rows_of(groups)
    splits = splits_of(rollouts, rows, max_tokens=max_tokens, max_rows=max_rows)
    assert sorted(torch.cat(splits).tolist()) == rows.tolist()
    longest = [int(rollouts.completion_lengths[chosen].max()) for chosen in splits]
    assert all(a >= b for a, b in pairwise(longest))
    for chosen, length in zip(splits, longest, strict=True):
        prompts = distinct_prompts(rollouts, chosen)[1]
        assert len(chosen) == 1 or pass_tokens(len(prompts), int(prompts.max()), len(chosen), length) <= max_tokens
        assert max_rows is None or len(chosen) <= max_rows


def test_split_groups_keeps_groups_whole_and_together_where_they_fit():
    groups = [(30, [8, 8]), (30, [8, 8]), (30, [8, 8])]
    rollouts, rows = rollouts_of(groups), rows_of(groups)
    assert [sorted(chosen.tolist()) for chosen in splits_of(rollouts, rows, max_tokens=100)] == [[0, 1, 2, 3], [4, 5]]
    assert [sorted(chosen.tolist()) for chosen in splits_of(rollouts, rows, max_tokens=60)] == [[0, 1], [2, 3], [4, 5]]


def test_split_groups_cuts_a_group_that_does_not_fit_into_even_parts():
    rollouts, rows = rollouts_of([(40, [20] * 10)]), torch.arange(10)
    assert [len(chosen) for chosen in splits_of(rollouts, rows, max_tokens=220)] == [5, 5]


def test_split_groups_cuts_off_short_completions_where_that_saves_more_than_a_prompt():
    groups = [(5, [100, 100, 4, 4, 4])]
    splits = splits_of(rollouts_of(groups), rows_of(groups), max_tokens=1000)
    assert [sorted(chosen.tolist()) for chosen in splits] == [[0, 1], [2, 3, 4]]
    groups = [(500, [100, 100, 4, 4, 4])]
    assert len(splits_of(rollouts_of(groups), rows_of(groups), max_tokens=2000)) == 1


@given(prompt=st.integers(1, 30), completions=st.lists(st.integers(1, 30), min_size=1, max_size=7))
def test_a_group_is_cut_into_the_parts_with_the_fewest_tokens(prompt, completions):
    """Against all ways to cut the completions in the order of their lengths."""
    rows = sorted(completions, reverse=True)
    count = len(rows)

    def tokens(parts) -> int:
        return sum(prompt + len(part) * part[0] for part in parts)

    ways = []
    for cuts in (cuts for size in range(count) for cuts in combinations(range(1, count), size)):
        ends = [0, *cuts, count]
        ways.append(tokens([rows[a:b] for a, b in pairwise(ends)]))
    from tealightning.training.micro_batches import _cut

    parts = _cut([(length, prompt, row) for row, length in enumerate(completions)], 10**6, None)
    assert sorted(row for part in parts for row in part.rows) == list(range(count))
    assert tokens([sorted((completions[row] for row in part.rows), reverse=True) for part in parts]) == min(ways)


def test_split_groups_of_nothing_is_nothing():
    none = torch.tensor([], dtype=torch.long)
    assert split_groups(none, torch.tensor([3]), torch.tensor([3]), none, max_tokens=10) == []


# ---------------------------------------------------------------- which models can


def backward(loss):
    loss.backward()


@pytest.mark.parametrize("name", ["mamba", "rwkv", "jamba", "qwen3_next", "openai-gpt"])
def test_a_model_that_cannot_keeps_to_the_plain_pass_and_says_why(name):
    model, rollouts = tiny.build(name), rollouts_of([(9, [5, 4, 3]), (9, [5, 5, 5])])
    with pytest.warns(UserWarning, match="Prompts are computed anew for each of their rollouts"):
        assert not can_share_prompts(model, rollouts, max_tokens=1000, backward=backward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not can_share_prompts(model, rollouts, max_tokens=1000, backward=backward)


class Forgetful(LlamaForCausalLM):
    """Its completions go on from prompts whose values are a little off, or which no gradient reaches."""

    loses_gradient = False

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        if past_key_values is not None:
            for layer in past_key_values.layers:
                layer.values = layer.values.detach() if self.loses_gradient else 1.1 * layer.values
        return super().forward(input_ids, attention_mask, past_key_values=past_key_values, **kwargs)


@pytest.mark.parametrize(("loses_gradient", "reason"), [(False, "log-probs then differ"), (True, "gradient then diff")])
def test_a_wrong_log_prob_or_gradient_is_found_out(loses_gradient, reason):
    model = Forgetful(tiny_llama().config).eval()
    model.loses_gradient = loses_gradient
    with pytest.warns(UserWarning, match=f"with Forgetful: its {reason}"):
        assert not can_share_prompts(model, make_rollouts([[1.0, 2.0]]), max_tokens=100, backward=backward)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_policy_whose_gradient_was_not_tried_is_tried_again_for_training():
    model, rollouts = Forgetful(tiny_llama().config).eval(), make_rollouts([[1.0, 2.0]])
    model.loses_gradient = True
    assert can_share_prompts(model, rollouts, max_tokens=100)
    with pytest.warns(UserWarning, match="gradient"):
        assert not can_share_prompts(model, rollouts, max_tokens=100, backward=backward)


def test_checkpointed_activations_and_compiled_models_keep_to_the_plain_pass():
    checkpointed = tiny_llama()
    checkpointed.gradient_checkpointing_enable()
    checkpointed.train()
    with pytest.warns(UserWarning, match="it keeps no key-value cache of the prompts"):
        assert not can_share_prompts(checkpointed, make_rollouts([[1.0, 2.0]]), max_tokens=100, backward=backward)
    with pytest.warns(UserWarning, match="it is compiled"):
        assert not can_share_prompts(torch.compile(tiny_llama()), make_rollouts([[1.0, 2.0]]), max_tokens=100)


def test_ranks_decide_together():
    with pytest.warns(UserWarning, match="on another rank its results differ"):
        assert not can_share_prompts(
            tiny_llama(), make_rollouts([[1.0, 2.0]]), max_tokens=100, over_ranks=lambda value: 1.0
        )


def test_running_out_of_memory_in_the_trial_is_no_reason(monkeypatch):
    def score(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(shared_prompts, "score_completions", score)
    with pytest.raises(torch.OutOfMemoryError):
        can_share_prompts(tiny_llama(), make_rollouts([[1.0, 2.0]]), max_tokens=100)


@given(groups=lengths_of_groups, max_tokens=st.integers(8, 400))
def test_the_trial_has_padding_on_both_sides_and_fits_into_a_pass(groups, max_tokens):
    groups = [(prompt, [*completions, 1, 1][:3]) for prompt, completions in groups]
    trial = trial_rollouts(rollouts_of(groups), max_tokens)
    prompts, completions = trial.prompt_lengths, trial.completion_lengths
    assert len(prompts) == 4
    assert prompts[0] == prompts[1] == prompts.max() and prompts[2] == prompts[3] >= 1
    assert prompts[0] == 1 or prompts[2] < prompts[0]
    assert completions.min() >= 1
    assert completions.max() == 1 or completions.min() < completions.max()
    assert 4 * int(prompts.max() + completions.max()) <= max(max_tokens, 16)


def test_groups_of_one_share_nothing_and_try_nothing(monkeypatch):
    monkeypatch.setattr(shared_prompts, "score_completions", lambda *args, **kwargs: 1 / 0)
    assert not can_share_prompts(tiny_llama(), make_rollouts([[1.0], [2.0]]), max_tokens=100)


def test_share_prompts_false_is_the_plain_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("tealightning.training.scoring_policy.can_share_prompts", lambda *args, **kwargs: 1 / 0)
    module = PostTrainingModule(save_tiny_policy(tmp_path), build_estimator("grpo"), share_prompts=False)
    run_steps(module, [make_batch(replace(make_rollouts([[1.0, 2.0]])))])


def test_callbacks_see_no_backward_pass_of_the_trial(tmp_path):
    seen: list[float] = []

    class Watch(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(float(loss))

    module = PostTrainingModule(save_tiny_policy(tmp_path), build_estimator("grpo"))
    run_steps(module, [make_batch(make_rollouts([[1.0, 2.0]]))], [Watch()])
    assert len(seen) == 1
