"""Graph passes, one file each, and the order in which they run.

::

    canonicalize → find_attention → prove_mask → trim_keys → classify_phase → find_modality → assign_patterns
    → rewrite → cleanup
"""

from __future__ import annotations

from mmi_compile.passes.assign_patterns import AssignPatterns
from mmi_compile.passes.base import AttentionSite, ModalityFact, Pass, PassContext, run_pipeline
from mmi_compile.passes.canonicalize import Canonicalize
from mmi_compile.passes.classify_phase import ClassifyPhase
from mmi_compile.passes.cleanup import Cleanup
from mmi_compile.passes.find_attention import FindAttention
from mmi_compile.passes.find_modality import FindModality
from mmi_compile.passes.prove_mask import ProveMask
from mmi_compile.passes.rewrite import Rewrite
from mmi_compile.passes.trim_keys import TrimKeys

PIPELINE: tuple[Pass, ...] = (
    Canonicalize(),
    FindAttention(),
    ProveMask(),
    TrimKeys(),
    ClassifyPhase(),
    FindModality(),
    AssignPatterns(),
    Rewrite(),
    Cleanup(),
)
"""The passes in order. ``classify_phase`` runs before ``find_modality``, since only prefill needs modalities."""

__all__ = ["PIPELINE", "AttentionSite", "ModalityFact", "Pass", "PassContext", "run_pipeline"]
