"""Counts the operators that would each be a launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_ALIASES = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "permute", "select", "slice",
    "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_conj", "_reshape_alias", "_unsafe_view",
    "scalar_tensor",  # a number for `where`, kept on the host
}  # fmt: skip


class Launches(TorchDispatchMode):
    """``count`` operators that compute something; views and empty tensors are free."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call: Callable[..., Any] = func
        self.count += func.overloadpacket.__name__ not in _ALIASES
        return call(*args, **(kwargs or {}))


def launches(work: Callable[[], object]) -> int:
    """Operators that ``work`` runs when it is run a second time."""
    work()
    with Launches() as seen:
        work()
    return seen.count
