"""Vectors and scores that are not finite, or have no length: refused where they enter, by the id of the document."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clustered import as_stage, unit_vectors
from paired_documents import DOCUMENTS, make_documents, make_vectors, run_pair, write_inputs

from sbp_fast.config import EmbedConfig, PairConfig
from sbp_fast.errors import UserError
from sbp_fast.neighbors.embedding import _refuse_others, make_shards
from sbp_fast.neighbors.encoder import SentenceEncoder
from sbp_fast.neighbors.kmeans import train_centroids
from sbp_fast.neighbors.vectors import Storage
from sbp_fast.pairs.criteria import ACCEPTED, REJECT_REASONS, reject_reasons
from sbp_fast.pairs.find import _check_recall

UNUSABLE = [np.full(6, np.nan), np.zeros(6), np.array([np.inf, 0, 0, 0, 0, 0])]
NAMES = ["nan", "zero", "infinite"]


@pytest.mark.parametrize("row", UNUSABLE, ids=NAMES)
def test_pair_with_one_unusable_vector_is_refused_by_its_document(tmp_path: Path, row: np.ndarray) -> None:
    vectors = make_vectors(0)
    vectors[0] = row
    texts, ids = make_documents(0)
    write_inputs(tmp_path, texts, ids, vectors)
    with pytest.raises(UserError, match=f"unique document {ids[0]}: its vector has the length"):
        run_pair(tmp_path, neighbors=DOCUMENTS)
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_zero_vector_in_any_storage_is_refused_when_it_is_read(tmp_path: Path, storage: Storage) -> None:
    matrix = unit_vectors(30, 6)
    matrix[21] = 0
    vectors = as_stage(matrix, tmp_path / "vectors", storage=storage)
    assert np.isfinite(vectors[np.arange(21)]).all()
    with pytest.raises(UserError, match="unique document 21: its vector has the length 0"):
        vectors[np.array([3, 21])]


@pytest.mark.parametrize("row", UNUSABLE, ids=NAMES)
def test_encoder_that_returns_an_unusable_vector_is_refused_by_the_document(row: np.ndarray) -> None:
    def encode(texts: list[str], **_: Any) -> np.ndarray:
        return np.stack([row if text == "bad" else np.eye(6)[0] for text in texts])

    encoder = object.__new__(SentenceEncoder)
    encoder.model, encoder.prompt, encoder.batch_documents, encoder.dimension = SimpleNamespace(encode=encode), "", 2, 6
    assert encoder.encode(["a", "b"]).shape == (2, 6)
    with pytest.raises(UserError, match="document x-3: its vector has the length"):
        encoder.encode(["a", "b", "c", "bad"], name=lambda number: f"document x-{number}")


def test_centroid_whose_members_add_up_to_zero_is_replaced() -> None:
    opposite = np.array([[1, 0], [-1, 0]], np.float32).repeat(4, axis=0)
    centroids = train_centroids(opposite, 1, seed=0, threads=1)
    assert np.linalg.norm(centroids, axis=1) == pytest.approx([1])


def test_thresholds_reject_what_is_not_a_number() -> None:
    nan, fine, none = np.float32([np.nan]), np.float32([0.5]), np.array([False])
    config = PairConfig()
    assert reject_reasons(fine, none, np.zeros(1), 0.4, config).tolist() == [ACCEPTED]
    assert reject_reasons(nan, none, np.zeros(1), 0.4, config).tolist() == [REJECT_REASONS.index("below_band")]
    assert reject_reasons(fine, none, np.zeros(1), float("nan"), config).tolist() == [REJECT_REASONS.index("below_band")]
    assert reject_reasons(fine, none, np.array([np.nan]), 0.4, config).tolist() == [REJECT_REASONS.index("near_duplicates")]
    with pytest.raises(UserError, match="of the pairs in the band were found"):
        _check_recall({"recall": float("nan"), "pairs": 0, "queries": 0}, 1, config)


def test_embed_with_a_shard_that_is_not_of_the_corpus_refuses_it(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, "unique", 10, EmbedConfig(shard_documents=4))
    for shard in shards:
        shard.vectors.touch()
    _refuse_others(tmp_path, shards)
    (tmp_path / "vectors-00099.npy").touch()
    with pytest.raises(UserError, match=r"vectors-00099\.npy: is none of the shards"):
        _refuse_others(tmp_path, shards)
