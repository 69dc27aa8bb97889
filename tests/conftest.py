"""GPU rules of the tests, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Set before triton is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter takes a minute for the case that lets threads of a CPU share work."""
    for item in items:
        if "triton-threads" in item.name and not torch.cuda.is_available():
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def gpu() -> torch.device:
    """A CUDA device; without one the test is skipped, or fails under AUTODROP_REQUIRE_GPU=1."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("AUTODROP_REQUIRE_GPU") == "1":
        pytest.fail("AUTODROP_REQUIRE_GPU=1, but torch sees no CUDA GPU")
    pytest.skip("needs a CUDA GPU; torch sees none")
