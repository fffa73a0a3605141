import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from rlhf_core.config import RunConfig
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.labelers import API_KEY, QUESTION, EndpointLabeler, JudgeLabeler, make_labeler
from rlhf_core.modeling.encoding import encode_prompt

RUN = RunConfig(seed=0, device="cpu", num_processes=1, sharding="none", precision="float32")


def test_vader_reads_the_response_only():
    labeler = make_labeler("vader", "", RUN)
    good, neutral, bad, empty = labeler.score(
        ["I hate it"] * 4, ["I love this!", "the table", "awful, bad", ""]
    )
    assert -1 <= bad < neutral == empty == 0 < good <= 1
    # By hand from the lexicon: "good" is 1.9, and compound = x / sqrt(x^2 + 15).
    assert labeler.score([""], ["good"])[0] == pytest.approx(1.9 / math.sqrt(1.9**2 + 15), abs=1e-4)


def test_unknown_labeler_is_refused():
    with pytest.raises(InputError, match="must be vader"):
        make_labeler("crowd", "", RUN)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "import math\n"
        "number = 3\n"
        "def longer(prompts, responses): return [len(r) - len(p) for p, r in zip(prompts, responses)]\n"
        "def short(prompts, responses): return [0.0]\n"
        "def bad(prompts, responses): return [1.0, math.nan]\n"
        "def words(prompts, responses): return ['good', 'bad']\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import not_installed_at_all\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_function_is_imported_from_the_workspace(workspace):
    scores = make_labeler("function", "my_rewards:longer", RUN).score(["ab", "abc"], ["abcd", "a"])
    assert scores == [2.0, -2.0]
    assert all(isinstance(score, float) for score in scores)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_rewards:short", "gave 1 scores for 2 responses"),
        ("my_rewards:bad", "score 1 is nan"),
        ("my_rewards:words", "score 0 is 'good'"),
        ("my_rewards:absent", "no function 'absent'"),
        ("my_rewards:number", "no function 'number'"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("broken_rewards:f", "not_installed_at_all"),
    ],
)
def test_function_faults_are_named(workspace, target, message):
    with pytest.raises(InputError, match=message):
        make_labeler("function", target, RUN).score(["a", "b"], ["c", "d"])


@pytest.fixture(scope="module")
def judge(tiny_model_dir):
    return JudgeLabeler(tiny_model_dir, RUN)


def test_judge_gives_the_log_odds_of_yes(judge):
    prompts, responses = ["hi", "how are you doing today?"], ["hello there, friend!", "bad"]
    expected = []
    for prompt, response in zip(prompts, responses):
        question = QUESTION.format(prompt=prompt, response=response)
        ids = encode_prompt(judge._tokenizer, [{"role": "user", "content": question}])
        with torch.no_grad():
            probs = judge._model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        expected.append(math.log(probs[judge._yes].sum() / probs[judge._no].sum()))
    assert judge.score(prompts, responses) == pytest.approx(expected, abs=1e-4)


def test_judge_scores_do_not_depend_on_the_batch(judge):
    prompts, responses = ["hi"] * 5, ["a", "no rain", "i love the sea and the sun", "", "walks"]
    assert judge.score(prompts, responses, batch_size=1) == pytest.approx(
        judge.score(prompts, responses, batch_size=4), abs=1e-5
    )


def test_judge_needs_a_model_directory(tmp_path):
    with pytest.raises(InputError, match="no such model directory"):
        make_labeler("judge", str(tmp_path / "absent"), RUN)


class Server:
    """A chat endpoint that answers from a script: (status, text) per request, the last one for ever."""

    def __init__(self, script):
        self.script, self.requests, self.lock = list(script), [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, self.headers.get("Authorization"), body))
                    status, answer = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                if callable(answer):
                    answer = answer(body)
                data = (
                    answer if status != 200 else json.dumps({"choices": [{"message": {"content": answer}}]})
                )
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data.encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.delenv(API_KEY, raising=False)
    servers = []

    def start(*script):
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def quick(url, **changes):
    return EndpointLabeler(url, **{"wait_s": 0.01, "timeout_s": 5.0} | changes)


def test_endpoint_rates_in_the_order_given(serve):
    def rate(body):
        return "10" if "sunny" in body["messages"][0]["content"] else "Rating: 1/10"

    server = serve((200, rate))
    responses = ["rain", "sunny", "rain", "sunny", "sunny"]
    assert quick(server.url + "#judge-7b").score(["weather?"] * 5, responses) == [-1.0, 1.0, -1.0, 1.0, 1.0]
    path, authorization, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert authorization is None
    assert body["model"] == "judge-7b"
    assert body["temperature"] == 0


@pytest.mark.parametrize(
    ("text", "rating"), [("7", 7), ("8.5 of 10", 8.5), (" 10.", 10), ("I say 3!", 3), ("1", 1)]
)
def test_endpoint_reads_ratings(serve, text, rating):
    assert quick(serve((200, text)).url).score(["p"], ["r"]) == [pytest.approx((rating - 5.5) / 4.5)]


@pytest.mark.parametrize("text", ["no idea", "0", "11", "85", "10.5", ""])
def test_endpoint_refuses_what_is_no_rating(serve, text):
    with pytest.raises(RLHFError, match=r"failed 2 times.*no rating from 1 to 10"):
        quick(serve((200, text)).url, attempts=2).score(["p"], ["r"])


def test_endpoint_tries_again_when_busy(serve):
    server = serve((429, "slow down"), (503, "starting"), (200, "10"))
    assert quick(server.url).score(["p"], ["r"]) == [1.0]
    assert len(server.requests) == 3


def test_endpoint_stops_after_its_attempts(serve):
    server = serve((500, "out of   memory"))
    with pytest.raises(RLHFError, match="failed 3 times; the last time: HTTP 500: out of memory"):
        quick(server.url, attempts=3).score(["p"], ["r"])
    assert len(server.requests) == 3


def test_endpoint_refusal_is_not_repeated_and_shows_no_key(serve, monkeypatch):
    monkeypatch.setenv(API_KEY, "sk-secret-value")
    server = serve((401, "invalid key"))
    with pytest.raises(InputError, match="HTTP 401: invalid key") as caught:
        quick(server.url).score(["p"], ["r"])
    assert len(server.requests) == 1
    assert server.requests[0][1] == "Bearer sk-secret-value"
    assert "sk-secret-value" not in str(caught.value)


def test_endpoint_that_is_not_there_gives_one_error(serve):
    server = serve((200, "5"))
    url = server.url
    server.close()
    with pytest.raises(RLHFError, match=r"failed 2 times.*ConnectError"):
        quick(url, attempts=2).score(["p"], ["r"])


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", "http://"])
def test_endpoint_checks_its_address(url):
    with pytest.raises(InputError, match="must begin with http"):
        make_labeler("endpoint", url, RUN)


def test_endpoint_takes_the_whole_address_too():
    assert EndpointLabeler("http://h:1/v1/chat/completions").url == EndpointLabeler("http://h:1/v1/").url
