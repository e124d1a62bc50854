"""Runs a few iterations of a tiny pipeline on several processes: python tests/ranks.py FOLDER JSON.

JSON: a list of cases {"name", "world", "iterations", "config": {...}, "family"}. The processes of a case are forked
from this one, which has imported everything, and write FOLDER/NAME_RANK.json.
"""

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import torch
from tiny_pipelines import build

from vipo.config import Config
from vipo.distributed import RankError, leave, local, whole
from vipo.fitting import OutOfMemory
from vipo.runlog import PhaseClock
from vipo.safety import NonFiniteGuard
from vipo.trainer import Trainer


def red_less_blue(frames, prompts):
    """A reward."""
    return (frames[:, :, 0] - frames[:, :, 2]).mean((1, 2, 3))


def failing(frames, prompts):
    """A reward that fails."""
    return torch.full((len(frames),), torch.nan)


def blind_to_a(frames, prompts):
    """The same reward for all samples of prompts that begin with an a."""
    found = red_less_blue(frames, prompts)
    return torch.where(torch.tensor([prompt.startswith("a ") for prompt in prompts]), torch.zeros(()), found)


def bright(frames, prompts):
    """A map."""
    return frames.mean(2) ** 2


FAILED = []


def gone_on_rank_1(frames, prompts):
    """A map that is not finite there, the first time."""
    gone = os.environ["RANK"] == "1" and not FAILED
    FAILED.append(1)
    return bright(frames, prompts) * (torch.nan if gone else 1)


COUNTED = []


def counted(frames, prompts):
    """A held-out reward that counts its samples."""
    COUNTED.extend(prompts)
    return bright(frames, prompts).mean((1, 2, 3))


CALLS = []


def rising(frames, prompts):
    """A reward that rises from call to call."""
    CALLS.append(1)
    return red_less_blue(frames, prompts) + len(CALLS)


def falling_on_rank_0(frames, prompts):
    """A reward that falls there only."""
    return red_less_blue(frames, prompts) - len(CALLS) * (os.environ["RANK"] == "0")


def falling_on_rank_1(frames, prompts):
    """A reward that falls there only."""
    return red_less_blue(frames, prompts) - len(CALLS) * (os.environ["RANK"] == "1")


def run(case, folder, rank):
    torch.set_num_threads(1)
    config = dict(case["config"])
    config["model"] = {"path": str(folder / case["family"]), "lora_rank": 2, **config.get("model", {})}
    output = str(folder / f"run_{case.get('begun_by', case['name'])}")
    run = {"output": output, "iterations": case["iterations"], "tensorboard": False}
    config["run"] = {**run, **config.get("run", {})}
    config["prompts"] = {"path": str(folder / "prompts.txt"), **config["prompts"]}
    if case.get("hangs") == rank:
        Trainer._step = hanging(folder / f"{case['name']}_0.json")
    if case.get("runs_out") == rank:
        Trainer._accumulate = out_of_memory(Trainer._accumulate)
    trainer = Trainer(Config.from_mapping(config))
    start = _weights(trainer.parameters)
    lines, frames = [], []
    guard = NonFiniteGuard(trainer.config, trainer.rollouts.batch, rank=rank)
    if "mode" in case:  # with a run directory
        trainer.run(mode=case["mode"], on_iteration=lambda iteration, metrics: lines.append(metrics))
    with trainer.ranks.guard():
        for iteration in range(0 if "mode" in case else case["iterations"]):
            if case.get("dies") == [rank, iteration]:
                os._exit(9)
            with spoilt(trainer, [kind for kind, *where in case.get("bad", []) if where == [rank, iteration]]):
                lines.append(guard.attempt(trainer.step, iteration))
            frames.append(trainer.frames.double().flatten(1).mean(1).tolist() if "skipped" not in lines[-1] else [])
    if case.get("bad_weight") == rank:
        local(trainer.parameters[0].data).fill_(torch.nan)
        guard.check_state(case["iterations"], trainer.policy.trainable_parameters(), trainer.optimizer)
    found = {
        "iterations": trainer.iteration,
        "counted": len(import_module("ranks").COUNTED),  # not this file, which is __main__
        "metrics": lines,
        "frames": frames,
        "start": start,
        "weights": _weights(trainer.parameters),
        "ema": _weights(trainer.ema.values) if trainer.ema else None,
    }
    leave()
    return found


def out_of_memory(accumulate):
    """A replay whose memory runs out at 2 samples."""

    def replay(trainer, traj, *arguments, **more):
        if len(traj) == 2:
            raise torch.OutOfMemoryError("out of memory")
        accumulate(trainer, traj, *arguments, **more)

    return replay


def hanging(file):
    """A step that waits within a call of the denoiser until rank 0 has given up, or for 30 s, and then ends."""

    def hang(*arguments):
        ended = time.monotonic() + 30
        while not file.exists() and time.monotonic() < ended:
            time.sleep(0.1)
        os._exit(9)

    def step(trainer, iteration):
        trainer.policy.denoiser.register_forward_pre_hook(hang)
        return trainer.experience(iteration, PhaseClock(trainer.policy.device))

    return step


@contextlib.contextmanager
def spoilt(trainer, kinds):
    """Make the first sampled latents NaN for the length of a block, or the advantages of the last update."""
    spread, calls = trainer.pixel_advantages, []

    def advantages(*arguments):
        calls.append(1)
        last = len(calls) == trainer.config.optimizer.updates_per_rollout
        return [part * (torch.nan if last else 1) for part in spread(*arguments)]

    def denoiser(module, arguments, output):
        calls.append(1)
        return (output[0] * torch.nan, *output[1:]) if len(calls) == 1 else output

    if "advantages" in kinds:
        trainer.pixel_advantages = advantages
    hook = trainer.policy.denoiser.register_forward_hook(denoiser) if "latents" in kinds else None
    try:
        yield
    finally:
        trainer.pixel_advantages = spread
        if hook:
            hook.remove()


def _weights(tensors):
    """Some of the weights: of every tensor the first hundred."""
    return torch.cat([whole(p.detach()).flatten()[:100] for p in tensors]).double().tolist()


def child(case, folder, rank, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(case["world"]), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        found = run(case, folder, rank)
    except (RankError, OutOfMemory, ValueError, FloatingPointError) as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    (folder / f"{case['name']}_{rank}.json").write_text(json.dumps(found))


def main():
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for family in {case["family"] for case in cases}:
        build(family).save_pretrained(folder / family)
    for case in cases:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(case["world"]):
            pid = os.fork()
            if pid == 0:
                try:
                    child(case, folder, rank, port)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
