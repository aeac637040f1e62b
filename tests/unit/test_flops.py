import pytest
import torch
from sbp_kernels import PackedLayout
from torch.utils.flop_counter import FlopCounterMode

from sbp_fast.config import ModelConfig
from sbp_fast.model.flops import forward_flops, parameters, training_flops
from sbp_fast.model.transformer import Transformer

CONFIG = ModelConfig(layers=3, width=16, heads=4, key_value_heads=2, head_width=12, feed_forward_width=20)
VOCABULARY = 31


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied: bool) -> None:
    config = CONFIG.model_copy(update={"tied_embeddings": tied})
    model = Transformer(config, VOCABULARY)
    assert parameters(config, VOCABULARY) == sum(parameter.numel() for parameter in model.parameters())


def counted(model: Transformer, targets: torch.Tensor, layout: PackedLayout, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        loss = model.loss(torch.zeros(len(layout), dtype=torch.long), targets, layout)
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
    assert forward_flops(CONFIG, VOCABULARY, 0, pairs, 0) == products * 2 * CONFIG.head_width
    assert training_flops(CONFIG, VOCABULARY, 0, pairs, 0) == 3 * products * 2 * CONFIG.head_width
