"""The tokenizer of an exported model, which encodes a text in transformers and vLLM as this project does."""

from __future__ import annotations

from pathlib import Path

from sbp_fast.data.tokenizer import BEGIN, END, PARTNER, TOKENIZER, Tokenizer
from sbp_fast.pipeline.files import atomic_open, dump_json, parse_json, write_json


def write_tokenizer(tokenizer: Tokenizer, directory: Path, positions: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    The tokenizer puts <|begin|> before a text, as every document began in training. A text that spells a special token is
    encoded as those characters, as in training. A plain `tokenizers.Tokenizer` does so once its `encode_special_tokens` is set,
    which `tokenizer.json` cannot express.

    Args:
        tokenizer: of the model's training corpus.
        directory: an existing directory.
        positions: longest chain of positions that the model was trained on.
    """
    with atomic_open(directory / TOKENIZER) as file:
        file.write(with_begin(tokenizer).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "extra_special_tokens": {"partner_token": PARTNER},
    }
    write_json(directory / "tokenizer_config.json", config)


def with_begin(tokenizer: Tokenizer) -> str:
    """Return the `tokenizer.json` of a tokenizer that puts the begin token first."""
    content = parse_json(tokenizer.to_json())
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [tokenizer.begin], "tokens": [BEGIN]}},
    }
    return dump_json(content, TOKENIZER, ensure_ascii=False, indent=2)
