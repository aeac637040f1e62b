"""A real A/A comparison: two arms of one configuration, trained from other seeds, are not called different."""

import json
from pathlib import Path

from conftest import TINY

from sbp_fast.config.files import load_config
from sbp_fast.experiment.report import wording
from sbp_fast.experiment.run import run
from sbp_fast.pipeline.progress import Console

EQUAL_ARMS = (
    "arms.baseline.seeds=[0, 1, 2]",
    "arms.again.seeds=[3, 4, 5]",
    "arms.sbp.enabled=false",
    "arms.oracle.enabled=false",
    "pretrain.tokens=20480",
    "evaluate.choices=[]",
)


def test_equal_arms_of_three_runs_each_get_no_verdict(tmp_path: Path) -> None:
    run(load_config(["small"], [*TINY, *EQUAL_ARMS]), tmp_path / "run", console=Console(quiet=True))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    values = results["arms"]["again"]["heldout_bits_per_byte"]["run_values"]
    assert len(set(values)) == 3  # the runs differ
    for name, difference in results["arms"]["again"]["difference_to_baseline"].items():
        assert difference["runs"] == [3, 3]
        assert difference["low"] < 0 < difference["high"], name
    assert wording.headline(results)[0].startswith("No measurable difference in held-out bits per byte: Again ")
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'class="change unclear"' in page and 'class="change better"' not in page and 'class="change worse"' not in page
