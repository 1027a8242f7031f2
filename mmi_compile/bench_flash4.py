"""The causal mask of partial blocks in flash-attn-4's own language; imported only where that package is."""

import importlib
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def causal_mask_mod() -> Any:
    """``mask_mod`` of ``flash_attn_func`` for equal numbers of queries and keys."""
    cute: Any = importlib.import_module("cutlass.cute")

    # Arguments stay bare: the language reads types from annotations, and has its own for these.
    @cute.jit
    def causal(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        return n_idx <= m_idx

    return causal
