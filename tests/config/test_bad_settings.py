"""Settings that no run can mean: each is refused in one line that names the key, before anything is read or written."""

from pathlib import Path

import pytest

from sbp_fast.cli_options import load_settings
from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError

COUNTS = (
    "corpus.shard_tokens", "embed.shard_documents", "pair.neighbors", "pair.hnsw_m", "pretrain.tokens_per_step",
    "synthesize.samples_per_seed", "filter.shingle_tokens", "validation.tokens", "checkpoint.keep", "quality.judged_documents",
)  # fmt: skip
NUMBERS = (
    "corpus.heldout_share", "corpus.validation_share", "corpus.unique_share", "pretrain.learning_rate", "pretrain.weight_decay",
    "pretrain.epsilon", "pretrain.gradient_clip", "pretrain.spike_deviations", "pair.similarity_low", "pair.similarity_high",
    "pair.memory_gib", "model.rope_theta", "model.norm_eps", "synthesize.temperature", "synthesize.cache_gib",
    "filter.duplicate_similarity", "checkpoint.seconds", "quality.judge_timeout_seconds", "compare.confidence",
)  # fmt: skip
BAD = [
    *(f"{key}={value}" for key in COUNTS for value in ("0", "-1", "1.5", "1e30")),
    *(f"{key}={value}" for key in NUMBERS for value in ("inf", "nan", "-3.0")),
    *(f"{key}=true" for key in ("threads", "pretrain.learning_rate", "corpus.text_field", "seed", "seeds")),
    *(f"{key}=2024" for key in ("name", "corpus.path", "corpus.text_field", "device", "embed.model", "arms.sbp.label")),
    *(f"name={name}" for name in ("../../x", "a/b", "'..'", "''", ".hidden", "'a b'", "x" * 101, "/tmp/x")),
    *(f"pretrain.tokens={text}" for text in ("1.5", "1Q", "1.2345k", "'1 M'", "-1M", "M", "1e-3", "999999T", "1535")),
    "pair={similarity_low=0.9, similarity_high=0.8}", "pair={similarity_low=0.9, similarity_high=0.9}",
    "pair.similarity_high=1.5", "arms.sbp={share=0.2, minimum_share=0.5}", "arms.sbp.share=2", "arms.sbp.recipe={tokens=100}",
    "pretrain={warmup_fraction=0.6, decay_fraction=0.6, schedule='warmup-stable-decay'}", "pretrain.beta2=1",
    "pretrain={warmup_fraction=0.6, decay_fraction=0.6}", "pretrain={tokens_per_step=100, microbatch_tokens=30}",
    "synthesizer.tokens=1", "seeds=[0, 0]", "seeds=[]", "arms.sbp.seeds=[1, 2, 1]", "seed=-1", "seed=9223372036854775808",
    "corpus.heldout_share=1", "corpus.text_field=id", "corpus.text_field=''", "corpus.vocabulary_size=100", "threads=100000",
    "corpus.maximum_record_mib=0", "corpus.tokenizer=''", "filter.minimum_tokens=1000",
    "sources.related.filter.minimum_tokens=9999",
    "model.layers=1000000", "model.norm_eps=0", "model.head_dim=7", "pair.partition_overlap=9", "pretrain.patience=3",
    "synthesize={maximum_tokens=10}", "embed.batch_documents=0", "embed.batch_documents=many",
]  # fmt: skip


def test_there_are_a_hundred_bad_settings() -> None:
    assert len(BAD) == len(set(BAD)) >= 100


@pytest.mark.parametrize("override", BAD, ids=str)
def test_bad_setting_is_refused_in_one_line_that_names_it(override: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(["small"], [override])
    message = str(refused.value)
    assert "\n" not in message and override.partition("=")[0].split(".")[-1] in message
    assert "[type=" not in message and ".str " not in message and ".float " not in message


def test_text_given_as_a_number_is_refused_with_the_quotes_to_write() -> None:
    with pytest.raises(UserError, match=r'corpus.path = 2024 is not usable: .*; put text in quotes: path = "2024"'):
        load_config(["small"], ["corpus.path=2024"])


@pytest.mark.parametrize(
    ("text", "tokens"), [("1M", 1_000_000), ("1.5B", 1_500_000_000), ("20k", 20_000), ("0.25M", 250_000), ("1T", 10**12)]
)
def test_counts_may_be_written_short(text: str, tokens: int, tmp_path: Path) -> None:
    assert load_config(["small"], [f"pretrain.tokens={text}"]).pretrain.tokens == tokens
    (tmp_path / "short.toml").write_text(f'[pretrain]\ntokens = "{text}"\n[arms.sbp]\nrecipe.tokens = "{text}"\n')
    config = load_config(["small", tmp_path / "short.toml"])
    assert config.pretrain.tokens == config.arms["sbp"].resolve_recipe(config.pretrain).tokens == tokens


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is given twice"):
        load_settings(["small", "seed=1", "seed=2"])
    assert load_settings(["small", "model={layers=2}", "model.layers=3"]).model.layers == 3
    (tmp_path / "twice.toml").write_text("[pretrain]\ntokens = 20_000\ntokens = 30_000\n")
    with pytest.raises(UserError, match=r"twice\.toml: not valid TOML"):
        load_config([tmp_path / "twice.toml"])


def test_the_default_configuration_is_valid() -> None:
    assert RunConfig.model_validate(RunConfig().model_dump(mode="json")) == RunConfig()
