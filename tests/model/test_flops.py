import pytest
import torch
from sbp_kernels import PackedLayout
from torch.utils.flop_counter import FlopCounterMode

from sbp_fast.config import ModelConfig
from sbp_fast.model.flops import (
    PEAK_FLOPS,
    forward_flops,
    matrix_parameters,
    palm_flops,
    parameters,
    parameters_by_part,
    peak_flops,
    training_flops,
)
from sbp_fast.model.transformer import Transformer

CONFIG = ModelConfig(layers=3, hidden_size=16, heads=4, kv_heads=2, head_dim=12, intermediate_size=20)
VOCABULARY = 31


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": False}, {"qk_norm": False}])
def test_parameters_are_those_of_the_model(changes: dict[str, bool]) -> None:
    config = CONFIG.model_copy(update=changes)
    model = Transformer(config, VOCABULARY)
    assert parameters(config, VOCABULARY) == sum(parameter.numel() for parameter in model.parameters())


def counted(model: Transformer, targets: torch.Tensor, layout: PackedLayout, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        loss = model(torch.zeros(len(layout), dtype=torch.long), layout, targets)
        if backward:
            loss.backward()
    attention = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    return counter.get_total_flops() - attention


def test_products_are_those_that_torch_counts() -> None:
    model, layout = Transformer(CONFIG, VOCABULARY), PackedLayout.from_lengths([5, 8])
    targets = torch.arange(13).where(torch.arange(13) % 3 > 0, -100)
    loss_tokens = int((targets != -100).sum())
    assert counted(model, targets, layout, backward=False) == forward_flops(CONFIG, VOCABULARY, 13, 0, loss_tokens)
    assert counted(model, targets, layout, backward=True) == training_flops(CONFIG, VOCABULARY, 13, 0, loss_tokens)


def test_attention_counts_the_visible_pairs_alone() -> None:
    pairs = PackedLayout.from_tree([2, 3, 1], [-1, 0, 0]).visible_pairs()
    assert pairs == (1 + 2) + (3 + 4 + 5) + 3
    products = pairs * CONFIG.layers * CONFIG.heads * 2  # a score and a weighted value for each head
    assert forward_flops(CONFIG, VOCABULARY, 0, pairs, 0) == products * 2 * CONFIG.head_dim
    assert training_flops(CONFIG, VOCABULARY, 0, pairs, 0) == 3 * products * 2 * CONFIG.head_dim


def test_each_part_has_the_parameters_of_its_modules() -> None:
    config = CONFIG.model_copy(update={"tied_embeddings": False})
    kinds = {
        "embed_tokens": "embedding",
        "qkv_proj": "attention",
        "o_proj": "attention",
        "gate_up_proj": "feed-forward",
        "down_proj": "feed-forward",
        "lm_head": "output projection",
    }
    counted = dict.fromkeys(parameters_by_part(config, VOCABULARY), 0)
    for name, parameter in Transformer(config, VOCABULARY).named_parameters():
        counted[kinds.get(name.split(".")[-2], "norms")] += parameter.numel()
    assert parameters_by_part(config, VOCABULARY) == counted
    assert matrix_parameters(config) == counted["attention"] + counted["feed-forward"]


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 PCIe", None),  # 756
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GB200", None),
        ("Tesla V100-SXM2-16GB", None),
        ("", None),
    ],
)
def test_a_device_has_its_own_peak_or_none(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


def test_peaks_are_dense_ones() -> None:
    """A clock, the multiprocessors, and what each does a cycle, doubled for multiply and add (NVIDIA's architecture papers)."""
    assert PEAK_FLOPS["a100"] == pytest.approx(1.410e9 * 108 * 1024 * 2, rel=1e-3)
    assert PEAK_FLOPS["h100"] == PEAK_FLOPS["h200"] == pytest.approx(1.830e9 * 132 * 2048 * 2, rel=1e-3)


def test_the_usual_formula_takes_every_parameter_and_the_whole_square() -> None:
    tied = palm_flops(CONFIG, VOCABULARY, 100, 64)
    assert tied == 100 * (6 * parameters(CONFIG, VOCABULARY) + 12 * 3 * 48 * 64)
    norms = parameters_by_part(CONFIG, VOCABULARY)["norms"]
    exact = training_flops(CONFIG, VOCABULARY, 100, 100 * 64, 100)  # every token sees the whole context
    assert tied == exact + 100 * 6 * norms
    assert palm_flops(CONFIG.model_copy(update={"tied_embeddings": False}), VOCABULARY, 100, 64) == tied
