"""A token that a run uses is in none of its files and in none of its words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from loopback import TOKEN, fake, send

from vipo.cli import main
from vipo.rewards.endpoint import Endpoint, read_token

SMALL = {
    "prompts": {"per_iteration": 1, "group_size": 2},
    "sampling": {"num_inference_steps": 2},
    "run": {"output": "out", "iterations": 1},
}


def config_for(url, **options):
    reward = {
        "name": "remote",
        "paths": {"remote": url},
        "options": {"remote": {"token_env": "VIPO_TEST_TOKEN", **options}},
    }
    return yaml.safe_dump({**SMALL, "reward": reward})


def files_with(folder, secret):
    return [str(path) for path in Path(folder).rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_run_with_a_token_leaves_no_trace_of_it(tmp_path):
    def different(handler, body):
        send(handler, {"scores": [float(i) for i in range(len(body["samples"]))]})

    with fake(different) as server:
        (tmp_path / "run.yaml").write_text(config_for(server.url))
        environment = {**os.environ, "VIPO_TEST_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "vipo", "train", "run.yaml"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert server.requests and all(headers["Authorization"] == f"Bearer {TOKEN}" for _, headers, _ in server.requests)
    assert all(TOKEN not in str(body) for _, _, body in server.requests)
    assert (tmp_path / "out" / "config.yaml").is_file() and (tmp_path / "out" / "report.html").is_file()
    assert files_with(tmp_path, "VIPO_TEST_TOKEN"), "the search finds what is there"
    assert files_with(tmp_path, TOKEN) == [] and TOKEN not in done.stdout + done.stderr


def test_a_server_that_repeats_the_token_does_not_get_it_printed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIPO_TEST_TOKEN", TOKEN)
    with fake(
        lambda handler, body: send(handler, {"detail": f"no: {handler.headers['Authorization']}"}, 403)
    ) as server:
        Path("run.yaml").write_text(config_for(server.url))
        with pytest.raises(SystemExit) as caught:
            main(["train", "run.yaml"])
    said = capfd.readouterr()
    assert caught.value.code == 2 and "HTTP 403: no: Bearer ***" in said.err and TOKEN not in said.err + said.out
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("query", ["api_key=x", "a=1&access_token=x", "Signature=", "sig=x", "password=x"])
def test_a_secret_in_an_address_is_refused_as_the_config_is_written_down(query):
    with pytest.raises(ValueError, match="reads like a secret; name a variable") as caught:
        Endpoint(f"https://host/score?{query}")
    assert "=x" not in str(caught.value)
    assert Endpoint("https://host/score?model=b&api-version=3").place == "https://host/score"


def test_what_may_be_a_token_is_not_repeated():
    with pytest.raises(ValueError, match="not shown") as caught:
        read_token(TOKEN)
    assert TOKEN not in str(caught.value)
