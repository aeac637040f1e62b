import json
from pathlib import Path
from typing import Any

import pytest
from tiny_training import QUIET

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.stages.prepare import prepare


def configure(directory: Path, **settings: Any) -> RunConfig:
    """Return the configuration of a corpus of three sources, 40 documents each."""
    records = [
        {"id": f"{source}-{number}", "text": f"words of {source}, number {number}", "source": source}
        for number in range(40)
        for source in ("north", "south", "west")
    ]
    (directory / "documents.jsonl").write_text("\n".join(map(json.dumps, records)))
    corpus = {"path": str(directory / "documents.jsonl"), "vocabulary_size": 300, "unique_share": 0.5, "heldout_share": 0.2}
    return RunConfig.model_validate({"threads": 1, "corpus": corpus | settings})


def test_only_documents_of_the_named_sources_are_read_and_the_others_counted(tmp_path: Path) -> None:
    prepare(configure(tmp_path, sources=["north", "west"]), tmp_path / "out", console=QUIET)
    prepared = PreparedCorpus(tmp_path / "out")
    sources = {str(source) for corpus in (prepared.train, prepared.heldout) for source in corpus.sources}
    assert sources == {"north", "west"} and len(prepared.train) + len(prepared.heldout) == 80
    assert prepared.counts["other_sources"] == 40


def test_a_source_that_no_document_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus.sources = east: no document is of this source; left out were 80 documents"):
        prepare(configure(tmp_path, sources=["north", "east"]), tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()
