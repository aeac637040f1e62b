"""To and from a Hugging Face directory, which loads with no custom code.

The weights are those of a Qwen3ForCausalLM or, without norms of queries and keys, of a LlamaForCausalLM.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from sbp_fast.config import ModelConfig
from sbp_fast.data.tokenizer import BEGIN, END, Tokenizer
from sbp_fast.errors import UserError
from sbp_fast.model.saved import fill, load_model, read_weights, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.files import atomic_open, atomic_path, hash_file, read_json, write_json
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import Work, run_stage

QUIET = Console(quiet=True)
SHARD_BYTES = 5 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
SUPPORTED: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
}


def export_model(model_directory: Path, tokenizer_json: Path, out: Path, *, force: bool = False) -> None:
    """Write a saved model as a Hugging Face directory of Qwen3 or Llama, with its tokenizer.

    The tokenizer puts <|begin|> before a text, as every document began in training.

    Raises:
        UserError: no saved model, or one that Llama cannot be; no tokenizer; an `out` that holds something else (unless
            `force`).
    """
    model, tokenizer = load_model(model_directory), Tokenizer(tokenizer_json)
    facts = hugging_face_config(model.config, model.vocabulary_size, where=model_directory)

    def body(work: Work) -> None:
        write_shards(to_hugging_face(model), work.directory)
        with atomic_open(work.directory / "tokenizer.json") as file:
            file.write(with_begin(tokenizer).encode())
        tokens = {"bos_token": BEGIN, "eos_token": END, "pad_token": END}
        write_json(
            work.directory / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": 2 * model.config.context,
                "clean_up_tokenization_spaces": False,
                **tokens,
            },
        )
        ids = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
        write_json(work.directory / "generation_config.json", {**ids, "do_sample": True, "temperature": 1.0})
        write_json(work.directory / "config.json", {**facts, **ids})

    inputs: dict[str, Path | str] = {"model": Path(model_directory), "tokenizer": hash_file(tokenizer_json)}
    run_stage("export", out, config={}, inputs=inputs, body=body, console=QUIET, force=force)


def import_model(hf_directory: Path, out: Path, *, force: bool = False) -> None:
    """Turn a Hugging Face directory of Qwen3 or Llama into a saved model, in float32.

    Its `tokenizer.json` goes on being the tokenizer.

    Raises:
        UserError: no such directory, another architecture, or weights that do not fit the configuration.
    """
    directory = Path(hf_directory)
    path = directory / "config.json"
    config, vocabulary_size = from_hugging_face_config(_read(path), path)
    files = weight_files(directory)

    def body(work: Work) -> None:
        weights = {name: tensor for file in files for name, tensor in read_weights(file).items()}
        with torch.device("meta"):
            model = Transformer(config, vocabulary_size)
        fill(model.to_empty(device="cpu"), from_hugging_face(weights, model, where=directory), where=directory)
        save_model(model, work.directory)

    inputs: dict[str, Path | str] = {file.name: hash_file(file) for file in [path, *files]}
    run_stage("import", out, config={}, inputs=inputs, body=body, console=QUIET, force=force)


def write_shards(weights: dict[str, Tensor], directory: Path) -> None:
    """One safetensors file, or several of at most SHARD_BYTES (a larger tensor has its own) and then their index."""
    split = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD_BYTES)
    for name, tensors in split.filename_to_tensors.items():
        with atomic_path(directory / name) as temporary:
            save_file({tensor: weights[tensor] for tensor in tensors}, temporary, metadata={"format": "pt"})
    if split.is_sharded:
        write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory: one, or those that its index names.

    Raises:
        UserError: neither is there, or a file that the index names is not.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        raise UserError(directory, f"holds neither {SINGLE} nor {INDEX}", "download the model's safetensors files too")
    weight_map = _read(directory / INDEX).get("weight_map", {})
    files = [directory / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(directory / INDEX, f"names {missing[0]}, which is not there", "download all of its files")
    return files


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read: {error}", "give a Hugging Face model's directory on this machine") from None


def hugging_face_config(config: ModelConfig, vocabulary_size: int, where: Path) -> dict[str, Any]:
    """`config.json`; the rotary base stands there twice, for transformers 5 and for what came before it.

    Raises:
        UserError: a Llama whose width is no multiple of its heads, which transformers refuses to load.
    """
    kind = "qwen3" if config.qk_norm else "llama"
    if kind == "llama" and config.hidden_size % config.heads:
        problem = (
            f"is a Llama (qk_norm = false) whose hidden_size {config.hidden_size} is no multiple of its {config.heads} heads"
        )
        raise UserError(where, f"{problem}, which transformers refuses to load", "train with another hidden_size or heads")
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": 2 * config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": "float32",
        "dtype": "float32",
        **SUPPORTED[kind],
    }


def from_hugging_face_config(facts: dict[str, Any], where: Path) -> tuple[ModelConfig, int]:
    """The configuration and the vocabulary size of a Qwen3 or Llama model; what is left out means what transformers takes.

    Raises:
        UserError: what this project's model cannot be, by name and value.
    """
    kind, rope = facts.get("model_type"), facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    if kind not in SUPPORTED or (odd := _unsupported(facts, rope)):
        found = f"model_type = {kind}" if kind not in SUPPORTED else ", ".join(odd)
        raise UserError(where, f"{found} is not supported", "give a dense Qwen3 or Llama model with plain rotary positions")
    try:
        heads, hidden_size = facts["num_attention_heads"], facts["hidden_size"]
        config = ModelConfig(
            layers=facts["num_hidden_layers"],
            hidden_size=hidden_size,
            heads=heads,
            kv_heads=facts.get("num_key_value_heads") or heads,
            head_dim=facts.get("head_dim") or hidden_size // heads,
            intermediate_size=facts["intermediate_size"],
            rope_theta=rope.get("rope_theta", facts.get("rope_theta", 10_000.0)),
            norm_eps=facts.get("rms_norm_eps", 1e-6),
            tied_embeddings=facts.get("tie_word_embeddings", False),
            qk_norm=kind == "qwen3",
            context=facts["max_position_embeddings"] // 2,
        )
        return config, facts["vocab_size"]
    except KeyError as error:
        raise UserError(where, f"lacks {error}", "give the config.json of a Qwen3 or Llama model") from None
    except ValidationError as error:
        what = "; ".join(problem["msg"] for problem in error.errors())
        raise UserError(where, what, "give the config.json of a Qwen3 or Llama model") from None


def _unsupported(facts: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    """What `config.json` has that this project's model has not, as "key = value"."""
    plain = SUPPORTED[facts["model_type"]] | {"partial_rotary_factor": 1.0, "quantization_config": None}
    odd = {key: facts[key] for key, value in plain.items() if facts.get(key, value) != value}
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
        odd["rope_type"] = rope_type
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        odd["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if set(facts.get("layer_types") or ()) - {"full_attention"}:
        odd["layer_types"] = facts["layer_types"]
    return [f"{key} = {value}" for key, value in odd.items()]


def to_hugging_face(model: Transformer) -> dict[str, Tensor]:
    """The weights under their Hugging Face names, fused projections taken apart."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value, full = parameter.detach(), _full_name(name)
        if name.endswith(tuple(FUSED)):
            fused, parts = _parts(name, model.config)
            pieces = value.split([rows for _, rows in parts])
            weights |= {full.replace(fused, part): piece.clone() for (part, _), piece in zip(parts, pieces, strict=True)}
        else:
            weights[full] = value.contiguous()
    return weights


def from_hugging_face(weights: dict[str, Tensor], model: Transformer, where: Path) -> dict[str, Tensor]:
    """The reverse of `to_hugging_face` for `model`, in float32; takes what it uses out of `weights`.

    Raises:
        UserError: naming a tensor that is missing.
    """
    if model.config.tied_embeddings:
        weights.pop("lm_head.weight", None)
    found: dict[str, Tensor] = {}
    try:
        for name, _ in model.named_parameters():
            full = _full_name(name)
            if name.endswith(tuple(FUSED)):
                fused, parts = _parts(name, model.config)
                found[name] = torch.cat([weights.pop(full.replace(fused, part)) for part, _ in parts]).float()
            else:
                found[name] = weights.pop(full).float()
    except KeyError as error:
        raise UserError(where, f"holds no tensor {error}", "give all safetensors files of the model") from None
    # old Llama files hold the rotary frequencies; what else is left over is for `fill` to complain about
    return found | {name: tensor for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}


FUSED = ("qkv_proj.weight", "gate_up_proj.weight")


def _parts(name: str, config: ModelConfig) -> tuple[str, list[tuple[str, int]]]:
    """The name of a fused projection, and names and rows of what it was made of."""
    if name.endswith("qkv_proj.weight"):
        rows, key_value_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
        return "qkv_proj", [("q_proj", rows), ("k_proj", key_value_rows), ("v_proj", key_value_rows)]
    return "gate_up_proj", [("gate_proj", config.intermediate_size), ("up_proj", config.intermediate_size)]


def _full_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def with_begin(tokenizer: Tokenizer) -> str:
    """`tokenizer.json` of a tokenizer that puts the begin token first."""
    content = json.loads(tokenizer.to_json())
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [tokenizer.begin], "tokens": [BEGIN]}},
    }
    return json.dumps(content, ensure_ascii=False, indent=2)
