"""CONTRIBUTING.md as a user follows it: its snippets are taken from the page and run, without a change of the package."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sbp_kernels import PackedLayout, packed_attention
from sbp_kernels.attention import registry as attention_registry
from tiny_training import QUIET, configure, make_corpus, train_arm
from written_corpus import fresh_tokens, make_written

from sbp_fast.config.files import load_config
from sbp_fast.data.documents import find_files, read_file
from sbp_fast.data.readers import READERS
from sbp_fast.evaluate.quality_rates import QUALITY_RATES
from sbp_fast.experiment.arms import arms_of
from sbp_fast.filters.rules import FILTER_RULES
from sbp_fast.model.flops import parameters
from sbp_fast.neighbors.backends import BACKENDS
from sbp_fast.stages.filter import filter_documents
from sbp_fast.train.log import read_curve
from sbp_fast.train.memory import optimizer_bytes
from sbp_fast.train.optimizer import OPTIMIZERS

ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", CONTRIBUTING, re.MULTILINE | re.DOTALL))
CHANGES = (
    "A filter rule",
    "An attention backend",
    "An arm",
    "An optimizer",
    "A kNN backend",
    "An input format",
    "A quality metric",
    "A kernel",
)
REGISTRIES = (FILTER_RULES, OPTIMIZERS, BACKENDS, READERS, QUALITY_RATES)


def snippet(change: str, language: str = "python") -> str:
    (code,) = re.findall(rf"```{language}\n(.*?)```", SECTIONS[change], re.DOTALL)
    return code


def follow(change: str) -> dict[str, Any]:
    """Run the snippet of a change and return its names."""
    names: dict[str, Any] = {"__name__": "mine"}
    exec(compile(snippet(change), f"CONTRIBUTING.md: {change}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_entries", dict(registry.items()))
    monkeypatch.setattr(attention_registry, "_BACKENDS", dict(attention_registry._BACKENDS))


def test_the_page_shows_the_eight_changes_as_six_lines_each() -> None:
    assert tuple(SECTIONS) == CHANGES
    for change in CHANGES:
        lines = [line.partition(":")[0] for line in SECTIONS[change].splitlines() if line.startswith("- ")]
        assert len(lines) == 6 and {"- Source", "- Test", "- Documentation"} <= set(lines), change


def test_every_path_that_the_page_names_exists() -> None:
    for path in re.findall(r"`((?:sbp_fast|kernels|bench|tests|docs)/[\w./]+)`", CONTRIBUTING):
        assert "NAME" in path or (ROOT / path).exists(), path


def test_module_of_the_page_gives_the_command_line_what_it_registers(tmp_path: Path) -> None:
    (start,) = re.findall(r"```python\n(# mine.py.*?)```", CONTRIBUTING, re.DOTALL)
    before, _, after = start.partition("# ... registrations")
    mine = tmp_path / "mine.py"
    mine.write_text(f"{before}{snippet('An optimizer')}{after.partition(chr(10))[2]}", encoding="utf-8")
    shown = subprocess.run([sys.executable, mine, "plan", "demo", "pretrain.optimizer=sgd"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    refused = subprocess.run([sys.executable, mine, "plan", "demo", "pretrain.optimizer=sgdd"], capture_output=True, text=True)
    assert refused.returncode == 2 and "known: adamw, muon, muon-float32, sgd" in refused.stderr


def test_optimizer_of_the_page_trains_a_model_and_is_planned(tmp_path: Path) -> None:
    follow("An optimizer")
    corpus = make_corpus(tmp_path)
    config = configure(tmp_path, "pretrain.optimizer=sgd", "pretrain.learning_rate=0.5")
    train_arm(config, tmp_path / "baseline", corpus=corpus)
    losses = [loss for _, loss in read_curve(tmp_path / "baseline" / "metrics.jsonl", "train/loss")]
    assert losses[-1] < losses[0]
    assert optimizer_bytes(config.model, 300, "sgd") == 4 * parameters(config.model, 300)


def test_filter_rule_of_the_page_rejects_and_is_counted(tmp_path: Path) -> None:
    follow("A filter rule")
    random, corpus = np.random.default_rng(0), make_corpus(tmp_path)
    rows = [(0, fresh_tokens(random, tokens), "end") for tokens in (40, 401, 60)]
    synthetic = make_written(corpus, tmp_path / "synthetic", rows)
    manifest = filter_documents(configure(tmp_path), tmp_path / "filter", corpus=corpus, synthetic=synthetic, console=QUIET)
    assert manifest.counts["rules"]["too_long"]["rejected"] == 1
    assert manifest.counts["rules"]["too_long"]["description"] == "more tokens"


def test_arm_of_the_page_is_an_arm_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(snippet("An arm", "toml"), encoding="utf-8")
    config = load_config(["small", tmp_path / "mine.toml"])
    assert list(arms_of(config)) == ["baseline", "sbp", "oracle", "decayed"]
    assert config.arms["decayed"].resolve_recipe(config.pretrain).weight_decay == 1.0


def test_attention_backend_of_the_page_gives_the_attention_of_the_package() -> None:
    follow("An attention backend")
    layout = PackedLayout.from_tree([6, 4, 4, 2], [-1, 0, 0, 0])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(16, heads, 8, generator=generator) for heads in (4, 2, 2))
    mine, theirs = packed_attention(q, k, v, layout, backend="dense"), packed_attention(q, k, v, layout, backend="torch")
    torch.testing.assert_close(mine, theirs)
    assert load_config(["small"], ["pretrain.attention=dense"]).pretrain.attention == "dense"


def test_knn_backend_of_the_page_finds_the_nearest() -> None:
    follow("A kNN backend")
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], np.float32)
    searcher = BACKENDS["sorted"].open(vectors, np.arange(4), load_config(["small"]).pair)  # type: ignore[call-arg]
    ids, scores = searcher.search(np.arange(2), 2)
    assert ids.tolist() == [[1, 2], [0, 2]] and scores[0, 0] == pytest.approx(0.8)


def test_reader_of_the_page_reads_its_suffix(tmp_path: Path) -> None:
    follow("An input format")
    (tmp_path / "mine.csv").write_text("id,text\na,First.\nb,Second.\n", encoding="utf-8")
    config = load_config(["small"], [f"corpus.path='{tmp_path}'"]).corpus
    texts = [document.text for file in find_files(config.path) for document in read_file(file, config)]
    assert texts == ["First.", "Second."]


def test_quality_rate_of_the_page_is_registered_with_its_label() -> None:
    follow("A quality metric")
    assert QUALITY_RATES["brief"].label == "Brief documents"


def test_kernel_of_the_page_is_differentiated_and_compiled_as_one_operation() -> None:
    follow("A kernel")
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    torch.ops.sbp_kernels.square(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 4, 6]
    torch.library.opcheck(torch.ops.sbp_kernels.square.default, (x.detach(),))
