"""Settings for every test."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it meets a kernel, so before any is imported

settings.register_profile("sbp-fast", deadline=None)  # a busy machine is not a failure
settings.load_profile("sbp-fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is no CUDA device, the tests that need one are skipped and say so."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A test that broke the CUDA context ends its process: every later test of it would fail as well.

    pytest-xdist starts a new process in place of a worker that ends.
    """
    if item.get_closest_marker("gpu") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            pytest.exit(f"{item.nodeid} broke the CUDA context: {error}", returncode=1)
