"""Servers on loopback for the tests of rewards over HTTP: ours under uvicorn, and one that does as a test says."""

import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
import uvicorn

from vipo.rewards.serve import listen, make_app

os.environ.setdefault("NO_PROXY", "127.0.0.1")
TOKEN = "s3cret-t0ken"
FAST = {"timeout": 5.0, "retries": 2, "backoff": 0.01}


def pictures(count, shape=(1, 3, 8, 12), seed=0):
    """Frames (N, F, 3, Y, X) that 8 bits hold exactly."""
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed)).float() / 255


@contextmanager
def fake(answer):
    """A server that answers POSTs by answer(handler, request's JSON); its `requests` are kept."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.requests.append((self.path, dict(self.headers), body))
            answer(self, body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}/score"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler, reply, status=200, **headers):
    content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


def ones(handler, body):
    send(handler, {"scores": [1.0] * len(body["samples"])})


@contextmanager
def served(reward, **options):
    """Our own app under uvicorn; yields the address."""
    with listen("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(make_app(reward, "tested", **options), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}/score"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()
