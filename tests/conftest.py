"""Test session set-up: offline, a fair share of the cores per worker, and hypothesis profiles.

Choose a profile with ``HYPOTHESIS_PROFILE``: ``desk`` (default), ``ci`` or ``nightly``.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

# Before torch and transformers are imported, because both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if _WORKERS > 1:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# A developer's own settings must not decide what the tests see; MMI_ACCEPT rewrites golden files.
for _name in [name for name in os.environ if name.startswith("MMI_") and name != "MMI_ACCEPT"]:
    del os.environ[_name]

import pytest  # noqa: E402  (the environment comes first)
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))

# Tracing a model inside a test is slow by hypothesis' standards, and that is no defect of the test.
_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("desk", max_examples=15, derandomize=True, deadline=None, suppress_health_check=_SLOW_IS_FINE)
settings.register_profile(
    "ci", max_examples=100, derandomize=True, deadline=None, print_blob=True, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile(
    "nightly", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=_SLOW_IS_FINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "desk"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: no collection of garbage need walk through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Forget every compiled frame before and after the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _honour_fresh_dynamo_marker(request: pytest.FixtureRequest) -> None:
    """``@pytest.mark.fresh_dynamo`` (or ``pytestmark``) asks for the fixture without naming it in each test."""
    if request.node.get_closest_marker("fresh_dynamo"):
        request.getfixturevalue("fresh_dynamo")
