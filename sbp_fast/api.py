"""sbp-fast in Python: open what its stages wrote, load models, generate, and run experiments. `import sbp_fast` has all of it.

Example:
    corpus = sbp_fast.PreparedCorpus("runs/demo/prepare")
    model = sbp_fast.load_model("runs/demo/tune/related")
    texts = sbp_fast.generate_documents(model, corpus, "Chad: Economy", count=3)
"""

from __future__ import annotations

from sbp_kernels import PackedLayout, linear_cross_entropy, packed_attention

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.experiment.results import collect as collect_results
from sbp_fast.experiment.run import run
from sbp_fast.model.saved import load_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.stages.sample import write_after

__all__ = [
    "Corpus",
    "PackedLayout",
    "PairSet",
    "PreparedCorpus",
    "UserError",
    "collect_results",
    "generate_documents",
    "linear_cross_entropy",
    "load_config",
    "load_model",
    "packed_attention",
    "run",
]


def generate_documents(
    model: Transformer, corpus: PreparedCorpus, seed_text: str = "", *, count: int = 1, config: RunConfig | None = None
) -> list[str]:
    """Return documents that a model writes, sampled as `synthesize` would.

    Args:
        model: as `load_model` returns it, on the device that computes.
        corpus: the prepared corpus whose tokenizer the model has.
        seed_text: text after which a synthesizer writes; "" for none, as a pretrained model writes. What does not fit into the
            model's context is cut off.
        count: number of documents, each with random numbers of its own.
        config: its `synthesize` says how tokens are sampled, its `seed` is the key of the random numbers; None: the defaults.

    Raises:
        UserError: the model has another vocabulary than the corpus.
    """
    config = config or RunConfig()
    _, results = write_after(config, model, corpus, seed_text, count)
    return [corpus.tokenizer.decode(result.tokens) for result in results]
