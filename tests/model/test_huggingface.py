import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import change_weights, make_saved
from sbp_kernels import PackedLayout
from small_ops import check_errors

from sbp_fast.data.tokenizer import Tokenizer, train_tokenizer
from sbp_fast.errors import UserError
from sbp_fast.model import huggingface
from sbp_fast.model.huggingface import from_hugging_face_config
from sbp_fast.model.saved import load_model
from sbp_fast.pipeline.files import read_json, write_json
from sbp_fast.stages.huggingface import export_hugging_face, import_hugging_face


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["the cat sees the dog and the dog sees the tree"] * 3, 270).save(path)
    return path


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 8000], ids=["whole", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "LlamaForCausalLM"])
def test_transformers_computes_the_same_logits_and_import_gives_the_same_weights(
    kind: str, tied: bool, shard_bytes: int, tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(huggingface, "SHARD_BYTES", shard_bytes)
    tokenizer = Tokenizer(tokenizer_json)
    changes = {"tied_embeddings": tied, "qk_norm": kind.startswith("Qwen3"), "rope_theta": 5e4, "norm_eps": 1e-5}
    saved = make_saved(tmp_path / "saved", tokenizer.vocabulary_size, **changes)
    export_hugging_face(saved, tokenizer_json, tmp_path / "exported")
    files = sorted((tmp_path / "exported").glob("*.safetensors"))
    assert (len(files) > 2) == (tmp_path / "exported" / "model.safetensors.index.json").exists() == (shard_bytes == 8000)
    if shard_bytes == 8000:  # of the tensors, only the tables of the vocabulary are larger
        assert sum(file.stat().st_size > 1.2 * shard_bytes for file in files) == (1 if tied else 2)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(theirs).__name__ == kind and theirs.config.max_position_embeddings == 64
    ours = load_model(saved)
    tokens = torch.randint(0, tokenizer.vocabulary_size, (128,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layout in (PackedLayout.from_lengths([128]), PackedLayout.from_lengths([40, 1, 60, 27])):
            their_logits = theirs(
                tokens.unsqueeze(0), position_ids=layout.positions.long().unsqueeze(0), use_cache=False
            ).logits[0]
            our_logits = ours.float().logits(ours(tokens, layout))
            exact = ours.double().logits(ours(tokens, layout))
            check_errors([our_logits], [their_logits], [exact])
            check_errors([their_logits], [our_logits], [exact])  # else a wrong export would allow any error

    import_hugging_face(tmp_path / "exported", tmp_path / "imported")
    for name in ("weights.safetensors", "model.json"):
        assert (tmp_path / "imported" / name).read_bytes() == (saved / name).read_bytes()

    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported("the dog").input_ids == [tokenizer.begin, *tokenizer.encode("the dog")]
    assert (exported.bos_token_id, exported.eos_token_id) == (tokenizer.begin, tokenizer.end)


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_a_model_made_by_transformers_comes_back_the_same(kind: str, tokenizer_json: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 6}
    vocabulary_size = Tokenizer(tokenizer_json).vocabulary_size
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**shape, vocab_size=vocabulary_size, num_key_value_heads=2)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    import_hugging_face(tmp_path / "theirs", tmp_path / "imported")
    export_hugging_face(tmp_path / "imported", tokenizer_json, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(exported[name], weight.float()) for name, weight in theirs.state_dict().items())


def test_missing_keys_of_an_old_config_mean_what_they_mean_to_transformers(tokenizer_json: Path, tmp_path: Path) -> None:
    changes = {"qk_norm": False, "head_dim": 6, "kv_heads": 4}
    saved = make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size, **changes)
    export_hugging_face(saved, tokenizer_json, tmp_path / "exported")
    config = read_json(tmp_path / "exported" / "config.json")
    for key in ("head_dim", "num_key_value_heads", "rope_theta", "rope_parameters", "rms_norm_eps", "mlp_bias"):
        del config[key]
    write_json(tmp_path / "exported" / "config.json", {**config, "rope_scaling": None})
    weights = load_file(tmp_path / "exported" / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(weights, tmp_path / "exported" / "model.safetensors")
    import_hugging_face(tmp_path / "exported", tmp_path / "imported")
    assert load_model(tmp_path / "imported").config == load_model(saved).config
    assert (tmp_path / "imported" / "weights.safetensors").read_bytes() == (saved / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type = mistral is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True, "model_type": "llama"}, "mlp_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .*sliding_attention.* is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = yarn is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supp"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = linear is not supported"),
        ({"num_key_value_heads": 3}, "heads = 4 is no multiple of kv_heads = 3"),
        ({"num_hidden_layers": 3}, "holds no tensor 'model.layers.2"),
        ({"num_hidden_layers": 1}, r"layers\.1.*the model has no tensor of that name"),
        ({"vocab_size": 400}, r"embed_tokens\.weight: the model has \(400, 24\)"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            r"k_norm\.weight: the model has no tensor of that name",
        ),
        ({"model_type": ["qwen3"]}, r"model_type = \['qwen3'\] is not supported"),
        ({"model_type": "llama"}, r"architectures = \['Qwen3ForCausalLM'\] is not supported"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers = 2 differs from the number of layer_types"),
        ({"layer_types": 5}, "layer_types = 5 is not supported"),
        ({"rope_theta": 5e4}, r"rope_theta is 10000\.0 in rope_parameters and 50000\.0 in rope_theta"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is 'default' in rope_parameters and 'linear' in rope_scaling",
        ),
        ({"rope_scaling": {"rope_theta": 5e4}}, r"rope_theta is 10000\.0 in rope_parameters and 50000\.0 in rope_scaling"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "default", "rope_type": "linear"}},
            "rope_type is 'default' in rope_scaling and 'linear' in rope_scaling",
        ),
        ({"rope_scaling": [2]}, r"rope_scaling = \[2\] is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"hidden_size": "24"}, "hidden_size = '24' is no number from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 is no number from 1"),
        ({"max_position_embeddings": None}, "max_position_embeddings = None is no number from 1"),
        ({"vocab_size": True}, "vocab_size = True is no number from 1"),
        ({"sbp_context": 0}, "sbp_context = 0 is no number from 1"),
        ({"rms_norm_eps": "small"}, "norm_eps: Input should be a valid number"),
    ],
)
def test_unsupported_model_is_refused_with_the_reason(
    changes: dict[str, object], message: str, tokenizer_json: Path, tmp_path: Path
) -> None:
    saved = make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size)
    export_hugging_face(saved, tokenizer_json, tmp_path / "exported")
    config = read_json(tmp_path / "exported" / "config.json")
    write_json(tmp_path / "exported" / "config.json", {**config, **changes})
    with pytest.raises(UserError, match=message):
        import_hugging_face(tmp_path / "exported", tmp_path / "imported")


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads"])
def test_a_missing_key_of_a_qwen3_config_means_the_default_of_transformers(key: str) -> None:
    transformers = pytest.importorskip("transformers")
    content = {
        "model_type": "qwen3",
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 16,
        "intermediate_size": 40,
        "max_position_embeddings": 128,
        "vocab_size": 270,
    }
    del content[key]
    theirs = transformers.Qwen3Config(**content)
    ours = from_hugging_face_config(content, Path("config.json"))[0]
    assert (ours.head_dim, ours.kv_heads) == (theirs.head_dim, theirs.num_key_value_heads)


def test_a_tied_model_with_another_lm_head_is_refused_and_with_its_embeddings_imported(
    tokenizer_json: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    export_hugging_face(make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size), tokenizer_json, exported)
    embeddings = load_file(exported / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(exported, lm_head__weight=embeddings.clone())
    import_hugging_face(exported, tmp_path / "imported")
    different = embeddings.clone()
    different[0, 0] += 1
    change_weights(exported, lm_head__weight=different)
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        import_hugging_face(exported, tmp_path / "refused")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((24,), float("nan")), r"norm\.weight holds values that are not finite"),
        (torch.full((24,), 1e300, dtype=torch.float64), r"norm\.weight holds values that are not finite in float32"),
        (torch.ones(24, dtype=torch.int8), r"model\.norm\.weight is of type int8; give weights that are not quantised"),
        (torch.ones(24).to(torch.float8_e4m3fn), r"model\.norm\.weight is of type float8_e4m3fn"),
        (torch.tensor(1.0), r"norm\.weight: the model has \(24,\), the file \(\)"),
    ],
    ids=["nan", "beyond float32", "int8", "float8", "scalar"],
)
def test_weights_that_mean_nothing_are_refused_by_name(
    tensor: torch.Tensor, message: str, tokenizer_json: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    export_hugging_face(make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size), tokenizer_json, exported)
    change_weights(exported, model__norm__weight=tensor)
    with pytest.raises(UserError, match=message):
        import_hugging_face(exported, tmp_path / "imported")


def test_parts_of_a_fused_projection_whose_sizes_only_add_up_are_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    export_hugging_face(make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size), tokenizer_json, exported)
    parts = {
        "model__layers__0__mlp__gate_proj__weight": torch.zeros(41, 24),
        "model__layers__0__mlp__up_proj__weight": torch.zeros(39, 24),
    }
    change_weights(exported, **parts)
    with pytest.raises(UserError, match=r"gate_proj\.weight: the model has \(40, 24\), the file \(41, 24\)"):
        import_hugging_face(exported, tmp_path / "imported")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../stray.safetensors", r"'\.\./stray\.safetensors', not a safetensors file of this directory"),
        ("/stray.safetensors", r"'/stray\.safetensors', not a safetensors file of this directory"),
        ("..", r"'\.\.', not a safetensors file of this directory"),
        (7, "7, not a safetensors file of this directory"),
        ("other.safetensors", r"names other\.safetensors, which is not there"),
    ],
)
def test_an_index_that_names_no_file_of_its_directory_is_refused(
    name: object, message: str, tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 8000)
    exported, index = tmp_path / "exported", tmp_path / "exported" / "model.safetensors.index.json"
    export_hugging_face(make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size), tokenizer_json, exported)
    content = read_json(index)
    tensor, file = next(iter(content["weight_map"].items()))
    shutil.copy(exported / file, tmp_path / "stray.safetensors")
    content["weight_map"][tensor] = name
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        import_hugging_face(exported, tmp_path / "imported")


def test_an_index_that_contradicts_its_files_is_refused(
    tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 8000)
    exported, index = tmp_path / "exported", tmp_path / "exported" / "model.safetensors.index.json"
    export_hugging_face(make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size), tokenizer_json, exported)
    whole = read_json(index)

    def refused(content: object, message: str) -> None:
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            import_hugging_face(exported, tmp_path / "imported")

    refused({"weight_map": ["model.safetensors"]}, "has no weight_map")
    refused({}, "has no weight_map")
    files = sorted(set(whole["weight_map"].values()))
    elsewhere = {name: files[0] if name == "model.norm.weight" else file for name, file in whole["weight_map"].items()}
    assert elsewhere != whole["weight_map"]
    refused({"weight_map": elsewhere}, r"model\.norm\.weight is not both there and in model\.safetensors\.index\.json")
    index.write_text(json.dumps(whole))
    other = exported / next(file for file in files if file != whole["weight_map"]["model.norm.weight"])
    content = load_file(other)
    save_file({**content, "model.norm.weight": torch.ones(24)}, other)
    with pytest.raises(UserError, match=rf"{other.name}: model\.norm\.weight is not both there and in"):
        import_hugging_face(exported, tmp_path / "imported")
    save_file(content, other)
    save_file({"model.norm.weight": torch.ones(24)}, exported / "model.safetensors")
    with pytest.raises(UserError, match=r"holds model\.safetensors and an index of other files"):
        import_hugging_face(exported, tmp_path / "imported")


def test_a_hugging_face_directory_that_is_not_whole_is_refused(
    tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 8000)
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        import_hugging_face(tmp_path, tmp_path / "imported")
    exported = tmp_path / "exported"
    export_hugging_face(make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size), tokenizer_json, exported)
    first = min(exported.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{first.name}: cannot be read"):
        import_hugging_face(exported, tmp_path / "imported")
    first.unlink()
    with pytest.raises(UserError, match=f"names {first.name}, which is not there"):
        import_hugging_face(exported, tmp_path / "imported")
    (exported / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        import_hugging_face(exported, tmp_path / "imported")


def test_a_model_that_transformers_would_refuse_to_load_is_not_exported(tokenizer_json: Path, tmp_path: Path) -> None:
    changes = {"qk_norm": False, "hidden_size": 26}
    saved = make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size, **changes)
    with pytest.raises(UserError, match="hidden_size 26 is no multiple of its 4 heads"):
        export_hugging_face(saved, tokenizer_json, tmp_path / "exported")


def test_a_directory_without_a_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no saved model"):
        load_model(tmp_path)
    saved = make_saved(tmp_path / "saved", 270)
    config = read_json(saved / "model.json")
    write_json(saved / "model.json", {**config, "vocabulary_size": 271})
    with pytest.raises(UserError, match=r"embed_tokens\.weight: the model has \(271, 24\), the file \(270, 24\)"):
        load_model(saved)
    (saved / "weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"weights\.safetensors: cannot be read"):
        load_model(saved)
    (saved / "model.json").write_text("{}")
    with pytest.raises(UserError, match="is not a model's description"):
        load_model(saved)
