"""Where the host waits for the device: a count of the calls that read a tensor's values, by the place they come from.

It needs no accelerator: the same calls are made on a CPU, where they cost nothing. What it cannot see is a copy between
devices, and what a library does in C++ without an operator of its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, Self

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "__format__"}
"""Methods of a tensor that need its values on the host."""
OPERATORS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim"}
"""Operators whose result, or its size, needs them."""
_WRAPPERS = (
    "torch/overrides.py",
    "torch/utils/_python_dispatch.py",
    "torch/_tensor.py",
    "torch/_ops.py",
    "torch/_compile.py",
    "torch/_dynamo/eval_frame.py",
    __file__,
)
_BOOKKEEPING = "torch/optim"  # AdamW keeps its step counts on the host


class Syncs:
    """Counts while it is entered; `places` maps "file.py:function" to calls.

    A method of `READS` calls an operator of `OPERATORS`: one place is counted once per innermost call.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._functions, self._operators = _Functions(self), _Operators(self)
        self._reading = False

    def __enter__(self) -> Self:
        self._functions.__enter__()
        self._operators.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operators.__exit__(*error)
        self._functions.__exit__(*error)

    @property
    def total(self) -> int:
        """All calls."""
        return self.places.total()

    def count(self) -> None:
        """Count a call at the innermost frame outside of torch's wrappers."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.endswith(_WRAPPERS):
            frame = frame.f_back
        assert frame is not None
        path = frame.f_code.co_filename
        if _BOOKKEEPING not in path:
            self.places[f"{Path(path).name}:{frame.f_code.co_name}"] += 1


class _Functions(TorchFunctionMode):
    def __init__(self, owner: Syncs) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = getattr(func, "__name__", "") in READS
        if not reads or self.owner._reading:
            return func(*args, **(kwargs or {}))
        self.owner.count()
        self.owner._reading = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.owner._reading = False


class _Operators(TorchDispatchMode):
    def __init__(self, owner: Syncs) -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and not index.dtype.is_floating_point and index.dtype.itemsize == 1
            for index in args[1]
        )
        if (name in OPERATORS or by_mask) and not self.owner._reading:
            self.owner.count()
        return func(*args, **(kwargs or {}))
