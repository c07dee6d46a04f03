"""Classes that an engine changes while it loads."""

import pytest
from torch import nn

from tealightning.rollouts.shared_classes import classes_kept


def test_classes_are_as_they_were_and_the_engine_keeps_what_it_changed():
    class Added:
        pass

    class Model(nn.Module):
        def answer(self):
            return "trainer"

    policy, before = Model(), (Model.__bases__, dict(vars(Model)))
    with classes_kept(policy) as own_classes:
        Model.__bases__ = (*Model.__bases__, Added)
        Model.answer = lambda self: "engine"
        Model.ignore = False
        engine = nn.Sequential(Model())
    own_classes(engine)
    assert (Model.__bases__, dict(vars(Model))) == before
    assert (policy.answer(), engine[0].answer()) == ("trainer", "engine")
    assert isinstance(engine[0], Model) and isinstance(engine[0], Added) and engine[0].ignore is False
    assert not hasattr(policy, "ignore")


def test_classes_are_as_they_were_after_an_engine_that_could_not_start():
    class Model(nn.Module):
        pass

    before = dict(vars(Model))
    with pytest.raises(RuntimeError), classes_kept(Model()):
        Model.ignore = False
        raise RuntimeError
    assert dict(vars(Model)) == before
