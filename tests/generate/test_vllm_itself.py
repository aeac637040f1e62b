"""The backend `vllm` against vLLM itself: of the environment that SBP_FAST_VLLM_PYTHON names, or of this one."""

import os
import sys
from pathlib import Path

import pytest
import torch
from tiny_synthesis import make_inputs, run

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.generate.backends.vllm import vllm_version

pytestmark = pytest.mark.slow
PYTHON = os.environ.get("SBP_FAST_VLLM_PYTHON", sys.executable)
VLLM = ("synthesize.backend=vllm", f"synthesize.vllm_python={PYTHON}", "synthesize.cache_gib=0.25")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    try:
        vllm_version(PYTHON, "cuda" if torch.cuda.is_available() else "cpu")
    except UserError as error:
        pytest.skip(f"set SBP_FAST_VLLM_PYTHON to the Python of an environment with vLLM: this one {error.what}")
    return make_inputs(tmp_path_factory.mktemp("vllm"), head_dim=64)  # a width of heads that vLLM's attention has


def rows(directory: Path) -> list[tuple[int, int, str, list[int]]]:
    corpus = Corpus(directory)
    return [(row["seed"], row["sample"], row["stop"], corpus[i].tolist()) for i, row in enumerate(corpus.documents.to_pylist())]


def test_greedy_documents_of_vllm_equal_those_of_the_engine(inputs: dict[str, Path], tmp_path: Path) -> None:
    overrides = ("device=cpu", "synthesize.temperature=0", "synthesize.samples_per_seed=1", "synthesize.precision=float32")
    run(inputs, tmp_path / "ours", *overrides)
    manifest = run(inputs, tmp_path / "theirs", *VLLM, *overrides)
    assert rows(tmp_path / "theirs") == rows(tmp_path / "ours") and len(rows(tmp_path / "ours")) == manifest.counts["documents"]
    ours, theirs = (Corpus(tmp_path / name).column("mean_log_probability") for name in ("ours", "theirs"))
    assert theirs == pytest.approx(ours, rel=1e-6)  # float32 arithmetic in another order


def test_vllm_samples_documents_with_a_seed_for_each_request(inputs: dict[str, Path], tmp_path: Path) -> None:
    manifest = run(inputs, tmp_path / "out", *VLLM, "synthesize.temperature=1", "synthesize.samples_per_seed=4")
    texts = [tuple(tokens) for *_, tokens in rows(tmp_path / "out")]
    assert len(texts) == manifest.counts["documents"] and len(set(texts)) > len(texts) // 2
    assert not manifest.counts["reproducible"]
