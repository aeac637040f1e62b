"""Every file of `examples/`, run on a finished run as its first lines say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sbp_fast import PairSet, PreparedCorpus

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "read_a_corpus.py": ("prepare",),
    "look_at_pairs.py": ("prepare", "pair/related"),
    "write_after_a_text.py": ("prepare", "tune/related", "Chad: Economy"),
    "kernels_in_your_model.py": (),
}
NOTEBOOK = EXAMPLES / "a_run_in_python.ipynb"
PRINTED = {
    "read_a_corpus.py": "a batch has 8 documents",
    "look_at_pairs.py": "seeds, similarity 0.",
    "write_after_a_text.py": "\n3. ",
    "kernels_in_your_model.py": "the first token moves: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]",
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == ARGUMENTS.keys() == PRINTED.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example_prints_what_it_promises(name: str, tiny_run: Path) -> None:
    arguments = [part if " " in part else str(tiny_run / part) for part in ARGUMENTS[name]]
    result = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert PRINTED[name] in result.stdout


def test_notebook_runs_from_its_first_cell_to_its_last(tiny_run: Path, tmp_path: Path) -> None:
    """Its code alone, in a process of its own, where the run lies as the notebook expects it: no Jupyter is needed."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(tiny_run)
    (tmp_path / "examples").mkdir()
    program = "\n".join("".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if is_code(cell))
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path / "examples", env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    difference = re.search(r"largest difference (\S+)", result.stdout)
    assert difference is not None and float(difference[1]) < 1e-5
    assert re.search(r"given its own seed \d\.\d+\ngiven another one  \d\.\d+\n$", result.stdout)


def test_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert notebook["nbformat"] == 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in notebook["cells"] if is_code(cell))
    assert {path.name for path in EXAMPLES.glob("*.ipynb")} == {NOTEBOOK.name}


def is_code(cell: dict[str, Any]) -> bool:
    return cell["cell_type"] == "code"


def test_table_of_pairs_has_the_ids_of_both_documents(tiny_run: Path) -> None:
    pairs, unique = PairSet(tiny_run / "pair/related"), PreparedCorpus(tiny_run / "prepare").unique
    table = pairs.table(unique)
    assert table["seed_id"].to_pylist() == unique.ids[pairs.seeds].tolist()
    assert table["partner_id"].to_pylist() == unique.ids[pairs.partners].tolist()
    assert table["score"].to_numpy().tolist() == pairs.scores.tolist()
