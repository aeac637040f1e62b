"""Packed input in small random Llama and Qwen3 models of transformers, against the models as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from sbp_kernels import PackedLayout, integrations
from sbp_kernels.integrations import huggingface, layout_of_documents
from sbp_kernels.integrations.huggingface import packed_inputs, patch, register_attention, unpatch
from small_ops import check_errors
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

LENGTHS = [7, 1, 12, 5]
DOCUMENTS = PackedLayout.from_lengths(LENGTHS)
SHARED = PackedLayout.from_tree([6, 4, 5, 3, 7], [-1, 0, 0, 2, -1])  # a prefix of two, one of them continued; a document
VOCABULARY = 97
GPU = pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)


def make(kind: str, **options: Any) -> Any:
    """The same random weights at every call, with norms that are not all ones."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attn_implementation": "sdpa"}
    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": VOCABULARY, "initializer_range": 0.1, **sizes, **heads, **options}
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1, 0.3)
    return model


def exact_copy(model: Any) -> Any:
    """In float64 also where transformers computes in float32 whatever the model's dtype is: its norms."""
    copy = deepcopy(model).double()
    for module in copy.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight, epsilon = module.weight, module.variance_epsilon
            module.forward = lambda x, w=weight, e=epsilon: F.rms_norm(x, w.shape, w, e)
    return copy


def batch_of(layout: PackedLayout, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Tokens and labels [1, T]; no loss where a token does not continue the one before it, nor on every fifth."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (1, len(layout)), generator=generator)
    labels = tokens.clone()
    labels[0, 1:][layout.positions.diff() != 1] = -100
    labels[0, ::5] = -100
    return tokens.to(device), labels.to(device)


def alone(model: Any, layout: PackedLayout, tokens: Tensor, labels: Tensor) -> Tensor:
    """The loss of the model as it is, each segment in a call of its own with all that it continues."""
    assert layout.lengths is not None
    spans = torch.arange(len(layout)).split(layout.lengths)
    count = (labels[0, 1:] != -100).sum()
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for segment in range(len(spans)):
        path = torch.cat([spans[index] for index in layout.path(segment)])
        targets = labels[:, path].clone()
        targets[:, : len(path) - len(spans[segment])] = -100
        if not (targets[:, 1:] != -100).any():
            continue
        if model.dtype == torch.float64:  # transformers' own loss is in float32
            logits = model(input_ids=tokens[:, path]).logits[0]
            total = total + F.cross_entropy(logits[:-1], targets[0, 1:], reduction="sum") / count
        else:
            total = total + model(input_ids=tokens[:, path], labels=targets, num_items_in_batch=count).loss.double()
    return total


def results(model: Any, losses: list[Tensor]) -> list[Tensor]:
    """The losses, stacked, and the gradient of their sum by each parameter."""
    parameters = list(model.parameters())
    stacked = torch.stack([loss.double() for loss in losses])
    return [stacked.detach(), *torch.autograd.grad(stacked.sum(), parameters)]


def by_positions(layout: PackedLayout, device: str) -> dict[str, Any]:
    return {"position_ids": layout.positions.to(device).long().unsqueeze(0)}


def by_cu_seq_lens(layout: PackedLayout, device: str) -> dict[str, Any]:
    ends = F.pad(torch.tensor(layout.lengths).cumsum(0), (1, 0)).int().to(device)
    longest = max(layout.lengths or ())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "max_length_q": longest, "max_length_k": longest}


def by_layout(layout: PackedLayout, device: str) -> dict[str, Any]:
    return packed_inputs(layout.to(device))


FORMS = [(by_positions, DOCUMENTS), (by_cu_seq_lens, DOCUMENTS), (by_layout, DOCUMENTS), (by_layout, SHARED)]


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cpu", torch.bfloat16), GPU])
@pytest.mark.parametrize(("given", "layout"), FORMS, ids=["position_ids", "cu_seq_lens", "documents", "shared"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_loss_and_gradients_are_those_of_documents_alone(
    kind: str, given: Callable[[PackedLayout, str], dict[str, Any]], layout: PackedLayout, device: str, dtype: torch.dtype
) -> None:
    plain = make(kind, tie_word_embeddings=kind == "Qwen3").to(device, dtype)
    exact, patched = exact_copy(plain), patch(deepcopy(plain))
    batches = [batch_of(layout, seed, device) for seed in range(4)]
    outputs = [patched(input_ids=tokens, labels=labels, **given(layout, device)) for tokens, labels in batches]
    assert all(output.logits is None for output in outputs)
    mine = results(patched, [output.loss for output in outputs])
    theirs, right = (results(model, [alone(model, layout, *batch) for batch in batches]) for model in (plain, exact))
    check_errors([mine[0].float(), *mine[1:]], [theirs[0].float(), *theirs[1:]], right)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_training_goes_the_same_way(kind: str) -> None:
    """Twenty steps of AdamW: losses and weights stray from those in float64 no more than twice as far as without the patch."""
    plain = make(kind)
    exact, patched = exact_copy(plain), patch(deepcopy(plain))

    def train(model: Any, loss_of: Callable[[Any, Tensor, Tensor], Tensor]) -> list[Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(20):
            loss = loss_of(model, *batch_of(SHARED, step % 3))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return [torch.stack(losses).to(model.dtype), torch.cat([x.detach().flatten() for x in model.parameters()])]

    def packed(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=labels, **packed_inputs(SHARED)).loss

    def one_by_one(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        return alone(model, SHARED, tokens, labels)

    mine, theirs, right = train(patched, packed), train(plain, one_by_one), train(exact, one_by_one)
    assert right[0][-1] < right[0][0] / 3
    check_errors(mine, theirs, right)


@pytest.mark.parametrize("given", [by_positions, by_cu_seq_lens])
def test_registration_alone_serves_a_model(
    given: Callable[[PackedLayout, str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make("Llama"), batch_of(DOCUMENTS, 0)[0]
    right = torch.cat([exact_copy(model)(input_ids=document).logits for document in tokens.split(LENGTHS, 1)], 1)
    theirs = torch.cat([model(input_ids=document).logits for document in tokens.split(LENGTHS, 1)], 1)
    model.set_attn_implementation(register_attention())
    mask_maker = mock.Mock(side_effect=AssertionError("transformers makes a mask, and waits for the device to do so"))
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", mask_maker)
    check_errors([model(input_ids=tokens, use_cache=False, **given(DOCUMENTS, "cpu")).logits], [theirs], [right])


def test_patched_logits_and_the_loss_of_a_counted_batch() -> None:
    model = make("Qwen3")
    tokens, labels = batch_of(DOCUMENTS, 0)
    inputs = {**by_positions(DOCUMENTS, "cpu"), "use_cache": False}  # with a cache, transformers looks for no documents
    theirs, right = (each(input_ids=tokens, **inputs).logits for each in (model, exact_copy(model)))
    model = patch(model)
    check_errors([model(input_ids=tokens, **inputs).logits], [theirs], [right])
    assert model(input_ids=tokens, **inputs, logits_to_keep=1).logits.shape == (1, 1, VOCABULARY)
    count = (labels[:, 1:] != -100).sum()
    mean = model(input_ids=tokens, labels=labels, **inputs).loss
    for number in (2 * count, int(2 * count)):
        torch.testing.assert_close(model(input_ids=tokens, labels=labels, num_items_in_batch=number, **inputs).loss, mean / 2)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert model(input_ids=tokens, labels=tokens, shift_labels=shifted, **inputs).loss == mean
    assert model(input_ids=tokens, labels=labels, return_dict=False, **inputs)[0] == mean
    embeddings = model.get_input_embeddings()(tokens)
    assert model(inputs_embeds=embeddings, labels=labels, **inputs).loss == mean


def test_a_patch_touches_one_model_and_can_be_undone() -> None:
    config = make("Llama").config
    one, other = (transformers.LlamaForCausalLM(config) for _ in range(2))
    one.load_state_dict(other.state_dict())
    tokens, labels = batch_of(DOCUMENTS, 0)
    names, before = list(one.state_dict()), one(input_ids=tokens, labels=labels)
    patch(one)
    assert list(one.state_dict()) == names
    assert other.config._attn_implementation == "sdpa" and torch.equal(other(input_ids=tokens).logits, before.logits)
    assert not any("forward" in vars(module) for module in other.modules())
    with pytest.raises(ValueError, match="patched already"):
        patch(one)
    unpatch(one)
    assert one.config._attn_implementation == "sdpa" and not any("forward" in vars(module) for module in one.modules())
    after = one(input_ids=tokens, labels=labels)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    with pytest.raises(ValueError, match="not patched"):
        unpatch(one)


def test_a_patched_model_copies_as_one() -> None:
    model = patch(make("Llama"))
    copy = deepcopy(model)
    tokens, labels = batch_of(DOCUMENTS, 0)
    with torch.no_grad():
        copy.lm_head.weight.zero_()
    inputs = by_positions(DOCUMENTS, "cpu")
    assert copy(input_ids=tokens, labels=labels, **inputs).loss.item() == pytest.approx(torch.tensor(97.0).log().item())
    assert model(input_ids=tokens, labels=labels, **inputs).loss.item() > 4.7


def test_full_logits_never_exist_with_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch(make("Llama"))
    seen: list[Any] = []
    monkeypatch.setattr(huggingface, "linear_cross_entropy", lambda h, w, t, **options: seen.append((h, w, t)) or h.sum())
    tokens, labels = batch_of(DOCUMENTS, 0)
    model.lm_head.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    model(input_ids=tokens, labels=labels, **by_positions(DOCUMENTS, "cpu"))
    (hidden, weight, _), shape = seen
    assert hidden.shape == (len(DOCUMENTS), 64) and weight is model.lm_head.weight
    assert shape == ()  # the hooks of lm_head ran, on the loss


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # its successor is not in 5.17
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_give_the_same_gradients(reentrant: bool) -> None:
    model = patch(make("Qwen3")).train()
    tokens, labels = batch_of(SHARED, 0)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=tokens, labels=labels, **packed_inputs(SHARED)).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    right = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for mine, expected in zip(gradients(), right, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_autocast() -> None:
    plain = make("Qwen3")
    exact, patched = exact_copy(plain), patch(deepcopy(plain))
    batches = [batch_of(SHARED, seed) for seed in range(16)]  # of a few, the error is luck
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [patched(input_ids=x, labels=y, **packed_inputs(SHARED)) for x, y in batches]
        theirs = results(plain, [alone(plain, SHARED, *batch) for batch in batches])
    mine = results(patched, [output.loss for output in outputs])
    check_errors(mine, theirs, results(exact, [alone(exact, SHARED, *batch) for batch in batches]))


def test_adapters_on_the_feed_forward_work() -> None:
    """Whatever stands in for `down_proj` after the patch is called, as PEFT's adapters need."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = patch(make("Llama"))
    feed_forward = model.model.layers[0].mlp
    x = torch.randn(1, 5, 64)
    once = feed_forward(x)
    doubled = Doubled(96, 64, bias=False)
    doubled.weight = feed_forward.down_proj.weight
    feed_forward.down_proj = doubled
    torch.testing.assert_close(feed_forward(x), 2 * once)


def test_each_forward_pass_makes_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    original = PackedLayout.from_cu_seqlens
    monkeypatch.setattr(PackedLayout, "from_cu_seqlens", lambda *a, **k: built.append(a) or original(*a, **k))
    model, tokens = make("Llama"), batch_of(DOCUMENTS, 0)[0]
    model.set_attn_implementation(register_attention())
    for given in (by_positions, by_cu_seq_lens):
        inputs = given(DOCUMENTS, "cpu")
        built.clear()
        first = model(input_ids=tokens, **inputs).logits
        assert len(built) == 1
        assert torch.equal(model(input_ids=tokens, **inputs).logits, first) and len(built) == 1
    ends = inputs["cu_seq_lens_q"]
    ends.copy_(torch.tensor([0, 2, 4, 20, 25]))  # in place: the same tensor, another layout
    assert not torch.equal(model(input_ids=tokens, **inputs).logits, first) and len(built) == 2


def test_a_layout_lives_no_longer_than_its_tensor() -> None:
    ends = torch.tensor([0, 3, 5])
    layout = layout_of_documents(ends, 5)
    assert layout_of_documents(ends, 5) is layout
    with pytest.raises(ValueError, match="tokens is 6"):
        layout_of_documents(ends, 6)
    kept, entries = weakref.ref(layout), len(integrations._LAYOUTS)
    del layout, ends
    assert kept() is None and len(integrations._LAYOUTS) == entries - 1


def test_a_sharded_head_is_gathered_for_the_loss() -> None:
    """FSDP2 on a single process: outside of the hooks of `lm_head`, its weight is a DTensor, which nothing here could read."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, (tokens, labels) = patch(make("Llama")), batch_of(SHARED, 0)
        right = model(input_ids=tokens, labels=labels, **packed_inputs(SHARED)).loss
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for module in (*model.model.layers, model.lm_head, model):
            torch.distributed.fsdp.fully_shard(module, mesh=mesh)
        loss = model(input_ids=tokens, labels=labels, **packed_inputs(SHARED)).loss
        loss.backward()
        assert torch.equal(loss, right) and model.lm_head.weight.grad.to_local().abs().sum() > 0
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_as_one_graph() -> None:
    model, (tokens, labels) = patch(make("Qwen3")), batch_of(SHARED, 0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    losses = [each(input_ids=tokens, labels=labels, **packed_inputs(SHARED)).loss for each in (model, compiled)]
    assert torch.equal(losses[1], losses[0])


@pytest.mark.gpu
def test_on_a_gpu_cu_seq_lens_cause_no_synchronisation() -> None:
    model = patch(make("Qwen3").to("cuda", torch.bfloat16))
    tokens, labels = batch_of(DOCUMENTS, 0, "cuda")
    count = (labels[:, 1:] != -100).sum()
    inputs = {**by_positions(DOCUMENTS, "cuda"), **by_cu_seq_lens(DOCUMENTS, "cuda"), "num_items_in_batch": count}
    model(input_ids=tokens, labels=labels, **inputs).loss.backward()  # compiles
    inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_q"].clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(input_ids=tokens, labels=labels, **inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_unsupported_options_of_attention_are_refused() -> None:
    model, (tokens, labels) = patch(make("Qwen3")), batch_of(DOCUMENTS, 0)
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    with pytest.raises(ValueError, match="batch of 1, not 2"):
        model(input_ids=tokens.expand(2, -1))
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(input_ids=tokens, labels=labels, logits_to_keep=1)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(labels=labels)
    model.config.attention_dropout = 0.5
    unpatch(model)
    model.set_attn_implementation(register_attention())
    with torch.inference_mode():
        cache = model(input_ids=tokens, use_cache=True)
    cache = cache.cache if "cache" in cache else cache.past_key_values
    with pytest.raises(ValueError, match="no cache, got 1 queries and 26 keys"):
        model(tokens[:, :1], None, None, cache)
    with pytest.raises(ValueError, match="no attention_mask"):
        model(input_ids=tokens, attention_mask=torch.ones(1, 1, 25, 25))
    for module in model.modules():
        module.attention_dropout = 0.5
    with pytest.raises(ValueError, match="no dropout"):
        model.train()(input_ids=tokens)
    sliding = make("Qwen3", use_sliding_window=True, max_window_layers=1, sliding_window=4)
    with pytest.raises(ValueError, match="no sliding_window"):
        patch(sliding)(input_ids=tokens)
    with pytest.raises(ValueError, match="causal"):
        huggingface.attention_forward(nn.Module(), *torch.zeros(3, 1, 2, 4, 8), None, is_causal=False)


def test_other_architectures_and_losses_are_refused() -> None:
    model = make("Llama")
    model.loss_function = F.cross_entropy
    with pytest.raises(ValueError, match="loss function of its own"):
        patch(model)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="GPT2LMHeadModel: supported are LlamaForCausalLM and Qwen3ForCausalLM"):
        patch(transformers.GPT2LMHeadModel(config))


def test_a_layout_made_while_a_graph_is_captured_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice(torch.Tensor):
        is_cuda = True

    ends = torch.tensor([0, 3, 5]).as_subclass(OnDevice)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    entries = len(integrations._LAYOUTS)
    assert layout_of_documents(ends, 5) is not layout_of_documents(ends, 5) and len(integrations._LAYOUTS) == entries
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert layout_of_documents(ends, 5) is layout_of_documents(ends, 5)
