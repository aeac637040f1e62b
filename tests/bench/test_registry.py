"""The registry on a machine that has only torch, triton, numpy and numba."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = '''
import sys
from itertools import islice

BLOCKED = ("pydantic", "zstandard", "hnswlib", "tomli_w", "sbp_fast")


class Blocker:
    """Refuses the packages that a machine with only the kernels does not have."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Blocker())
import torch

import bench.__main__
import bench.first_light
from bench import machine
from bench.registry import BENCHMARKS

assert not {entry.cases.split(":")[0] for entry in BENCHMARKS.values()} & sys.modules.keys()  # none is imported yet
import sbp_kernels  # before the pretence of a GPU

torch.cuda.is_available = lambda: True
machine.device = lambda: torch.device("cpu")
for name, entry in BENCHMARKS.items():
    try:
        cases = list(islice(entry.load()(), 12))  # as large as on a GPU
    except ModuleNotFoundError as error:
        print(name, "needs", error.name or str(error).split("'")[1].split(".")[0])
    else:
        assert all(case.providers and case.shape for case in cases)
        print(name, len(cases), *sorted({case.shape.get("operation", name) for case in cases}))
'''


def test_list_and_set_up_without_the_packages_of_sbp_fast() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "attention 12 attention",
        "generation needs sbp_fast",
        "training needs sbp_fast",
        "loss 8 loss",
        "small 10 qk_norm_rope rms_norm rms_norm with residual swiglu",
        "pairs 2 pairs",
        "plan 10 plan",
        "order needs sbp_fast",
        "short-documents needs sbp_fast",
        "corpus needs sbp_fast",
    ]
