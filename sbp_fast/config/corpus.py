"""Where documents come from and how they become token shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from sbp_fast.config.section import NO_EFFECT, Count, CountOrZero, Name, Processes, Section, parse_count


class CorpusConfig(Section):
    """Where documents come from and how they become token shards."""

    path: Annotated[str | tuple[str, ...], NO_EFFECT] = "embedded:default"
    """Documents: files, globs, folders or fsspec URLs, of any suffix that `sbp_fast.data.readers` has a reader for. In folders
    and globs, names that begin with "." or "_", linked folders, and text files beside files of records are left out."""
    unique: Annotated[str | tuple[str, ...], NO_EFFECT] = ""
    """Documents that the baseline and SBP may read, in place of a random `unique_share`; the oracle may read these and those of
    `path` ("": `unique_share` of `path`). Needs `deduplicate = "none"`: a text may stand in both."""
    heldout: Annotated[str | tuple[str, ...], NO_EFFECT] = "auto"
    """Documents for evaluation only; "auto" takes those of the embedded corpus, or holds out `heldout_share` of all."""
    heldout_share: Annotated[float, Field(ge=0, lt=1)] = 0.04
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the held-out documents on which recipes and checkpoints are chosen, whole originals together; the others, the
    test documents, are scored by `evaluate` alone."""
    text_field: Name = "text"
    """Key (column) of the text, as of id and source; "doc.text" is the key `text` of the object under `doc`."""
    id_field: Name = "id"
    """Text or an integer. A record without it is named after its file and line."""
    source_field: Name = "source"
    """Name of a record's source, by which evaluation is grouped; a record without it belongs to the source "text"."""
    sources: tuple[str, ...] = ()
    """Read only the documents of these sources (none: all), and count the others."""
    group_separator: str = "auto"
    """Documents whose ids agree up to the last separator, such as "/", are parts of one original; `prepare` prints how many
    that joins. "" joins only the passages of a document; "auto" is "/" for the embedded corpus, "" for any other."""
    maximum_documents: CountOrZero = 0
    """Read at most this many documents, and at most as many of given held-out ones (0: all)."""
    passage_characters: CountOrZero = 0
    """Split longer documents at paragraph or sentence ends into passages of at most this many characters (0: never)."""
    deduplicate: Literal["none", "exact", "near"] = "exact"
    """Leave out exact duplicates; "near" also near-duplicates, which `near-duplicates.parquet` lists; "none" keeps all, even
    duplicates of held-out documents: for documents that are independent samples of a known distribution."""
    near_duplicate_similarity: Annotated[float, Field(ge=0.7, le=1)] = 0.8
    """Jaccard similarity of the 5-word shingles of two texts from which they are near-duplicates."""
    tokenizer: Annotated[Name, NO_EFFECT] = "train"
    """ "train" trains a byte-level BPE on the unique documents; else the path of a `tokenizer.json`."""
    lossy_tokenizer: bool = False
    """Accept a tokenizer from a file that does not give back every text; the manifest counts the losses in a sample."""
    vocabulary_size: Annotated[int, BeforeValidator(parse_count), Field(ge=260, le=1 << 31)] = 4096
    """Size of the trained vocabulary, special tokens included."""
    unique_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the documents that the baseline and SBP may read; the oracle may read all of them."""
    maximum_record_mib: Annotated[int, Field(ge=1, le=1 << 20)] = 256
    """A record of more than this many MiB cannot be used; that is noticed while it is read, before it fills the memory."""
    shard_tokens: Count = 16_777_216
    """Tokens of a shard: it ends with the document that reaches this number."""
    compression: Literal["none", "zstd"] = "none"
    """How tokens are stored: raw, to be memory-mapped, or in zstd frames that are unpacked when read."""
    on_error: Literal["stop", "skip"] = "stop"
    """A record that cannot be used stops `prepare`, or is skipped, counted and listed in `skipped.jsonl`."""
    workers: Annotated[Processes, NO_EFFECT] = 0
    """Processes that read and tokenize (0: as many as `threads`); the result does not depend on it."""
    encoder: Annotated[Literal["auto", "tokenizers", "gigatoken"], NO_EFFECT] = "auto"
    """Library that encodes; the ids are the same. "auto" takes gigatoken, many times faster, where it is installed
    (`sbp-fast[gigatoken]`), can load the tokenizer and agrees with `tokenizers` on a sample."""

    @model_validator(mode="after")
    def _text_is_no_name(self) -> CorpusConfig:
        if self.text_field in (self.id_field, self.source_field):
            raise ValueError(f'text_field = "{self.text_field}" is the field of the id or of the source too')
        return self

    @model_validator(mode="after")
    def _unique_documents_are_named_once(self) -> CorpusConfig:
        default = type(self).model_fields["unique_share"].default
        if self.unique and self.unique_share != default:
            raise ValueError(
                f"unique names the unique documents, and unique_share = {self.unique_share} another number of them"
            )
        if self.unique and self.deduplicate != "none":
            raise ValueError(f'unique needs deduplicate = "none", not "{self.deduplicate}"')
        return self
