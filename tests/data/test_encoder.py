"""The encoders of `prepare`: against a stand-in for gigatoken, and against the real one where it is installed."""

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.config import CorpusConfig, RunConfig
from sbp_fast.data import encoder as encoders
from sbp_fast.data import round_trip
from sbp_fast.data.encoder import (
    ODD_CHARACTERS,
    ODD_TEXTS,
    GigatokenEncoder,
    IdsDiffer,
    TokenizersEncoder,
    choose_encoder,
    make_encoder,
)
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from sbp_fast.errors import UserError
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.prepare import prepare

TEXTS = [f"Letter {i}, part {i % 4}:\nDear reader {i * i}, we don't <|end|> ..." for i in range(200)]
TRAINED = train_tokenizer(TEXTS, 400)
QUIET = Console(quiet=True)
MARKED = next(text for text in ODD_TEXTS if "\u0323" in text)
NEEDS_GIGATOKEN = pytest.mark.skipif(
    find_spec("gigatoken") is None, reason="gigatoken is not installed: pip install 'sbp-fast[gigatoken]'"
)
Spoil = Callable[[str, list[int]], list[int]]


class StandIn(ModuleType):
    """What is used of gigatoken: `spoil` may change the ids of a text, `refusal` is what loading raises."""

    def __init__(self, spoil: Spoil = lambda text, ids: ids, refusal: str = "") -> None:
        super().__init__("gigatoken")
        self.__spec__ = ModuleSpec("gigatoken", None)
        self.spoil, self.refusal, self.loaded = spoil, refusal, 0
        self.Tokenizer = SimpleNamespace(from_json=self.load)

    def load(self, content: str) -> Any:
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.loaded += 1
        inner = tokenizers.Tokenizer.from_str(content)

        def encode_batch(texts: list[str], *, parallel: bool) -> list[list[int]]:
            assert not parallel
            return [self.spoil(text, inner.encode(text).ids) for text in texts]

        return SimpleNamespace(encode_batch=encode_batch)


def install(patch: pytest.MonkeyPatch, module: StandIn) -> StandIn:
    awkward = ModuleType("awkward")
    awkward.__dict__.update(
        from_arrow=lambda texts: texts.to_pylist(),
        flatten=lambda rows: [id for ids in rows for id in ids],
        num=lambda rows: [len(ids) for ids in rows],
    )
    patch.setitem(sys.modules, "gigatoken", module)
    patch.setitem(sys.modules, "awkward", awkward)
    real = encoders.version
    patch.setattr(encoders, "version", lambda name: "0.0" if name == "gigatoken" else real(name))
    return module


def uninstall(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "gigatoken", None)


def wrong_for(part: str) -> Spoil:
    return lambda text, ids: [*ids[:-1], ids[-1] + 1] if part in text else ids


def configure(directory: Path, encoder: str, **corpus: Any) -> RunConfig:
    path = directory / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(TEXTS)))
    settings = {"path": str(path), "vocabulary_size": 300, "unique_share": 0.25, "encoder": encoder, **corpus}
    return RunConfig(corpus=CorpusConfig(**settings))


def chunks(texts: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts[:1], pa.large_string()), pa.array(texts[1:], pa.large_string())])


def standard(reason: str = "") -> tuple[str, str]:
    return "tokenizers", f"tokenizers {tokenizers.__version__}" + (f": gigatoken {reason}" if reason else "")


def test_auto_takes_gigatoken_where_it_is_installed_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch)
    assert choose_encoder("auto", TRAINED, TEXTS) == standard()
    install(monkeypatch, StandIn())
    for asked in ("auto", "gigatoken"):
        assert choose_encoder(asked, TRAINED, TEXTS) == ("gigatoken", "gigatoken 0.0")
    assert choose_encoder("tokenizers", TRAINED, TEXTS) == standard()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (StandIn(refusal="Unsupported\n\nLocation: a line"), "cannot load this tokenizer: Unsupported"),
        (StandIn(wrong_for("\u0323")), f"gives other ids than tokenizers for {MARKED!r}"),
        (StandIn(wrong_for("<|begin|>")), "gives other ids than tokenizers for '<|begin|>'"),
        (StandIn(wrong_for("reader 361,")), f"gives other ids than tokenizers for {TEXTS[19]!r}"),
        (StandIn(lambda text, ids: [] if text == "" else ids[1:]), "gives other ids than tokenizers for ' '"),
    ],
)
def test_an_unusable_gigatoken_is_described_by_auto_and_refused_when_asked_for(
    module: StandIn, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, module)
    assert choose_encoder("auto", TRAINED, TEXTS) == standard(reason)
    with pytest.raises(UserError) as caught:
        choose_encoder("gigatoken", TRAINED, TEXTS)
    assert str(caught.value) == f'corpus.encoder: gigatoken {reason}; set it to "tokenizers"'


def test_a_broken_gigatoken_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn())
    monkeypatch.setitem(sys.modules, "awkward", None)
    assert "gigatoken cannot be imported: " in choose_encoder("auto", TRAINED, TEXTS)[1]


def test_choose_encoder_reads_no_more_texts_than_checked_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn())
    monkeypatch.setattr(round_trip, "CHECKED_BYTES", 100)
    texts = iter(["x" * 60, "é" * 20, "y", "z"])
    choose_encoder("gigatoken", TRAINED, texts)
    assert list(texts) == ["z"]


def test_odd_characters_are_of_every_plane() -> None:
    assert len(set(ODD_CHARACTERS)) == len(ODD_CHARACTERS) and not [c for c in ODD_CHARACTERS if 0xD800 <= c < 0xE000]
    assert {c >> 16 for c in ODD_CHARACTERS} == set(range(17))


def test_both_encoders_give_the_ids_of_each_text(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn())
    texts = [*TEXTS[:5], "", *SPECIAL_TOKENS]
    for name in ("tokenizers", "gigatoken"):
        encoder = make_encoder(name, TRAINED)
        assert isinstance(encoder, TokenizersEncoder if name == "tokenizers" else GigatokenEncoder)
        tokens, lengths = encoder.encode(chunks(texts), np.arange(len(texts), dtype=np.uint64))
        assert (tokens.dtype, lengths.dtype) == (np.uint32, np.int64)
        assert [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])] == [TRAINED.encode(text) for text in texts]


def test_the_hashes_select_the_documents_that_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn(wrong_for("two")))
    encoder = GigatokenEncoder(TRAINED)
    encoder.encode(chunks(["one", "two", "three"]), np.array([0, 1, 1000], np.uint64))
    with pytest.raises(IdsDiffer, match="for 'two'"):
        encoder.encode(chunks(["one", "two", "three"]), np.array([1, 5000, 0], np.uint64))


def test_gigatoken_is_reloaded_after_renewed_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(monkeypatch, StandIn())
    monkeypatch.setattr(encoders, "RENEWED_BYTES", 1000)
    encoder = GigatokenEncoder(TRAINED)
    found = [encoder.encode(chunks(["word " * 60] * 2), np.ones(2, np.uint64))[0].tolist() for _ in range(5)]
    assert module.loaded == 3 and all(ids == found[0] for ids in found)


def test_the_encoder_is_recorded_and_changes_no_byte_of_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(configure(tmp_path, "tokenizers"), tmp_path / "first", console=QUIET)
    install(monkeypatch, StandIn())
    second = prepare(configure(tmp_path, "auto"), tmp_path / "second", console=Console())
    assert "tokenizing with gigatoken 0.0" in capsys.readouterr().out
    assert (first.files, first.fingerprint) == (second.files, second.fingerprint)
    assert (first.counts.pop("encoder"), second.counts.pop("encoder")) == (standard()[1], "gigatoken 0.0")
    assert first.counts == second.counts
    assert prepare(configure(tmp_path, "gigatoken"), tmp_path / "first", console=QUIET).fingerprint == first.fingerprint


def test_a_missing_gigatoken_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch)
    with pytest.raises(UserError) as caught:
        prepare(configure(tmp_path, "gigatoken"), tmp_path / "out", console=QUIET)
    assert caught.value.where == "corpus.encoder" and "sbp-fast[gigatoken]" in caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_ids_that_differ_while_tokenizing_leave_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_trip, "CHECKED_BYTES", 0)
    monkeypatch.setattr(encoders, "SAMPLED", 1)
    monkeypatch.setattr("sbp_fast.data.preparation.SMALL_PARTITION_BYTES", 2000)
    settings = {"shard_tokens": 1000, "workers": 1}
    expected = prepare(configure(tmp_path, "tokenizers", **settings), tmp_path / "expected", console=QUIET)
    corpus = PreparedCorpus(tmp_path / "expected")
    last = corpus.text(corpus.train, len(corpus.train) - 1)  # in the last part, when the others are written
    install(monkeypatch, StandIn(wrong_for(last)))
    with pytest.raises(IdsDiffer, match=last.partition(",")[0]):
        prepare(configure(tmp_path, "auto", **settings), tmp_path / "out", console=QUIET)
    left = {path.name for path in (tmp_path / "out.partial").rglob("*")}
    assert "scratch" in left and not [name for name in left if name.startswith(("partition-", "tokens-", "train"))]
    again = prepare(configure(tmp_path, "tokenizers", **settings), tmp_path / "out", console=QUIET)
    assert again.files == expected.files


@NEEDS_GIGATOKEN
def test_auto_takes_gigatoken_for_a_trained_tokenizer() -> None:
    name, said = choose_encoder("gigatoken", TRAINED, TEXTS)
    assert name == "gigatoken" and said.startswith("gigatoken ")


@NEEDS_GIGATOKEN
@given(texts=st.lists(st.one_of(st.text(), st.sampled_from([*SPECIAL_TOKENS, *TEXTS])), min_size=1, max_size=4))
def test_gigatoken_gives_the_ids_of_tokenizers(texts: list[str]) -> None:
    hashes = np.zeros(len(texts), np.uint64)
    expected = TokenizersEncoder(TRAINED).encode(chunks(texts), hashes)
    found = GigatokenEncoder(TRAINED).encode(chunks(texts), hashes)
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    assert not {TRAINED.begin, TRAINED.end, TRAINED.partner} & set(found[0].tolist())


@NEEDS_GIGATOKEN
def test_a_tokenizer_that_gigatoken_cannot_load_is_refused() -> None:
    other = tokenizers.Tokenizer.from_str(TRAINED.to_json())
    other.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="gigatoken cannot load this tokenizer: "):
        choose_encoder("gigatoken", Tokenizer(other.to_str()), TEXTS)


@NEEDS_GIGATOKEN
def test_gigatoken_and_tokenizers_write_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_fast.data.preparation.SMALL_PARTITION_BYTES", 2000)
    first, second = (
        prepare(configure(tmp_path, encoder, workers=2), tmp_path / encoder, console=QUIET)
        for encoder in ("tokenizers", "gigatoken")
    )
    assert first.files == second.files and second.counts["encoder"].startswith("gigatoken ")
