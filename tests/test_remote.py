"""RemoteReward: with our own server, and with servers that are slow, broken, rude or gone."""

import random
import threading
import time

import pytest
import torch
from loopback import FAST, TOKEN, fake, ones, pictures, send, served

from vipo.rewards import JudgeReward, RemoteReward, endpoint, redness, score
from vipo.rewards.wire import encode_sample


def asks(url, error, message, **options):
    """Ask for two scores, expect an error of one line, and return it."""
    with pytest.raises(error, match=message) as caught:
        RemoteReward(url, **{**FAST, **options})(pictures(2), ["a", "b"])
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)


def test_a_served_reward_scores_as_the_local_one():
    frames, prompts = pictures(19), [f"prompt {i}" for i in range(19)]
    with served(redness) as url:
        found = RemoteReward(url, **FAST, batch=4)(frames, prompts)
        assert found.dtype == torch.float32
        assert torch.equal(found, redness(frames, prompts))
        rough = torch.rand(2, 1, 3, 5, 7, generator=torch.Generator().manual_seed(1))
        off = (RemoteReward(url, **FAST)(rough, ["", ""]) - redness(rough, ["", ""])).abs().max()
        assert 0 < off < 1 / 255
        assert torch.equal(score(RemoteReward(url, **FAST), frames, prompts).rewards, found)


def test_clips_travel_as_png_or_mp4():
    smooth = torch.linspace(0.2, 0.8, 32).expand(2, 5, 3, 16, 32) * torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)
    exact = (smooth * 255).round() / 255
    with served(redness) as url:
        png = RemoteReward(url, **FAST, format="png")(smooth, ["", ""])
        mp4 = RemoteReward(url, **FAST, format="mp4", fps=8)(smooth, ["", ""])
    assert torch.equal(png, redness(exact, ["", ""]))
    assert 0 < (mp4 - png).abs().max() < 0.01
    assert set(encode_sample(smooth[0], "p", "mp4", 8)) == {"prompt", "video", "fps"}
    assert len(encode_sample(smooth[0], "p", "png", 8)["frames"]) == 5
    assert "frames" in encode_sample(smooth[0, :1], "p", "mp4", 8)


def test_a_sample_that_is_not_finite_has_no_score():
    frames = pictures(3)
    frames[1, 0, 0, 0, 0] = torch.nan
    with served(redness) as url:
        found = RemoteReward(url, **FAST)(frames, ["", "", ""])
    assert found.isnan().tolist() == [False, True, False]


def test_a_slow_server_is_a_timeout():
    answered = threading.Event()
    with fake(lambda handler, body: answered.wait(5)) as server:
        began = time.monotonic()
        message = "no answer in 2 attempts; the last: no answer within 0.1 s"
        asks(server.url, ConnectionError, message, timeout=0.1, retries=1)
        assert time.monotonic() - began < 4 and len(server.requests) == 2
        answered.set()


def test_a_server_that_drips_is_a_timeout():
    def drip(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        for _ in range(20):  # a byte every 50 ms: no single wait is long
            handler.wfile.write(b" ")
            time.sleep(0.05)

    with fake(drip) as server:
        asks(server.url, ConnectionError, "no answer within 0.2 s", timeout=0.2, retries=0)


def test_dropped_connections_and_nobody_there():
    def drop(handler, body):
        handler.connection.close()

    with fake(drop) as server:
        asks(server.url, ConnectionError, "no answer in 3 attempts; the last: ")
        assert len(server.requests) == 3
        url = server.url
    asks(url, ConnectionError, "the last: .*refused")


@pytest.mark.parametrize("length", ["99", None])
def test_a_reply_cut_short_is_tried_again(length):
    def cut(handler, body):
        if len(handler.server.requests) > 1:
            return ones(handler, body)
        handler.send_response(200)
        if length:
            handler.send_header("Content-Length", length)
        else:
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b'{"scores": [1.0, 2.0]}' if length else b'16\r\n{"scores": [1.0, 2.0]}')

    with fake(cut) as server:
        assert RemoteReward(server.url, **FAST)(pictures(2), ["", ""]).tolist() == [1, 1]
        assert len(server.requests) == 2


def test_two_errors_then_an_answer(monkeypatch):
    pauses = []
    monkeypatch.setattr(endpoint.time, "sleep", pauses.append)

    def twice(handler, body):
        return ones(handler, body) if len(handler.server.requests) > 2 else send(handler, {"detail": "busy"}, 503)

    with fake(twice) as server:
        state = torch.random.get_rng_state(), random.getstate()
        found = RemoteReward(server.url, timeout=5, retries=2, backoff=8)(pictures(2), ["", ""])
        assert found.tolist() == [1, 1] and len(server.requests) == 3
        assert 4 <= pauses[0] <= 8 <= pauses[1] <= 16 and len(pauses) == 2
        assert torch.equal(state[0], torch.random.get_rng_state()) and state[1] == random.getstate()


def test_an_error_for_ever_and_long_pauses_are_bounded(monkeypatch):
    pauses = []
    monkeypatch.setattr(endpoint.time, "sleep", pauses.append)
    with fake(lambda handler, body: send(handler, b"<h1>out\nof \x1b[31mmemory</h1>" + b"x" * 9999, 502)) as server:
        text = asks(server.url, ConnectionError, "no answer in 9 attempts", retries=8, backoff=1)
        assert "HTTP 502: <h1>out of [31mmemory" in text and len(text) < 500 and "\x1b" not in text
        assert len(server.requests) == 9 and max(pauses) <= 30


@pytest.mark.parametrize(
    ("status", "reply", "message"),
    [
        (404, {"detail": "Not Found"}, "HTTP 404: Not Found"),
        (422, {"detail": [{"loc": ["x"], "msg": "bad"}]}, r'HTTP 422: \[\{"loc": \["x"\], "msg": "bad"\}\]'),
        (400, {"error": {"message": "no such model", "code": 1}}, "HTTP 400: no such model"),
        (403, b"", r"HTTP 403: \(nothing\)"),
        (302, b"moved", "HTTP 302: moved"),
    ],
)
def test_refusals_are_not_tried_again(status, reply, message):
    def refuse(handler, body):
        send(handler, reply, status, Location=f"http://127.0.0.1:{handler.server.server_port}/other")

    with fake(refuse) as server:
        assert asks(server.url, ValueError, message).startswith(f"{server.url}: HTTP {status}")
        assert len(server.requests) == 1 and server.requests[0][0] == "/score"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"scores": [1.0]}, "expected 2 scores, one per sample, got 1"),
        ({"scores": [1.0, 2.0, 3.0]}, "expected 2 scores, one per sample, got 3"),
        (b'{"scores": [1.0', r'unexpected reply \(Invalid JSON.*\): \{"scores": \[1.0'),
        (b"<html>login</html>", "<html>login</html>"),
        (b"", r"unexpected reply .*\(nothing\)"),
        ([1.0, 2.0], r"unexpected reply \(.*object.*\): \[1.0, 2.0\]"),
        ({"score": [1.0, 2.0]}, r"unexpected reply \(scores: Field required\)"),
        ({"scores": [1.0, "2.0"]}, r"scores.1: Input should be a valid number"),
        ({"scores": [True, 1.0]}, r"scores.0: Input should be a valid number"),
        (b"[" * 50_000, r"unexpected reply"),
        (b"\xff\xfe" * 5000, r"unexpected reply"),
    ],
)
def test_wrong_replies_say_what_came(reply, message):
    with fake(lambda handler, body: send(handler, reply)) as server:
        text = asks(server.url, ValueError, message)
        assert len(server.requests) == 1 and len(text) < 600


@pytest.mark.parametrize("scores", [b"[null, 2]", b"[NaN, 2.0]"])
def test_null_and_nan_are_failures_of_one_sample(scores):
    with fake(lambda handler, body: send(handler, b'{"scores": ' + scores + b"}")) as server:
        found = RemoteReward(server.url, **FAST)(pictures(2), ["", ""])
    assert found[0].isnan() and found[1] == 2


def test_a_huge_reply_is_not_read(monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_REPLY", 100_000)
    sent = []

    def flood(handler, body):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(b" " * 100_000)
            sent.append(1)

    with fake(flood) as server:
        server.handle_error = lambda *_: None  # the pipe breaks, as it should
        asks(server.url, ValueError, "the reply is longer than 100000 bytes")
        assert len(server.requests) == 1
    assert len(sent) < 1000


def test_requests_run_at_once_and_keep_the_order():
    lock, running, most = threading.Lock(), [0], [0]

    def watch(handler, body):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        indices = [int(sample["prompt"]) for sample in body["samples"]]
        time.sleep(0.02 * (7 - indices[0] // 2 % 7))  # the earlier, the slower
        with lock:
            running[0] -= 1
        send(handler, {"scores": indices})

    prompts = [str(i) for i in range(17)]
    with fake(watch) as server:
        found = RemoteReward(server.url, **FAST, concurrency=3, batch=2)(pictures(17), prompts)
        assert found.tolist() == list(range(17)) and len(server.requests) == 9
        assert most[0] == 3
        most[0] = 0
        RemoteReward(server.url, **FAST, concurrency=1, batch=9)(pictures(17), prompts)
        assert most[0] == 1


def test_the_first_refusal_stops_the_requests_that_wait():
    def refuse(handler, body):
        time.sleep(0.02)
        send(handler, {"detail": "no"}, 400)

    with fake(refuse) as server:
        with pytest.raises(ValueError, match="HTTP 400"):
            RemoteReward(server.url, **FAST, concurrency=2, batch=1)(pictures(40), [""] * 40)
        assert len(server.requests) < 10


def test_the_token_is_sent_and_never_shown(monkeypatch, caplog):
    monkeypatch.setenv("REWARD_TOKEN", TOKEN + "\n")
    with fake(
        lambda handler, body: send(handler, {"detail": f"bad {handler.headers['Authorization']}"}, 401)
    ) as server:
        text = asks(server.url + "?part=hidden", ValueError, r"bad Bearer \*\*\*", token_env="REWARD_TOKEN")
        assert server.requests[0][1]["Authorization"] == f"Bearer {TOKEN}" and "hidden" not in text
        assert server.requests[0][0] == "/score?part=hidden"
        shown = repr(RemoteReward(server.url + "?part=hidden", token_env="REWARD_TOKEN"))
        assert TOKEN not in shown and "hidden" not in shown and "REWARD_TOKEN" in shown
    with fake(lambda handler, body: send(handler, handler.headers["Authorization"].encode())) as server:
        asks(server.url, ValueError, r"unexpected reply .*Bearer \*\*\*", token_env="REWARD_TOKEN")
    with fake(lambda handler, body: handler.wfile.write(handler.headers["Authorization"].encode())) as server:
        asks(server.url, ConnectionError, r"Bearer \*\*\*", token_env="REWARD_TOKEN")
    assert TOKEN not in caplog.text
    for content in ("", "  ", "two words", "caf\xe9", "a\nb"):
        monkeypatch.setenv("REWARD_TOKEN", content)
        with pytest.raises(ValueError, match="REWARD_TOKEN") as caught:
            RemoteReward("http://127.0.0.1/score", token_env="REWARD_TOKEN")
        assert not content.strip() or content not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "file:///etc/passwd"}, "url: expected http"),
        ({"url": "localhost:8000/score"}, "url: expected http.*got 'localhost:8000/score'"),
        ({"url": "http://"}, "url: expected http"),
        ({"url": "http://host:99999/"}, "url: expected http"),
        ({"url": "http://host:0/"}, "url: expected http"),
        ({"url": "http://[::1/score"}, "url: expected http"),
        ({"url": "http://host/a b"}, "without blanks"),
        ({"url": "http://host/a\r\nX: y"}, "url: expected http"),
        ({"url": "http://höst/"}, "url: expected http"),
        ({"url": "http://user:hunter2@host/"}, "url: expected no @.*token_env"),
        ({"timeout": 0}, "timeout > 0"),
        ({"timeout": float("inf")}, "timeout > 0"),
        ({"backoff": -1}, "backoff >= 0"),
        ({"retries": -1}, "retries >= 0"),
        ({"concurrency": 0}, "concurrency >= 1"),
        ({"batch": 0}, "batch >= 1"),
        ({"fps": 0}, "fps of 0.01"),
        ({"format": "mpg"}, "format: .*mpg"),
        ({"token_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE is not set"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        RemoteReward(**{"url": "http://127.0.0.1/score", **options})
    assert "hunter2" not in str(caught.value)


def test_shapes_are_checked_before_anything_is_sent():
    with fake(ones) as server:
        for reward in (RemoteReward(server.url), JudgeReward(server.url, model="m")):
            with pytest.raises(ValueError, match="frames: expected shape"):
                reward(pictures(2), ["one prompt"])
        assert not server.requests


def test_half_precision_and_a_graph_may_come():
    with fake(ones) as server:
        found = RemoteReward(server.url, **FAST)(pictures(2).half().requires_grad_(), ["", ""])
    assert found.tolist() == [1, 1] and not found.requires_grad
