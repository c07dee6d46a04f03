"""Sleep mode exists on GPUs only: here the calls of the engine are watched, on an `LLM` that cannot sleep."""

import pytest
from lightning.pytorch.callbacks import LambdaCallback
from playground_fits import fit
from tiny_policies import engine_context, save_policy

from tealightning.rollouts import VLLMEngine
from tealightning.training.policy_weights import policy_weights
from tealightning.types import SamplingConfig


class SleepyLLM:
    """vLLM's `LLM`, which refuses to work while it is asleep."""

    def __init__(self, llm):
        self.llm = llm
        self.naps = 0
        self.asleep = False

    def sleep(self, level):
        assert level == 1 and not self.asleep
        self.asleep = True
        self.naps += 1

    def wake_up(self):
        assert self.asleep
        self.asleep = False

    def __getattr__(self, name):
        assert not self.asleep, f"{name} while asleep"
        return getattr(self.llm, name)


class SleepyEngine(VLLMEngine):
    def start(self, context):
        super().start(context)
        self._llm = self.watched = SleepyLLM(self._llm)
        self.sleep = True  # only now, because the CPU build refuses it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def test_vllm_sleeps_when_it_rests_and_wakes_up_for_work(folder):
    context = engine_context(folder)
    engine = SleepyEngine()
    engine.start(context)
    for work in (
        lambda: engine.generate([[3, 4]], num_samples=1, sampling=SamplingConfig(max_new_tokens=2), seeds=[7]),
        lambda: engine.sync_weights(policy_weights(context.policy)),
    ):
        engine.offload()
        engine.offload()
        assert engine.watched.asleep
        work()
        assert not engine.watched.asleep
    engine.offload()
    engine.close()
    assert not engine.watched.asleep and engine.watched.naps == 3


def test_vllm_stays_awake_unless_asked_to_sleep(folder):
    engine = VLLMEngine()
    engine.start(engine_context(folder))
    engine._llm = watched = SleepyLLM(engine._llm)
    engine.offload()
    assert watched.naps == 0
    engine.close()


def test_vllm_sleeps_through_the_training_of_every_step(playground):
    engine = SleepyEngine()
    asleep = []
    watch = LambdaCallback(on_before_optimizer_step=lambda *_: asleep.append(engine.watched.asleep))
    fit(playground, steps=3, engine=engine, callbacks=[watch])
    assert asleep == [True] * 3 and engine.watched.naps == 3


def test_vllm_on_a_cpu_says_that_it_cannot_sleep(folder):
    with pytest.raises(ValueError, match=r"sleep=true needs vLLM on a GPU"):
        VLLMEngine(sleep=True).start(engine_context(folder))
