"""Many processes, started by torchrun: what each samples, what is gathered, and how their gradients become one.

Without torchrun there is one rank and every function here returns what it was given.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .types import NonFiniteError

BUCKET = 2**26
"""Bytes of gradients that are summed in one all-reduce."""
_LOST = re.compile("gloo|nccl|connection|timed out|timeout|broken pipe|process group", re.IGNORECASE)


class RankError(RuntimeError):
    """Another rank has stopped or hangs."""


class NotFiniteElsewhere(NonFiniteError):
    """A NonFiniteError of another rank, `rank`."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} has met a tensor that is not finite, and names it", "", torch.empty(0))
        self.rank = rank


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank: 0 to world - 1; rank 0 alone writes files.
        world: number of processes.
        local: position on its machine: which accelerator it uses.
        timeout: seconds to wait for the others, where they are waited for.
        context: neighbours that share the tokens of the same samples (`vipo.context`); 1: every rank has its own.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    timeout: float = 600.0
    context: int = 1

    @property
    def data_world(self) -> int:
        """Number of shares that the samples are cut into: one per context group."""
        return self.world // self.context

    @property
    def data_rank(self) -> int:
        """Which of these shares is this rank's."""
        return self.rank // self.context

    @property
    def main(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def device(self, wanted: str | None) -> str | None:
        """The device of this rank: its own accelerator where none, or only its kind, is named.

        Raises:
            ValueError: one accelerator is named for several ranks.
        """
        if self.world > 1 and wanted is not None and ":" in wanted:
            kind = wanted.split(":")[0]
            raise ValueError(f"model.device: {wanted} cannot be that of {self.world} ranks; write {kind}, or null")
        if self.world == 1 or wanted not in (None, "cuda"):
            return wanted
        return f"cuda:{self.local}" if torch.cuda.is_available() or wanted else None

    def share(self, count: int) -> slice:
        """Which of `count` samples this rank makes: equal, contiguous shares, so that a group may span ranks.

        The ranks of a context group make the same ones.

        Raises:
            ValueError: not a multiple of the number of ranks, or of context groups.
        """
        if count % self.data_world:
            kind = "ranks" if self.context == 1 else f"groups of parallel.context={self.context} ranks"
            raise ValueError(
                f"prompts.per_iteration x prompts.group_size: {count} samples cannot be shared evenly by "
                f"{self.data_world} {kind}; make it a multiple of {self.data_world}"
            )
        size = count // self.data_world
        first = self.data_rank * size
        return slice(first, first + size)

    def gather(self, values: Tensor) -> Tensor:
        """Join the values of all ranks, equal in shape, along the last axis, in the order of the ranks."""
        return torch.cat(self._every(values), -1) if self.world > 1 else values

    def gather_samples(self, values: Tensor) -> Tensor:
        """Join what belongs to samples, as `gather`: of a context group, that of its first rank."""
        return torch.cat(self._every(values)[:: self.context], -1) if self.world > 1 else values

    def _every(self, values: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(values) for _ in range(self.world)]
        with self.guard():
            dist.all_gather(parts, values.contiguous())
        return parts

    def reduce(
        self, values: Mapping[str, Tensor], *, sums: Collection[str] = (), maxima: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Mean over the ranks of 0-dim tensors by name, in one message; of `sums` the sum, of `maxima` the largest."""
        if self.world == 1 or not values:
            return dict(values)
        device = next(iter(values.values())).device
        row = torch.stack([value.to(device, torch.float64) for value in values.values()])
        rows = dict(zip(values, self.gather_samples(row[:, None]), strict=True))
        return {
            name: (row.sum() if name in sums else row.amax() if name in maxima else row.mean()).float()
            for name, row in rows.items()
        }

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor of one shape over the ranks."""
        if self.world > 1:
            values = values.clone()
            with self.guard():
                dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.world == 1 else bool(self.gather(torch.tensor([flag])).any())

    def largest(self, value: float) -> float:
        """The largest of a number on any rank."""
        if self.world == 1:
            return value
        return float(self.gather(torch.tensor([value], dtype=torch.float64)).max())

    def equal(self, name: str, value: int) -> None:
        """Raise ValueError unless a number is the same on all ranks."""
        found = self.gather(torch.tensor([value])).tolist() if self.world > 1 else [value]
        if len(set(found)) > 1:
            raise ValueError(f"{name}: differs between ranks ({', '.join(map(str, found))}), which must work in step")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """End a block with a NonFiniteError on all ranks where one ends so: nobody waits for a rank that has left.

        All ranks come here. In the block none waits for others, unless all leave it alike where one does.
        """
        found: NonFiniteError | None = None
        try:
            yield
        except NonFiniteError as error:
            found = error
        bad = self.gather(torch.tensor([found is not None])).tolist()
        if found is not None:
            raise found
        if any(bad):
            raise NotFiniteElsewhere(bad.index(True))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the ranks, where parameters are replicas; None counts as 0.

        Called once per optimizer step: a replay makes many backwards. Sharded parameters have been summed by then.
        In a context group each rank has the gradient of its own tokens, so there too the sum is the whole.
        """
        if self.world == 1:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        with self.guard():
            for part in _buckets(gradients):
                flat = torch.cat([gradient.flatten() for gradient in part])
                dist.all_reduce(flat)
                for gradient, summed in zip(part, flat.split([g.numel() for g in part]), strict=True):
                    gradient.copy_(summed.view_as(gradient))

    def replicate(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every rank the weights of rank 0."""
        if self.world > 1:
            with self.guard(), torch.no_grad():
                for p in parameters:
                    dist.broadcast(p, 0)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Say in words that another rank is gone, where the collective operations only say that a pipe is broken."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or isinstance(error, RankError) or not _LOST.search(str(error)):
                raise
            reason = " ".join(str(error).split())[:160]
            raise RankError(
                f"rank {self.rank} of {self.world} has lost the others: one of them has stopped, and its own message "
                f"says why, or took longer than parallel.timeout = {self.timeout:g} s ({reason}); start again with "
                "--resume, with any number of ranks"
            ) from error


def start(*, device: str | None = None, timeout: float = 600.0, context: int = 1) -> Ranks:
    """Join the other processes of torchrun or accelerate launch; alone, be the only rank.

    Args:
        device: torch device of the run; null for cuda where there is one, else cpu. Its kind decides the backend.
        timeout: seconds after which a rank that waits in vain gives up.
        context: ranks that share the tokens of a sample.

    Raises:
        ValueError: WORLD_SIZE is set, but not which rank this is; it is no multiple of `context`.
        RankError: the others cannot be reached.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % context:
        raise ValueError(
            f"parallel.context: expected a divisor of the number of ranks, {world}, got {context}; start that many "
            "with torchrun --nproc-per-node"
        )
    if world == 1:
        return Ranks()
    if "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE={world} is set but not RANK; unset it, or start with torchrun -m vipo train ...")
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")), timeout, context)
    cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if cuda:
        found = torch.cuda.device_count()
        if ranks.local >= found:
            raise ValueError(
                f"rank {ranks.rank}: {found} GPUs here, none for local rank {ranks.local}; start fewer ranks"
            )
        torch.cuda.set_device(ranks.local)
    if not dist.is_initialized():
        with ranks.guard():
            # tensors on the CPU too: flags, and shards that wait there
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    return ranks


def leave() -> None:
    """Leave the other processes, all of which have finished."""
    if dist.is_initialized():
        groups.cache_clear()
        dist.destroy_process_group()


def shard(
    module: nn.Module, device: torch.device, *, ranks: Ranks, size: int | None = None, cpu_offload: bool = False
) -> None:
    """Spread a module's parameters over ranks (FSDP2), its repeated blocks one by one.

    Args:
        module: a denoiser of `diffusers`, which names its blocks.
        device: where it computes.
        ranks: all processes.
        size: neighbours that hold all weights between them, as every other such group does (hybrid sharding); None:
            all ranks are one group.
        cpu_offload: keep the shards in the memory of the CPU between uses.

    Raises:
        ValueError: the ranks are no multiple of `size`.
    """
    if ranks.world % (size or 1):
        raise ValueError(f"parallel.shard_size: expected a divisor of the number of ranks, {ranks.world}, got {size}")
    size = size or ranks.world
    mesh = groups(device.type, (ranks.world // size, size), ("replicas", "shards"), ranks.timeout)
    mesh = mesh if ranks.world > size else mesh["shards"]
    pinned = device.type != "cpu"  # where there is an accelerator to copy to
    policy = CPUOffloadPolicy(pin_memory=pinned) if cpu_offload else OffloadPolicy()
    names = set(getattr(module, "_repeated_blocks", None) or []) | set(getattr(module, "_no_split_modules", None) or [])
    for block in reversed([part for part in module.modules() if type(part).__name__ in names]):  # inner ones first
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(module, mesh=mesh, offload_policy=policy)


@functools.cache
def groups(kind: str, shape: tuple[int, ...], names: tuple[str, ...], timeout: float) -> DeviceMesh:
    """Groups of ranks along the axes of a mesh, made once for all denoisers; they wait `timeout` seconds."""
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():
        group.set_timeout(timedelta(seconds=timeout))  # a mesh's groups have torch's default
    return mesh


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece, on every rank (all must ask); another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; another one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(module: nn.Module) -> None:
    """Drop the whole weights that a call without a backward leaves in a sharded module: the next call gathers anew."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextlib.contextmanager
def exchanged(
    parameters: Iterable[Tensor], others: Iterable[Tensor], modules: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Exchange the contents of two lists of tensors for the length of a block, with one tensor's copy at a time.

    Contents, not storages: FSDP2 gathers from storage that an exchange of `.data` would not reach.

    Args:
        parameters: whole, or sharded: then this rank's parts are exchanged.
        others: as many, of the same shapes or the parts' shapes.
        modules: whose parameters they are, where these are called in the block.
    """
    pairs = [(local(p.detach()), local(other.detach())) for p, other in zip(parameters, others, strict=True)]

    def exchange() -> None:
        for module in modules:
            reshard(module)
        for mine, other in pairs:
            held = mine.clone()
            mine.copy_(other)
            other.copy_(held)

    exchange()
    try:
        yield
    finally:
        exchange()


def whole_state(module: nn.Module, *, adapters: bool) -> dict[str, Tensor]:
    """State of a module in one piece; of a sharded one all ranks must ask, and it waits on the CPU.

    Args:
        module: sharded or not.
        adapters: those of peft only.
    """
    state = {name: value for name, value in module.state_dict().items() if "lora_" in name or not adapters}
    return {name: whole(value).cpu() if isinstance(value, DTensor) else value for name, value in state.items()}


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was sharded."""
    classes: list[type[nn.Module]] = [c for c in type(module).__mro__ if issubclass(c, nn.Module)]
    return next(c for c in classes if not issubclass(c, FSDPModule))


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Spread a whole tensor, known to every rank, as another one is spread."""
    if not isinstance(other, DTensor):
        return tensor.to(other.device)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, BUCKET bytes together."""
    part: list[Tensor] = []
    for tensor in tensors:
        if part and (tensor.dtype != part[0].dtype or sum(t.nbytes for t in part) + tensor.nbytes > BUCKET):
            yield part
            part = []
        part.append(tensor)
    if part:
        yield part
