"""vLLM that is out of memory, and vLLM servers that are killed or stop to answer."""

import importlib.util
import os
import signal

import pytest
from fault_runs import ends_within_a_minute, goes_on
from tiny_policies import engine_context
from zygote import children_of

from tealightning.rollouts import VLLMServerEngine

MAX_MODEL_LEN = 128
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
missing = [
    name
    for name in ("vllm", "uvicorn", "watchfiles", "prometheus_fastapi_instrumentator")
    if importlib.util.find_spec(name) is None
]
needs_server = pytest.mark.skipif(bool(missing), reason=f"a vLLM server needs {', '.join(missing)}")
pytestmark = pytest.mark.timeout(900)  # a server starts in a minute where nothing else runs


@needs_vllm
@pytest.mark.fault("vLLM is out of memory", how="its model runner raises the allocator's error in the third generation")
def test_vllm_out_of_memory_is_told_with_what_to_change(fit, injected):
    (run,) = fit("--rollout.engine=FaultyVLLMEngine")
    ends_within_a_minute([run])
    assert "error: vLLM broke down while generating: RuntimeError" in run.text()
    assert "lower rollout.engine.gpu_memory_utilization" in run.text()
    goes_on(fit, run, engine=["--rollout.engine=VLLMEngine"])
    injected(times=1)


@needs_server
@pytest.mark.fault("the vLLM server that a run started is killed", how="SIGKILL of its processes before a generation")
def test_killed_server_ends_the_run(fit, injected, tmp_path):
    (run,) = fit("--rollout.engine=FaultyServerEngine", "--rollout.engine.where=generate")
    run.wait(600)
    ends_within_a_minute([run])
    assert "cannot be reached while generating" in run.text()
    assert "It ended with exit code 137. The end of its log" in run.text()
    assert "It happened while generating." in run.text()
    goes_on(fit, run, step=1)
    injected(times=1)


@pytest.fixture(scope="module")
def server(playground):
    """A server, as another process has started it, and its processes."""
    engine = VLLMServerEngine(start_timeout_seconds=800)
    engine.start(engine_context(str(playground / "policy"), max_model_len=MAX_MODEL_LEN))
    yield engine._client.url, children_of(engine._server._process.pid)
    engine.close()


def with_server(server, number: int, where: str) -> list[str]:
    url, pids = server
    settings = {"number": number, "where": where, "url": url, "request_timeout_seconds": 10}
    settings["pids"] = ",".join(map(str, pids))
    length = f"--rollout.max_model_len={MAX_MODEL_LEN}"
    named = [f"--rollout.engine.{name}={value}" for name, value in settings.items()]
    return ["--rollout.engine=FaultyServerEngine", *named, length]


@needs_server
@pytest.mark.fault("a vLLM server stops to answer", how="SIGSTOP of its processes before a generation or a weight sync")
@pytest.mark.parametrize("where", ["generate", "sync"])
def test_server_that_stops_to_answer_ends_the_run(fit, injected, server, where):
    (run,) = fit(*with_server(server, signal.SIGSTOP, where))
    try:
        ends_within_a_minute([run], limit=10)
    finally:
        for pid in server[1]:
            os.kill(pid, signal.SIGCONT)
    phase = {"generate": "generating", "sync": "asking for its parameters"}[where]
    assert f"did not answer within 10 s while {phase}" in run.text()
    injected(times=1)


@needs_server
@pytest.mark.fault("a vLLM server is killed in a weight sync", how="SIGKILL of its processes")
def test_server_killed_in_a_sync_ends_the_run(fit, injected, server):
    (run,) = fit(*with_server(server, signal.SIGKILL, "sync"))
    ends_within_a_minute([run])
    assert "cannot be reached while asking for its parameters" in run.text()
    assert "It happened while syncing weights." in run.text()
    injected(times=1)
