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
