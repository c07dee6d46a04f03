from itertools import chain

import pytest

from tealightning.data import EvaluationLoader, PromptLoader


def ids_of(loader) -> list[list[str]]:
    return [batch.ids for batch in loader]


def flat(batches) -> list[str]:
    return list(chain.from_iterable(batches))


def test_epoch_is_a_shuffle_in_full_batches(prompt_set):
    loader = PromptLoader(prompt_set(10), batch_size=3)
    batches = ids_of(loader)
    assert len(loader) == 3
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert len(set(flat(batches))) == 9
    assert flat(batches) != sorted(flat(batches))


def test_order_depends_on_seed_and_epoch_only(prompt_set):
    prompts = prompt_set(12)
    first, again, other = (PromptLoader(prompts, batch_size=4, seed=s) for s in (1, 1, 2))
    epochs = [ids_of(first), ids_of(first)]
    assert [ids_of(again), ids_of(again)] == epochs
    assert epochs[0] != epochs[1]
    assert ids_of(other) != epochs[0]
    assert sorted(flat(epochs[1])) == sorted(str(i) for i in range(12))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_each_step_without_duplicates(prompt_set, world_size):
    prompts = prompt_set(27)
    whole = ids_of(PromptLoader(prompts, batch_size=6, seed=5))
    shares = [
        ids_of(PromptLoader(prompts, batch_size=6 // world_size, seed=5, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert [sorted(flat(step)) for step in zip(*shares, strict=True)] == [sorted(step) for step in whole]
    assert len(whole) == 4  # 3 prompts are left out


def test_two_iterators_without_a_batch_between_lose_nothing(prompt_set):
    prompts = prompt_set(6)
    loader = PromptLoader(prompts, batch_size=2)
    iter(loader)
    assert ids_of(loader) == ids_of(PromptLoader(prompts, batch_size=2))


def test_pass_cut_short_is_continued_by_the_next(prompt_set):
    prompts = prompt_set(8)
    loader = PromptLoader(prompts, batch_size=2)
    first = [batch.ids for batch, _ in zip(loader, range(3), strict=False)]
    assert loader.steps_served in (3, 4)
    reference = PromptLoader(prompts, batch_size=2)
    stream = ids_of(reference) + ids_of(reference)
    assert first == stream[:3]
    served = loader.steps_served
    assert ids_of(loader) == stream[served : served + 4]


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 8])
def test_state_continues_the_stream_exactly(prompt_set, steps):
    prompts = prompt_set(9)
    one, other = (PromptLoader(prompts, batch_size=2, seed=3) for _ in range(2))
    stream = chain(one, one, one)
    for _ in range(steps):
        next(stream)
    other.load_state_dict(one.state_dict())
    assert ids_of(other) == [next(stream).ids for _ in range(4)]


@pytest.mark.parametrize(
    ("n", "settings", "message"),
    [
        (9, {"batch_size": 2, "seed": 1}, r"seed \(was 0, now 1\) changed"),
        (9, {"batch_size": 3, "seed": 0}, r"prompts_per_step \(was 2, now 3\)"),
        (10, {"batch_size": 2, "seed": 0}, r"prompts \(was 9, now 10\), digest of ids"),
    ],
)
def test_state_of_another_stream_is_refused(prompt_set, n, settings, message):
    state = PromptLoader(prompt_set(9), batch_size=2, seed=0).state_dict()
    with pytest.raises(ValueError, match=message):
        PromptLoader(prompt_set(n), **settings).load_state_dict(state)


def test_state_fits_another_number_of_ranks_with_as_many_prompts_a_step(prompt_set):
    prompts = prompt_set(9)
    one = PromptLoader(prompts, batch_size=4)
    next(iter(one))
    ranks = [PromptLoader(prompts, batch_size=2, rank=r, world_size=2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(one.state_dict())
    assert sorted(flat(next(iter(rank)).ids for rank in ranks)) == sorted(next(iter(one)).ids)


def test_fewer_prompts_than_a_step_is_an_error(prompt_set):
    with pytest.raises(ValueError, match=r"takes 8 prompts a step \(batch_size=4 on each of 2 ranks\) and there are 7"):
        PromptLoader(prompt_set(7), batch_size=4, world_size=2)


def test_evaluation_yields_everything_in_order_each_time(prompt_set):
    loader = EvaluationLoader(prompt_set(7), batch_size=3)
    expected = [["0", "1", "2"], ["3", "4"], ["5", "6"]]
    assert len(loader) == 3
    next(iter(loader))  # a pass cut short changes nothing
    assert ids_of(loader) == expected
    assert ids_of(loader) == expected


@pytest.mark.parametrize(
    ("n", "batch_size", "world_size"), [(7, 2, 2), (8, 2, 3), (9, 4, 4), (5, 5, 4), (4, 9, 4), (10, 3, 1)]
)
def test_evaluation_ranks_cover_everything_once_in_equally_many_batches(prompt_set, n, batch_size, world_size):
    prompts = prompt_set(n)
    ranks = [
        ids_of(EvaluationLoader(prompts, batch_size=batch_size, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert sorted(flat(flat(ranks))) == sorted(str(i) for i in range(n))
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(batch) for batch in flat(ranks)} <= set(range(1, batch_size + 1))


def test_evaluation_with_single_prompts_may_differ_by_one_batch(prompt_set):
    prompts = prompt_set(5)
    assert [len(EvaluationLoader(prompts, batch_size=1, rank=r, world_size=2)) for r in range(2)] == [3, 2]


def test_evaluation_with_fewer_prompts_than_ranks_is_an_error(prompt_set):
    with pytest.raises(ValueError, match="a prompt for each of 3 ranks, and there are 2"):
        EvaluationLoader(prompt_set(2), batch_size=1, world_size=3)


@pytest.mark.parametrize(("overfit", "steps"), [(1, 1), (2, 2), (9, 3), (0.5, 2), (0.01, 1), (1.0, 3)])
def test_overfitting_repeats_the_first_steps_of_the_first_epoch(prompt_set, overfit, steps):
    prompts = prompt_set(10)
    first = ids_of(PromptLoader(prompts, batch_size=3, seed=1))[:steps]
    loader = PromptLoader(prompts, batch_size=3, seed=1, overfit=overfit)
    served = [*ids_of(loader), *ids_of(loader), *ids_of(loader)]
    assert served == [first[k % steps] for k in range(9)]
    resumed = PromptLoader(prompts, batch_size=3, seed=1, overfit=overfit)
    resumed.load_state_dict(loader.state_dict())
    assert next(iter(resumed)).ids == first[9 % steps]
