"""JudgeReward against a server that speaks OpenAI's /v1/chat/completions, and the arithmetic of its two modes."""

import re

import pytest
import torch
from loopback import FAST, TOKEN, fake, pictures, send

from vipo.rewards import JudgeReward
from vipo.rewards.judge import parse_score, yes_probability
from vipo.rewards.wire import encode_png


def completion(text="", log_probs=None):
    tokens = [{"token": token, "logprob": value, "bytes": None} for token, value in (log_probs or {}).items()]
    logprobs = None if log_probs is None else {"content": [{"token": "x", "logprob": -1, "top_logprobs": tokens}]}
    return {
        "id": "1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}],
    }


def test_the_judge_asks_and_reads_log_probs(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    answers = {"a {low} cat": {"Yes": -0.5, " no": -1.5, "maybe": -3.0}, "b": {"No": -0.1}, "c": {"Maybe": -0.1}}

    def answer(handler, body):
        text = body["messages"][0]["content"][-1]["text"]
        send(handler, completion("Yes", answers[re.search('"(.*)"', text)[1]]))

    frames = pictures(3, (1, 3, 6, 8))
    with fake(answer) as server:
        judge = JudgeReward(server.url.replace("/score", "/v1/"), model="eye", token_env="JUDGE_TOKEN", **FAST)
        found = judge(frames, list(answers))
        torch.testing.assert_close(found[0], torch.tensor(1 / (1 + torch.e**-1)))
        assert found[1] == 0 and found[2].isnan()
        path, headers, body = next(r for r in server.requests if "cat" in r[2]["messages"][0]["content"][-1]["text"])
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {TOKEN}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("eye", 0, 1)
    assert body["logprobs"] is True and body["top_logprobs"] == 20
    picture, text = body["messages"][0]["content"]
    assert text["type"] == "text" and "Answer with yes or no only." in text["text"]
    assert picture == {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode_png(frames[0, 0])}"}}


def test_the_judge_reads_a_score_and_sees_evenly_spaced_frames():
    answers = {"a": "7", "b": "Score: 2.5 of 5", "c": "none", "d": "12", "e": "", "f": "10"}

    def answer(handler, body):
        text = body["messages"][0]["content"][-1]["text"]
        send(handler, completion(answers[text.removeprefix("2 to 10: ")]))

    clips = pictures(6, (9, 3, 6, 8))
    with fake(answer) as server:
        judge = JudgeReward(
            server.url,
            model="eye",
            mode="score",
            template="{low} to {high}: {prompt}",
            low=2,
            frames=3,
            max_tokens=9,
            **FAST,
        )
        found = judge(clips, list(answers))
        assert found.isnan().tolist() == [False, False, True, True, True, False]
        torch.testing.assert_close(found[[0, 1, 5]], torch.tensor([5 / 8, 0.5 / 8, 1.0]))
        body = next(r[2] for r in server.requests if r[2]["messages"][0]["content"][-1]["text"].endswith("a"))
    shown = [part["image_url"]["url"] for part in body["messages"][0]["content"][:-1]]
    assert shown == [f"data:image/png;base64,{encode_png(clips[0, i])}" for i in (0, 4, 8)]
    assert body["max_tokens"] == 9 and "logprobs" not in body and server.requests[0][0] == "/score/chat/completions"


def test_the_judge_with_broken_servers():
    frames = pictures(1)
    for reply, message in (
        (completion("yes"), "no log-probs; does the server give them"),
        ({"choices": []}, "unexpected reply .choices: "),
        ({"choices": [{"message": {"content": ["x"]}}]}, "choices.0.message.content"),
        (b"{}", "choices: Field required"),
    ):
        with (
            fake(lambda handler, body, reply=reply: send(handler, reply)) as server,
            pytest.raises(ValueError, match=message),
        ):
            JudgeReward(server.url, model="eye", **FAST)(frames, ["x"])
    overloaded = {"error": {"message": "overloaded"}}
    with (
        fake(lambda handler, body: send(handler, overloaded, 529)) as server,
        pytest.raises(ConnectionError, match="no answer in 3 attempts; the last: HTTP 529: overloaded"),
    ):
        JudgeReward(server.url, model="eye", **FAST)(frames, ["x"])


def test_the_judges_address():
    for url in ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"):
        assert JudgeReward(url, model="m").url == "http://h/v1/chat/completions"
    assert JudgeReward("http://h/v1?version=2", model="m").url == "http://h/v1/chat/completions?version=2"


def test_yes_probability():
    log = torch.tensor([0.2, 0.1, 0.3, 0.4]).log().tolist()
    tokens = list(zip(["yes", " Yes", "\u0120NO", "yesterday"], log, strict=True))
    assert yes_probability(tokens) == pytest.approx(0.5)
    assert yes_probability([("yes", -9999.0), ("no", -9999.0)]) == pytest.approx(0.5)  # far below exp's range
    assert yes_probability([("\u2581Yes", -3.0)]) == 1 and yes_probability([("no", -3.0)]) == 0
    assert torch.tensor(yes_probability([("maybe", 0.0)])).isnan()
    assert torch.tensor(yes_probability([])).isnan()


def test_parse_score():
    number = JudgeReward.pattern
    assert parse_score("I say 8/10.", number, 0, 10) == pytest.approx(0.8)
    assert parse_score("-1", number, -1, 1) == 0
    assert parse_score("2 cats; score: 4", r"score: (\d)", 0, 5) == pytest.approx(0.8)
    for answer, pattern in (("11", number), ("-1", number), ("", number), ("x", "(x)"), ("a", "a|(b)")):
        assert torch.tensor(parse_score(answer, pattern, 0, 10)).isnan(), answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "model: expected"),
        ({"mode": "stars"}, "mode: .*stars"),
        ({"template": "no place"}, "template: expected {prompt}"),
        ({"low": 5, "high": 5}, "low < high"),
        ({"low": float("-inf")}, "low < high"),
        ({"frames": 0}, "frames >= 1"),
        ({"max_tokens": 0}, "max_tokens >= 1"),
        ({"pattern": "("}, "no regular expression"),
        ({"timeout": -1}, "timeout > 0"),
    ],
)
def test_bad_settings_of_the_judge(options, message):
    with pytest.raises(ValueError, match=message):
        JudgeReward("http://127.0.0.1/v1", **{"model": "m", **options})
