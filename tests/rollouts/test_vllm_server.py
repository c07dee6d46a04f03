"""`VLLMServerEngine` on a real server, one for the whole file: the contract of engines, syncs, and how it ends."""

import importlib.util
import os
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_policies import EOS, PROMPTS, engine_context, largest_difference, perturb_, save_policy, token_ids

from tealightning.rollouts import VLLMServerEngine, policy_weights
from tealightning.rollouts.vllm_client import ServerError
from tealightning.types import SamplingConfig

missing = [
    name
    for name in (
        "vllm",
        "uvicorn",
        "watchfiles",
        "prometheus_fastapi_instrumentator",
        "model_hosting_container_standards",
    )
    if importlib.util.find_spec(name) is None
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a minute where nothing else runs, many where much does
    pytest.mark.skipif(bool(missing), reason=f"a vLLM server needs {', '.join(missing)}"),
]

SAMPLING = SamplingConfig(max_new_tokens=24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same shapes with tied and untied embeddings; a server of the second serves the weights of both."""
    tied, untied = (tmp_path_factory.mktemp(name) for name in ("tied", "untied"))
    return save_policy(tied), save_policy(untied, tied=False, eos_token_id=[EOS, contract.SECOND_EOS])


@pytest.fixture(scope="module")
def server(folders):
    """An engine that has started a server, and the server's processes."""
    os.environ["SERVER_KEY"] = "secret"
    engine = VLLMServerEngine(api_key_env="SERVER_KEY", serve_args=["--max-num-seqs", "64"], start_timeout_seconds=800)
    engine.start(engine_context(folders[1]))
    yield engine
    engine.close()
    del os.environ["SERVER_KEY"]


def connected(server, folder):
    """Another engine at the same server, which now has the weights of `folder`."""
    context = engine_context(folder)
    engine = VLLMServerEngine(url=server._client.url, api_key_env="SERVER_KEY")
    engine.start(context)
    return engine, context.policy


@pytest.fixture
def tied(server, folders):
    engine, policy = connected(server, folders[0])
    yield engine, policy
    engine.close()


@pytest.fixture
def untied(server, folders):
    engine, policy = connected(server, folders[1])
    yield engine, policy
    engine.close()


def _contract():
    path = Path(__file__).parents[1] / "contract" / "test_engine_contract.py"
    spec = importlib.util.spec_from_file_location("engine_contract", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = _contract()
sample = contract.sample

test_returns_samples = contract.test_engine_returns_the_samples_of_each_prompt_with_a_log_prob_for_each_token
test_returns_nothing = contract.test_engine_returns_nothing_for_no_prompts
test_samples_the_softmax = contract.test_engine_samples_the_softmax_and_ignores_the_folders_defaults
test_keeps_the_eos = contract.test_engine_keeps_the_sampled_eos_and_flags_what_ran_out_of_tokens
test_ends_on_every_eos = contract.test_engine_ends_on_every_eos_of_the_generation_config
test_cuts_stop_strings = contract.test_engine_keeps_the_tokens_of_a_stop_string_and_cuts_its_text
test_last_token_may_end_it = contract.test_engine_is_not_truncated_when_the_last_token_ends_it
test_special_stops = contract.test_engine_ends_on_a_stop_string_that_is_a_special_token
test_seeds_decide = contract.test_engine_samples_follow_from_the_prompts_seed_alone
test_refuses = contract.test_engine_refuses_what_it_cannot_serve


@pytest.mark.parametrize("sampling", [contract.PLAIN, contract.FILTERED], ids=["plain", "filtered"])
@pytest.mark.parametrize("which", ["tied", "untied"])
def test_server_log_probs_are_the_trainers_of_the_same_tokens(which, sampling, request):
    engine, policy = request.getfixturevalue(which)
    assert largest_difference(policy, PROMPTS, sample(engine, sampling=sampling), sampling) < 1e-5


def test_server_samples_of_many_requests_are_those_of_one(tied):
    together = token_ids(sample(tied[0], num_samples=40))  # three requests a prompt
    assert [group[:5] for group in together] == token_ids(sample(tied[0], num_samples=5))


def test_server_follows_the_trainer_after_a_sync_and_not_before(tied):
    engine, policy = tied
    prompts = [[5 + i % 20 for i in range(100)]]  # long enough for the prefix cache
    seen = sample(engine)
    sample(engine, prompts=prompts, seeds=[1])
    perturb_(policy)
    assert token_ids(sample(engine)) == token_ids(seen)
    assert largest_difference(policy, PROMPTS, seen, SAMPLING) > 1e-2
    engine.sync_weights(policy_weights(policy))
    fresh = sample(engine)
    assert largest_difference(policy, PROMPTS, fresh, SAMPLING) < 1e-5
    assert largest_difference(policy, prompts, sample(engine, prompts=prompts, seeds=[1]), SAMPLING) < 1e-5
    assert token_ids(fresh) != token_ids(seen)


def test_server_refuses_a_push_that_leaves_a_weight_behind(tied):
    engine, policy = tied
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight"):
        engine.sync_weights([(n, w) for n, w in policy_weights(policy) if n != "model.norm.weight"])
    assert largest_difference(policy, PROMPTS, sample(engine), SAMPLING) < 1e-5


def test_server_with_another_trainers_weights_is_refused(server, folders, tied):
    engine, _ = tied
    other, _ = connected(server, folders[1])
    with pytest.raises(ServerError, match="does another trainer use it"):
        sample(engine)
    other.close()


def test_server_that_serves_too_little_or_wants_a_key_is_refused(server, folders):
    with pytest.raises(ServerError, match="start it with --max-model-len 129"):
        VLLMServerEngine(url=server._client.url, api_key_env="SERVER_KEY").start(
            engine_context(folders[1], max_model_len=129)
        )
    with pytest.raises(ServerError, match="refuses the API key"):
        VLLMServerEngine(url=server._client.url).start(engine_context(folders[1]))


RANK = """
import sys
import torch
import torch.distributed as dist
from tiny_policies import PROMPTS, SEEDS, engine_context, largest_difference, token_ids
from tealightning.errors import UserError
from tealightning.rollouts import VLLMServerEngine, policy_weights
from tealightning.rollouts.vllm_client import ServerError
from tealightning.types import SamplingConfig

dist.init_process_group("gloo")
rank, sampling = dist.get_rank(), SamplingConfig(max_new_tokens=8)
context = engine_context(sys.argv[1])
engine = VLLMServerEngine(url=sys.argv[2], api_key_env="SERVER_KEY")
engine.start(context)
with torch.no_grad():
    context.policy.model.norm.weight.add_(0.1)
engine.sync_weights(policy_weights(context.policy))
prompts, seeds = PROMPTS[rank : rank + 2], SEEDS[rank : rank + 2]
grouped = engine.generate(prompts, num_samples=2, sampling=sampling, seeds=seeds)
assert largest_difference(context.policy, prompts, grouped, sampling) < 1e-5
answers = [None, None]
dist.all_gather_object(answers, token_ids(grouped))
assert answers[0][1] == answers[1][0]  # a prompt's samples do not depend on the rank


def refuse(*args, **kwargs):
    raise ServerError("refused")


if rank == 0:
    engine._pusher.push = refuse
try:
    engine.sync_weights(policy_weights(context.policy))
except (ServerError, UserError) as error:
    assert str(error) == ("refused" if rank == 0 else "Rank 0 failed: ServerError: refused"), error
else:
    raise AssertionError("a failed push must fail on every rank")
engine.close()
"""


def test_server_serves_two_ranks_and_a_failed_push_fails_on_both(server, folders, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    run_ranks(script, folders[1], server._client.url, timeout=150)


def test_server_that_is_killed_is_an_error_at_once_and_close_leaves_no_process(server, folders):
    psutil = pytest.importorskip("psutil")
    server.start(engine_context(folders[1]))  # finds its server running, and takes it back from the other tests
    url = server._client.url
    processes = psutil.Process(server._server._process.pid).children(recursive=True)
    assert len(processes) >= 2  # the API and its engine
    processes[-1].kill()
    started = time.monotonic()
    with pytest.raises(ServerError, match="The end of its log"):
        sample(server)
    assert time.monotonic() - started < 30
    server.close()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, alive
    with pytest.raises(ServerError, match="cannot be reached"):
        VLLMServerEngine(url=url, api_key_env="SERVER_KEY").start(engine_context(folders[1]))
