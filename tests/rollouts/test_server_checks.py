"""A vLLM server that is wrong, silent, old or gone is an error that says so, at once."""

import time

import pytest
import torch
from safetensors.torch import load_file
from stub_server import choice, stub_server
from tiny_policies import engine_context, save_policy

from tealightning.rollouts import VLLMServerEngine
from tealightning.rollouts.vllm_client import (
    ServerError,
    VLLMClient,
    check_length,
    check_log_probs_mode,
    check_policy,
    check_versions,
    is_local,
)
from tealightning.rollouts.vllm_server import serve_command, serve_environment
from tealightning.rollouts.weight_push import FilePush, NCCLPush
from tealightning.types import Completion

GENERATE = "/inference/v1/generate"
LOGITS = torch.tensor([3.0, 2.0, 2.0, -1.0, -4.0])  # two are tied for the second place


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return engine_context(save_policy(tmp_path_factory.mktemp("policy")))


def log_probs_server(mode, logits=LOGITS):
    """Answers as vLLM would with `--logprobs-mode mode`."""

    def answer(body):
        sampling = body["sampling_params"]
        scaled = logits / sampling["temperature"]
        filtered = scaled.masked_fill(scaled < scaled.topk(sampling["top_k"]).values[-1], -9999)
        values = {
            "processed_logprobs": filtered.log_softmax(0).clamp(min=-9999),
            "processed_logits": filtered,
            "raw_logprobs": logits.log_softmax(0),
            "raw_logits": logits,
        }[mode].sort(descending=True, stable=True)
        top = [{"token_id": int(i), "logprob": float(v)} for v, i in zip(*values, strict=True)]
        first = choice([top[0]["token_id"]], [top[0]["logprob"]])
        first["logprobs"]["content"][0]["top_logprobs"] = [top[0], *top][: 1 + sampling["logprobs"]]
        return 200, {"choices": [first]}

    return answer


@pytest.mark.parametrize("logits", [LOGITS, 20 * LOGITS, LOGITS.clamp(max=2)], ids=["flat", "peaked", "tied"])
@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits", "raw_logprobs", "raw_logits"])
def test_check_log_probs_mode_accepts_what_the_server_samples_with(mode, logits):
    with stub_server({GENERATE: log_probs_server(mode, logits)}) as (url, _):
        if mode == "processed_logprobs":
            check_log_probs_mode(VLLMClient(url))
        else:
            with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
                check_log_probs_mode(VLLMClient(url))


def test_check_length_names_the_flag(context):
    models = {"data": [{"max_model_len": 127}]}
    told = pytest.raises(ServerError, match=r"serves 127 tokens .* is 128: start it with --max-model-len 128")
    with stub_server({"/v1/models": lambda body: (200, models)}) as (url, _), told:
        check_length(VLLMClient(url), context)


def test_check_policy_finds_another_model_and_changes_no_mode(context):
    class Other(VLLMServerEngine):
        def generate(self, prompt_token_ids, *, num_samples, sampling, seeds):
            return [[Completion(token_ids=[5] * 8, log_probs=[-0.01] * 8, text="", truncated=True)]]

    context.policy.model.layers[1].train()
    with pytest.raises(ServerError, match=r"off by \d\.\d\d nats a token: it serves another model"):
        check_policy(Other(), context)
    assert context.policy.model.layers[1].mlp.training and not context.policy.model.layers[0].training
    context.policy.eval()


def test_check_versions_refuses_weights_that_were_not_pushed():
    client = VLLMClient("http://127.0.0.1:9")
    check_versions(client, [choice([5], [-1.0], version="a")], "a")
    for version in ("b", "a incomplete"):
        with pytest.raises(ServerError, match="was it restarted, or does another trainer use it"):
            check_versions(client, [choice([5], [-1.0], version="a"), choice([5], [-1.0], version=version)], "a")
    with pytest.raises(ServerError, match=r"labelled \[\]"):
        check_versions(client, [{"weight_versions": None}], "a")


def test_client_says_which_phase_failed_and_why():
    answers = {
        "/v1/models": lambda body: (401, {"error": "Unauthorized"}),
        "/collective_rpc": lambda body: (500, {"error": {"message": "size mismatch"}}),
        "/reset_prefix_cache": lambda body: (200, {"success": False}),
    }
    with stub_server(answers) as (url, seen):
        client = VLLMClient(url, api_key="secret", explain=lambda: "Its log says more.")
        with pytest.raises(ServerError, match=r"refuses the API key: set rollout\.engine\.api_key_env") as refused:
            client.max_model_len()
        assert "secret" not in str(refused.value)
        assert seen[0][2]["Authorization"] == "Bearer secret"
        with pytest.raises(ServerError, match="answered 500 while loading the new weights: size mismatch Its log says"):
            client.reload_weights("/x")
        with pytest.raises(ServerError, match="could not drop its prefix cache"):
            client.reset_prefix_cache()
        with pytest.raises(ServerError, match=f"has no {GENERATE}: start it with --enable-scale-out"):
            list(client.generate([{}]))
        with pytest.raises(ServerError, match="has no /update_weight_version: start it with VLLM_SERVER_DEV_MODE=1"):
            client.set_weight_version("a")


def test_client_gives_up_on_a_silent_server_and_resumes_after_a_failed_update():
    answers = {
        "/get_world_size": lambda body: (time.sleep(2), (200, {}))[1],
        "/pause": lambda body: (200, {}),
        "/resume": lambda body: (200, {}),
    }
    with stub_server(answers) as (url, seen):
        client = VLLMClient(url, timeout_seconds=0.2)
        with pytest.raises(ServerError, match=r"did not answer within 0\.2 s while asking for its world size"):
            client.world_size()
        with pytest.raises(ServerError, match="VLLM_SERVER_DEV_MODE"), client.paused():
            client.reload_weights("/x")
        assert seen[-1][0] == "/resume"


def test_client_returns_answers_as_they_come_and_choices_by_index():
    def answer(body):
        time.sleep(0.5 * (body["n"] == 0))  # the first request ends last
        return 200, {"choices": [{"index": 1, "n": body["n"]}, {"index": 0, "n": body["n"]}]}

    with stub_server({GENERATE: answer}) as (url, _):
        answers = list(VLLMClient(url, connections=3).generate([{"n": n} for n in range(9)]))
    assert [[c["index"] for c in choices] for _, choices in answers] == [[0, 1]] * 9
    assert [choices[0]["n"] for _, choices in answers] == [number for number, _ in answers]
    assert answers[-1][0] == 0 and sorted(number for number, _ in answers) == list(range(9))


@pytest.mark.slow
def test_client_is_what_vllms_own_weight_transfer_drives():
    base = pytest.importorskip("vllm.distributed.weight_transfer.base")
    assert isinstance(VLLMClient("http://127.0.0.1:9"), base.VLLMWeightSyncClient)


def test_engine_without_a_server_says_so_fast(context):
    engine = VLLMServerEngine(url="http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9 cannot be reached while asking for its models"):
        engine.start(context)
    assert time.monotonic() - started < 5
    with pytest.raises(RuntimeError, match=r"start\(\)"):
        engine.generate([[5]], num_samples=1, sampling=None, seeds=[1])


def test_engine_whose_server_ends_at_once_shows_its_log(context, monkeypatch):
    monkeypatch.setattr(
        "tealightning.rollouts.vllm_server._program", lambda: ["sh", "-c", "echo no such model; exit 7"]
    )
    with pytest.raises(ServerError, match=r"could not start. It ended with exit code 7.*\nno such model"):
        VLLMServerEngine().start(context)


def test_engine_gives_up_on_a_server_that_does_not_get_ready(context, monkeypatch):
    monkeypatch.setattr("tealightning.rollouts.vllm_server._program", lambda: ["sh", "-c", "echo loading; sleep 600"])
    with pytest.raises(ServerError, match=r"not ready within rollout.engine.start_timeout_seconds=1\. It still runs"):
        VLLMServerEngine(start_timeout_seconds=1).start(context)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url must begin with http"),
        ({"weight_transfer": "ipc"}, "weight_transfer must be one of file, nccl, got 'ipc'"),
        ({"dtype": "half16"}, "dtype must be auto or a dtype of torch"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests must be an integer of at least 1, got 0"),
        ({"url": "http://gpu7:8000"}, "weights_dir must name a folder that http://gpu7:8000 sees"),
        ({"serve_args": ["--logprobs_mode=raw_logits"]}, r"serve_args may not hold \['--logprobs-mode'\]"),
    ],
)
def test_engine_refuses_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VLLMServerEngine(**kwargs)


def test_engine_warns_of_settings_without_effect():
    with pytest.warns(UserWarning, match="no effect with a url"):
        VLLMServerEngine(url="http://127.0.0.1:8000", serve_args=["--max-num-seqs", "8"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"api_key_env": "NO_SUCH_KEY"}, "names NO_SUCH_KEY, and that variable is not set"),
        ({"weights_dir": "/no/such/folder"}, "weights_dir must be an existing folder"),
        ({"log_file": "/no/such/folder/log"}, "log_file: the folder of"),
        ({"weight_transfer": "nccl"}, "needs the policy on an NVIDIA GPU, it is on cpu"),
    ],
)
def test_engine_refuses_settings_that_do_not_fit_the_machine(context, kwargs, message):
    with pytest.raises(ValueError, match=message):
        VLLMServerEngine(**kwargs).start(context)


def test_engine_on_a_gpu_wants_the_servers_gpus_named(context, monkeypatch):
    monkeypatch.setattr(context, "device", torch.device("cuda", 0))
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        VLLMServerEngine().start(context)


def test_serve_command_depends_on_device_and_transfer_and_hides_the_key(context, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    on_cpu = serve_command(context, port=8001, dtype="float32", nccl=False, serve_args=["--max-num-seqs", "8"])
    assert on_cpu[on_cpu.index("--port") + 1] == "8001" and on_cpu[-2:] == ["--max-num-seqs", "8"]
    assert "--enforce-eager" in on_cpu and "--weight-transfer-config" not in on_cpu
    monkeypatch.setattr(context, "device", torch.device("cuda", 0))
    on_gpu = serve_command(context, port=8001, dtype="bfloat16", nccl=True, serve_args=[])
    assert "--enforce-eager" not in on_gpu and on_gpu[-1] == '{"backend": "nccl"}'
    environment = serve_environment(context, api_key="secret", serve_env={"CUDA_VISIBLE_DEVICES": "1"})
    assert (environment["VLLM_API_KEY"], environment["CUDA_VISIBLE_DEVICES"]) == ("secret", "1")
    assert "WORLD_SIZE" not in environment and "secret" not in " ".join(on_gpu)


def test_file_push_writes_every_name_and_leaves_nothing_behind(tmp_path):
    tied, loaded = torch.arange(6.0).reshape(2, 3), {}

    class Client:
        def reload_weights(self, folder):
            (file,) = folder.iterdir()
            loaded.update(load_file(file))

    push = FilePush(str(tmp_path))
    push.push(Client(), [("embedding", tied), ("head", tied), ("transposed", tied.T)])
    assert torch.equal(loaded["embedding"], tied) and torch.equal(loaded["head"], tied)
    assert torch.equal(loaded["transposed"], tied.T)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with pytest.raises(ValueError, match=r"take 3725.29 GiB and .* left"):
        push.push(Client(), [("huge", torch.empty(10**12, device="meta"))])
    push.close()
    assert list(tmp_path.iterdir()) == []


def test_nccl_push_connects_once_and_sends_each_time(monkeypatch):
    sent = []

    class Sender:
        def __init__(self, client, weights, *, host, port, world_size):
            self.weights, self.place = weights, (host, world_size)

        def send_weights(self):
            sent.append((self, self.weights()))

        def shutdown(self):
            sent.append("shutdown")

    class Client:
        def world_size(self):
            return 4

    monkeypatch.setattr("tealightning.rollouts.weight_push.nccl_sender", Sender)
    monkeypatch.setattr(torch.cuda, "device", lambda device: memoryview(b""))  # any context manager
    push = NCCLPush(torch.device("cuda", 0), "10.0.0.1")
    for value in (1.0, 2.0):
        push.push(Client(), [("weight", torch.tensor(value))])
    assert sent[0][0] is sent[1][0] and sent[0][0].place == ("10.0.0.1", 5)
    assert [float(weights[0][1]) for _, weights in sent] == [1.0, 2.0]
    push.close()
    assert sent[-1] == "shutdown"


def test_is_local_knows_the_loopback_interface():
    assert is_local(None) and is_local("http://localhost:8000") and is_local("http://[::1]:80")
    assert not is_local("http://127.0.0.1.example.com") and not is_local("http://gpu7:8000")
