"""The engine beside transformers' `generate` on the exported model."""

from pathlib import Path

import numpy as np
import torch
from tiny_synthesis import make_inputs
from transformers import AutoModelForCausalLM

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.generate.decoder import KVCacheConfig, SamplingParams
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
    sampling = SamplingParams(tokenizer.partner, tokenizer.end, forbidden, 30, temperature=0.0)
    seeds = [Seed(i, i, prepared.unique[i][:30], (0,)) for i in range(len(prepared.unique))]
    results = list(Engine(model, sampling, KVCacheConfig(32, 1, 100, 16, 30, 100), 0).generate(seeds))
    assert len(results) == len(seeds) > 40
    for result in results:
        prompt = torch.from_numpy(np.append(seeds[result.seed].tokens, tokenizer.partner).astype(np.int64))[None]
        options = {"do_sample": False, "temperature": None, "max_new_tokens": 30, "suppress_tokens": list(forbidden)}
        tokens = peer.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :].tolist()
        assert tokens == [*result.tokens.tolist(), *[tokenizer.end] * (result.stop == "end")]
    assert len({tuple(result.tokens.tolist()) for result in results}) > 10
