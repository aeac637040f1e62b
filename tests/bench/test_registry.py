"""The registry on a machine that has only torch, triton, numpy and numba."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = '''
import os
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
from bench.runner import check

assert not {entry.cases.split(":")[0] for entry in BENCHMARKS.values()} & sys.modules.keys()  # none is imported yet
import sbp_kernels  # before the pretence of a GPU

no_gpu = torch.cuda.is_available
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

torch.cuda.is_available = no_gpu
os.environ["BENCH_TINY"] = "1"
for name in ("attention", "loss", "small", "pairs"):
    verdicts = [check(case)["right"] for case in BENCHMARKS[name].load()()]
    print(name, "is right in", sum(verdicts), "of", len(verdicts), "tiny cases")
'''


def test_list_set_up_and_check_without_the_packages_of_sbp_fast() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "attention 12 attention",
        "generation needs sbp_fast",
        "training needs sbp_fast",
        "loss 8 loss",
        "small 12 qk_norm_rope rms_norm rms_norm with residual sampling swiglu",
        "decode-steps needs sbp_fast",
        "pairs 2 pairs",
        "plan 10 plan",
        "order needs sbp_fast",
        "steps needs sbp_fast",
        "short-documents needs sbp_fast",
        "corpus needs sbp_fast",
        "scale needs sbp_fast",
        "attention is right in 4 of 4 tiny cases",
        "loss is right in 2 of 2 tiny cases",
        "small is right in 4 of 4 tiny cases",
        "pairs is right in 1 of 1 tiny cases",
    ]
