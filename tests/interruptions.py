"""Training runs that are killed, stopped, locked out and starved of disk, each a forked process of the real command.

python tests/interruptions.py FOLDER KILLS SEED writes what happened to FOLDER/report.json for `test_resume`. One
process has imported everything and forks: an import of torch takes longer than a run. No thread is there before a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

import vipo.report
import vipo.trainer
from vipo.cli import main
from vipo.rng import seed_all

ITERATIONS, EVENTS = 4, ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
GATE, BLOCKED = Path("gate"), Path("blocked")
ROOM = 2**26
calls = 0


def noisy(frames, prompts):
    """Draws from every generator, so that a resume which forgets one gives other numbers; fails now and then."""
    global calls
    calls += 1
    if GATE.exists() and calls == 2:
        BLOCKED.touch()
        while GATE.exists():
            time.sleep(0.005)
    noise = torch.rand(len(frames)) + torch.from_numpy(np.random.rand(len(frames))) + random.random()
    rewards = frames.mean((1, 2, 3, 4)) + 0.1 * noise.float()
    if random.random() < 0.3:
        rewards[0] = float("nan")
    return rewards


def prepare(folder: Path) -> None:
    """A tiny Stable Diffusion 3 on the disk, its prompts, and the config of all runs."""
    from tiny_pipelines import build

    build("sd3").save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("a red cat\ntwo dogs\na green house\n")
    call = {"max_sequence_length": 8}
    config = {
        "model": {"path": str(folder / "model"), "lora_rank": 4, "lora_alpha": 8, "device": "cpu"},
        "sampling": {"kernel": "flow_grpo", "num_inference_steps": 3, "height": 32, "width": 32, "call": call},
        "prompts": {"path": str(folder / "prompts.txt"), "per_iteration": 2, "group_size": 2},
        "reward": {"name": "interruptions:noisy", "on_failure": "drop"},
        "map": {"control": "random"},
        "optimizer": {"learning_rate": 1e-2, "ema": 0.9, "warmup": 2, "schedule": "cosine"},
        "run": {"iterations": ITERATIONS, "save_every": 2, "keep": 1, "sample_every": 2, "threads": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


class Child:
    """A forked `vipo train run.yaml --run.output=NAME ...`; its output is in NAME.log.

    Args:
        name: of the run directory.
        arguments: further ones.
        die_at: kill itself just before the file operation of this number, counted within the run directory.
        trace: write the names of all file operations there.
        before: called in the child first.
    """

    def __init__(self, name, *arguments, die_at=None, trace=None, before=None):
        self.log = Path(f"{name}.log")
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            events = []
            if die_at is not None or trace:
                sys.addaudithook(lambda event, found: watch(event, found, f"{name}/", events, die_at))
            if before:
                before()
            main(["train", "run.yaml", f"--run.output={name}", *arguments])
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        if trace:
            found = list(events)
            trace.write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(code)

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill_after(self, seconds: float) -> int:
        ended = time.monotonic() + seconds
        while time.monotonic() < ended:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait_for(self, true) -> None:
        while not true():
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                raise RuntimeError(f"ended too early: {self.log.read_text()}")
            time.sleep(0.002)


def watch(event, found, output, events, die_at):
    if event in EVENTS and isinstance(found[0], (str, bytes, os.PathLike)):
        path = os.fsdecode(found[0])
        if output in path or event in ("os.remove", "os.rmdir") and found[1] != -1:
            events.append(f"{event} {path}")
            if len(events) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)


def outcome(name: str) -> dict:
    """All that two runs must have in common, bit for bit."""
    run = Path(name)
    found = {"checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir())}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]
    for checkpoint in found["checkpoints"]:
        state = json.loads((run / "checkpoints" / checkpoint / "state.json").read_text())
        found[checkpoint] = {key: value for key, value in state.items() if key != "seconds"}
        for file in ("state", "weights/pytorch_lora_weights", "weights_ema/pytorch_lora_weights"):
            tensors = load_file(run / "checkpoints" / checkpoint / f"{file}.safetensors")
            found[checkpoint][file] = {key: value.tolist() for key, value in tensors.items()}
    return found


def begun(name: str) -> bool:
    return Path(name).is_dir() and any(Path(name).iterdir())


def kills(count: int, seed: int, whole: dict, seconds: float, events: list[str]) -> list[dict]:
    """Kill `count` runs at random moments, every fourth twice, resume each, and compare it to the whole run."""
    draw, results = random.Random(seed), []
    inside = [i + 1 for i, event in enumerate(events) if "/partial_" in event]
    for number in range(count):
        name, moments = f"killed_{number}", []
        for attempt in range(2 if number % 4 == 3 else 1):
            arguments = ["--resume"] if begun(name) else []
            kind = ("time", "inside the checkpoint", "file operation")[(number + attempt) % 3]
            if kind == "time":
                moment = draw.uniform(0, seconds)
                code = Child(name, *arguments).kill_after(moment)
            else:
                moment = draw.choice(inside) if kind == "inside the checkpoint" else draw.randint(1, len(events))
                code = Child(name, *arguments, die_at=moment).wait()
            partial = [path.name for path in Path(name).glob("checkpoints/partial_*")]
            lines = Path(name) / "metrics.jsonl"
            done = lines.read_text().count("\n") if lines.exists() else 0
            moments.append({"kind": kind, "moment": moment, "code": code, "iteration": done, "partial": partial})
            if code == 0:
                break
        code = Child(name, *(["--resume"] if begun(name) else [])).wait()
        same = code == 0 and outcome(name) == whole
        results.append({"moments": moments, "code": code, "same": same, "log": Path(f"{name}.log").read_text()})
        if same:
            shutil.rmtree(name, ignore_errors=True)
    return results


def blocked_child(name: str, *arguments: str) -> Child:
    """A run that waits inside its second iteration until the gate is removed."""
    BLOCKED.unlink(missing_ok=True)
    GATE.touch()
    child = Child(name, *arguments)
    child.wait_for(BLOCKED.exists)
    return child


def signals(whole: dict) -> dict:
    """The lock; a second Ctrl-C; SIGTERM; and going on after both."""
    child = blocked_child("signals")
    other = Child("signals", "--resume")
    other.log = Path("signals.log")
    found = {"holder": child.pid, "locked_out": other.wait(), "locked_log": Path("signals.log").read_text()}
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    for name, asked, again in (("twice", signal.SIGINT, signal.SIGINT), ("once", signal.SIGTERM, None)):
        child = blocked_child("signals", "--resume")
        os.kill(child.pid, asked)
        child.wait_for(lambda child=child: "finishing this iteration" in child.log.read_text())
        if again is None:
            GATE.unlink()
        else:
            os.kill(child.pid, again)
        found[name] = child.wait()
        found[f"{name}_log"] = child.log.read_text()
        found[f"{name}_checkpoints"] = sorted(path.name for path in Path("signals/checkpoints").iterdir())
    found["summary"] = json.loads(Path("signals/summary.json").read_text())
    found["resumed"] = Child("signals", "--resume").wait()
    ended = outcome("signals")
    found["same"] = {key: ended[key] == whole[key] for key in ended}
    return found


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def let_permissions_count() -> None:
    """As root: give up CAP_DAC_OVERRIDE, which makes permission bits mean nothing."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for i in (0, 1):  # effective, permitted
        sets[i] &= ~(1 << 1)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def disk(whole: dict) -> dict:
    """A checkpoint that does not fit, a folder that may not be written: the last good one is as it was."""
    found = {}
    assert Child("disk", before=lambda: sys.addaudithook(_die_in_second_checkpoint)).wait() == -signal.SIGKILL
    kept = Path("disk/checkpoints/step_000002")
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    size = (kept / "state.safetensors").stat().st_size

    def read_only() -> None:
        let_permissions_count()
        Path("disk/checkpoints").chmod(0o555)

    for name, starve in (("full", lambda: limit_file_size(size - 1)), ("read_only", read_only)):
        child = Child("disk", "--resume", before=starve)
        found[name], found[f"{name}_log"] = child.wait(), child.log.read_text()
        Path("disk/checkpoints").chmod(0o755)
        found[f"{name}_left"] = sorted(path.name for path in Path("disk/checkpoints").iterdir())
        found[f"{name}_intact"] = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    found["not_mounted"] = mount_below(Path("disk/checkpoints"))
    if found["not_mounted"]:
        found["resumed"] = Child("disk", "--resume").wait()
        found["same"] = outcome("disk") == whole
        return found
    try:
        half = sum(-(-len(content) // 4096) * 4096 for content in before.values()) + size // 2
        for name, room, starve in (("no_space", half, None), ("remounted", ROOM, remount_in_second_checkpoint)):
            remount(Path("disk/checkpoints"), f"rw,size={room}")
            child = Child("disk", "--resume", before=starve)
            found[name], found[f"{name}_log"] = child.wait(), child.log.read_text()
            found[f"{name}_left"] = sorted(path.name for path in Path("disk/checkpoints").iterdir())
            found[f"{name}_intact"] = {path: path.read_bytes() for path in before} == before
        remount(Path("disk/checkpoints"), f"rw,size={ROOM}")
        found["resumed"] = Child("disk", "--resume").wait()
        found["same"] = outcome("disk") == whole
    finally:
        subprocess.run(["umount", "disk/checkpoints"], check=True)
    return found


def mount_below(folder: Path) -> str:
    """Move a folder's content into a file system of its own there; returns why that cannot be done, or nothing.

    Only this process and its children see it: it is gone with them, however they end.
    """
    shutil.copytree(folder, "moved")
    libc, mounts = ctypes.CDLL(None, use_errno=True), 0x00020000  # CLONE_NEWNS
    if libc.unshare(mounts):
        return f"unshare: {os.strerror(ctypes.get_errno())}"
    for command in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder]):
        try:
            done = subprocess.run(["mount", *command], capture_output=True, text=True)
        except FileNotFoundError as error:
            return str(error)
        if done.returncode:
            return done.stderr.strip() or f"mount ended with {done.returncode}"
    shutil.copytree("moved", folder, dirs_exist_ok=True)
    return ""


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def remount_in_second_checkpoint() -> None:
    """Just before the second checkpoint its file system becomes read-only, as one with errors does."""

    def hook(event, found):
        if event == "os.mkdir" and str(found[0]).endswith("partial_000004"):
            read_only, again = 1, 32
            libc = ctypes.CDLL(None, use_errno=True)
            failed = libc.mount(b"tmpfs", b"disk/checkpoints", b"tmpfs", read_only | again, None)
            assert failed == 0, os.strerror(ctypes.get_errno())

    sys.addaudithook(hook)


def _die_in_second_checkpoint(event, found):
    if event == "os.mkdir" and str(found[0]).endswith("partial_000004"):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.modules["interruptions"] = sys.modules["__main__"]
    vipo.report.render_report = lambda run: run  # half of a run's time, and not what is tried here
    folder, count, seed = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])
    os.chdir(folder)
    prepare(folder)
    with contextlib.suppress(SystemExit):  # whatever is imported late is imported once
        main(["train", "run.yaml", "--run.output=warm", "--run.iterations=1", "--run.tensorboard=false"])
    calls = 0
    seed_all(99)  # what a child inherits is not what a fresh process has
    started = time.monotonic()
    trace = folder / "events.json"
    assert Child("whole", trace=trace).wait() == 0, Path("whole.log").read_text()
    seconds = time.monotonic() - started
    whole, events = outcome("whole"), json.loads(trace.read_text())
    report = {
        "seconds": seconds,
        "events": len(events),
        "kills": kills(count, seed, whole, seconds, events),
    }
    if count < 20:
        report.update(signals=signals(whole), disk=disk(whole))
    (folder / "report.json").write_text(json.dumps(report))
