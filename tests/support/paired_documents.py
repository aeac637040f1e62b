"""Documents with given vectors, the stage `pair` over them, and the pairs that its definition gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import EmbedConfig, RunConfig
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.data.tokenizer import train_tokenizer
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage
from sbp_fast.stages.pair import pair

QUIET = Console(quiet=True)
DOCUMENTS, BEGIN, END, VOCABULARY = 60, 0, 1, 300
WORDS = "the quick brown fox jumps over the lazy dog and runs away from the large brown bear at the end of the day"
UNCAPPED: dict[str, Any] = {"neighbors": DOCUMENTS, "partners_per_seed": DOCUMENTS, "seeds_per_partner": DOCUMENTS}


def make_documents(seed: int) -> tuple[list[list[int]], list[str]]:
    """Random token strings, three parts to an original; some are spliced from another, some are (near-)duplicates."""
    random = np.random.default_rng(seed)
    texts = [random.integers(3, VOCABULARY, random.integers(2, 60)).tolist() for _ in range(DOCUMENTS)]
    for number in range(3, DOCUMENTS, 2):
        texts[number][5:] = texts[number - 3][: random.integers(0, 40)]
    texts[30], texts[41] = texts[7], texts[7]
    texts[24] = random.integers(3, VOCABULARY, 40).tolist()
    texts[50], texts[57] = [*texts[24], VOCABULARY - 1], texts[24][1:]
    return texts, [f"letter-{number // 3}/{number % 3}" for number in range(DOCUMENTS)]


def make_vectors(seed: int, documents: int = DOCUMENTS) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((documents, 6)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_inputs(directory: Path, texts: list[list[int]], ids: list[str], vectors: np.ndarray) -> tuple[Path, Path]:
    """What `prepare` and `embed` would have written."""

    def write_corpus(context: StageContext) -> None:
        train_tokenizer([WORDS], VOCABULARY).save(context.directory / "tokenizer.json")
        for part in ("train", "heldout"):
            writer = CorpusWriter(context.directory / part, VOCABULARY)
            for tokens, id in zip(texts, ids, strict=True):
                writer.add([BEGIN, *tokens, END], id=id, source="letters", text_bytes=1)
            writer.close()
        context.record(unique_documents=len(texts), embedded=False, sources={"letters": len(texts)})

    def write_vectors(context: StageContext) -> None:
        np.save(context.directory / "vectors-00000.npy", vectors[:20])
        np.save(context.directory / "vectors-00001.npy", vectors[20:])
        (context.directory / "heldout").mkdir()
        np.save(context.directory / "heldout/vectors-00000.npy", vectors)  # they are the same documents

    corpus, out = directory / "corpus", directory / "vectors"
    config = {"corpus": {"group_separator": "/"}}
    run_stage("prepare", corpus, config=config, inputs={}, body=write_corpus, console=QUIET)
    embed = {"embed": EmbedConfig().model_dump(mode="json")}
    run_stage("embed", out, config=embed, inputs={"corpus": corpus}, body=write_vectors, console=QUIET)
    return corpus, out


def run_pair(directory: Path, out: str = "pairs", **settings: Any) -> tuple[PairSet, dict[str, Any]]:
    config = RunConfig.model_validate({"threads": 1, "pair": {"shingle_tokens": 4, "recall_queries": DOCUMENTS, **settings}})
    manifest = pair(config, directory / "corpus", directory / "vectors", directory / out, console=QUIET)
    return PairSet(directory / out), manifest.counts


def shingles(tokens: list[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)} if len(tokens) >= 4 else {tuple(tokens)}


def representatives(texts: list[list[int]], share: float = 0.8) -> list[int]:
    """Documents that neither equal an earlier one nor are near-duplicates of an earlier representative."""
    representative_rows: list[int] = []
    for row, tokens in enumerate(texts):
        if texts.index(tokens) == row:
            compared = ((shingles(tokens), shingles(texts[other])) for other in representative_rows)
            if all(len(mine & theirs) < share * max(len(mine), len(theirs)) for mine, theirs in compared):
                representative_rows.append(row)
    return representative_rows


def qualifying(texts: list[list[int]], ids: list[str], vectors: np.ndarray, low: float, high: float, limit: float) -> set:
    """The ordered pairs that qualify, by the definition alone."""
    firsts = representatives(texts)
    pairs = set()
    for a in firsts:
        for b in firsts:
            mine, theirs = shingles(texts[a]), shingles(texts[b])
            near_duplicate = len(mine & theirs) >= limit * min(len(mine), len(theirs))
            if a != b and low <= vectors[a] @ vectors[b] <= high and not near_duplicate:
                pairs |= {(a, b)} if ids[a].split("/")[0] != ids[b].split("/")[0] else set()
    return pairs


def as_set(pairs: PairSet) -> set[tuple[int, int]]:
    return set(zip(pairs.seeds.tolist(), pairs.partners.tolist(), strict=True))
