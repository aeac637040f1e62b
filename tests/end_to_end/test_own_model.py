"""A tokenizer and a model made by other libraries: imported, tuned to a synthesizer, generating, exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from sbp_kernels import PackedLayout
from small_ops import check_errors
from tiny_training import QUIET, WORDS, configure, make_corpus, make_pairs, train_arm
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.tokenizer import SPECIAL_TOKENS
from sbp_fast.errors import UserError
from sbp_fast.model.saved import load_model
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.huggingface import export_hugging_face, import_hugging_face
from sbp_fast.stages.synthesize import synthesize

transformers = pytest.importorskip("transformers")
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
SIZE = 290
END_OF_TEXT = "<|endoftext|>"


def write_tokenizer(path: Path, words: tuple[str, ...] = WORDS) -> None:
    """Write a byte-level BPE of 289 tokens, as GPT-2 has it, and an added token that it puts before a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(words)] * 3, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    assert tokenizer.get_vocab_size() == SIZE
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    tokenizer.save(str(path))


def write_model(folder: Path, kind: str, rows: int, **changes: Any) -> Any:
    """Write a model of random weights with transformers, and a tokenizer beside it."""
    torch.manual_seed(0)
    settings = SHAPE | {"vocab_size": rows, "num_key_value_heads": 1, "max_position_embeddings": 192, **changes}
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # padding too, which must not be sampled
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json")
    return model


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens.unsqueeze(0), use_cache=False).logits[0]


@pytest.mark.parametrize(
    ("kind", "rows", "tied"), [("Qwen3", 384, True), ("Qwen3", 292, False), ("Llama", SIZE, False), ("Llama", SIZE - 1, True)]
)
def test_a_model_of_transformers_becomes_a_synthesizer_that_transformers_loads(
    kind: str, rows: int, tied: bool, tmp_path: Path
) -> None:
    theirs = write_model(tmp_path / "theirs", kind, rows, tie_word_embeddings=tied)
    import_hugging_face(tmp_path / "theirs", tmp_path / "base")
    corpus = make_corpus(tmp_path, f"corpus.tokenizer={tmp_path}/theirs/tokenizer.json")
    tokenizer = PreparedCorpus(corpus).tokenizer
    assert tokenizer.vocabulary_size == SIZE + 3
    known = min(rows, SIZE)

    export_hugging_face(tmp_path / "base", corpus / "tokenizer.json", tmp_path / "exported-base")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported-base").eval()
    tokens = torch.randint(0, known, (90,), generator=torch.Generator().manual_seed(1))
    assert exported.config.vocab_size == SIZE + 3
    states = [model.model(tokens.unsqueeze(0), use_cache=False).last_hidden_state for model in (exported, theirs)]
    assert torch.equal(*states)
    for (name, parameter), (_, other) in zip(exported.named_parameters(), theirs.named_parameters(), strict=True):
        kept = known if len(parameter) == SIZE + 3 else len(parameter)
        assert torch.equal(parameter[:kept], other[:kept]), name
    tables = {"embed_tokens.weight": exported.get_input_embeddings().weight, "lm_head.weight": exported.lm_head.weight}
    for name, table in tables.items():
        new = [tokenizer.vocabulary()[token] for token in SPECIAL_TOKENS] + [SIZE - 1] * (rows < SIZE)
        mean = table[:known].double().mean(0).float()
        assert all(torch.equal(table[id], mean) for id in new), name

    config = configure(
        tmp_path, f"corpus.tokenizer={tmp_path}/theirs/tokenizer.json", "synthesize={samples_per_seed=2, batch_documents=8}"
    )
    pairs = make_pairs(corpus, tmp_path / "pairs")
    train_arm(config, tmp_path / "tuned", "synthesizer", corpus=corpus, pairs=pairs, start=tmp_path / "base")
    synthesize(config, tmp_path / "synthetic", corpus=corpus, model=tmp_path / "tuned", console=QUIET)
    written = Corpus(tmp_path / "synthetic")
    assert len(written) and written.vocabulary_size == SIZE + 3

    export_hugging_face(tmp_path / "tuned", corpus / "tokenizer.json", tmp_path / "exported")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    ours, tokens = load_model(tmp_path / "tuned"), torch.from_numpy(written[0].astype("int64"))
    layout = PackedLayout.from_lengths([len(tokens)])
    with torch.no_grad():
        our_logits = ours.logits(ours(tokens, layout))
        exact = ours.double().logits(ours(tokens, layout))
    check_errors([logits(exported, tokens)], [our_logits], [exact])
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert text("the small cat").input_ids == [tokenizer.begin, *tokenizer.encode("the small cat")]


def test_a_shorter_context_is_the_imported_models_and_a_longer_one_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "Qwen3", 384)
    import_hugging_face(tmp_path / "theirs", tmp_path / "base", context=40)
    assert load_model(tmp_path / "base").config.context == 40
    with pytest.raises(UserError, match=r"positions, too few for a seed and a partner of 97 tokens each; set --context to 96"):
        import_hugging_face(tmp_path / "theirs", tmp_path / "long", context=97)


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        (384, ["91 rows of the embeddings left out, which no token has", "3 tokens that the model does not know begin as"]),
        (SIZE, ["3 tokens that the model does not know begin as the mean of the others: <|begin|>, <|end|>, <|partner|>"]),
        (SIZE - 1, ["4 tokens that the model does not know begin as the mean of the others: <|endoftext|>, <|begin|>"]),
    ],
)
def test_import_says_and_records_what_became_of_the_rows(
    rows: int, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "theirs", "Llama", rows)
    import_hugging_face(tmp_path / "theirs", tmp_path / "base", console=Console())
    output = capsys.readouterr().out
    assert all(line in output for line in lines), output
    manifest = Manifest.load(tmp_path / "base", "import")
    new = [END_OF_TEXT] * (rows < SIZE) + [*SPECIAL_TOKENS]
    assert manifest.counts["vocabulary"] == {"rows": rows, "tokens": SIZE + 3, "new": new}
    assert manifest.config == {"new_rows": "mean", "context": 96}


def test_an_imported_model_exported_and_imported_again_is_the_same(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "Qwen3", 384)
    import_hugging_face(tmp_path / "theirs", tmp_path / "base")
    export_hugging_face(tmp_path / "base", tmp_path / "base" / "tokenizer.json", tmp_path / "exported")
    import_hugging_face(tmp_path / "exported", tmp_path / "again")
    for name in ("weights.safetensors", "model.json"):
        assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert Manifest.load(tmp_path / "again").counts["vocabulary"]["new"] == []


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "Qwen3", 280)
    with pytest.raises(UserError, match=r"theirs: has 280 rows of embeddings, and its tokenizer.json 289 tokens; give the"):
        import_hugging_face(tmp_path / "theirs", tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_model_with_another_tokenizer_than_the_corpus_is_refused_with_the_way_out(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "Llama", SIZE)
    import_hugging_face(tmp_path / "theirs", tmp_path / "base")
    write_tokenizer(
        tmp_path / "other.json", ("quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "others", "sleep")
    )
    assert len(json.loads((tmp_path / "other.json").read_text())["model"]["vocab"]) == SIZE - 1  # as large as the model's
    corpus = make_corpus(tmp_path, f"corpus.tokenizer={tmp_path}/other.json")
    inputs = {"corpus": corpus, "pairs": make_pairs(corpus, tmp_path / "pairs"), "start": tmp_path / "base"}
    with pytest.raises(UserError, match=r"another tokenizer than the corpus.*corpus.tokenizer=.*/base/tokenizer.json"):
        train_arm(configure(tmp_path), tmp_path / "tuned", "synthesizer", **inputs)


def test_a_model_without_a_tokenizer_keeps_its_rows_and_is_refused_as_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "theirs", "Qwen3", 384)
    (tmp_path / "theirs" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    import_hugging_face(tmp_path / "theirs", tmp_path / "base", console=Console())
    assert "no tokenizer.json beside the model: it keeps its 384 rows" in capsys.readouterr().out
    corpus = make_corpus(tmp_path, f"corpus.tokenizer={tmp_path}/tokenizer.json")
    inputs = {"corpus": corpus, "pairs": make_pairs(corpus, tmp_path / "pairs"), "start": tmp_path / "base"}
    with pytest.raises(
        UserError, match=r"has a vocabulary of 384, the corpus's tokenizer 293; .* import one with its tokenizer"
    ):
        train_arm(configure(tmp_path), tmp_path / "tuned", "synthesizer", **inputs)
