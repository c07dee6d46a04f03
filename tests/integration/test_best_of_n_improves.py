"""Training raises best-of-n where a reward is easy to raise: the whole loop has its signs right."""

import pytest
from playground_fits import data_of, module_of, rollout_of, trainer_of

from tealightning import BestOfNReport
from tealightning.functional.best_of_n import best_of_n
from tealightning.functional.statistics import paired_difference

NS = (1, 16)
STEPS = 20


def letters(prompts, completions, metadata):
    """How often `e` comes in a completion: one learns it in a few steps."""
    return [completion.count("e") for completion in completions]


@pytest.mark.parametrize("estimator", ["grpo", "tea"])
def test_best_of_n_rises_by_more_than_three_standard_errors(estimator, playground, tmp_path):
    report = BestOfNReport()
    trainer = trainer_of(
        rollout_of(playground, reward=letters, group_size=16, seed=1),
        report,
        max_steps=STEPS,
        num_sanity_val_steps=-1,
        limit_val_batches=1.0,
        val_check_interval=STEPS,
        check_val_every_n_epoch=None,
        default_root_dir=tmp_path,
    )
    module = module_of(playground, estimator=estimator, lr=5e-3, ns=NS)
    trainer.fit(module, datamodule=data_of(playground, val_batch_size=16))
    before, after = report.before, report.after
    rise = paired_difference((before.keys, best_of_n(before.rewards, NS)), (after.keys, best_of_n(after.rewards, NS)))
    assert (before.step, after.step) == (0, STEPS)
    assert (rise.num_prompts >= 10).all()
    assert (rise.mean > 3 * rise.standard_error).all(), rise
    assert (rise.mean > 0.5).all(), rise
