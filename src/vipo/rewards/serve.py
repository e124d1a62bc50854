"""A reward behind HTTP: what `vipo serve-reward` runs. Needs the extra `serve` (FastAPI, uvicorn).

POST /score    see wire.py
GET  /health   {"name": ..., "version": ...}, without a token
"""

from __future__ import annotations

import asyncio
import hmac
import math
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from torch import Tensor

from .. import __version__
from . import Reward, score, wire
from .endpoint import first_problem


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is answered with 413."""

    batch_pixels: int = 2**24
    """F * Y * X, summed over the samples that the reward scores at once; a larger sample is scored alone."""
    pixels: int = 2**28
    """F * Y * X, summed over the request: 3 GB as float32."""
    samples: int = 64
    """Samples of a request."""
    body: int = 2**28
    """Bytes of a request."""


def make_app(
    reward: Reward,
    name: str,
    *,
    device: torch.device | str = "cpu",
    token: str | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """Put a reward behind POST /score.

    Args:
        reward: the scorer; its credit map, if it gives one, is not sent.
        name: what /health calls it.
        device: where frames go.
        token: that requests have to bring as `Authorization: Bearer`; None lets anybody ask.
        limits: None for the defaults.
    """
    limits = limits or Limits()
    app = FastAPI(title="vipo serve-reward", docs_url=None, redoc_url=None, openapi_url=None)
    model_thread = ThreadPoolExecutor(1)  # one request is decoded and scored after the other, always in this thread

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        line = " ".join(str(error).split()) or type(error).__name__
        return JSONResponse({"detail": f"reward {name}: {line}"}, 500)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"name": name, "version": __version__}

    @app.post("/score")
    async def scores(request: Request) -> JSONResponse:
        known = token is None or _knows(request, token)
        body = await _read(request, limits.body, keep=known)
        if not known:
            expected = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "wrong or missing token, expected Authorization: Bearer", expected)
        values = await asyncio.get_running_loop().run_in_executor(
            model_thread, _answer, body, reward, torch.device(device), limits
        )
        return JSONResponse({"scores": values})

    return app


def listen(host: str, port: int) -> socket.socket:
    """Bind a TCP port, any free one for 0; OSError says why it cannot be had."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port: expected 0 to 65535, got {port}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, port {port}: {error.strerror}; --host takes an address of this machine, "
            "--port a free port, or 0 for any"
        ) from error


def run(app: FastAPI, bound: socket.socket) -> None:
    """Answer requests on a bound socket until interrupted."""
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[bound])


def _knows(request: Request, token: str) -> bool:
    """Compare in a time that does not tell how much of the token was right."""
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


async def _read(request: Request, limit: int, *, keep: bool) -> bytes:
    """Read the body. What is not kept or too long is read and thrown away: a client reads no answer before it has
    sent everything, unless that is absurdly long."""
    body = bytearray()
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if keep and size <= limit:
                body += chunk
            if size > 4 * limit:
                break
    except ClientDisconnect:
        raise HTTPException(400, "the request ended before its end") from None
    if keep and size > limit:
        raise HTTPException(413, f"the request is longer than {limit} bytes; send fewer samples at once")
    return bytes(body)


def _answer(body: bytes, reward: Reward, device: torch.device, limits: Limits) -> list[float | None]:
    """Decode a request and score it."""
    try:
        samples = wire.Request.model_validate_json(body).samples
    except ValidationError as error:
        code = 400 if error.errors(include_input=False)[0]["type"] == "json_invalid" else 422
        raise HTTPException(code, first_problem(error)) from error
    if len(samples) > limits.samples:
        raise HTTPException(413, f"{len(samples)} samples, expected at most {limits.samples} in one request")
    frames: list[Tensor] = []
    left = limits.pixels
    for i, sample in enumerate(samples):
        try:
            frames.append(wire.decode_sample(sample, left))
        except ValueError as error:
            code = 413 if isinstance(error, wire.TooLargeError) else 422
            raise HTTPException(code, f"samples.{i}.{error}") from error
        left -= frames[-1][:, 0].numel()
    return score_shapes(reward, frames, [sample.prompt for sample in samples], device, limits.batch_pixels)


def score_shapes(
    reward: Reward, frames: Sequence[Tensor], prompts: Sequence[str], device: torch.device, batch_pixels: int
) -> list[float | None]:
    """Score samples of any shapes, equal ones together, at most `batch_pixels` at once.

    Args:
        reward: the scorer.
        frames: one (F, 3, Y, X) per sample.
        prompts: one per sample.
        device: where frames go.
        batch_pixels: F * Y * X summed over a batch; a larger sample is scored alone.

    Returns:
        One number per sample, None where it is not finite: JSON has no NaN.
    """
    shapes: dict[torch.Size, list[int]] = {}
    for i, clip in enumerate(frames):
        shapes.setdefault(clip.shape, []).append(i)
    found: list[float | None] = [None] * len(frames)
    for shape, members in shapes.items():
        size = max(1, batch_pixels // (shape[0] * shape[2] * shape[3]))
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            batch = torch.stack([frames[i] for i in chosen]).to(device)
            values = score(reward, batch, [prompts[i] for i in chosen]).rewards.tolist()
            for i, value in zip(chosen, values, strict=True):
                found[i] = value if math.isfinite(value) else None
    return found
