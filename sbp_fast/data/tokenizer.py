"""The tokenizer: a byte-level BPE of the Hugging Face `tokenizers` library, trained here or loaded from its file."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import atomic_open, parse_json

BEGIN, END, PARTNER = "<|begin|>", "<|end|>", "<|partner|>"
SPECIAL_TOKENS = (BEGIN, END, PARTNER)
# the words of Qwen2 and later: single digits, contractions, punctuation with its line ends, runs of spaces
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TOKENIZER = "tokenizer.json"  # its file, in the output of `prepare`, beside imported models and in Hugging Face directories
LONGEST_WORD = 256


class Tokenizer:
    """Text to token ids and back.

    Special tokens never come out of text: a document that spells "<|end|>" is encoded as those characters.

    Args:
        path_or_json: path of a `tokenizer.json`, or its content (which starts with a brace).

    Attributes:
        begin, end, partner: ids of the special tokens, which are added to a tokenizer that lacks them, and made special in one
            that has them as other tokens.
        new_tokens: those of the special tokens that the file lacks.
        added_tokens: the added tokens, special or not.
        own_size: one more than the highest id of the tokens that are not added ones.
        vocabulary_size: one more than the highest id.

    Raises:
        UserError: a file that is missing or not a tokenizer.
    """

    def __init__(self, path_or_json: str | Path) -> None:
        self._tokenizer = _load(path_or_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.new_tokens = tuple(token for token in SPECIAL_TOKENS if self._tokenizer.token_to_id(token) is None)
        special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
        self._tokenizer.add_special_tokens(special)
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_tokens = tuple(token.content for token in added.values())
        self.own_size: int = max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        vocabulary = self.vocabulary()
        self.begin, self.end, self.partner = (vocabulary[token] for token in SPECIAL_TOKENS)
        self.vocabulary_size: int = max(vocabulary.values()) + 1

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token, added ones too."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def token(self, id: int) -> str:
        """Return the token with an id, as its file spells it."""
        return str(self._tokenizer.id_to_token(id))

    def special_ids(self) -> list[int]:
        """Return the ids of the special tokens, without the one that stands for unknown text."""
        model = parse_json(self.to_json())["model"]
        unknown = (model.get("unk_token"), model.get("unk_id"))
        added = self._tokenizer.get_added_tokens_decoder().items()
        return [id for id, token in added if token.special and token.content not in unknown and id not in unknown]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens; encoded in parallel.

        Raises:
            UserError: the tokenizer has no token for a part of a text, and none for what is unknown.
        """
        try:
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as error:  # noqa: BLE001  (the library raises plain Exception)
            remedy = "take a byte-level tokenizer, or one with a token for what is unknown"
            raise UserError("corpus.tokenizer", f"cannot encode a text: {error}", remedy) from None

    def enclose(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add <begin> and <end> to each of some concatenated documents.

        Args:
            tokens: integers [tokens].
            lengths: int64 [documents].

        Returns:
            The tokens and lengths with the special tokens.
        """
        ends = np.cumsum(lengths)
        edges = np.stack([ends - lengths, ends], axis=1).ravel()
        return np.insert(tokens, edges, np.tile([self.begin, self.end], len(lengths))), lengths + 2

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special tokens."""
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    def decode_batch(self, documents: Sequence[np.ndarray]) -> list[str]:
        """Return the text of each document without special tokens; decoded in parallel."""
        return self._tokenizer.decode_batch([ids.tolist() for ids in documents], skip_special_tokens=True)

    def to_json(self) -> str:
        """Return the content of its `tokenizer.json`."""
        return self._tokenizer.to_str(pretty=True)

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json` that any Hugging Face library loads."""
        with atomic_open(path) as file:
            file.write(self.to_json().encode())


def join_ids(documents: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate documents. Returns their tokens, uint32 [tokens], and their lengths, int64 [documents]."""
    joined = array("I")
    for ids in documents:
        joined.fromlist(ids)  # four times as fast as numpy
    return np.asarray(joined), np.array([len(ids) for ids in documents], np.int64)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016, over bytes) in which every text has an encoding.

    The special tokens come first, then the 256 bytes, then merges up to `vocabulary_size`, fewer if the texts have no
    more pairs. The same texts give the same tokenizer on any number of threads. Words of more than `LONGEST_WORD` characters,
    such as DNA or a line of dashes, are learnt from in pieces of that length: time grows with the square of a length.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    pieces = pre_tokenizers.Split(Regex(rf"[\s\S]{{{LONGEST_WORD}}}"), "isolated")
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pieces, characters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, characters])
    return Tokenizer(tokenizer.to_str())


def _load(path_or_json: str | Path) -> tokenizers.Tokenizer:
    if isinstance(path_or_json, str) and path_or_json.lstrip().startswith("{"):
        return tokenizers.Tokenizer.from_str(path_or_json)
    path = Path(path_or_json)
    remedy = 'give the path of a tokenizer.json, or "train"'
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(path, f"the tokenizer cannot be read: {reason}", remedy) from None
    try:
        return tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # noqa: BLE001  (the library raises plain Exception)
        raise UserError(path, f"is no tokenizer: {error}", remedy) from None
