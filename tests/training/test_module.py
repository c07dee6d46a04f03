import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from module_fixtures import make_batch, make_rollouts, run_steps, save_tiny_policy, tiny_llama
from torch.utils.data import DataLoader

from tealightning import PolicyGradientLoss, PostTrainingModule
from tealightning.estimators import build_estimator
from tealightning.functional.tail_checks import check_tail, summarise
from tealightning.training.scoring import score_completions

REWARDS = [[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, 0.5, 0.25]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def module_of(policy, estimator="mean_reward", loss=None, lr=0.0, **kwargs):
    kwargs = {"gradient_clip_norm": None, "advantage_scale": "none"} | kwargs
    return PostTrainingModule(
        policy=policy,
        estimator=build_estimator(estimator) if isinstance(estimator, str) else estimator,
        loss=PolicyGradientLoss(**(loss or {})),
        optimizer=lambda p: torch.optim.SGD(p, lr=lr),
        **kwargs,
    )


def textbook_gradient(rollouts, advantages, token_weight):
    """`-sum_i A_i sum_t w_it grad log pi(y_it)` by one backward pass per token, no batching."""
    model = tiny_llama()
    loss = torch.zeros(())
    for row in range(rollouts.rewards.numel()):
        tp, t = int(rollouts.prompt_lengths[row]), int(rollouts.completion_lengths[row])
        ids = torch.cat([rollouts.prompt_ids[row, -tp:], rollouts.completion_ids[row, :t]])
        log_probs = model(ids[None]).logits[0, tp - 1 : -1].log_softmax(-1)
        for position in range(t):
            loss = loss - float(advantages[row]) * token_weight(row) * log_probs[position, ids[tp + position]]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_gradient_equals_the_textbook_sum(policy, reduction):
    rollouts = make_rollouts(REWARDS)
    lengths = rollouts.completion_lengths.tolist()
    weight = {
        "token_mean": lambda row: 1 / sum(lengths),
        "sequence_mean": lambda row: 1 / (8 * lengths[row]),
        "constant": lambda row: 1 / 8,
    }[reduction]
    advantages = (rollouts.rewards - rollouts.rewards.mean(1, keepdim=True)).flatten()
    loss = {"reduction": reduction, "constant": 1.0 if reduction == "constant" else None}
    _, gradients = run_steps(module_of(policy, loss=loss), [make_batch(rollouts)])
    expected = textbook_gradient(rollouts, advantages, weight)
    assert torch.allclose(gradients[0], expected, atol=1e-6 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("loss", [{}, {"reduction": "sequence_mean"}, {"kl_coef": 0.1, "kl_estimator": "k2"}])
@pytest.mark.parametrize("split", [{"micro_batch_size": 3}, {"micro_batch_size": 1}, {"micro_batch_tokens": 20}])
def test_gradient_does_not_depend_on_the_micro_batch_size(policy, loss, split):
    """In peers the loss changed with gradient accumulation (TRL #3021, #5619; open-instruct #1161)."""
    batch = make_batch(make_rollouts(REWARDS))
    _, (whole,) = run_steps(module_of(policy, "grpo", loss), [batch])
    _, (parts,) = run_steps(module_of(policy, "grpo", loss, **split), [batch])
    assert whole.abs().max() > 1e-3
    assert torch.allclose(whole, parts, atol=1e-6)


def test_rollouts_without_advantage_are_skipped_and_the_gradient_is_the_same(policy):
    rollouts = make_rollouts([torch.randn(16, generator=torch.Generator().manual_seed(3)).tolist()])
    trainer, (skipped,) = run_steps(module_of(policy, "tea"), [make_batch(rollouts)])
    advantages = build_estimator("tea")(rollouts.rewards).flatten()
    tokens = float(rollouts.completion_lengths.sum())
    expected = textbook_gradient(rollouts, advantages, lambda row: 1 / tokens)
    assert torch.allclose(skipped, expected, atol=1e-5)
    assert trainer.callback_metrics["train/rollouts_skipped"] == (advantages == 0).double().mean() == 13 / 16


def test_unscorable_rollouts_leave_loss_and_denominator(policy):
    """A NaN reward trains as if the rollout had never been sampled."""
    with_nan = make_rollouts([[2.0, math.nan, 0.5, -1.0]])
    keep = torch.tensor([0, 2, 3])
    advantages = torch.zeros(4)
    advantages[keep] = (with_nan.rewards[0, keep] - with_nan.rewards[0, keep].mean()).float()
    tokens = float(with_nan.completion_lengths[keep].sum())
    _, (gradient,) = run_steps(module_of(policy), [make_batch(with_nan)])
    assert torch.allclose(gradient, textbook_gradient(with_nan, advantages, lambda row: 1 / tokens), atol=1e-6)


def test_a_batch_with_nothing_to_learn_from_takes_a_zero_step(policy):
    module = module_of(policy, "grpo", lr=0.1)
    all_nan = make_batch(make_rollouts([[math.nan] * 4]))
    constant = make_batch(make_rollouts([[1.0] * 4]))
    trainer, gradients = run_steps(module, [all_nan, constant])
    assert len(gradients) == 2 and all((g == 0).all() for g in gradients)
    assert trainer.callback_metrics["train/groups_too_small"] == 0.0  # of the last batch; the first had 1.0


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_groups_without_spread_leave_the_direction_of_the_step_alone(policy, reduction):
    """In peers groups of equal rewards dilute or spike the loss (TRL #6367, NeMo-RL #4158). Here they count as what
    they are, prompts with nothing to learn from: the mean over prompts has a zero more, and no number explodes."""
    rollouts = make_rollouts([[2.0, 1.0, 0.5, -1.0], [0.1 + 0.2] * 4])  # a number whose mean is not itself, by rounding
    lengths = rollouts.completion_lengths.reshape(2, 4).sum(dim=1)
    share = float(lengths[0] / lengths.sum()) if reduction == "token_mean" else 0.5
    module = module_of(policy, "grpo", {"reduction": reduction})
    trainer, (both,) = run_steps(module, [make_batch(rollouts)])
    advantages = build_estimator("grpo")(rollouts.rewards)
    assert (advantages[1] == 0).all()
    assert trainer.callback_metrics["train/rollouts_skipped"] == 0.5
    weight = {"sequence_mean": lambda row: 1 / (4 * float(rollouts.completion_lengths[row]))}.get(
        reduction, lambda row: 1 / float(lengths[0])
    )
    alone = textbook_gradient(rollouts, advantages.flatten(), weight)
    assert alone.abs().max() > 1e-2
    assert torch.allclose(both, alone * share, atol=1e-6)


def test_groups_too_small_are_counted(policy):
    rollouts = make_rollouts([[1.0, math.nan, math.nan, math.nan], [1.0, 2.0, 3.0, 4.0]])
    trainer, _ = run_steps(module_of(policy, "grpo"), [make_batch(rollouts)])
    assert trainer.callback_metrics["train/groups_too_small"] == 0.5


def test_kl_penalty_pulls_back_to_the_reference(policy):
    """At the reference the k2 gradient is zero; away from it a step along it lowers the KL."""
    module = module_of(policy, "grpo", {"kl_coef": 1.0, "kl_estimator": "k2"})
    rollouts = make_rollouts([[1.0] * 4])  # no advantage: only the penalty acts
    _, (at_reference,) = run_steps(module, [make_batch(rollouts)])
    assert at_reference.abs().max() < 1e-6
    module = module_of(policy, "grpo", {"kl_coef": 1.0, "kl_estimator": "k2"}, lr=0.02)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    kls = []
    for _ in range(3):
        trainer, _ = run_steps(module, [make_batch(rollouts)])
        kls.append(float(trainer.callback_metrics["train/kl"]))
    assert kls[0] > kls[1] > kls[2] > 0


def test_no_reference_is_loaded_without_a_kl_penalty(policy):
    module = module_of(policy)
    module.setup("fit")
    assert module._reference == ()


def test_no_reference_is_loaded_to_evaluate(policy):
    module = module_of(policy, loss={"kl_coef": 0.1})
    module.setup("validate")
    assert module._reference == ()


def test_a_missing_reference_is_one_clear_message(policy, tmp_path):
    with pytest.raises(ValueError, match=r"reference .*there is no such folder"):
        module_of(policy, loss={"kl_coef": 0.1}, reference=str(tmp_path / "nowhere")).setup("fit")


def test_reference_is_neither_in_the_checkpoint_nor_trained(policy):
    module = module_of(policy, "grpo", {"kl_coef": 0.1}, lr=0.1)
    run_steps(module, [make_batch(make_rollouts(REWARDS))])
    assert all(key.startswith("policy.") for key in module.state_dict())
    reference = module._reference[0]
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), tiny_llama().parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(reference.parameters(), module.policy.parameters(), strict=True))


def test_inner_epochs_use_the_policy_of_the_start_as_behaviour(policy):
    """Two inner epochs are two steps; the second one's ratio is measured to the weights before the first."""
    rollouts = make_rollouts(REWARDS)
    module = module_of(policy, "mean_reward", {"clip_lower": 1.0, "clip_upper": 1e6}, lr=0.02, inner_epochs=2)
    trainer, gradients = run_steps(module, [make_batch(rollouts)])
    assert len(gradients) == 2 and trainer.global_step == 2

    stepped = tiny_llama()
    offset = 0
    with torch.no_grad():
        for parameter in stepped.parameters():
            parameter -= 0.02 * gradients[0][offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
    advantages = (rollouts.rewards - rollouts.rewards.mean(1, keepdim=True)).flatten().float()
    now = score_completions(stepped, rollouts, torch.arange(8)).log_probs
    then = score_completions(tiny_llama(), rollouts, torch.arange(8)).log_probs.detach()
    mask = rollouts.completion_mask[:, : now.shape[1]]
    (-((now - then).exp() * advantages[:, None] * mask).sum() / mask.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in stepped.parameters()])
    assert torch.allclose(gradients[1], expected, atol=1e-5)


@pytest.mark.parametrize(("inner_epochs", "passes"), [(1, 1), (3, 3)])
def test_no_epoch_needs_a_second_forward_pass(policy, monkeypatch, inner_epochs, passes):
    """The first epoch's own log-probs are those of the behaviour policy for the epochs after it."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return score_completions(*args, **kwargs)

    monkeypatch.setattr("tealightning.training.module.score_completions", counted)
    run_steps(module_of(policy, "grpo", lr=0.02, inner_epochs=inner_epochs), [make_batch(make_rollouts(REWARDS))])
    assert len(calls) == passes


def test_inner_epochs_clip_once_the_policy_moved(policy):
    module = module_of(policy, "grpo", lr=5.0, inner_epochs=3)
    trainer, _ = run_steps(module, [make_batch(make_rollouts(REWARDS))])
    assert 0 < trainer.callback_metrics["train/clip_fraction"] <= 1


def test_batch_rms_frees_the_step_from_the_rewards_scale(policy):
    plain, scaled = ([[r * s for r in group] for group in REWARDS] for s in (1.0, 1000.0))
    gradients = [
        run_steps(module_of(policy, advantage_scale="batch_rms"), [make_batch(make_rollouts(rewards))])[1][0]
        for rewards in (plain, scaled)
    ]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    unit = module_of(policy, advantage_scale="batch_rms")
    advantages = []
    unit.estimator.compute, compute = (
        (lambda r: advantages.append(compute(r)) or advantages[-1]),
        unit.estimator.compute,
    )
    run_steps(unit, [make_batch(make_rollouts(REWARDS))])
    reference = run_steps(module_of(policy), [make_batch(make_rollouts(REWARDS))])[1][0]
    rms = advantages[0].square().mean().sqrt()
    assert torch.allclose(gradients[0] * rms.float(), reference, atol=1e-6)


def test_importance_correction_weights_tokens_by_the_capped_ratio(policy):
    """Engine log-probs one nat above the trainer's: every token weighs exp(-1)."""
    rollouts = make_rollouts(REWARDS)
    rollouts.rollout_log_probs = score_completions(tiny_llama(), rollouts, torch.arange(8)).log_probs.detach() + 1.0
    _, (plain,) = run_steps(module_of(policy), [make_batch(rollouts)])
    _, (corrected,) = run_steps(module_of(policy, loss={"importance_cap": 2.0}), [make_batch(rollouts)])
    assert torch.allclose(corrected, plain * math.exp(-1), atol=1e-6)
    rollouts.rollout_log_probs = rollouts.rollout_log_probs - 3.0
    _, (capped,) = run_steps(module_of(policy, loss={"importance_cap": 2.0}), [make_batch(rollouts)])
    assert torch.allclose(capped, plain * 2.0, atol=1e-6)


def test_log_prob_mismatch_is_measured(policy):
    rollouts = make_rollouts(REWARDS)
    rollouts.rollout_log_probs = score_completions(tiny_llama(), rollouts, torch.arange(8)).log_probs.detach() + 0.25
    trainer, _ = run_steps(module_of(policy), [make_batch(rollouts)])
    assert float(trainer.callback_metrics["rollout/log_prob_abs_diff_mean"]) == pytest.approx(0.25, abs=1e-5)
    assert float(trainer.callback_metrics["rollout/log_prob_abs_diff_max"]) == pytest.approx(0.25, abs=1e-5)


def test_gradient_is_clipped_to_the_norm(policy):
    trainer, _ = run_steps(module_of(policy, gradient_clip_norm=1e-3, lr=1.0), [make_batch(make_rollouts(REWARDS))])
    module = trainer.lightning_module
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(module.policy.parameters(), tiny_llama().parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert trainer.callback_metrics["train/grad_norm"] > 1e-2


def test_scheduler_steps_once_a_rollout_step(policy):
    module = module_of(policy, lr=1.0, inner_epochs=2)
    module.lr_scheduler = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer, _ = run_steps(module, [make_batch(make_rollouts(REWARDS))] * 2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25


def test_gradient_checkpointing_changes_no_gradient(policy):
    batch = make_batch(make_rollouts(REWARDS))
    _, (plain,) = run_steps(module_of(policy), [batch])
    _, (checkpointed,) = run_steps(module_of(policy, gradient_checkpointing=True), [batch])
    assert torch.allclose(plain, checkpointed, atol=1e-6)


def test_validation_logs_the_tail_of_its_own_rewards_only(policy):
    module = module_of(policy, ns=[1, 32])
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    for seed in range(2):
        rewards = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        batches = [make_batch(make_rollouts(rewards[i : i + 3].tolist()), first_id=i) for i in (0, 3)]
        (found,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
        expected = summarise(check_tail(rewards))
        assert {key for key in found if "tail" in key} == {f"val/{key}" for key in expected}
        for key in ("tail_qq_r2", "tail_shape", "tail_shape_se", "tail_ties"):
            assert found[f"val/{key}"] == pytest.approx(float(expected[key]), abs=1e-6), (seed, key)


def test_a_batch_without_rollouts_says_what_is_missing(policy):
    batch = make_batch(make_rollouts(REWARDS))
    batch.rollouts = None
    with pytest.raises(RuntimeError, match="RolloutCallback"):
        run_steps(module_of(policy), [batch])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"advantage_scale": "rms"}, "advantage_scale"),
        ({"inner_epochs": 0}, "inner_epochs"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens"),
        ({"gradient_clip_norm": 0.0}, "gradient_clip_norm"),
    ],
)
def test_bad_settings_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        module_of("unused", **arguments)


@pytest.mark.parametrize(
    "field", [{"clip_lower": 0.0}, {"clip_upper": -1.0}, {"kl_coef": -1.0}, {"importance_cap": 0.0}]
)
def test_bad_loss_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        PolicyGradientLoss(**field)


def test_a_missing_policy_is_one_clear_message(tmp_path):
    with pytest.raises(ValueError, match=r"policy .*there is no such folder"):
        module_of(str(tmp_path / "nowhere")).configure_model()


def test_settings_without_effect_are_warned_about():
    with pytest.warns(UserWarning, match=r"model.reference has no effect"):
        module_of("unused", reference="other")
    with pytest.warns(UserWarning, match=r"loss.constant has no effect"):
        PolicyGradientLoss(constant=3.0)


def test_float16_mixed_precision_is_refused(policy):
    module = module_of(policy)
    module._trainer = SimpleNamespace(precision="16-mixed")  # a real trainer wants a GPU for it
    with pytest.raises(ValueError, match="bf16-mixed"):
        module.on_fit_start()
