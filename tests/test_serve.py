"""vipo serve-reward: real servers on loopback, good requests, bad ones, and the command itself."""

import base64
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch
from loopback import FAST, TOKEN, pictures, served

from vipo import __version__
from vipo.cli import main
from vipo.media import read_frames
from vipo.rewards import RemoteReward, redness, wire
from vipo.rewards.serve import Limits, listen, score_shapes
from vipo.rewards.wire import encode_png, encode_sample


def test_the_server_sees_every_frame_and_prompt_and_sends_null():
    seen = []

    def picky(frames, prompts):
        seen.append((frames, list(prompts), threading.get_ident(), torch.is_grad_enabled()))
        values = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.float32)
        return torch.where(values > 3, torch.inf, values), torch.ones(len(frames), frames.shape[1], 1, 1)

    frames = pictures(4, (3, 3, 4, 6))
    with served(picky, limits=Limits(batch_pixels=2 * 3 * 4 * 6)) as url:
        found = RemoteReward(url, **FAST, format="png", concurrency=1)(frames, ["é", "", "four", "abc"])
    assert found[[0, 1, 3]].tolist() == [1, 0, 3] and found[2].isnan()
    assert [prompts for _, prompts, _, _ in seen] == [["é", ""], ["four", "abc"]]  # two fit into batch_pixels
    torch.testing.assert_close(torch.cat([batch for batch, *_ in seen]), frames, rtol=0, atol=0)
    assert len({thread for _, _, thread, _ in seen}) == 1 and not any(grad for *_, grad in seen)


def test_the_model_runs_once_at_a_time():
    running, most = [0], [0]

    def slow(frames, prompts):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.05)
        running[0] -= 1
        return redness(frames, prompts)

    with served(slow) as url:
        found = RemoteReward(url, **FAST, concurrency=4, batch=1)(pictures(4), [""] * 4)
    assert most[0] == 1 and torch.equal(found, redness(pictures(4), [""] * 4))


def test_samples_of_equal_shape_are_scored_together_and_keep_their_place():
    sizes = []

    def means(frames, prompts):
        sizes.append((len(frames), frames.shape[-1]))
        return frames.mean((1, 2, 3, 4))

    frames = [torch.full((1, 3, 2, width), value) for width, value in ((4, 0.1), (6, 0.2), (4, 0.3), (4, 0.4))]
    found = score_shapes(means, frames, ["", "", "", ""], torch.device("cpu"), 16)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4]) and sizes == [(2, 4), (1, 4), (1, 6)]


def test_the_server_wants_its_token(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    large = torch.rand(1, 1, 3, 1500, 1500)  # 6 MB: a client must be able to send it all before it reads the refusal
    with served(redness, token=TOKEN) as url:
        assert len(RemoteReward(url, **FAST, token_env="REWARD_TOKEN")(pictures(2), ["", ""])) == 2
        with pytest.raises(ValueError, match="HTTP 401: wrong or missing token"):
            RemoteReward(url, **FAST)(large, [""])
        monkeypatch.setenv("REWARD_TOKEN", TOKEN + "x")
        with pytest.raises(ValueError, match="HTTP 401: wrong or missing token") as caught:
            RemoteReward(url, **FAST, token_env="REWARD_TOKEN")(pictures(1), [""])
        assert TOKEN not in str(caught.value)


def png(width, height):
    return encode_png(torch.zeros(3, height, width))


def one(**sample):
    return {"samples": [{"prompt": "", **sample}]}


JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(50)).decode()
CUT = base64.b64encode(base64.b64decode(png(64, 64))[:60]).decode()
PLAYLIST = base64.b64encode(b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n").decode()
VIDEO = encode_sample(torch.zeros(6, 3, 16, 16), "", "mp4", 8)["video"]
BAD_REQUESTS = [
    (b"{", 400, "Invalid JSON"),
    (b"[" * 100_000, 400, "recursion limit"),
    ([], 422, "Input should be an object"),
    ({}, 422, "samples: Field required"),
    ({"samples": [{"frames": [png(2, 2)]}]}, 422, "samples.0.prompt: Field required"),
    (one(), 422, "samples.0: expected either frames or video"),
    (one(frames=[png(2, 2)], video=VIDEO), 422, "samples.0: expected either frames or video"),
    (one(frames=[]), 422, "samples.0.frames: List should have at least 1 item"),
    (one(frame=png(2, 2)), 422, "samples.0.frame: Extra inputs are not permitted"),
    (one(frames=[3]), 422, "samples.0.frames.0: Input should be a valid string"),
    (one(frames=["no base64!"]), 422, "samples.0.frames.0: not base64"),
    (one(frames=[JPEG]), 422, "samples.0.frames.0: not a PNG file"),
    (one(frames=[CUT]), 422, "samples.0.frames.0: not readable"),
    (one(frames=[png(2, 2), png(4, 2)]), 422, "frames.1: the frames of one sample have several sizes (2x2 and 4x2)"),
    (one(frames=[png(101, 100)]), 413, "samples.0.frames.0: 101x100 is more than the 10000 pixels left"),
    (
        {"samples": [{"prompt": "", "frames": [png(80, 80)]}] * 2},
        413,
        "samples.1.frames.0: 80x80 is more than the 3600",
    ),
    (one(frames=[png(80, 80)] * 2), 413, "samples.0.frames.1: 80x80 is more than the 3600"),
    (one(video=JPEG), 422, "samples.0.video: not an MP4 file"),
    (one(video=PLAYLIST), 422, "samples.0.video: not an MP4 file"),
    (one(video=VIDEO[:400]), 422, "samples.0.video: holds no video stream"),
    (one(video=VIDEO[:-40]), 422, "samples.0.video: not readable"),
    (one(video=VIDEO, fps=0), 422, "samples.0.fps: Input should be greater than 0"),
    ({"samples": [{"prompt": "", "frames": [png(2, 2)]}] * 65}, 413, "65 samples, expected at most 64"),
]


@pytest.fixture(scope="module")
def limited():
    with served(redness, limits=Limits(pixels=10_000, body=8_000_000)) as url:
        yield url


def post(url, content):
    """POST by the standard library alone: (status, JSON)."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=10)
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    connection.request("POST", f"/{path}", body, {"Content-Type": "application/json"})
    with connection.getresponse() as response:
        return response.status, json.loads(response.read())


@pytest.mark.parametrize(("content", "status", "message"), BAD_REQUESTS)
def test_bad_requests_get_one_clear_line(limited, content, status, message):
    found, reply = post(limited, content)
    assert found == status, reply
    assert message in reply["detail"] and "\n" not in reply["detail"] and "/tmp" not in reply["detail"]
    assert len(reply["detail"]) < 300


def test_a_video_of_too_many_pixels_is_refused_before_all_are_decoded(limited, monkeypatch):
    read = []
    monkeypatch.setattr(wire, "read_frames", lambda path, most: read.append(most) or read_frames(path, most))
    assert post(limited, one(video=VIDEO)) == (200, {"scores": [0.0]})
    long = encode_sample(torch.zeros(50, 3, 16, 16), "", "mp4", 8)["video"]
    assert post(limited, one(video=long))[0] == 413
    assert read == [40, 40]  # 39 frames of 256 pixels are allowed
    large = encode_sample(torch.zeros(2, 3, 128, 128), "", "mp4", 8)["video"]
    status, reply = post(limited, one(video=large))
    assert status == 413 and reply["detail"] == "samples.0.video: more than the 10000 pixels left of this request"
    assert len(read) == 2


def test_too_long_a_body_is_refused_in_words(limited):
    status, reply = post(limited, b" " * 30_000_000)
    assert status == 413 and "longer than 8000000 bytes" in reply["detail"]


def test_health_and_a_reward_that_fails():
    def failing(frames, prompts):
        raise KeyError("no such\nlayer")

    with served(failing, token=TOKEN) as url:
        response = urllib.request.urlopen(url.replace("/score", "/health"), timeout=5)
        assert json.load(response) == {"name": "tested", "version": __version__}
    with served(failing) as url:
        status, reply = post(url, one(frames=[png(2, 2)]))
        assert status == 500 and reply["detail"].startswith("reward tested: ") and "no such" in reply["detail"]
        with pytest.raises(ConnectionError, match="no answer in 3 attempts; the last: HTTP 500: reward tested: "):
            RemoteReward(url, **FAST)(pictures(1), [""])
    with served(lambda frames, prompts: torch.zeros(len(frames), 2)) as url:
        assert "expected one number per sample" in post(url, one(frames=[png(2, 2)]))[1]["detail"]


def test_serve_reward_on_the_command_line():
    environment = {**os.environ, "REWARD_TOKEN": TOKEN}
    command = [sys.executable, "-m", "vipo", "serve-reward", "redness", "--port", "0", "--token-env", "REWARD_TOKEN"]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        line = process.stdout.readline()
        url = re.fullmatch(r"redness on cpu: (http://127\.0\.0\.1:\d+/score)\n", line)[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REWARD_TOKEN", TOKEN)
            found = RemoteReward(url, token_env="REWARD_TOKEN", **FAST)(pictures(3), ["", "", ""])
        assert torch.equal(found, redness(pictures(3), ["", "", ""]))
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and out == "stopped\n" and err == "", (process.returncode, out, err)


def test_bad_input_of_serve_reward(capsys, monkeypatch):
    def fails(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(["serve-reward", *arguments])
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert "unknown reward 'rednes'" in fails("rednes", "--port", "0")
    assert "--port: expected 0 to 65535, got 70000" in fails("redness", "--port", "70000")
    assert "--max-batch-pixels: expected at least 1" in fails("redness", "--max-batch-pixels", "0")
    assert "NO_SUCH_VARIABLE is not set" in fails("redness", "--token-env", "NO_SUCH_VARIABLE")
    with listen("127.0.0.1", 0) as bound:
        assert "Address already in use" in fails("redness", "--port", str(bound.getsockname()[1]))
    monkeypatch.delitem(sys.modules, "vipo.rewards.serve")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "vipo serve-reward needs fastapi: pip install 'vipo[serve]'" in fails("redness")


def test_the_library_does_not_import_the_server():
    code = "import sys, vipo.cli, vipo.rewards; sys.exit('fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
