"""HTTPReward against real local servers: wire format, what is asked again, and where tokens do not turn up."""

import datetime
import json
import logging
import math
import random
import threading
import time
import traceback
import warnings
from decimal import Decimal

import numpy
import pytest
import torch
from reward_server import reward_server, score_of
from stub_server import stub_server

from tealightning.rewards import FunctionReward, HTTPReward, WeightedReward
from tealightning.rewards.http_client import RewardServerError

TOKEN = "s3cret-Token_1"
QUICK = {"backoff_seconds": 0.01, "max_backoff_seconds": 0.05}
CHAT = [{"role": "user", "content": "2 + 2 ="}]
ROWS = (["a prompt", CHAT], ["one", "two"], [{"answer": 4}, {"answer": 5}])


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    return "REWARD_TOKEN"


def answering(score=1.0):
    return lambda body: (200, {"scores": [{"id": item["id"], "score": score} for item in body["items"]]})


def test_request_and_answer_are_the_documented_json():
    with stub_server({"/score": answering()}) as (url, seen):
        scores = HTTPReward(url + "/score", metadata_keys=["answer", "absent"])(*ROWS)
    ((path, body, headers),) = seen
    assert path == "/score" and headers["Content-Type"] == "application/json" and headers["Idempotency-Key"]
    first, second = body["items"]
    assert first | {"id": ""} == {"id": "", "prompt": "a prompt", "completion": "one", "metadata": {"answer": 4}}
    assert second["prompt"] == CHAT and second["id"] != first["id"]
    assert scores.total.tolist() == [1.0, 1.0] and scores.total.dtype == torch.float64
    assert scores.counts == {"http": {"retries": 0, "timeouts": 0, "errors": 0, "unscored": 0}}


def test_ids_are_never_used_twice_but_for_a_retry():
    with reward_server({"500": 0.5}, seed=3) as server:
        reward = HTTPReward(server.url, batch_size=2, retries=30, **QUICK)
        for _ in range(3):
            reward(*ROWS)
    assert server.injected["500"] > 0
    assert len(server.bodies) == 3 and all(len(bodies) == 1 for bodies in server.bodies.values())
    ids = [item["id"] for (body,) in server.bodies.values() for item in json.loads(body)["items"]]
    assert len(set(ids)) == len(ids) == 6


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0.1", 0.1),
        ("-1e300", -1e300),
        ("7", 7.0),
        ("null", math.nan),
        ("NaN", math.nan),
        ("Infinity", math.nan),
        ("1e999", math.nan),
        ("true", math.nan),
        ('"0.5"', math.nan),
        ("[1]", math.nan),
        ("1" + "0" * 400, math.nan),
    ],
)
def test_scores_are_float64_and_what_is_no_finite_number_is_unscorable(given, expected):
    with reward_server() as server:
        server.entries = lambda items: [{"id": item["id"], "score": json.loads(given)} for item in items]
        reward = HTTPReward(server.url, retries=1, **QUICK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (score,) = reward(["p"], ["c"], [{}]).total.tolist()
    assert score == expected or (math.isnan(score) and math.isnan(expected))


def test_null_is_the_servers_last_word():
    """And is no score of 0, as in TRL #5902."""
    with reward_server() as server:
        scores = HTTPReward(server.url, **QUICK)(["p"] * 2, ["<null>", "c"], [{}] * 2)
    assert math.isnan(scores.total[0]) and scores.total[1] == score_of({"prompt": "p", "completion": "c"})
    assert server.requests == 1 and scores.counts["http"]["unscored"] == 0


def test_only_what_is_missing_is_asked_for_again():
    with reward_server({"missing_ids": 1.0}) as server:
        with pytest.warns(UserWarning, match="the server left completions out"):
            scores = HTTPReward(server.url, batch_size=8, retries=0, **QUICK)(["p"] * 8, list("abcdefgh"), [{}] * 8)
        sizes = [len(json.loads(body)["items"]) for bodies in server.bodies.values() for body in bodies]
    right = [score_of({"prompt": "p", "completion": c}) for c in "abcdefgh"]
    assert scores.total.tolist()[:7] == right[:7]  # a single one is never answered by a server that leaves out half
    assert math.isnan(scores.total[7])
    assert sizes[0] == 8 and sum(sizes) < 3 * 8


@pytest.mark.parametrize("fault", ["wrong_ids", "one_wrong_id", "duplicated_ids", "by_position", "no_numbers"])
def test_answer_that_mixes_ids_up_is_not_used_at_all(fault):
    with reward_server({fault: 1.0}) as server:
        reward = HTTPReward(server.url, retries=1, **QUICK)
        with pytest.warns(UserWarning, match="no score for 3 completions"):
            scores = reward(["p"] * 3, list("abc"), [{}] * 3)
    assert torch.isnan(scores.total).all() and scores.counts["http"]["unscored"] == 3
    assert reward.problem


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 422])
def test_refusal_ends_the_call_at_once_with_status_and_text(status):
    with stub_server({"/score": lambda body: (status, {"error": "no such thing"})}) as (url, seen):
        with pytest.raises(RewardServerError, match=rf"{url}/score answered {status}: .*no such thing"):
            HTTPReward(url + "/score", concurrency=1)(*ROWS)
        assert len(seen) == 1


def test_redirect_to_another_server_is_not_followed(token):
    with stub_server({"/score": answering()}) as (other, seen_there), reward_server({"redirect": 1.0}) as server:
        server.location = f"{other}/score"
        with pytest.raises(RewardServerError, match=r"answered 302.*Redirects are not followed"):
            HTTPReward(server.url, token_env=token)(*ROWS)
        assert server.requests == 1 and seen_there == []


def test_neither_proxies_of_the_environment_nor_netrc_are_used(token, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with stub_server({"/score": answering()}) as (url, seen):
        assert HTTPReward(url + "/score", token_env=token)(*ROWS).total.tolist() == [1.0, 1.0]
    assert seen[0][2]["Authorization"] == f"Bearer {TOKEN}"


def test_token_is_sent_and_turns_up_nowhere_else(token, caplog, capfd):
    """Not in messages, warnings, logs, output, or the object, although the server repeats it."""
    caplog.set_level(logging.DEBUG)
    told = []

    def repeats(status):
        return lambda body: (status, {"error": f"you sent Bearer {TOKEN}"})

    with stub_server({"/401": repeats(401), "/500": repeats(500), "/200": repeats(200)}) as (url, seen):
        for path in ("/401", "/500", "/200"):
            reward = HTTPReward(url + path, token_env=token, retries=0, **QUICK)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    reward(*ROWS)
                except RewardServerError as error:
                    told += traceback.format_exception(error)
                    told += [repr(vars(one)) for one in (error, error.__context__, error.__cause__) if one is not None]
            told += [str(one.message) for one in caught] + [str(reward.problem), repr(reward), repr(vars(reward))]
            told += [repr(vars(part)) for part in (reward.client, reward._call)]
    assert {headers["Authorization"] for _, _, headers in seen} == {f"Bearer {TOKEN}"}
    assert any("***" in text for text in told)
    out, err = capfd.readouterr()
    assert not [text for text in [*told, caplog.text, out, err] if TOKEN in text]


def test_unreachable_server_gives_nan_at_the_deadline_and_no_token(token):
    reward = HTTPReward("http://127.0.0.1:1/score?key=hidden", token_env=token, deadline_seconds=0.3, **QUICK)
    with pytest.warns(
        UserWarning, match=r"http://127.0.0.1:1/score cannot be reached \(ConnectError: ConnectionRefused"
    ) as caught:
        scores = reward(*ROWS)
    assert torch.isnan(scores.total).all()
    assert not any(text in str(one.message) for one in caught for text in (TOKEN, "hidden"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000/score", "url must be http"),
        ("ftp://127.0.0.1/score", "url must be http"),
        ("http:///score", "url must be http"),
        ("http://127.0.0.1:99999/score", "url must be http"),
        ("http://user:hunter2@127.0.0.1/score", "without a name and password"),
        ("https://hunter2@127.0.0.1/score", "without a name and password"),
        ("http://rewards.example/score?key=hunter2", "is not encrypted"),
    ],
)
def test_url_that_is_none_or_would_tell_a_secret_is_refused(url, message, token):
    with pytest.raises(ValueError, match=message) as caught:
        HTTPReward(url, token_env=token)
    assert "hunter2" not in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize("url", ["http://localhost:1/", "http://127.8.0.1:1/", "http://[::1]:1/", "https://a.example/"])
def test_token_may_go_to_this_machine_and_over_https(url, token):
    HTTPReward(url, token_env=token)


def test_http_to_another_machine_is_allowed_without_a_token():
    HTTPReward("http://rewards.example/score")


def test_token_that_is_not_there_or_cannot_be_sent_is_refused_without_showing_it(monkeypatch):
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with pytest.raises(ValueError, match="'NO_TOKEN', which is not set"):
        HTTPReward("https://a.example", token_env="NO_TOKEN")
    monkeypatch.setenv("ODD_TOKEN", f"{TOKEN}\n")
    with pytest.raises(ValueError, match="'ODD_TOKEN' holds a space, a line end") as caught:
        HTTPReward("https://a.example", token_env="ODD_TOKEN")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"concurrency": 0},
        {"retries": -1},
        {"timeout_seconds": 0.0},
        {"timeout_seconds": math.nan},
        {"deadline_seconds": math.inf},
        {"backoff_seconds": -1.0},
        {"max_backoff_seconds": math.inf},
    ],
)
def test_setting_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        HTTPReward("https://a.example", **settings)


@pytest.mark.parametrize("value", [{1, 2}, math.nan, b"bytes"])
def test_metadata_that_json_cannot_hold_is_an_error_that_names_the_columns(value):
    reward = HTTPReward("http://127.0.0.1:1/")
    row = {"answer": 1, "odd": value}
    told = r"cannot send column 'odd' .*: name the columns that it needs in metadata_keys; there are 'answer', 'odd'"
    with pytest.raises(ValueError, match=told):
        reward(["p"], ["c"], [row])
    with pytest.raises(ValueError, match=told):
        WeightedReward({"a": reward}, {"a": 1.0}).check_metadata(row)
    HTTPReward("http://127.0.0.1:1/", metadata_keys=["answer"]).check_metadata(row)


def test_dates_and_exact_numbers_are_sent_as_people_write_them():
    row = {
        "day": datetime.date(2026, 1, 2),
        "at": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC),
        "price": Decimal("1.10"),
    }
    with stub_server({"/score": answering()}) as (url, seen):
        HTTPReward(url + "/score")(["p"], ["c"], [row])
    (item,) = seen[0][1]["items"]
    assert item["metadata"] == {"day": "2026-01-02", "at": "2026-01-02T03:04:00+00:00", "price": "1.10"}


def test_global_random_numbers_are_left_alone():
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    with reward_server({"500": 0.5}, seed=3) as server:
        HTTPReward(server.url, batch_size=1, retries=30, **QUICK)(["p"] * 20, [str(i) for i in range(20)], [{}] * 20)
    assert random.getstate() == states[0]
    assert numpy.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_no_more_requests_at_a_time_than_told():
    with reward_server({"slow": 0.3}) as server:
        HTTPReward(server.url, batch_size=1, concurrency=3)(["p"] * 20, [str(i) for i in range(20)], [{}] * 20)
    assert server.most_at_a_time == 3


def test_close_from_another_thread_ends_a_call():
    reward = HTTPReward("http://127.0.0.1:1/", deadline_seconds=600.0)
    threading.Timer(0.2, reward.close).start()
    started = time.monotonic()
    with pytest.warns(UserWarning, match="no score"):
        assert torch.isnan(reward(*ROWS).total).all()
    assert time.monotonic() - started < 60.0


def test_weighted_sum_has_no_total_where_the_server_gave_no_score_and_keeps_the_counts():
    def length(prompts, completions, metadata):
        return [float(len(c)) for c in completions]

    with reward_server() as server:
        parts = {"judge": HTTPReward(server.url, **QUICK), "length": FunctionReward(length)}
        reward = WeightedReward(parts, {"judge": 1.0, "length": 0.5})
        scores = reward(["p"] * 2, ["<null>", "four"], [{}] * 2)
    assert math.isnan(scores.total[0]) and scores.components["length"].tolist() == [6.0, 4.0]
    assert scores.total[1] == score_of({"prompt": "p", "completion": "four"}) + 2.0
    assert scores.counts == {"judge": {"retries": 0, "timeouts": 0, "errors": 0, "unscored": 0}}
