"""The forward in Gluon, on a model of its copies and barriers: it has no interpreter, and no GPU is needed."""

import inspect
from types import ModuleType

import gluon_on_host
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_inputs import inputs
from gluon_on_host import Deadlock, Descriptor, Pointer
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels import PackedLayout, packed_attention
from sbp_kernels.attention import gluon
from sbp_kernels.attention.reference import packed_attention as exact_attention
from sbp_kernels.layout import plan
from sbp_kernels.layout.plan import Tiles
from sbp_kernels.layout.reference import dense_mask
from torch import Tensor
from trees import error, forests, rounding

WIDTH = 16


@pytest.fixture(autouse=True)
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAXIMUM_PARTS", 4)
    monkeypatch.setattr(plan, "SLOTS", 2)


def on_host(
    layout: PackedLayout, q: Tensor, k: Tensor, v: Tensor, stages: int, seed: int, module: ModuleType = gluon
) -> tuple[Tensor, Tensor]:
    """Return out and lse, in base e, computed by the kernel's source on the host."""
    layout = layout.planned()
    assert layout.plan is not None
    sizes, (tokens, heads, width) = layout.plan.tiles, q.shape
    matrices = [x.reshape(tokens, -1).numpy() for x in (q, k, v)]
    blocks = [64, sizes.key_step, sizes.key_step]
    out, lse = np.full((tokens, heads, width), np.nan, np.float16), np.full((heads, tokens), np.nan, np.float32)
    tables = [x.numpy().reshape(-1) for x in (layout.visible_until, layout.plan.query_tiles, layout.plan.query_runs)]
    gluon_on_host.run(
        module, "forward_kernel", len(layout.plan.query_tiles) * heads,
        *(Descriptor(matrix, [rows, width]) for matrix, rows in zip(matrices, blocks, strict=True)),
        Pointer(tables[0]), Pointer(out.reshape(-1)), Pointer(lse.reshape(-1)), Pointer(tables[1]), Pointer(tables[2]),
        heads * width, width, tokens, width**-0.5,
        HEADS=heads, GROUP=heads // k.shape[1], D=width, GROUPS=sizes.query_rows // 64, STEP=sizes.key_step, STAGES=stages,
        seed=seed,
    )  # fmt: skip
    return torch.from_numpy(out), torch.from_numpy(lse) * float(np.log(2))


def assert_accurate(layout: PackedLayout, stages: int, seed: int, module: ModuleType = gluon) -> None:
    """Errors from float64 are at most twice those of torch's operations; the log-sum-exp is that of the plain path."""
    q, k, v, _ = inputs(len(layout), (2, 1), torch.float16, WIDTH)
    out, lse = on_host(layout, q, k, v, stages, seed, module)
    exact = exact_attention(q.double(), k.double(), v.double(), layout)
    batch = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    dense = F.scaled_dot_product_attention(*batch, attn_mask=dense_mask(layout), enable_gqa=True).squeeze(0).transpose(0, 1)
    plain, plain_lse = packed_attention(q, k, v, layout, return_lse=True)
    allowed = 2 * max(error(dense, exact), error(plain, exact), rounding(exact, q.dtype))
    assert out.isfinite().all() and error(out, exact) <= allowed
    exact_lse = packed_attention(q.double(), k.double(), v.double(), layout, return_lse=True)[1]
    assert error(lse, exact_lse) <= 2 * max(error(plain_lse, exact_lse), rounding(exact_lse, torch.float32))


@settings(max_examples=25)
@given(
    forests(maximum_segments=6, maximum_length=90, maximum_depth=4),
    st.sampled_from([64, 128]),
    st.sampled_from([16, 32]),
    st.sampled_from([2, 3]),
    st.integers(0, 1000),
)
def test_it_errs_no_more_than_twice_torchs_operation_however_copies_land(
    forest: tuple[list[int], list[int]], rows: int, step: int, stages: int, seed: int
) -> None:
    assert_accurate(PackedLayout.from_tree(*forest, tiles=Tiles(rows, step, rows, step)), stages, seed)


LAYOUT = PackedLayout.from_tree([150, 40, 90], [-1, 0, 0], tiles=Tiles(128, 16, 128, 16))
PLANTED = {
    "keys are not waited for": "    mbarrier.wait(k_ready.index(slot), step // STAGES & 1)\n",
    "values are not waited for": "    mbarrier.wait(v_ready.index(slot), step // STAGES & 1)\n",
    "buffers are not waited for": "    mbarrier.wait(free.index(slot), step // STAGES & 1 ^ 1)\n",
    "a wrong phase of the keys": (
        "mbarrier.wait(k_ready.index(slot), step // STAGES & 1)",
        "mbarrier.wait(k_ready.index(slot), 0)",
    ),
    "a wrong phase of the buffers": ("step // STAGES & 1 ^ 1)", "step // STAGES & 1)"),
    "keys are given back too early": (
        "            scores = warpgroup_mma_wait(1, deps=[scores])\n            mbarrier.arrive(k_free.index(step % STAGES))\n",
        "            mbarrier.arrive(k_free.index(step % STAGES))\n            scores = warpgroup_mma_wait(1, deps=[scores])\n",
    ),
    "keys are not given back": "            mbarrier.arrive(k_free.index(step % STAGES))\n",
    "values are not given back": "            mbarrier.arrive(v_free.index((step - 1) % STAGES))\n",
    "scores are used before they are there": ("warpgroup_mma_wait(1, deps=[scores])", "warpgroup_mma_wait(2, deps=[scores])"),
    "a barrier for one group": ("count=GROUPS)", "count=1)"),
}


@pytest.mark.parametrize("change", PLANTED.values(), ids=PLANTED.keys())
def test_planted_fault_is_found(change: str | tuple[str, str], tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, right = (change, "") if isinstance(change, str) else change
    source = inspect.getsource(gluon)
    assert wrong in source
    (tmp_path / "faulty_gluon.py").write_text(source.replace(wrong, right))
    monkeypatch.syspath_prepend(tmp_path)
    import faulty_gluon

    monkeypatch.delitem(__import__("sys").modules, "faulty_gluon")
    found = 0
    for seed in range(8):
        try:
            assert_accurate(LAYOUT, 2, seed, faulty_gluon)
        except (AssertionError, Deadlock):
            found += 1
    assert found
