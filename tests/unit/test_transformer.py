from itertools import pairwise

import pytest
import torch
from sbp_kernels import PackedLayout
from sbp_kernels.reference import dense_mask

from sbp_fast.config import ModelConfig
from sbp_fast.model.transformer import Transformer

CONFIG = ModelConfig(layers=2, width=16, heads=4, key_value_heads=2, head_width=8, feed_forward_width=24, context=32)
TREE = PackedLayout.from_tree([4, 3, 5, 2, 6, 3], [-1, 0, 0, -1, -1, 4])


def make_model(dtype: torch.dtype = torch.float64, **changes: object) -> Transformer:
    model = Transformer(CONFIG.model_copy(update=changes), 50)
    model.initialize(3)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start of training, so that attention is far from even
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model.to(dtype)


def stream(layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 50, (len(layout),), generator=generator), torch.randint(0, 50, (len(layout),), generator=generator)


def test_the_gradient_of_an_output_touches_only_what_its_token_may_see() -> None:
    model, (tokens, _) = make_model(), stream(TREE)
    embedded = model.embed_tokens(tokens).detach().requires_grad_()
    model.embed_tokens.forward = lambda _: embedded
    hidden = model(tokens, TREE)
    for token in range(len(TREE)):
        (gradient,) = torch.autograd.grad(hidden[token].sum(), embedded, retain_graph=True)
        assert torch.equal((gradient != 0).any(1), dense_mask(TREE)[token])


@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_seed_equals_its_pairs_run_alone(tied: bool) -> None:
    model, (tokens, targets) = make_model(tied_embeddings=tied), stream(TREE)
    starts = [0, 4, 7, 12, 14, 20, 23]
    pieces = [slice(start, stop) for start, stop in pairwise(starts)]
    paths = {1: [0, 1], 2: [0, 2], 3: [3], 5: [4, 5]}  # the segments that carry loss, each with all that it sees
    targets = targets.clone()
    for root in (0, 4):
        targets[pieces[root]] = -100
    packed = model.loss(tokens, targets, TREE)
    packed_gradients = torch.autograd.grad(packed, list(model.parameters()))
    alone = torch.zeros((), dtype=torch.float64)
    for path in paths.values():
        own, goals = (torch.cat([x[pieces[segment]] for segment in path]) for x in (tokens, targets))
        alone = alone + model.loss(own, goals, PackedLayout.from_lengths([len(own)]))
    torch.testing.assert_close(packed, alone, rtol=1e-13, atol=0)
    for mine, theirs in zip(packed_gradients, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, (tokens, targets) = make_model(tied_embeddings=False), stream(TREE)
    targets[::3] = -100
    logits = model.logits(model(tokens, TREE))
    right = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(model.loss(tokens, targets, TREE), right, rtol=1e-13, atol=0)


def test_weights_are_drawn_from_the_seed_alone() -> None:
    torch.manual_seed(0)
    one = make_model()
    torch.manual_seed(1)
    other = make_model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_autocast_keeps_the_loss_within_the_rounding_of_its_dtype() -> None:
    model, (tokens, targets) = make_model(torch.float32), stream(TREE)
    exact = make_model().loss(tokens, targets, TREE)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, targets, TREE)
    loss.backward()
    assert loss.dtype == torch.float32
    assert 0 < abs(loss / exact - 1) < 2**-8
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_the_kernels_give_the_models_loss_and_gradients() -> None:
    model, (tokens, targets) = make_model(torch.float32), stream(TREE)
    exact = model.double().loss(tokens, targets, TREE)
    right = torch.autograd.grad(exact, list(model.parameters()))
    model.float()
    by_backend = {}
    for backend in ("torch", "triton"):
        loss = model.loss(tokens, targets, TREE, backend)
        by_backend[backend] = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    for plain, mine, value in zip(by_backend["torch"], by_backend["triton"], [exact, *right], strict=True):
        plain_error, error = ((x.double() - value).square().mean().sqrt() for x in (plain, mine))
        assert error <= 2 * max(plain_error, torch.finfo(torch.float32).eps * value.abs().max())
