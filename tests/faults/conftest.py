"""A finished run, every stage of which is damaged again and again."""

import pytest
from finished_run import FinishedRun, make_finished_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """One run for all tests, which leave it as it is."""
    return make_finished_run(tmp_path_factory.mktemp("faults"))
