"""OpenAI's contract over a real socket, with OpenAI's own client too."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest

from rlhf_core.config import SamplingConfig
from rlhf_core.generation import generate
from serving.service import Limits

from .conftest import HELLO, until

LONG = {"max_tokens": 400, "seed": 3}
LONG_CHAT = [{"role": "user", "content": "no"}]


def expected(loaded, messages, **changes):
    values = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": 16, "seed": 1}
    return generate(*loaded, [messages], SamplingConfig(**values | changes))[0][0]


def test_a_completion_has_openais_form_and_the_text_of_generate(server, loaded):
    reply = server.chat()
    assert reply.status_code == 200
    body = reply.json()
    answer = expected(loaded, HELLO)
    version = server.fleet.role("champion").version.label
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": "stop" if answer.finished else "length",
        }
    ]
    assert body["object"] == "chat.completion"
    assert body["usage"]["completion_tokens"] == len(answer.token_ids)
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + len(answer.token_ids)
    assert body["system_fingerprint"] == reply.headers["x-model-version"] == version
    assert body["feedback"] == {"stored": False}


def test_a_stream_is_the_same_text_in_pieces(server, loaded):
    events = server.events(max_tokens=40, n=2, stream_options={"include_usage": True})
    texts = ["", ""]
    for event in events[:-1]:
        assert event["object"] == "chat.completion.chunk"
        assert event["usage"] is None
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert [e["choices"][0]["delta"].get("role") for e in events[:2]] == ["assistant"] * 2
    whole = server.chat(max_tokens=40, n=2).json()
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert texts[0] == expected(loaded, HELLO, max_new_tokens=40).text
    assert len({event["id"] for event in events}) == 1
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert len(events) > 10  # in pieces indeed


def test_temperature_zero_is_the_likeliest_token_whatever_the_seed(server, loaded):
    texts = {server.chat(temperature=0, seed=s).json()["choices"][0]["message"]["content"] for s in (1, 2)}
    assert texts == {expected(loaded, HELLO, temperature=1.0, top_k=1).text}


def test_without_a_seed_answers_differ(server):
    texts = {
        server.chat(seed=None, temperature=2.0, max_tokens=30).json()["choices"][0]["message"]["content"]
        for _ in range(4)
    }
    assert len(texts) > 1


def test_a_stop_sequence_cuts_the_text_and_ends_it(server):
    whole = server.chat(max_tokens=40).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    cut = whole[: whole.index(stop)].strip()
    body = server.chat(max_tokens=40, stop=[stop, "never there"]).json()
    assert body["choices"][0]["message"]["content"] == cut
    assert body["choices"][0]["finish_reason"] == "stop"
    streamed = server.events(max_tokens=40, stop=stop)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed) == cut


def test_parts_of_text_and_the_developers_role_are_taken(server):
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]}
    ]
    assert server.chat(parts).json()["choices"] == server.chat().json()["choices"]
    assert server.chat([{"role": "developer", "content": "be kind"}, *HELLO]).status_code == 200


@pytest.mark.parametrize(
    ("values", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages", "messages.0.content"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "'king'"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages", "end with a user's turn"),
        ({"messages": [{"role": "user", "content": "hello " * 600}]}, "messages", "at most"),
        ({"temperature": 2.5}, "temperature", "2.5"),
        ({"temperature": "0.7"}, "temperature", "'0.7'"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5000}, "max_tokens", "at most 1024 on this server, found 5000"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "different things"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"n": 5}, "n", "at most 4, the slots"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"seed": -1}, "seed", "-1"),
        ({"seed": 2**70}, "seed", "seed"),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"frequency_penalty": 1}, "frequency_penalty", "not supported here, found 1"),
        ({"temprature": 1}, "temprature", "not supported"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "half a surrogate"),
    ],
)
def test_bad_input_names_key_value_and_rule(server, values, param, says):
    reply = server.chat(**values)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert error["message"].startswith(param)
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_an_answer_whose_length_is_not_said_ends_with_the_context(server, loaded):
    """The toy's context is 512 tokens, and an answer has up to 256 where nothing is said."""
    long = [{"role": "user", "content": "no " * 350}]
    prompt = server.chat(long, max_tokens=1).json()["usage"]["prompt_tokens"]
    assert 300 < prompt < 500
    assert server.chat(long, max_tokens=256).status_code == 400
    usage = server.chat(long, max_tokens=None, temperature=2).json()["usage"]
    assert usage["prompt_tokens"] == prompt
    assert usage["total_tokens"] <= 512


def test_keys_that_ask_for_nothing_are_passed_over(server):
    nothing = {"frequency_penalty": 0, "tools": [], "logprobs": False, "response_format": {"type": "text"}}
    assert server.chat(**nothing, user="ann", service_tier="auto").status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "status", "says"),
    [
        (b"{", "application/json", 400, "not JSON"),
        (b"[]", "application/json", 400, "must be a JSON object, found list"),
        (b"[" * 100_000, "application/json", 400, "not JSON"),
        (b"{}", "text/plain", 415, "application/json, found 'text/plain'"),
        (b"\xff", "application/json", 400, "not JSON"),
    ],
)
def test_bodies_that_are_no_requests(server, content, kind, status, says):
    reply = server.http.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, "invalid_request_error")
    assert says in reply.json()["error"]["message"]


def test_models_and_health(server):
    version = server.fleet.role("champion").version.label
    ids = [model["id"] for model in server.http.get("/v1/models").json()["data"]]
    assert ids == ["toy", version]
    state = server.health()
    assert (state["status"], state["in_flight"], state["logging"]) == ("ok", 0, "off")
    assert [(one["version"], one["roles"]) for one in state["versions"]] == [(version, ["champion"])]
    assert server.chat(model=version).status_code == server.chat(model="toy").status_code == 200
    reply = server.chat(model="gpt-5")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert f"there is toy, {version}" in reply.json()["error"]["message"]
    assert server.http.get("/v1/nothing").status_code == 404
    assert server.http.get("/v1/chat/completions").status_code == 405


def test_openais_own_client_is_content(server, loaded):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="toy", messages=HELLO, max_tokens=16, seed=1)
    assert answer.choices[0].message.content == expected(loaded, HELLO).text
    assert answer.system_fingerprint == server.fleet.role("champion").version.label
    assert answer.usage.completion_tokens == len(expected(loaded, HELLO).token_ids)
    stream = client.chat.completions.create(
        model="toy",
        messages=HELLO,
        max_completion_tokens=16,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(loaded, HELLO).text
    assert chunks[-1].usage == answer.usage
    assert next(model.id for model in client.models.list()) == "toy"
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(model="toy", messages=HELLO, temperature=3)
    assert told.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HELLO)


def test_a_full_server_says_429_and_when_to_come_back(serve, monkeypatch):
    slow(monkeypatch)
    server = serve()
    busy = [threading.Thread(target=server.chat, args=(LONG_CHAT,), kwargs=LONG) for _ in range(12)]
    for thread in busy:
        thread.start()
    engine = server.fleet.role("champion").engine
    until(lambda: (engine.running, engine.waiting) == (4, 8))
    reply = server.chat()
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "2")
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    for thread in busy:
        thread.join()
    assert server.fleet.in_flight == 0
    assert server.chat().status_code == 200


def body_of(**values):
    return json.dumps({"messages": LONG_CHAT, "seed": 3, "max_tokens": 450} | values).encode()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(serve, stream, monkeypatch):
    slow(monkeypatch)
    server = serve()
    host, port = "127.0.0.1", server.socket.getsockname()[1]
    with socket.create_connection((host, port)) as connection:
        body = body_of(stream=stream)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: server.fleet.role("champion").engine.running == 1)
    before = server.fleet.role("champion").engine.tokens
    until(lambda: server.fleet.role("champion").engine.running == 0)
    until(lambda: server.fleet.in_flight == 0)
    assert server.fleet.role("champion").engine.tokens - before < 200  # not to its end
    assert server.chat().status_code == 200


def slow(monkeypatch):
    """Steps that take their time, as those of a larger model."""
    from rlhf_core.modeling.running import StaticRows

    step = StaticRows.step

    def slower(self, tokens):
        time.sleep(0.01)
        return step(self, tokens)

    monkeypatch.setattr(StaticRows, "step", slower)


KEY = "a key of many characters"


def test_a_key_is_asked_for_and_never_logged(serve, caplog):
    server = serve(limits=Limits(slots=4, key=KEY))
    for headers in ({}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer wrong-secret-7"}):
        reply = server.chat(headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert server.http.get("/v1/models", headers=headers).status_code == 401
        assert server.http.post("/v1/feedback", headers=headers, json={}).status_code == 401
        assert server.http.get("/healthz", headers=headers).json() == {"status": "ok"}
    right = {"Authorization": f"Bearer {KEY}"}
    assert server.chat(headers=right).status_code == 200
    assert "versions" in server.http.get("/healthz", headers=right).json()
    said = caplog.text
    assert "refused POST /v1/chat/completions" in said
    assert KEY not in said
    assert "wrong-secret-7" not in said
    assert "hello there" not in said
    assert KEY not in repr(server.service.limits)


def test_requests_from_elsewhere_are_refused(server):
    elsewhere = {"Origin": "https://evil.example"}
    assert server.chat(headers=elsewhere).status_code == 403
    assert server.chat(headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert server.http.get("/healthz", headers={"Host": "evil.example"}).status_code == 400
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert server.chat(headers=own).status_code == 200


def test_bodies_that_are_too_large_are_refused_with_and_without_a_length(serve):
    server = serve(limits=Limits(slots=4, most_body=2000))
    big = [{"role": "user", "content": "x" * 3000}]
    kind = {"Content-Type": "application/json"}

    def parts():
        yield json.dumps({"messages": big}).encode()

    for reply in (
        server.chat(big),
        server.http.post("/v1/chat/completions", content=parts(), headers=kind),
    ):
        assert reply.status_code == 413
        assert reply.json()["error"]["message"] == "the body must be at most 2000 bytes"


def test_the_page_allows_no_script_but_its_own(server):
    reply = server.http.get("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'" in policy
    assert "unsafe" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "http://" not in reply.text
    assert "https://" not in reply.text
    assert "Nothing that you write here is kept." in reply.text
    for path in (
        "/static/chat.js",
        "/static/chat.css",
        "/static/feedback/style.css",
        "/static/feedback/icon.svg",
    ):
        assert path in reply.text
        assert server.http.get(path).status_code == 200


def test_a_drained_server_ends_what_runs_and_refuses_the_rest(serve, monkeypatch):
    slow(monkeypatch)
    server = serve()
    found = []
    running = threading.Thread(target=lambda: found.append(server.chat(LONG_CHAT, max_tokens=60, seed=3)))
    running.start()
    until(lambda: server.fleet.in_flight == 1)
    drained = []
    draining = threading.Thread(target=lambda: drained.append(server.fleet.drain(30.0)))
    draining.start()
    until(lambda: server.fleet.draining)
    reply = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
    assert "retry-after" in reply.headers
    assert server.http.get("/healthz").status_code == 503
    running.join()
    draining.join()
    assert drained == [True]
    assert found[0].status_code == 200
    assert found[0].json()["choices"][0]["finish_reason"] in ("length", "stop")
