from pathlib import Path

import pytest
import torch
from sbp_kernels import PackedLayout
from tiny_training import QUIET

from sbp_fast.config import ModelConfig
from sbp_fast.corpus.tokenizer import Tokenizer, train_tokenizer
from sbp_fast.errors import UserError
from sbp_fast.files import read_json, write_json
from sbp_fast.model.huggingface import export_model, import_model
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.stage import run_stage

CONFIG = ModelConfig(layers=2, width=24, heads=4, key_value_heads=2, head_width=16, feed_forward_width=40, context=64)
LAYOUT = PackedLayout.from_lengths([128])


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["the cat sees the dog and the dog sees the tree"] * 3, 270).save(path)
    return path


def make_saved(out: Path, vocabulary_size: int, **changes: object) -> Path:
    model = Transformer(CONFIG.model_copy(update=changes), vocabulary_size)
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():  # gains of one would hide a norm left out or put elsewhere
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    run_stage("train", out, config={}, inputs={}, body=lambda work: save_model(model, work.directory), console=QUIET)
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same_logits_and_import_gives_the_same_weights(
    tied: bool, tokenizer_json: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(tokenizer_json)
    saved = make_saved(tmp_path / "saved", tokenizer.vocabulary_size, tied_embeddings=tied, rope_base=5e4, norm_epsilon=1e-5)
    export_model(saved, tokenizer_json, tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ours = load_model(saved)
    tokens = torch.randint(0, tokenizer.vocabulary_size, (128,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = theirs(tokens.unsqueeze(0)).logits[0]
        mine = ours.logits(ours(tokens, LAYOUT))
        exact = ours.double().logits(ours(tokens, LAYOUT))
    assert isinstance(theirs, transformers.Qwen3ForCausalLM) and theirs.config.max_position_embeddings == 128
    assert (found - exact).norm() <= 2 * (mine - exact).norm()
    assert (mine - exact).norm() <= 2 * (found - exact).norm()

    import_model(tmp_path / "exported", tmp_path / "imported")
    for name in ("weights.safetensors", "model.json"):
        assert (tmp_path / "imported" / name).read_bytes() == (saved / name).read_bytes()

    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported("the dog").input_ids == [tokenizer.begin, *tokenizer.encode("the dog")]
    assert (exported.bos_token_id, exported.eos_token_id) == (tokenizer.begin, tokenizer.end)


def test_models_that_are_not_ours_are_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    saved = make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size)
    export_model(saved, tokenizer_json, tmp_path / "exported")
    facts = read_json(tmp_path / "exported" / "config.json")
    for changes, message in [
        ({"model_type": "llama"}, "model_type = llama is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = yarn is not supported"),
        ({"num_hidden_layers": 3}, "holds no tensor 'model.layers.2"),
        ({"num_hidden_layers": 1}, r"layers\.1.*the model has no tensor of that name"),
        ({"vocab_size": 400}, r"embed_tokens\.weight: the model has \(400, 24\)"),
    ]:
        write_json(tmp_path / "exported" / "config.json", {**facts, **changes})
        with pytest.raises(UserError, match=message):
            import_model(tmp_path / "exported", tmp_path / f"imported-{message[:9]}", force=True)
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        import_model(tmp_path, tmp_path / "imported")


def test_a_directory_without_a_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no saved model"):
        load_model(tmp_path)
    saved = make_saved(tmp_path / "saved", 270)
    facts = read_json(saved / "model.json")
    write_json(saved / "model.json", {**facts, "vocabulary_size": 271})
    with pytest.raises(UserError, match=r"embed_tokens\.weight: the model has \(271, 24\), the file \(270, 24\)"):
        load_model(saved)
    (saved / "weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"weights\.safetensors: cannot be read"):
        load_model(saved)
    (saved / "model.json").write_text("{}")
    with pytest.raises(UserError, match="is not a model's description"):
        load_model(saved)
