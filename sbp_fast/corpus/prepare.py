"""The prepare stage: raw documents -> a tokenizer, globally shuffled token shards, and held-out documents set apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from sbp_fast.config import CorpusConfig, RunConfig
from sbp_fast.corpus.documents import EMBEDDED, Document, fingerprint_sources, group_of, read_documents
from sbp_fast.corpus.passages import cut_passages
from sbp_fast.corpus.shards import Corpus, CorpusWriter
from sbp_fast.corpus.tokenizer import Tokenizer, train_tokenizer
from sbp_fast.errors import UserError
from sbp_fast.files import hash_file
from sbp_fast.progress import Console
from sbp_fast.stage import Manifest, Work, run_stage

MINIMUM_UNIQUE = 16
MINIMUM_HELDOUT = 8
BATCH_DOCUMENTS = 512
PATHS = {"path", "heldout", "tokenizer"}  # what lies there is an input; where it lies does not matter


def prepare(config: RunConfig, out: Path, *, console: Console, force: bool = False) -> Manifest:
    """Write `out`/train, `out`/heldout (each a `Corpus`) and `out`/tokenizer.json; open them with `PreparedCorpus`.

    Raises:
        UserError: input that cannot be used (see `read_documents`), too few documents, and what `run_stage` refuses.
    """
    corpus = config.corpus
    heldout = heldout_path(corpus)
    inputs = {"documents": fingerprint_sources(corpus.path)}
    if heldout is not None:
        inputs["heldout"] = fingerprint_sources(heldout)
    if corpus.tokenizer != "train":
        Tokenizer(corpus.tokenizer)
        inputs["tokenizer"] = hash_file(Path(corpus.tokenizer))
    settings = {"seed": config.seed, "embedded": is_embedded(corpus), "corpus": corpus.model_dump(mode="json", exclude=PATHS)}

    def body(work: Work) -> None:
        _prepare(config, heldout, work)

    return run_stage("prepare", out, config=settings, inputs=inputs, body=body, console=console, force=force)


def is_embedded(corpus: CorpusConfig) -> bool:
    """Whether the documents are the ones that come with the package."""
    return isinstance(corpus.path, str) and corpus.path.startswith(EMBEDDED)


def heldout_path(corpus: CorpusConfig) -> str | tuple[str, ...] | None:
    """Where the held-out documents are read from; None if they are to be set apart from the others."""
    if corpus.heldout != "auto":
        return corpus.heldout
    return f"{corpus.path}_heldout" if is_embedded(corpus) else None


def _prepare(config: RunConfig, heldout_from: str | tuple[str, ...] | None, work: Work) -> None:
    corpus, console = config.corpus, work.console
    documents, heldout = _select(config, heldout_from, work)
    unique = math.ceil(Fraction(str(corpus.unique_share)) * len(documents))
    if unique < MINIMUM_UNIQUE:
        raise UserError(
            "corpus",
            f"{len(documents)} documents x corpus.unique_share {corpus.unique_share} leaves {unique}, too few to work with",
            f"give at least {MINIMUM_UNIQUE} unique documents: more input, a larger corpus.unique_share or, for few long "
            "documents, corpus.passage_characters",
        )
    documents = [documents[i] for i in np.random.default_rng(config.seed).permutation(len(documents))]

    tokenizer = _tokenizer(corpus, documents[:unique], console)
    tokenizer.save(work.directory / "tokenizer.json")
    train = _write(documents, work.directory / "train", tokenizer, corpus, console)
    held = _write(heldout, work.directory / "heldout", tokenizer, corpus, console)
    text_bytes = int(train.text_bytes.sum())
    work.record(
        documents=len(train),
        tokens=train.tokens,
        text_bytes=text_bytes,
        unique_documents=unique,
        unique_tokens=train.prefix(unique).tokens,
        heldout_documents=len(held),
        heldout_tokens=held.tokens,
        vocabulary_size=tokenizer.vocabulary_size,
        bytes_per_token=text_bytes / (train.tokens - 2 * len(train)),
        sources=dict(sorted(Counter(document.source for document in documents).items())),
        embedded=is_embedded(corpus),
    )


def _select(config: RunConfig, heldout_from: str | tuple[str, ...] | None, work: Work) -> tuple[list[Document], list[Document]]:
    """Read, set apart, cut and free of copies: the documents to train on and the held-out ones."""
    corpus, console = config.corpus, work.console
    console.say(f"reading {corpus.path if isinstance(corpus.path, str) else ', '.join(corpus.path)}")
    documents = list(islice(read_documents(corpus), corpus.maximum_documents or None))
    if heldout_from is None:
        documents, heldout = set_apart(documents, corpus, config.seed)
        console.say(f"{len(heldout)} documents set apart for evaluation")
    else:
        heldout = list(read_documents(corpus, heldout_from))
    documents, passages = cut_long(documents, corpus)
    heldout, heldout_passages = cut_long(heldout, corpus)

    heldout, single = drop_copies(heldout), drop_copies(documents)
    kept = drop_copies(single, heldout)
    copies, heldout_copies = len(documents) - len(single), len(single) - len(kept)
    if copies or heldout_copies:
        console.say(f"dropped {copies} exact copies and {heldout_copies} documents that are held out as well")
    work.record(passages_cut=passages + heldout_passages, copies_dropped=copies, heldout_copies_dropped=heldout_copies)
    return kept, heldout


def set_apart(documents: list[Document], corpus: CorpusConfig, seed: int) -> tuple[list[Document], list[Document]]:
    """Split into the documents to train on and `heldout_share` of them for evaluation, whole originals together.

    Originals are drawn in the order of a keyed hash of their names; one too large for what is still wanted is passed over.

    Raises:
        UserError: if the originals are too few or too large for that.
    """
    sources = {document.source for document in documents}
    groups = [group_of(document.id, corpus.group_separator, sources) for document in documents]
    sizes = Counter(groups)
    wanted = max(MINIMUM_HELDOUT, round(corpus.heldout_share * len(documents)))
    chosen: set[str] = set()
    held = 0
    for group in sorted(sizes, key=lambda name: (xxhash.xxh3_64_intdigest(name.encode(), seed), name)):
        if held + sizes[group] <= wanted:
            chosen.add(group)
            held += sizes[group]
    if held < min(MINIMUM_HELDOUT, len(documents)):
        raise UserError(
            "corpus",
            f"its {len(documents)} documents belong to {len(sizes)} originals, too large to set {wanted} documents apart",
            'name held-out documents in corpus.heldout, or set corpus.group_separator="" if ids do not name originals',
        )
    kept = [document for document, group in zip(documents, groups, strict=True) if group not in chosen]
    return kept, [document for document, group in zip(documents, groups, strict=True) if group in chosen]


def cut_long(documents: Iterable[Document], corpus: CorpusConfig) -> tuple[list[Document], int]:
    """Cut documents longer than `passage_characters` into passages, which share a group; also the number of passages made."""
    limit, separator = corpus.passage_characters, corpus.group_separator or "/"
    result: list[Document] = []
    made = 0
    for document in documents:
        if not limit or len(document.text) <= limit:
            result.append(document)
            continue
        for number, passage in enumerate(cut_passages(document.text, limit)):
            result.append(replace(document, id=f"{document.id}{separator}{number:04d}", text=passage))
            made += 1
    return result, made


def drop_copies(documents: list[Document], others: Iterable[Document] = ()) -> list[Document]:
    """`documents` without those whose text is exactly that of an earlier one, or of one of `others`."""
    seen = {_hash(document) for document in others}
    kept = []
    for document in documents:
        if (digest := _hash(document)) not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


def _hash(document: Document) -> bytes:
    return xxhash.xxh3_128_digest(document.text.encode())


def _tokenizer(corpus: CorpusConfig, unique: list[Document], console: Console) -> Tokenizer:
    if corpus.tokenizer != "train":
        return Tokenizer(corpus.tokenizer)
    # on the unique documents alone: the arms may not learn from the others, not even which words are common
    console.say(f"training a tokenizer of {corpus.vocabulary_size} tokens on {len(unique)} documents")
    return train_tokenizer((document.text for document in unique), corpus.vocabulary_size)


def _write(documents: list[Document], directory: Path, tokenizer: Tokenizer, corpus: CorpusConfig, console: Console) -> Corpus:
    writer = CorpusWriter(directory, tokenizer.vocabulary_size, corpus.shard_tokens)
    with console.task(f"tokenizing {directory.name}", len(documents), "documents") as task:
        for start in range(0, len(documents), BATCH_DOCUMENTS):
            batch = documents[start : start + BATCH_DOCUMENTS]
            for document, ids in zip(batch, tokenizer.encode_batch([one.text for one in batch]), strict=True):
                tokens = [tokenizer.begin, *ids, tokenizer.end]
                writer.add(tokens, id=document.id, source=document.source, text_bytes=len(document.text.encode()))
            task.advance(len(batch))
    return writer.close()
