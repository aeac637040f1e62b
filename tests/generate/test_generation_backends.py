"""The stage with the backend `transformers`, and the stop rules for the output of other libraries."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_synthesis import Killed, documents, make_inputs, record_generated, run, settings
from transformers import AutoModelForCausalLM

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.generate.backends.backend import sampling_params
from sbp_fast.generate.backends.stop_rules import first_repetition, truncate, truncated_result
from sbp_fast.generate.backends.transformers_generator import TransformersGenerator
from sbp_fast.generate.decoder import SamplingParams
from sbp_fast.generate.engine import Seed
from sbp_fast.model.huggingface import export_model

TRANSFORMERS = "synthesize.backend=transformers"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("backends"))


@pytest.fixture(scope="module")
def peer(inputs: dict[str, Path]) -> Any:
    exported = inputs["directory"] / "exported"
    export_model(inputs["model"], inputs["corpus"] / "tokenizer.json", exported)
    return AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()


# --- stop rules


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 5))
def test_first_repetition_equals_brute_force(tokens: list[int], width: int) -> None:
    def repeats(stop: int) -> bool:
        return any(tokens[start : start + width] == tokens[stop - width : stop] for start in range(stop - width))

    expected = next((stop for stop in range(width + 1, len(tokens) + 1) if width and repeats(stop)), 0)
    assert first_repetition(np.array(tokens, np.int64), width) == expected


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ([1, 2, 3, 9], (4, "end")),
        ([1, 2, 3, 9, 9, 9], (4, "end")),
        ([9, 1, 2], (1, "end")),
        ([1, 2, 3, 4], (4, "length")),
        ([1, 2, 1, 2, 9], (4, "repetition")),
        ([1, 2, 3, 1, 2], (5, "repetition")),  # at the greatest length too
        ([1, 2, 1, 9, 2, 1], (4, "end")),  # what follows the end repeats
        ([1, 9, 1, 9], (2, "end")),
    ],
)
def test_output_of_other_libraries_is_truncated_by_the_stop_rules(generated: list[int], expected: tuple[int, str]) -> None:
    assert truncate(np.array(generated), 9, 2) == expected
    sampling = SamplingParams(first=8, end=9, forbidden=(), maximum_tokens=30, repeated_tokens=2)
    result = truncated_result(3, 4, np.array(generated), np.arange(len(generated)) + 0.5, sampling)
    assert (result.seed, result.sample, result.generated_tokens, result.stop) == (3, 4, *expected)
    assert result.tokens.tolist() == [token for token in generated[: result.generated_tokens] if token != 9]
    assert result.log_probability == sum(range(result.generated_tokens)) + 0.5 * result.generated_tokens


# --- the stage


@pytest.mark.parametrize("repeated", [4, 0])
def test_greedy_documents_equal_those_of_the_engine(inputs: dict[str, Path], tmp_path: Path, repeated: int) -> None:
    overrides = ("synthesize.temperature=0", f"synthesize.repeated_tokens={repeated}", "synthesize.samples_per_seed=1")
    ours, theirs = run(inputs, tmp_path / "ours", *overrides), run(inputs, tmp_path / "theirs", TRANSFORMERS, *overrides)
    engine, third_party = Corpus(tmp_path / "ours"), Corpus(tmp_path / "theirs")
    assert [row[:-1] for row in tokens_of(engine)] == [row[:-1] for row in tokens_of(third_party)]
    assert len({tuple(row[0]) for row in tokens_of(engine)}) > 8
    # float32 arithmetic in another order
    assert third_party.column("mean_log_probability") == pytest.approx(engine.column("mean_log_probability"), rel=1e-6)
    assert set(ours.counts["stops"]) == {"repetition" if repeated else "length"}
    assert (ours.counts["reproducible"], ours.counts["backend_versions"]) == (True, [])
    assert not theirs.counts["reproducible"] and set(*theirs.counts["backend_versions"]) == {"transformers"}
    assert not list((tmp_path / "theirs").glob("parts*"))


def tokens_of(corpus: Corpus) -> list[tuple[list[int], str, float]]:
    rows = corpus.documents.to_pylist()
    return [(corpus[i].tolist(), row["stop"], row["mean_log_probability"]) for i, row in enumerate(rows)]


def test_sampled_documents_follow_the_sampling_parameters(inputs: dict[str, Path], tmp_path: Path, peer: Any) -> None:
    """A high temperature makes all tokens likely, yet forbidden ones are absent; log-probabilities are at temperature 1."""
    overrides = (
        "synthesize.temperature=3",
        "synthesize.top_p=1",
        "synthesize.repeated_tokens=1",
        "synthesize.batch_documents=7",
    )
    manifest = run(inputs, tmp_path / "out", TRANSFORMERS, *overrides)
    written, prepared = Corpus(tmp_path / "out"), PreparedCorpus(inputs["corpus"])
    tokenizer = prepared.tokenizer
    assert set(manifest.counts["stops"]) == {"end", "length", "repetition"}
    for i, row in enumerate(written.documents.to_pylist()):
        text = written[i].tolist()[1:-1]
        assert not {tokenizer.begin, tokenizer.partner, tokenizer.end} & set(text)
        repeated = first_repetition(np.array(text), 1)
        assert repeated == (len(text) if row["stop"] == "repetition" else 0)
        assert (len(text) == 30) >= (row["stop"] == "length")
        generated = text + [tokenizer.end] * (row["stop"] == "end")
        prompt = [*prepared.unique[row["seed"]][:30].tolist(), tokenizer.partner]
        with torch.no_grad():
            logits = peer(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
        nats = logits.log_softmax(-1).gather(1, torch.tensor(generated)[:, None]).mean().item()
        assert row["mean_log_probability"] == pytest.approx(nats, rel=1e-5)
    assert len({tuple(written[i].tolist()) for i in range(len(written))}) > 0.9 * len(written)


def test_first_tokens_come_from_the_nucleus_of_the_most_probable(inputs: dict[str, Path], peer: Any) -> None:
    prepared = PreparedCorpus(inputs["corpus"])
    config = settings(inputs["directory"], "synthesize={top_k=6, top_p=0.6, temperature=2.0}")
    sampling = sampling_params(config.synthesize, prepared, 30)
    tokens = prepared.unique[0][:30]
    with torch.no_grad():
        logits = peer(torch.tensor([[*tokens.tolist(), sampling.first]])).logits[0, -1] / sampling.temperature
    logits[list(sampling.forbidden)] = -torch.inf
    best = logits.topk(6)
    before = best.values.softmax(0).cumsum(0) - best.values.softmax(0)
    nucleus = set(best.indices[before < 0.6].tolist())
    generator = TransformersGenerator(peer, sampling, 32, 0)
    generated = [
        result.tokens[0] if len(result.tokens) else sampling.end
        for result in generator.generate([Seed(0, 0, tokens, tuple(range(96)))])
    ]
    assert set(map(int, generated)) == nucleus and 1 < len(nucleus) < 6


def test_killed_and_rerun_generates_every_document_once(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = record_generated(monkeypatch, kill_at=20)
    overrides = (TRANSFORMERS, "synthesize.batch_documents=8")
    with pytest.raises(Killed):
        run(inputs, tmp_path / "out", *overrides)
    manifest = run(inputs, tmp_path / "out", *overrides)
    assert len(generated) == len(set(generated)) == manifest.counts["documents"]
    assert len(manifest.counts["backend_versions"]) == 1


def test_the_same_batches_give_the_same_documents(inputs: dict[str, Path], tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        run(inputs, tmp_path / name, TRANSFORMERS, f"seed={seed}")
    assert documents(tmp_path / "one") == documents(tmp_path / "two") != documents(tmp_path / "three")


def test_setting_without_meaning_for_transformers_is_refused_and_leaves_nothing(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match='not with "transformers"; leave them out'):
        run(inputs, tmp_path / "out", TRANSFORMERS, "synthesize.cache_gib=1")
    assert not (tmp_path / "out.partial").exists()
