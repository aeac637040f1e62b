"""The kernels are installable alone."""

import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
REPORT = """
import importlib, pkgutil, sys, sbp_kernels
for module in pkgutil.walk_packages(sbp_kernels.__path__, "sbp_kernels."):
    importlib.import_module(module.name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_kernels_import_neither_the_trainer_nor_what_it_depends_on() -> None:
    done = subprocess.run([sys.executable, "-c", REPORT], cwd=KERNELS, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "torch" in imported
    assert not imported & {"sbp_fast", "pydantic", "pyarrow", "tokenizers", "transformers", "rich", "typer"}


def test_the_folder_shadows_no_package() -> None:
    assert not (KERNELS / "__init__.py").exists()
