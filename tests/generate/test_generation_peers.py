"""Ours beside transformers' `generate` on the exported model."""

from pathlib import Path

import numpy as np
import torch
from tiny_synthesis import make_inputs
from transformers import AutoModelForCausalLM

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.generate.decoder import Room, SamplingRule
from sbp_fast.generate.engine import Engine, Seed
from sbp_fast.model.huggingface import export_model
from sbp_fast.model.saved import load_model


def test_greedy_documents_equal_those_of_transformers(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    export_model(inputs["model"], inputs["corpus"] / "tokenizer.json", tmp_path / "exported")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    prepared, model = PreparedCorpus(inputs["corpus"]), load_model(inputs["model"])
    tokenizer = prepared.tokenizer
    forbidden = (tokenizer.begin, tokenizer.partner)
    rule = SamplingRule(tokenizer.partner, tokenizer.end, forbidden, 30, temperature=0.0)
    seeds = [Seed(i, i, prepared.unique[i][:30], (0,)) for i in range(len(prepared.unique))]
    drafts = list(Engine(model, rule, Room(32, 1, 100, 16, 30, 100), 0).draw(seeds))
    assert len(drafts) == len(seeds) > 40
    for draft in drafts:
        prompt = torch.from_numpy(np.append(seeds[draft.seed].tokens, tokenizer.partner).astype(np.int64))[None]
        options = {"do_sample": False, "temperature": None, "max_new_tokens": 30, "suppress_tokens": list(forbidden)}
        found = peer.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :].tolist()
        assert found == [*draft.tokens.tolist(), *[tokenizer.end] * (draft.stop == "end")]
    assert len({tuple(draft.tokens.tolist()) for draft in drafts}) > 10
