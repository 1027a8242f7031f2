"""Patterns, probe, plan and kernels: everything that runs behind the ``mmi::`` operators."""
