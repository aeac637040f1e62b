"""Corpora that Megatron-LM and datatrove tokenised: their documents, and files that cannot be right."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from small_run import make_documents
from token_files import END, EXTRA, write_datatrove, write_megatron, write_tokenizer

from sbp_fast.cli import main
from sbp_fast.config import CorpusConfig, RunConfig
from sbp_fast.data import input_splits
from sbp_fast.data.documents import Document, read_file
from sbp_fast.data.input_files import find_files, fingerprint_sources, search_files
from sbp_fast.data.input_splits import split_files
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.readers import Fields, Record
from sbp_fast.errors import UserError
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.prepare import prepare

TEXTS = ["of the sea", "Zweite: äöü 𝄞.\n", f"a{EXTRA}b"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def tokenizer(files: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(files / "tokenizer.json"))


@pytest.fixture
def folder(files: Path, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes((files / "tokenizer.json").read_bytes())
    return tmp_path


def items(path: Path, tokenizer: Path, **settings: Any) -> list[Document | UserError]:
    config = CorpusConfig(path=str(path), tokenizer=str(tokenizer), **settings)
    return [item for file in find_files(config.path) for item in read_file(file, config)]


def texts(path: Path, **settings: Any) -> list[str]:
    """Return the texts of a file whose tokenizer lies beside it."""
    read = items(path, path.parent / "tokenizer.json", **settings)
    return [item.text if isinstance(item, Document) else str(item).replace(f"{path.parent}/", "") for item in read]


def write_both(folder: Path, documents: list[list[int]]) -> list[Path]:
    return [write_megatron(folder / "m", [[ids] for ids in documents]), write_datatrove(folder / "d.ds", documents)]


@pytest.mark.parametrize("letter", ["H", "h", "i", "q"])
def test_megatron_documents_of_several_sequences_give_their_texts(
    letter: str, folder: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    first, *others = (tokenizer.encode(text).ids for text in TEXTS)
    path = write_megatron(folder / "corpus_text_document", [[first[:2], first[2:]], *([ids] for ids in others)], letter)
    assert texts(path) == TEXTS
    assert [document.id for document in items(path, folder / "tokenizer.json") if isinstance(document, Document)] == [
        f"corpus_text_document.idx:{number}" for number in (1, 2, 3)
    ]


@pytest.mark.parametrize("letter", ["b", "B"])
def test_megatron_tokens_of_one_byte_are_read(letter: str, folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    assert texts(write_megatron(folder / "m", [[tokenizer.encode("abc").ids]], letter)) == ["abc"]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("metadata", ["", "gpt2\n30\n30 T", "tokenizer.json|{width}\n30\n30 T"])
def test_datatrove_documents_give_their_texts(width: int, metadata: str, folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    documents = [tokenizer.encode(text).ids for text in TEXTS]
    loss = [1] * sum(map(len, documents))
    path = write_datatrove(folder / "00000.ds", documents, width, loss=loss, metadata=metadata.format(width=width))
    assert texts(path) == TEXTS


def test_documents_that_megatron_wrote_give_their_texts(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="pip install --no-deps megatron-core")
    builder = megatron.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.uint16)
    for ids in (tokenizer.encode(text).ids for text in TEXTS):
        builder.add_document(np.array([*ids, tokenizer.token_to_id(END)]), [2, len(ids) - 1])
    builder.finalize(str(folder / "theirs.idx"))
    assert texts(folder / "theirs.idx") == TEXTS


def test_documents_that_datatrove_tokenised_give_their_texts(folder: Path) -> None:
    tokens = pytest.importorskip("datatrove.pipeline.tokens", reason="pip install datatrove")
    data = pytest.importorskip("datatrove.data")
    stage = tokens.DocumentTokenizer(str(folder), str(folder / "tokenizer.json"), eos_token=END, shuffle_documents=False)
    stage.run(data.Document(text=text, id=str(number)) for number, text in enumerate(TEXTS))
    (path,) = folder.glob("*.ds")
    assert texts(path) == TEXTS


@given(
    st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=3), max_size=5),
    st.booleans(),
)
def test_texts_of_any_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, files: Path, tokenizer: tokenizers.Tokenizer, parts: list[list[str]], ended: bool
) -> None:
    ids = [tokenizer.encode("".join(document)).ids + ended * [tokenizer.token_to_id(END)] for document in parts]
    ids = [document for document in ids if END not in tokenizer.decode(document[:-1], skip_special_tokens=False)]
    expected = [tokenizer.decode(document) for document in ids]
    folder = tmp_path_factory.mktemp("any")
    cuts = [[document[: len(document) // 2], document[len(document) // 2 :]] for document in ids]
    for path in (write_megatron(folder / "m", cuts, "i"), write_datatrove(folder / "d.ds", ids, 4)):
        if not ids:
            assert [str(item).partition(": ")[2] for item in items(path, files / "tokenizer.json")] == [
                "holds no documents; give a file with documents, or leave this one out"
            ]
            continue
        read = items(path, files / "tokenizer.json")
        assert [item.text for item in read if isinstance(item, Document)] == [text for text in expected if text.strip()]
        assert all(" a record with an empty text" in str(item) for item in read if isinstance(item, UserError))


def test_special_tokens_at_the_ends_are_left_out_and_in_the_middle_refused(
    folder: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    end, ids = tokenizer.token_to_id(END), tokenizer.encode("abc").ids
    for path in write_both(folder, [[end, *ids, end, end], ids, [*ids, end, *ids, end], [end]]):
        first, second, middle, empty = texts(path)
        assert (first, second) == ("abc", "abc")
        assert middle.startswith(f"{path.name}, document 3: its token 4 is {END}, a special one in the middle; leave it out")
        assert "document 4: a record with an empty text" in empty
        assert texts(path, lossy_tokenizer=True)[2] == middle


@pytest.mark.parametrize("token", [261, 65_535])
def test_a_token_outside_the_vocabulary_is_refused_though_losses_are_accepted(
    token: int, folder: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    for path in write_both(folder, [[*tokenizer.encode("ab").ids, token], tokenizer.encode("ok").ids]):
        refused, read = texts(path, lossy_tokenizer=True)
        assert f"{path.name}, document 1: its token 3, {token}, is not in the vocabulary; name the tokenizer" in refused
        assert read == "ok"


def test_a_negative_token_is_refused(folder: Path) -> None:
    (refused,) = texts(write_megatron(folder / "m", [[[5, -1]]], "i"))
    assert "document 1: its token 2, -1, is not in the vocabulary" in refused


def test_text_with_other_tokens_is_refused_or_counted(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    split = [id for part in ("of", " t", "he", " sea") for id in tokenizer.encode(part).ids]
    assert split != tokenizer.encode("of the sea").ids
    for path in write_both(folder, [split, tokenizer.encode("of the sea").ids]):
        refused, read = texts(path)
        assert "document 1: its text has other tokens; name the tokenizer that made it" in refused and read == "of the sea"
        accepted = items(path, folder / "tokenizer.json", lossy_tokenizer=True)
        assert [(item.text, item.recoded) for item in accepted if isinstance(item, Document)] == [
            ("of the sea", True),
            ("of the sea", False),
        ]


def test_a_document_with_tokens_without_loss_is_refused(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    ids = tokenizer.encode("ab").ids
    path = write_datatrove(folder / "d.ds", [ids, ids, ids], loss=[1, 1, 1, 0, 1, 1])
    first, masked, last = texts(path)
    assert (first, last) == ("ab", "ab")
    assert "d.ds, document 2: d.ds.loss says that some of its tokens have no loss; leave it out" in masked


def test_a_document_of_too_many_bytes_is_refused_unread(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    fields = Fields("text", "id", "source", 8, str(folder / "tokenizer.json"))
    for path in write_both(folder, [tokenizer.encode(text).ids for text in ("four", "fives", "ok")]):
        (file,) = find_files(str(path))
        whole, refused, last = file.reader.read(file, fields)
        assert isinstance(whole, Record) and isinstance(last, Record)
        assert (whole.values["text"], last.values["text"]) == ("four", "ok")
        assert f"{path.name}, document 2: a record of more than 0 MiB" in str(refused)


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return a function that changes the content of a file in a folder."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def put(position: int, content: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:position] + content + old[position + len(content) :]


SEQUENCES, POINTERS, DOCUMENTS = 34, 34 + 4 * 2, 34 + 12 * 2
MEGATRON_DAMAGES = {
    "no .bin": (lambda folder: (folder / "m.bin").unlink(), "m.idx: m.bin is missing beside it; give both files"),
    "no magic": (edit("m.idx", put(0, b"TNTIDX")), "m.idx: is no index of Megatron-LM; give the .idx of an indexed dataset"),
    "no header": (edit("m.idx", lambda old: old[:33]), "m.idx: is no index of Megatron-LM"),
    "version": (edit("m.idx", put(9, b"\2")), "m.idx: is of version 2; write the dataset with version 1"),
    "unknown code": (edit("m.idx", put(17, b"\x09")), "m.idx: has the unknown dtype code 9; known are 1 to 8"),
    "float": (edit("m.idx", put(17, b"\x07")), "m.idx: holds float32 numbers and no tokens"),
    "other code": (edit("m.idx", put(17, b"\4")), "m.idx: its sequences do not follow each other"),
    "cut .idx": (edit("m.idx", lambda old: old[:-1]), "m.idx: has 81 bytes, and its header tells of 82"),
    "modes": (edit("m.idx", lambda old: old + b"\0\1"), "m.idx: is multimodal; give a dataset of text alone"),
    "cut .bin": (edit("m.bin", lambda old: old[:-1]), "m.bin: has 9 bytes, and {}m.idx needs 10; copy or write"),
    "long .bin": (edit("m.bin", lambda old: old + b"\0\0"), "m.bin: has 12 bytes, and {}m.idx needs 10"),
    "length": (edit("m.idx", put(SEQUENCES, struct.pack("<i", -1))), "m.idx: its sequences do not follow each other"),
    "pointer": (edit("m.idx", put(POINTERS + 8, b"\5")), "m.idx: its sequences do not follow each other"),
    "first document": (edit("m.idx", put(DOCUMENTS, b"\1")), "m.idx: its documents do not divide its 2 sequences"),
    "falling documents": (edit("m.idx", put(DOCUMENTS + 8, b"\3")), "m.idx: its documents do not divide its 2 sequences"),
    "last document": (edit("m.idx", put(DOCUMENTS + 16, b"\1")), "m.idx: its documents do not divide its 2 sequences"),
}


@pytest.mark.parametrize("name", MEGATRON_DAMAGES)
def test_a_damaged_megatron_dataset_is_refused_by_name(name: str, folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    path = write_megatron(folder / "m", [[tokenizer.encode("abc").ids], [tokenizer.encode("de").ids]])
    damage, message = MEGATRON_DAMAGES[name]
    damage(folder)
    (refused,) = items(path, folder / "tokenizer.json")
    assert isinstance(refused, UserError) and str(refused).startswith(f"{folder}/{message.format(f'{folder}/')}")


DATATROVE_DAMAGES = {
    "no .index": (lambda folder: (folder / "d.ds.index").unlink(), "d.ds: d.ds.index is missing beside it; give both files"),
    "cut .index": (edit("d.ds.index", lambda old: old[:-1]), "d.ds.index: has 15 bytes, no multiple of 8"),
    "cut .ds": (edit("d.ds", lambda old: old[:-1]), "d.ds: has 9 bytes, neither 2 nor 4 for each of the 5 tokens of its index"),
    "falling ends": (edit("d.ds.index", put(0, b"\6")), "d.ds.index: its documents do not follow each other"),
    "huge end": (edit("d.ds.index", put(15, b"\xff")), "d.ds: has 10 bytes, neither 2 nor 4 for each of the 18374"),
    "other width": (
        lambda folder: (folder / "d.ds.metadata").write_text("gpt2|4\n5\n5 T"),
        "d.ds: has 2 bytes a token, and its metadata tell of 4",
    ),
    "cut loss": (lambda folder: (folder / "d.ds.loss").write_bytes(b"\1"), "d.ds.loss: has 1 bytes for 5 tokens"),
}


@pytest.mark.parametrize("name", DATATROVE_DAMAGES)
def test_a_damaged_file_of_datatrove_is_refused_by_name(name: str, folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    path = write_datatrove(folder / "d.ds", [tokenizer.encode("abc").ids, tokenizer.encode("de").ids])
    damage, message = DATATROVE_DAMAGES[name]
    damage(folder)
    (refused,) = items(path, folder / "tokenizer.json")
    assert isinstance(refused, UserError) and str(refused).startswith(f"{folder}/{message.format(f'{folder}/')}")


def test_tokens_without_a_tokenizer_are_refused_in_one_line_with_code_2(
    folder: Path, tokenizer: tokenizers.Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in write_both(folder, [tokenizer.encode("abc").ids]):
        monkeypatch.setattr(sys, "argv", ["sbp-fast", "prepare", "small", f"corpus.path={path}", "--out", str(folder / "out")])
        with pytest.raises(SystemExit) as caught:
            main()
        message = "holds tokens and no text; name the tokenizer.json that made them in corpus.tokenizer"
        assert caught.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_files_that_belong_to_others_are_neither_read_nor_left_out(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    write_both(folder, [tokenizer.encode("abc").ids])
    (folder / "d.ds.metadata").write_text("gpt2|2\n3\n3 T")
    (folder / "other.bin").write_bytes(b"")
    (folder / "tokenizer.json").unlink()
    found = search_files(str(folder))
    assert [Path(file.path).name for file in found.files] == ["d.ds", "m.idx"]
    assert found.left_out == {"files of a kind that cannot be read": ["other.bin"]}


@pytest.mark.parametrize("name", ["m.bin", "m.idx", "d.ds", "d.ds.index"])
def test_fingerprint_changes_with_each_file_of_a_dataset(name: str, folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    write_both(folder, [tokenizer.encode("abc").ids])
    before = fingerprint_sources(str(folder))
    (folder / name).write_bytes((folder / name).read_bytes() + b"\0")
    assert fingerprint_sources(str(folder)) != before


def test_size_of_a_dataset_is_that_of_its_files(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    for path in write_both(folder, [tokenizer.encode("abc").ids]):
        (file,) = find_files(str(path))
        assert file.stored_bytes() == 6 + (34 + 4 + 8 + 16 if path.suffix == ".idx" else 8)


def test_splits_have_the_documents_of_the_whole_file(
    folder: Path, tokenizer: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_splits, "SPLIT_BYTES", 64)
    documents = [tokenizer.encode(f"number {number}").ids for number in range(23)]
    for path in write_both(folder, documents):
        config = CorpusConfig(path=str(path), tokenizer=str(folder / "tokenizer.json"))
        (splits,) = split_files(find_files(str(path)), LOCAL, 1)
        assert len(splits) > 3
        read = [item for split in splits for item in read_file(split, config)]
        assert read == items(path, folder / "tokenizer.json")
        assert [item.text for item in read if isinstance(item, Document)] == [f"number {number}" for number in range(23)]


def test_prepared_corpus_has_the_tokens_of_the_files(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    words, end = make_documents(60).values(), tokenizer.token_to_id(END)
    documents = [tokenizer.encode(text).ids for text in words]
    split = [id for part in ("of", " t", "he") for id in tokenizer.encode(part).ids]
    write_megatron(folder / "a", [[ids[:7], [*ids[7:], end]] for ids in documents[:30]])
    write_datatrove(folder / "b.ds", [*documents[30:], split])
    settings = {"tokenizer": str(folder / "tokenizer.json"), "unique_share": 1.0, "lossy_tokenizer": True}
    paths = (str(folder / "a.idx"), str(folder / "b.ds"))
    config = RunConfig.model_validate({"corpus": {"path": paths, **settings}})
    prepare(config, folder / "out", console=Console(quiet=True))
    corpus = PreparedCorpus(folder / "out")
    written = {tuple(part[i][1:-1].tolist()) for part in (corpus.train, corpus.heldout) for i in range(len(part))}
    assert written == {*map(tuple, documents), tuple(tokenizer.encode("of the").ids)}
    assert np.array_equal(corpus.train[0][[0, -1]], [corpus.tokenizer.begin, corpus.tokenizer.end])
    assert Manifest.load(folder / "out", "prepare").counts["recoded"] == 1
