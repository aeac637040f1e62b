"""The files of a world, as any user of `prepare` and `pair` would bring them: documents, known pairs and a tokenizer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from sbp_fast.config import RunConfig
from sbp_fast.data.tokenizer import TOKENIZER
from sbp_fast.lab.worlds import GENRES, Documents, World, WorldSettings
from sbp_fast.pipeline.files import atomic_open, dump_json, read_json, write_json

UNIQUE, OTHERS, HELDOUT, PAIRS = "unique.jsonl", "others.jsonl", "heldout.jsonl", "pairs.jsonl"
WORLD = "world.json"


def write_world(world: World, directory: Path) -> None:
    """Write a world: documents, pairs that tell the same facts, a tokenizer with one token a word, and the settings."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = {UNIQUE: world.unique, OTHERS: world.others, HELDOUT: world.heldout}
    pairs = []
    for name, documents in parts.items():
        ids = document_ids(documents, name.removesuffix(".jsonl"))
        texts = world.texts(documents)
        sources = [GENRES[genre] for genre in documents.genres.tolist()]
        rows = zip(ids, sources, texts, strict=True)
        _write_lines(directory / name, [{"id": id, "source": source, "text": text} for id, source, text in rows])
        if name != OTHERS:
            pairs += [{"seed": ids[seed], "partner": ids[partner]} for seed, partner in world.related_pairs(documents).tolist()]
    _write_lines(directory / PAIRS, pairs)
    with atomic_open(directory / TOKENIZER) as file:
        file.write(word_tokenizer(world.vocabulary).encode())
    write_json(directory / WORLD, asdict(world.settings))


def load_world(config: RunConfig) -> World | None:
    """Return the world whose documents a configuration reads; None if they are of no world."""
    unique = config.corpus.unique
    path = Path(unique).parent / WORLD if unique and isinstance(unique, str) else None
    return World(WorldSettings(**read_json(path))) if path is not None and path.is_file() else None


def corpus_settings(directory: Path) -> dict[str, Any]:
    """Return the settings of `[corpus]` and `[pair]` that read a written world."""
    corpus = {"unique": UNIQUE, "path": OTHERS, "heldout": HELDOUT, "tokenizer": TOKENIZER}
    return {
        "corpus": {name: str(directory / file) for name, file in corpus.items()}
        | {"deduplicate": "none", "group_separator": "/", "lossy_tokenizer": True},  # a world has no text but its own words
        "pair": {"file": str(directory / PAIRS)},
    }


def document_ids(documents: Documents, part: str) -> list[str]:
    """Return an id for each document, which names its concept, its genre and the part that it belongs to: "17/B1-unique-40"."""
    columns = zip(documents.concepts.tolist(), documents.genres.tolist(), strict=True)
    return [f"{concept}/{GENRES[genre]}-{part}-{number}" for number, (concept, genre) in enumerate(columns)]


def parse_id(id: str) -> tuple[int, int]:
    """Return the concept and the genre of a document, by its id."""
    concept, _, rest = id.partition("/")
    return int(concept), GENRES.index(rest.split("-")[0])


def word_tokenizer(words: list[str]) -> str:
    """Return the content of a `tokenizer.json` in which each of the words is a token; texts separate them by single spaces."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer.to_str(pretty=True)


def _write_lines(path: Path, records: list[dict[str, str]]) -> None:
    with atomic_open(path) as file:
        file.writelines((dump_json(record, path) + "\n").encode() for record in records)
