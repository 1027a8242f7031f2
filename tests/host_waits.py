"""A dispatch mode that refuses what would make the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.unique_consecutive,
    torch.ops.aten._unique2,
    torch.ops.aten.repeat_interleave,
}


class NoHostWaits(TorchDispatchMode):
    """Raises where an operator's result, or its size, would have to be known on the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call: Callable[..., Any] = func
        if func.overloadpacket in _WAITS:
            raise AssertionError(f"{func} waits for the device")
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                raise AssertionError(f"{func} with a boolean index waits for the device")
        return call(*args, **(kwargs or {}))
