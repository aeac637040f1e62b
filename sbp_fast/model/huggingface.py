"""To and from a Hugging Face directory: the weights are a Qwen3ForCausalLM's, so no custom code is needed to load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sbp_fast.config import ModelConfig
from sbp_fast.corpus.tokenizer import BEGIN, END, Tokenizer
from sbp_fast.errors import UserError
from sbp_fast.files import atomic_open, atomic_path, hash_file, read_json, write_json
from sbp_fast.model.saved import fill, load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.progress import Console
from sbp_fast.stage import Work, run_stage

QUIET = Console(quiet=True)
SUPPORTED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}


def export_model(model_directory: Path, tokenizer_json: Path, out: Path, *, force: bool = False) -> None:
    """Write a saved model as a Hugging Face Qwen3 directory, with its tokenizer.

    The tokenizer puts <|begin|> before a text, as every document began in training.

    Raises:
        UserError: no saved model, no tokenizer, or an `out` that holds something else (unless `force`).
    """
    model, tokenizer = load_model(model_directory), Tokenizer(tokenizer_json)

    def body(work: Work) -> None:
        with atomic_path(work.directory / "model.safetensors") as temporary:
            save_file(to_qwen3(model), temporary, metadata={"format": "pt"})
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
        write_json(work.directory / "config.json", {**qwen3_config(model.config, model.vocabulary_size), **ids})

    inputs: dict[str, Path | str] = {"model": Path(model_directory), "tokenizer": hash_file(tokenizer_json)}
    run_stage("export", out, config={}, inputs=inputs, body=body, console=QUIET, force=force)


def import_model(hf_directory: Path, out: Path, *, force: bool = False) -> None:
    """Turn a Hugging Face Qwen3 directory into a saved model, in float32; its `tokenizer.json` goes on being the tokenizer.

    Raises:
        UserError: no such directory, another architecture, or weights that do not fit the configuration.
    """
    path = Path(hf_directory) / "config.json"
    try:
        facts = read_json(path)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read: {error}", "give a Hugging Face model's directory on this machine") from None
    config, vocabulary_size = from_qwen3_config(facts, path)
    files = sorted(Path(hf_directory).glob("model*.safetensors"))
    if not files:
        raise UserError(hf_directory, "holds no model*.safetensors", "download the model's safetensors files too")

    def body(work: Work) -> None:
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        model = Transformer(config, vocabulary_size)
        fill(model, from_qwen3(weights, config, where=Path(hf_directory)), where=Path(hf_directory))
        save_model(model, work.directory)

    inputs: dict[str, Path | str] = {file.name: hash_file(file) for file in [path, *files]}
    run_stage("import", out, config={}, inputs=inputs, body=body, console=QUIET, force=force)


def qwen3_config(config: ModelConfig, vocabulary_size: int) -> dict[str, Any]:
    """`config.json`; the rotary base stands there twice, for transformers 5 and for what came before it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": 2 * config.context,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": "float32",
        "dtype": "float32",
        **SUPPORTED,
    }


def from_qwen3_config(facts: dict[str, Any], where: Path) -> tuple[ModelConfig, int]:
    """The configuration and the vocabulary size of a Qwen3 model, refused where this project's model cannot be it."""
    rope = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    odd = [f"{key} = {facts[key]}" for key, value in SUPPORTED.items() if facts.get(key, value) != value]
    if rope.get("rope_type", "default") != "default":
        odd.append(f"rope_type = {rope['rope_type']}")
    if facts.get("model_type") != "qwen3" or odd:
        found = ", ".join([f"model_type = {facts.get('model_type')}", *odd])
        raise UserError(where, f"{found} is not supported", "give a dense Qwen3 model with plain rotary positions")
    try:
        config = ModelConfig(
            layers=facts["num_hidden_layers"],
            width=facts["hidden_size"],
            heads=facts["num_attention_heads"],
            key_value_heads=facts["num_key_value_heads"],
            head_width=facts["head_dim"],
            feed_forward_width=facts["intermediate_size"],
            rope_base=rope["rope_theta"] if "rope_theta" in rope else facts["rope_theta"],
            norm_epsilon=facts["rms_norm_eps"],
            tied_embeddings=facts.get("tie_word_embeddings", False),
            context=facts["max_position_embeddings"] // 2,
        )
        return config, facts["vocab_size"]
    except KeyError as error:
        raise UserError(where, f"lacks {error}", "give the config.json of a Qwen3 model") from None


def to_qwen3(model: Transformer) -> dict[str, Tensor]:
    """The weights under their Qwen3 names, fused projections taken apart."""
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


def from_qwen3(weights: dict[str, Tensor], config: ModelConfig, where: Path) -> dict[str, Tensor]:
    """The reverse of `to_qwen3`, in float32."""
    if config.tied_embeddings:
        weights.pop("lm_head.weight", None)
    found: dict[str, Tensor] = {}
    with torch.device("meta"):
        names = [name for name, _ in Transformer(config, 1).named_parameters()]
    try:
        for name in names:
            full = _full_name(name)
            if name.endswith(tuple(FUSED)):
                fused, parts = _parts(name, config)
                found[name] = torch.cat([weights.pop(full.replace(fused, part)) for part, _ in parts]).float()
            else:
                found[name] = weights.pop(full).float()
    except KeyError as error:
        raise UserError(where, f"holds no tensor {error}", "give all safetensors files of a Qwen3 model") from None
    return found | weights  # what is left over is for `fill` to complain about


FUSED = ("qkv_proj.weight", "gate_up_proj.weight")


def _parts(name: str, config: ModelConfig) -> tuple[str, list[tuple[str, int]]]:
    """The name of a fused projection, and names and rows of what it was made of."""
    if name.endswith("qkv_proj.weight"):
        rows, key_value_rows = config.heads * config.head_width, config.key_value_heads * config.head_width
        return "qkv_proj", [("q_proj", rows), ("k_proj", key_value_rows), ("v_proj", key_value_rows)]
    return "gate_up_proj", [("gate_proj", config.feed_forward_width), ("up_proj", config.feed_forward_width)]


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
