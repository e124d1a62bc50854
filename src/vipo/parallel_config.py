"""The settings of many processes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from .section import Positive, Section


class ParallelConfig(Section):
    """Many processes, started by torchrun or accelerate launch."""

    shard: bool = False
    """Spread the denoisers' weights, gradients and optimizer over the ranks (FSDP2); false: every rank has them all."""
    shard_size: Annotated[int, Field(ge=2)] | None = None
    """With shard: how many neighbours hold all weights between them (hybrid sharding: the GPUs of one machine); must
    divide the number of ranks. null: all ranks."""
    cpu_offload: bool = False
    """With shard: keep the shards on the CPU between uses."""
    context: Positive = 1
    """Neighbouring ranks that share the tokens of every sample (sequence parallelism); a divisor of their number."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which a rank that waits for the others gives up."""

    @property
    def in_step(self) -> bool:
        """Whether a denoiser's call needs several ranks: none may call it alone."""
        return self.shard or self.context > 1

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.shard_size and not self.shard:
            raise ValueError("parallel.shard_size: goes with parallel.shard=true")
        if self.cpu_offload and not self.shard:
            raise ValueError("parallel.cpu_offload: goes with parallel.shard=true; for one GPU see model.offload")
        return self
