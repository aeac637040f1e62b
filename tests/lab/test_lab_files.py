"""The files of a world, read by the stages `prepare` and `pair`."""

import json
from pathlib import Path

import numpy as np

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.tokenizer import Tokenizer
from sbp_fast.lab.files import HELDOUT, PAIRS, UNIQUE, corpus_settings, parse_id, word_tokenizer, write_world
from sbp_fast.lab.worlds import World, WorldSettings
from sbp_fast.pairs.heldout_pairs import HeldoutPairs
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.pair import pair
from sbp_fast.stages.prepare import prepare

QUIET = Console(quiet=True)
WORLD = World(WorldSettings(concepts=24, oracle_ratio=3))


def test_each_word_is_a_token_and_texts_come_back() -> None:
    tokenizer = Tokenizer(word_tokenizer(WORLD.vocabulary))
    for text in WORLD.texts(WORLD.others):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split(" ")) and tokenizer.decode(ids) == text


def test_prepare_and_pair_read_a_written_world(tmp_path: Path) -> None:
    write_world(WORLD, tmp_path / "world")
    config = RunConfig.model_validate({"threads": 1, **corpus_settings(tmp_path / "world")})
    prepare(config, tmp_path / "prepare", console=QUIET)
    pair(config, tmp_path / "prepare", None, tmp_path / "pair", console=QUIET)
    corpus, pairs = PreparedCorpus(tmp_path / "prepare"), PairSet(tmp_path / "pair")
    assert len(corpus.unique) == len(WORLD.unique) and len(corpus.train) == len(WORLD.unique) + len(WORLD.others)
    assert set(np.diff(corpus.train.offsets)) == {9}
    read, _ = WORLD.read([corpus.text(corpus.unique, index) for index in range(len(corpus.unique))])
    ids = [parse_id(str(id)) for id in corpus.unique.ids]
    assert ids == list(zip(read.concepts.tolist(), read.genres.tolist(), strict=True))
    assert sorted(zip(pairs.seeds, pairs.partners, strict=True)) == sorted(map(tuple, WORLD.related_pairs(read).tolist()))
    heldout = HeldoutPairs.load(tmp_path / "pair")
    assert len(heldout) == len(WORLD.related_pairs(WORLD.heldout))  # concepts are originals: no pair lies across splits
    lines = {name: (tmp_path / "world" / name).read_text().splitlines() for name in (UNIQUE, HELDOUT, PAIRS)}
    assert len(lines[PAIRS]) == len(pairs) + len(heldout) and json.loads(lines[UNIQUE][0])["source"] == "A1"
