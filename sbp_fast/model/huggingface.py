"""Conversion of models to and from a Hugging Face directory, which transformers and vLLM load with no custom code.

The weights are those of a Qwen3ForCausalLM or, for a model without norms of queries and keys, of a LlamaForCausalLM.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from sbp_fast.config import ModelConfig
from sbp_fast.data.tokenizer import Tokenizer
from sbp_fast.errors import UserError
from sbp_fast.model.exported_tokenizer import write_tokenizer
from sbp_fast.model.saved import fill, load_model, read_weights
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.files import atomic_path, parse_json, write_json

SHARD_BYTES = 5 * 10**9
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CONTEXT = "sbp_context"
"""Key of an exported config.json: `ModelConfig.context`, of which a synthesizer has twice as many positions."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULTS: dict[str, dict[str, Any]] = {"qwen3": {"num_key_value_heads": 32, "head_dim": 128}, "llama": {}}
"""What transformers takes for a missing key where that does not follow from the other keys."""
REMEDY = "give the config.json of a Qwen3 or Llama model"
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
SUPPORTED: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
}


def export_model(model_directory: Path, tokenizer_json: Path, directory: Path) -> None:
    """Write a saved synthesizer as a Hugging Face directory of Qwen3 or Llama, with its tokenizer, in float32.

    Raises:
        UserError: no saved model, a model that transformers could not load, or no tokenizer.
    """
    model = load_model(model_directory)
    tokenizer, positions = Tokenizer(tokenizer_json), 2 * model.config.context
    write_hugging_face(model, tokenizer, directory, positions=positions, where=model_directory)


def write_hugging_face(
    model: Transformer, tokenizer: Tokenizer, directory: Path, *, positions: int, dtype: str = "float32", where: Path
) -> None:
    """Write the weights, the configuration and the tokenizer of a model into `directory`; config.json comes last.

    Args:
        model: the model, not sharded.
        tokenizer: the tokenizer of its training corpus.
        directory: created where it does not exist.
        positions: longest chain of positions that the model was trained on.
        dtype: of the weights, a key of DTYPES.
        where: names the model in messages.

    Raises:
        UserError: a model that transformers could not load, or a weight that is not finite in `dtype`.
    """
    config = hugging_face_config(model.config, model.vocabulary_size, positions=positions, dtype=dtype, where=where)
    weights = convert_dtype(to_hugging_face(model), dtype)
    directory.mkdir(exist_ok=True)
    write_shards(weights, directory)
    write_tokenizer(tokenizer, directory, positions)
    ids = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
    write_json(directory / "generation_config.json", {**ids, "do_sample": True, "temperature": 1.0})
    write_json(directory / CONFIG, {**config, **ids})


def convert_dtype(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Return the weights in a dtype of DTYPES.

    Raises:
        UserError: one of them is not finite in it.
    """
    converted = {name: weight.to(DTYPES[dtype]) for name, weight in weights.items()}
    for name, weight in converted.items():
        if not weight.isfinite().all():
            raise UserError(f"--dtype {dtype}", f"{name} has values that are not finite in it", "choose float32")
    return converted


def import_model(directory: Path) -> Transformer:
    """Return the model of a Hugging Face directory of Qwen3 or Llama, in float32 on the CPU.

    The directory's `tokenizer.json` stays the tokenizer.

    Raises:
        UserError: no such directory, another architecture, weights that do not fit the configuration, or files that contradict
            each other.
    """
    config, vocabulary_size = read_hugging_face_config(directory)
    weights = read_hugging_face_weights(directory)
    with torch.device("meta"):
        model = Transformer(config, vocabulary_size)
    fill(model.to_empty(device="cpu"), from_hugging_face(weights, model, where=directory), where=directory)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(directory, f"{name} holds values that are not finite in float32", "give a model that was trained")
    return model


def write_shards(weights: dict[str, Tensor], directory: Path) -> None:
    """Write one safetensors file, or several of at most SHARD_BYTES and then their index.

    A tensor larger than SHARD_BYTES has a file of its own.
    """
    split = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD_BYTES)
    for name, tensors in split.filename_to_tensors.items():
        with atomic_path(directory / name) as temporary:
            save_file({tensor: weights[tensor] for tensor in tensors}, temporary, metadata={"format": "pt"})
    if split.is_sharded:
        write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Return the safetensors files of a Hugging Face directory, and which tensors its index says that each of them holds.

    None stands for the tensors of a single file that no index describes. An index that names a file in another directory is
    refused, since whoever wrote it would choose what is read; links in the directory itself, such as those of the Hugging Face
    cache, are followed.

    Raises:
        UserError: no weights are there, the index is damaged, names a file that is not there or lies elsewhere, or stands
            beside a single file that it does not name.
    """
    single, index = directory / SINGLE, directory / INDEX
    if not index.is_file():
        if not single.is_file():
            raise UserError(directory, f"holds neither {SINGLE} nor {INDEX}", "download the model's safetensors files too")
        return {single: None}
    weight_map = _read(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise UserError(index, "has no weight_map", "download it again")
    files: dict[Path, set[str] | None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or PurePath(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                index, f"puts {tensor} into {name!r}, not a safetensors file of this directory", "download it again"
            )
        files[directory / name] = (files.get(directory / name) or set()) | {tensor}
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(index, f"names {min(missing)}, which is not there", "download all of its files")
    if single not in files and single.is_file():
        raise UserError(directory, f"holds {SINGLE} and an index of other files", "remove the weights that are not the model's")
    return files


def read_hugging_face_weights(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a Hugging Face directory under their names there.

    Raises:
        UserError: see `weight_files`; or a file that cannot be read, holds other tensors than the index says, or tensors of
            integers or of 8 bits, which mean nothing without the scales of a quantisation.
    """
    weights: dict[str, Tensor] = {}
    for file, expected in weight_files(directory).items():
        tensors = read_weights(file)
        if expected is not None and (differing := sorted(expected ^ tensors.keys())):
            problem = f"{differing[0]} is not both there and in {INDEX}"
            raise UserError(file, problem, "download both again, from one revision of the model")
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOATS:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(file, f"{name} is of type {kind}", "give weights that are not quantised")
        weights |= tensors
    return weights


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(path, f"cannot be read: {error}", "give a Hugging Face model's directory on this machine") from None
    if not isinstance(content, dict):
        raise UserError(path, "is no JSON object", "give a Hugging Face model's directory on this machine")
    return content


def hugging_face_config(
    config: ModelConfig, vocabulary_size: int, *, positions: int, dtype: str = "float32", where: Path
) -> dict[str, Any]:
    """Return the content of `config.json`; for `positions`, `dtype` and `where` see `write_hugging_face`.

    It holds the rotary base twice: in `rope_parameters` for transformers 5, in `rope_theta` for earlier versions.

    Raises:
        UserError: a Llama whose hidden size is no multiple of its number of heads, which transformers refuses to load.
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
        "max_position_embeddings": positions,
        CONTEXT: config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
        "dtype": dtype,
        **SUPPORTED[kind],
    }


def read_hugging_face_config(directory: Path) -> tuple[ModelConfig, int]:
    """Return the shape and the vocabulary size of a Hugging Face directory's model.

    Raises:
        UserError: no readable `config.json`, or a model that is not supported.
    """
    return from_hugging_face_config(_read(directory / CONFIG), directory / CONFIG)


def read_positions(directory: Path) -> int:
    """Return the number of positions of a Hugging Face directory's model, whose config.json has been found to be supported."""
    return int(_read(directory / CONFIG)["max_position_embeddings"])


def from_hugging_face_config(content: dict[str, Any], where: Path) -> tuple[ModelConfig, int]:
    """Return the shape and the vocabulary size that the content of a `config.json` of Qwen3 or Llama describes.

    A missing key means what it means to transformers. The context is that of an export of this project; of another model half
    of its positions, since a synthesizer reads a seed and its partner together.

    Raises:
        UserError: the model is not supported, or keys that state the same contradict each other; the message names keys with
            their values.
    """
    kind, rope = content.get("model_type"), _rotary_settings(content, where)
    if kind not in tuple(ARCHITECTURES) or (unsupported := _unsupported(content, rope)):
        problem = f"model_type = {kind}" if kind not in tuple(ARCHITECTURES) else ", ".join(unsupported)
        raise UserError(where, f"{problem} is not supported", "give a dense Qwen3 or Llama model with plain rotary positions")
    content = DEFAULTS[kind] | content
    try:
        sizes = {key: _size(content[key], key, where) for key in SIZES}
        heads, hidden_size, layers = (sizes[key] for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        if content.get("layer_types") and len(content["layer_types"]) != layers:
            raise UserError(where, f"num_hidden_layers = {layers} differs from the number of layer_types", REMEDY)
        config = ModelConfig(
            layers=layers,
            hidden_size=hidden_size,
            heads=heads,
            kv_heads=content.get("num_key_value_heads") or heads,
            head_dim=content.get("head_dim") or hidden_size // heads,
            intermediate_size=sizes["intermediate_size"],
            rope_theta=rope.get("rope_theta", 10_000.0),
            norm_eps=content.get("rms_norm_eps", 1e-6),
            tied_embeddings=content.get("tie_word_embeddings", False),
            qk_norm=kind == "qwen3",
            context=_size(content.get(CONTEXT, sizes["max_position_embeddings"] // 2), CONTEXT, where),
        )
        return config, sizes["vocab_size"]
    except KeyError as error:
        raise UserError(where, f"lacks {error}", REMEDY) from None
    except ValidationError as error:
        problems = "; ".join(": ".join([*map(str, problem["loc"]), problem["msg"]]) for problem in error.errors())
        raise UserError(where, problems, REMEDY) from None


def _size(value: Any, key: str, where: Path) -> int:
    if type(value) is not int or value < 1:
        raise UserError(where, f"{key} = {value!r} is no number from 1", REMEDY)
    return value


def _rotary_settings(content: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return the settings of rotary positions, which versions of transformers put under different keys.

    Raises:
        UserError: two keys give one setting different values.
    """
    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key in ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"):
        value = content.get(key)
        if not isinstance(value, dict | None):
            value = {key: value}
        for name, setting in (value or {}).items():
            name = {"type": "rope_type"}.get(name, name)
            if settings.setdefault(name, setting) != setting:
                problem = f"{name} is {settings[name]!r} in {origins[name]} and {setting!r} in {key}"
                raise UserError(where, problem, "keep the one that the model was trained with")
            origins.setdefault(name, key)
    return settings


def _unsupported(content: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    """Return what `config.json` asks for and this project's model does not have, as "key = value"."""
    kind = content["model_type"]
    plain = {"architectures": [ARCHITECTURES[kind]], **SUPPORTED[kind], "quantization_config": None}
    unsupported = {key: content[key] for key, value in plain.items() if content.get(key) not in (None, value)}
    plain_rotary = {"rope_type": "default", "partial_rotary_factor": 1.0, "rope_parameters": None, "rope_scaling": None}
    unsupported |= {key: rope[key] for key, value in plain_rotary.items() if rope.get(key, value) != value}
    layer_types = content.get("layer_types") or []
    if not isinstance(layer_types, list) or any(layer_type != "full_attention" for layer_type in layer_types):
        unsupported["layer_types"] = layer_types
    return [f"{key} = {value}" for key, value in unsupported.items()]


def to_hugging_face(model: Transformer) -> dict[str, Tensor]:
    """Return the weights under their Hugging Face names, with fused projections split."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value, full = parameter.detach(), _full_name(name)
        if name.endswith(tuple(FUSED)):
            fused, parts = _parts(name, model.config)
            chunks = value.split([rows for _, rows in parts])
            weights |= {full.replace(fused, part): chunk.clone() for (part, _), chunk in zip(parts, chunks, strict=True)}
        else:
            weights[full] = value.contiguous()
    return weights


def from_hugging_face(weights: dict[str, Tensor], model: Transformer, where: Path) -> dict[str, Tensor]:
    """Return `weights` under the parameter names of `model`, in float32: the reverse of `to_hugging_face`.

    Tensors that the model does not use are returned too, for `fill` to refuse; those that it uses are removed from `weights`.

    Raises:
        UserError: a tensor is missing, a part of a fused projection has another shape, or `lm_head.weight` differs from the
            embeddings that it is tied to; the message names the tensor.
    """
    if model.config.tied_embeddings and (head := weights.pop("lm_head.weight", None)) is not None:
        embeddings = weights.get("model.embed_tokens.weight")
        if embeddings is not None and not torch.equal(head.float(), embeddings.float()):
            problem = "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight"
            raise UserError(where, problem, f"set tie_word_embeddings to false in {CONFIG} if both were trained")
    converted: dict[str, Tensor] = {}
    try:
        for name, _ in model.named_parameters():
            full = _full_name(name)
            if name.endswith(tuple(FUSED)):
                fused, parts = _parts(name, model.config)
                shapes = {full.replace(fused, part): (rows, model.config.hidden_size) for part, rows in parts}
                converted[name] = torch.cat([_take(weights, part, shape, where) for part, shape in shapes.items()]).float()
            else:
                converted[name] = weights.pop(full).float()
    except KeyError as error:
        raise UserError(where, f"holds no tensor {error}", "give all safetensors files of the model") from None
    # old Llama files hold the rotary frequencies, which the model computes itself
    return converted | {name: tensor for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def _take(weights: dict[str, Tensor], name: str, shape: tuple[int, int], where: Path) -> Tensor:
    """Remove a tensor of `shape` from `weights`, and return it."""
    tensor = weights.pop(name)
    if tuple(tensor.shape) != shape:
        problem = f"{name}: the model has {shape}, the file {tuple(tensor.shape)}"
        raise UserError(where, problem, "give the weights of this model")
    return tensor


FUSED = ("qkv_proj.weight", "gate_up_proj.weight")


def _parts(name: str, config: ModelConfig) -> tuple[str, list[tuple[str, int]]]:
    """Return the name of a fused projection, and the names and rows of the projections in it."""
    if name.endswith("qkv_proj.weight"):
        rows, key_value_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
        return "qkv_proj", [("q_proj", rows), ("k_proj", key_value_rows), ("v_proj", key_value_rows)]
    return "gate_up_proj", [("gate_proj", config.intermediate_size), ("up_proj", config.intermediate_size)]


def _full_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"
