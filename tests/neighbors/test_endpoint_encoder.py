"""Vectors of a server: what is asked, what is taken for an answer, and what becomes of failures."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_server import DIMENSION, embeddings, vector_of
from judge_server import Reply, serving
from typer.testing import CliRunner

from sbp_fast.cli import app
from sbp_fast.config import EmbedConfig, RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import TransientError, UserError
from sbp_fast.experiment.run import run
from sbp_fast.neighbors.endpoint_encoder import PROBE, EndpointEncoder, check_endpoint
from sbp_fast.neighbors.query import find_neighbors
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.pipeline import openai_client
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.embed import embed
from sbp_fast.stages.pair import pair
from sbp_fast.stages.prepare import prepare

QUIET = Console(quiet=True)
TEXTS = [f"text number {number}" for number in range(7)]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "FIRST_WAIT_SECONDS", 0.001)


def settings(url: str, **more: Any) -> EmbedConfig:
    return EmbedConfig(endpoint=url, model="bge", **{"batch_documents": 3, **more})


def unit(texts: list[str], dimensions: int = DIMENSION) -> np.ndarray:
    vectors = np.stack([vector_of(text)[:dimensions] for text in texts])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def whole(before: int, body: dict[str, Any]) -> Reply:
    return embeddings(body)


def after_probe(reply: Callable[[dict[str, Any]], Reply]) -> Callable[[int, dict[str, Any]], Reply]:
    """Return a behaviour that answers the probe and then as `reply`."""
    return lambda before, body: reply(body) if before else embeddings(body)


def test_vectors_of_all_batches_are_in_the_order_of_the_texts_whatever_the_order_of_answers() -> None:
    late = threading.Event()

    def behaviour(before: int, body: dict[str, Any]) -> Reply:
        if body["input"][0] == TEXTS[0]:
            assert late.wait(10)  # the first batch is answered last
        if body["input"][0] == TEXTS[6]:
            late.set()
        return embeddings(body)

    advanced: list[int] = []
    with serving(behaviour) as server:
        encoder = EndpointEncoder(settings(server.url + "/", prompt=""))
        assert (encoder.encode(TEXTS, advanced.append) == unit(TEXTS)).all()
    assert encoder.dimension == DIMENSION and sorted(advanced) == [1, 3, 3]
    assert server.paths == ["/v1/embeddings"] * 4
    assert server.requests[0] == {"model": "bge", "input": [PROBE], "encoding_format": "float"}
    assert sorted(body["input"] for body in server.requests[1:]) == [TEXTS[:3], TEXTS[3:6], TEXTS[6:]]
    assert all("Authorization" not in headers for headers in server.headers)


def test_prompt_and_head_of_a_text_are_sent_and_the_first_dimensions_kept() -> None:
    with serving(whole) as server:
        encoder = EndpointEncoder(settings(server.url, prompt="Find: ", endpoint_characters=4, dimensions=2))
        vectors = encoder.encode(["abcdefgh", "äöüß𝄞"])
    assert server.requests[1]["input"] == ["Find: abcd", "Find: äöüß"]
    assert encoder.dimension == 2 and (vectors == unit(["Find: abcd", "Find: äöüß"], 2)).all()
    assert encoder.lengths_of(["abcdefgh", "äöüß𝄞"]).tolist() == [8, 5] and encoder.limit == 4


def test_key_is_sent_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_KEY", "sk-secret")

    def behaviour(before: int, body: dict[str, Any]) -> Reply:
        return embeddings(body) if before == 0 else (401, b"wrong key: sk-secret")

    with serving(behaviour) as server:
        encoder = EndpointEncoder(settings(server.url, endpoint_key_variable="EMBED_KEY"))
        with pytest.raises(UserError, match=r"answers 401: wrong key: \(key\); correct embed.endpoint, embed.model or the key"):
            encoder.encode(["one"])
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    assert "secret" not in json.dumps([encoder.counts, encoder.description])


@pytest.mark.parametrize("failure", [(429, b"slow down"), (500, b"busy"), (200, b"<html>"), None])
def test_a_transient_failure_is_followed_by_another_attempt(failure: Reply | None) -> None:
    failed: list[str] = []

    def behaviour(before: int, body: dict[str, Any]) -> Reply:
        if before and failed.count(body["input"][0]) < 2:
            failed.append(body["input"][0])
            if failure is None:
                raise ConnectionResetError
            return failure
        return embeddings(body)

    with serving(behaviour) as server:
        assert (EndpointEncoder(settings(server.url)).encode(TEXTS) == unit(TEXTS)).all()
    assert len(server.requests) == 1 + 3 * 3


def without_last(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows[:-1]


ANSWERS_THAT_ARE_NONE = {
    "a missing row": (without_last, "3 texts have 2 embeddings"),
    "a row too many": (lambda rows: [*rows, {**rows[0], "index": 3}], "3 texts have 4 embeddings"),
    "an index twice": (lambda rows: [rows[0], rows[1], rows[1]], "3 texts have 3 embeddings, with the indices 0, 1"),
    "other indices": (lambda rows: [{**row, "index": row["index"] + 1} for row in rows], "with the indices 1, 2, 3"),
    "no index": (lambda rows: [{"embedding": row["embedding"]} for row in rows], "object"),
    "base64": (lambda rows: [{**row, "embedding": "AAAA"} for row in rows], "object"),
    "two dimensions": (lambda rows: [rows[0], rows[1], {**rows[2], "embedding": [1.0]}], r"have the shapes \(1,\), \(6,\)"),
    "nested": (lambda rows: [{**row, "embedding": [row["embedding"]]} for row in rows], r"have the shapes \(1, 6\)"),
    "huge": (lambda rows: [{**row, "embedding": [10**400]} for row in rows], "object"),
}


@pytest.mark.parametrize("name", ANSWERS_THAT_ARE_NONE)
def test_an_answer_without_a_vector_of_each_text_is_refused(name: str) -> None:
    change, message = ANSWERS_THAT_ARE_NONE[name]
    with serving(after_probe(lambda body: embeddings(body, change))) as server:
        encoder = EndpointEncoder(settings(server.url))
        with pytest.raises(TransientError, match=f"answers what is no list of embeddings: .*{message}.*; rerun when it does"):
            encoder.encode(TEXTS[:3])
    assert len(server.requests) == 1 + openai_client.ATTEMPTS


@pytest.mark.parametrize("component", [float("nan"), None, float("inf"), 1e300, "zero"])
def test_a_vector_without_a_direction_is_refused_and_its_document_named(component: Any) -> None:
    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[1]["embedding"] = [0.0] * DIMENSION if component == "zero" else [component, *rows[1]["embedding"][1:]]
        return rows

    with serving(after_probe(lambda body: embeddings(body, change))) as server:
        encoder = EndpointEncoder(settings(server.url))
        with pytest.raises(UserError, match=r"document 1: its vector has the length .*; leave the document out"):
            encoder.encode(TEXTS[:3], name=lambda row: f"document {row}")
    assert len(server.requests) == 2


def test_another_dimension_than_before_is_refused_at_once() -> None:
    shorter = after_probe(lambda body: embeddings(body, lambda rows: [{**row, "embedding": [1.0, 2.0]} for row in rows]))
    with serving(shorter) as server:
        encoder = EndpointEncoder(settings(server.url))
        with pytest.raises(UserError, match="gives vectors of 2 components, and gave 6 before; embed the whole corpus"):
            encoder.encode(TEXTS[:3])
    assert len(server.requests) == 2


def test_too_many_dimensions_are_refused() -> None:
    with serving(whole) as server, pytest.raises(UserError, match=r"embed\.dimensions = 9: bge has 6; set it to no more"):
        EndpointEncoder(settings(server.url, dimensions=9))


def test_a_redirection_is_refused() -> None:
    with (
        serving(lambda before, body: (307, b"")) as server,
        pytest.raises(UserError, match="a redirection, which is not followed"),
    ):
        EndpointEncoder(settings(server.url))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"endpoint": "localhost:8000"}, "embed.endpoint = 'localhost:8000': is no http address"),
        ({"endpoint": "http://me:secret@host/v1"}, "embed.endpoint: has a user, a password or parameters"),
        ({"endpoint": "http://x", "endpoint_key_variable": "NOT_SET_ANYWHERE"}, "variable NOT_SET_ANYWHERE: is not set; put"),
    ],
)
def test_unusable_settings_are_refused_before_anything_runs(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = RunConfig(embed=EmbedConfig(**values))
    for work in (
        lambda: check_endpoint(config.embed),
        lambda: embed(config, tmp_path, tmp_path / "out", console=QUIET),
        lambda: run(config, tmp_path / "out", console=QUIET),
    ):
        with pytest.raises(UserError) as raised:
            work()
        assert message in str(raised.value) and "secret" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_settings_name_the_model_of_a_server_as_such_and_not_where_it_is() -> None:
    here, there = EmbedConfig(model="bge").settings(), settings("http://x", endpoint_key_variable="KEY").settings()
    assert there == settings("http://y").settings() != settings("http://x", endpoint_characters=99).settings()
    assert (here["model"], there["model"]) == ("bge", "endpoint:bge")
    assert here.keys() - there.keys() == {"maximum_tokens", "precision"}
    assert there.keys() - here.keys() == {"endpoint_characters"}
    with pytest.raises(ValueError, match="file and endpoint both say where vectors come from"):
        EmbedConfig(file="vectors.npy", endpoint="http://x")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endpoint")
    lines = [
        json.dumps({"id": f"d{number}", "text": f"Document {number} of {number % 5} things. " * 9}) for number in range(60)
    ]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    values = {"path": str(folder / "documents.jsonl"), "unique_share": 1.0, "vocabulary_size": 300, "heldout_share": 0.1}
    prepare(RunConfig.model_validate({"corpus": values}), folder / "corpus", console=QUIET)
    return folder / "corpus"


def stage_settings(url: str) -> RunConfig:
    embedding = settings(url, shard_documents=20, storage="float32", endpoint_requests=1, endpoint_characters=40)
    return RunConfig(threads=1, device="cpu", embed=embedding)


def test_a_corpus_embedded_by_a_server_has_its_vectors(corpus: Path, tmp_path: Path) -> None:
    with serving(whole) as server:
        manifest = embed(stage_settings(server.url), corpus, tmp_path / "vectors", console=QUIET)
    prepared = PreparedCorpus(corpus)
    heads = [prepared.text(prepared.unique, row)[:40] for row in range(len(prepared.unique))]
    assert np.abs(Vectors(tmp_path / "vectors")[np.arange(len(heads))] - unit(heads)).max() < 1e-6
    assert manifest.counts["model"] == "bge" and manifest.counts["endpoint"] == f"{server.url}/embeddings"
    assert manifest.counts["maximum_characters"] == 40 and manifest.counts["truncated_share"] == 1.0
    assert manifest.flops == 0 and manifest.counts["heldout"]["documents"] == len(prepared.heldout)
    with serving(whole) as moved:
        embed(stage_settings(moved.url), corpus, tmp_path / "vectors", console=QUIET)
    assert moved.requests == []  # the same model at another address: the stage is finished


def test_a_failed_run_resumes_behind_the_finished_files_and_not_with_another_dimension(corpus: Path, tmp_path: Path) -> None:
    def dies(before: int, body: dict[str, Any]) -> Reply:
        return embeddings(body) if before < 10 else (503, b"no worker")

    def shorter(before: int, body: dict[str, Any]) -> Reply:
        return embeddings(body, lambda rows: [{**row, "embedding": row["embedding"][:2]} for row in rows])

    with serving(dies) as server, pytest.raises(TransientError, match="answers 503: no worker; rerun when it does"):
        embed(stage_settings(server.url), corpus, tmp_path / "vectors", console=QUIET)
    with serving(shorter) as server, pytest.raises(UserError, match="has vectors of 6 components, and bge now gives 2"):
        embed(stage_settings(server.url), corpus, tmp_path / "vectors", console=QUIET)
    with serving(whole) as server:
        embed(stage_settings(server.url), corpus, tmp_path / "vectors", console=QUIET)
    prepared = PreparedCorpus(corpus)
    shards = ((prepared.unique, range(20, len(prepared.unique))), (prepared.heldout, range(len(prepared.heldout))))
    missing = [prepared.text(part, row)[:40] for part, rows in shards for row in rows]
    assert [text for body in server.requests[1:] for text in body["input"]] == missing
    with serving(whole) as server:
        embed(stage_settings(server.url), corpus, tmp_path / "at-once", console=QUIET)
    for name in sorted(path.relative_to(tmp_path / "vectors") for path in (tmp_path / "vectors").rglob("*.npy")):
        assert (tmp_path / "vectors" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes()


@pytest.fixture(scope="module")
def index_of_a_server(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of vectors that a server gave."""
    out = tmp_path_factory.mktemp("server")
    with serving(whole) as server:
        embed(stage_settings(server.url), corpus, out / "vectors", console=QUIET)
    band = {"similarity_low": -1.0, "similarity_high": 1.0, "save_index": True, "near_duplicate_containment": 1.0}
    config = RunConfig.model_validate({"threads": 1, "device": "cpu", "pair": band})
    pair(config, corpus, out / "vectors", out / "index", console=QUIET)
    return out / "index"


def test_a_text_is_embedded_by_the_server_that_the_command_names(corpus: Path, index_of_a_server: Path) -> None:
    prepared = PreparedCorpus(corpus)
    text = prepared.text(prepared.unique, 3)
    with serving(whole) as server:
        options = ["--corpus", str(corpus), "--text", text, "--endpoint", server.url, "--count", "2"]
        result = CliRunner().invoke(app, ["neighbors", str(index_of_a_server), *options])
    assert result.exit_code == 0, result.output
    first, second = result.output.splitlines()
    assert first.split()[:2] == ["1.0000", prepared.unique.id(3)] and float(second.split()[0]) <= 1
    assert [body["input"] for body in server.requests] == [[PROBE], [text[:40]]] and server.requests[0]["model"] == "bge"


def test_a_text_is_not_sent_where_no_server_is_named_or_another_model_answers(corpus: Path, index_of_a_server: Path) -> None:
    def shorter(before: int, body: dict[str, Any]) -> Reply:
        return embeddings(body, lambda rows: [{**row, "embedding": row["embedding"][:2]} for row in rows])

    with pytest.raises(UserError, match="was made by bge of a server; give --endpoint with the server's URL, or --document"):
        find_neighbors(RunConfig(), index_of_a_server, corpora=[corpus], text="things")
    with serving(shorter) as server, pytest.raises(UserError, match="has vectors of 6 components, and bge now gives 2"):
        find_neighbors(RunConfig(embed=settings(server.url)), index_of_a_server, corpora=[corpus], text="things")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--document", "d1", "--endpoint", "http://localhost:1/v1"], "are for a text; leave them out, or give --text"),
        (["--document", "d1", "--model", "bge"], "are for a text; leave them out, or give --text"),
        (
            ["--text", "a", "--endpoint", "http://localhost:1/v1", "--model", "bge"],
            "which excludes --model; leave one of them out",
        ),
        (["--text", "a", "--key-variable", "KEY"], "--key-variable needs --endpoint"),
    ],
)
def test_options_of_a_query_that_have_no_effect_are_refused(options: list[str], problem: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["neighbors", str(tmp_path), "--corpus", str(tmp_path), *options])
    assert isinstance(result.exception, UserError) and problem in str(result.exception)


def test_command_embeds_by_a_server(corpus: Path, tmp_path: Path) -> None:
    with serving(whole) as server:
        words = ["embed", "small", f"embed.endpoint={server.url}", "embed.model=bge", "--corpus", str(corpus)]
        result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "vectors")])
    assert result.exit_code == 0, result.output
    assert Vectors(tmp_path / "vectors").dimension == DIMENSION
