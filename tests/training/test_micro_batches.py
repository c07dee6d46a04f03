import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from module_fixtures import make_rollouts, tiny_llama

from tealightning.training.micro_batches import split_rows
from tealightning.training.scoring import score_completions


@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=40),
    max_tokens=st.integers(1, 400),
    max_rows=st.sampled_from([None, 1, 3]),
)
def test_split_rows_partitions_within_the_budget(lengths, max_tokens, max_rows):
    prompts, completions = torch.tensor(lengths).T
    rows = torch.arange(len(lengths))[::2]
    splits = split_rows(prompts, completions, rows, max_tokens=max_tokens, max_rows=max_rows)
    assert sorted(torch.cat(splits).tolist()) == rows.tolist()
    for chosen in splits:
        padded = len(chosen) * int(prompts[chosen].max() + completions[chosen].max())
        assert len(chosen) == 1 or padded <= max_tokens
        assert max_rows is None or len(chosen) <= max_rows


def test_split_rows_counts_padding_on_both_sides():
    """A long prompt beside a long completion pads to 9 + 9 tokens, not to the 10 of either."""
    prompts, completions = torch.tensor([9, 1, 1]), torch.tensor([1, 9, 8])
    splits = split_rows(prompts, completions, torch.arange(3), max_tokens=30)
    assert [chosen.tolist() for chosen in splits] == [[0], [1, 2]]
    splits = split_rows(prompts, completions, torch.arange(3), max_tokens=36)
    assert [chosen.tolist() for chosen in splits] == [[0, 1], [2]]


def test_split_rows_of_nothing_is_nothing():
    lengths = torch.tensor([3, 4])
    assert split_rows(lengths, lengths, torch.tensor([], dtype=torch.long), max_tokens=10) == []


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6}, {"top_k": 5, "top_p": 0.8}])
def test_score_completions_equals_one_unpadded_row_at_a_time(sampling):
    """Padding, left or right, changes nothing: each row alone, with no padding at all, is the reference."""
    model = tiny_llama()
    rollouts = make_rollouts([[2.0, 1.0, 0.0], [1.0, 0.0, 3.0]], sampling=sampling)
    scores = score_completions(model, rollouts, torch.arange(6), with_entropy=True)
    for row in range(6):
        tp, t = int(rollouts.prompt_lengths[row]), int(rollouts.completion_lengths[row])
        ids = torch.cat([rollouts.prompt_ids[row, -tp:], rollouts.completion_ids[row, :t]])
        logits = model(ids[None]).logits[0, tp - 1 : -1].float() / rollouts.sampling.temperature
        for position in range(t):
            token = ids[tp + position]
            kept = logits[position].clone()
            if sampling.get("top_k"):
                kept[kept < kept.topk(5).values[-1]] = -torch.inf
            if sampling.get("top_p"):
                probabilities, order = kept.softmax(0).sort(descending=True)
                outside = probabilities.cumsum(0) - probabilities >= 0.8
                kept[order[outside]] = -torch.inf
            kept[token] = logits[position, token]
            expected = kept.log_softmax(0)[token]
            assert scores.log_probs[row, position].item() == pytest.approx(expected.item(), abs=1e-5)
            full = logits[position].log_softmax(0)
            assert scores.entropy[row, position].item() == pytest.approx(-(full.exp() * full).sum().item(), abs=1e-5)
        assert (scores.log_probs[row, t:] == 0).all()


def test_score_completions_pad_equal_to_eos_and_sampled_is_still_scored():
    """Token 0 is pad and eos here; make_rollouts samples it too. Masks come from lengths."""
    rollouts = make_rollouts([[1.0, 0.0]])
    rollouts.completion_ids[0, 0] = 0
    scores = score_completions(tiny_llama(), rollouts, torch.tensor([0]))
    assert scores.log_probs[0, 0] < 0
