import numpy as np
import pytest

from sbp_fast.errors import UserError
from sbp_fast.pipeline.finite import require_finite_rows


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4,), (4, 3), (4, 0)])
def test_finite_rows_are_accepted_even_where_there_are_none(shape: tuple[int, ...]) -> None:
    require_finite_rows(np.zeros(shape, np.float32), "score", str)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)])
def test_first_row_that_is_not_finite_is_named(shape: tuple[int, ...]) -> None:
    values = np.zeros(shape, np.float32)
    values[2:].flat[-1] = values.reshape(4, -1)[2, -1] = np.nan
    with pytest.raises(UserError, match="document 2: its score is not finite"):
        require_finite_rows(values, "score", lambda row: f"document {row}")
