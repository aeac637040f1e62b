"""Packed input in models of Hugging Face's transformers: attention by registration, the rest by a patch of one model.

`register_attention` serves every model that uses transformers' `AttentionInterface`. `patch` gives one Llama or Qwen3 model,
and no other of its class, that attention, this package's RMSNorm and SwiGLU, and a loss that never makes full logits.
transformers is imported by the calls that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbp_kernels.attention import packed_attention
from sbp_kernels.integrations import cached_by_tensor, layout_of_documents
from sbp_kernels.layout import PackedLayout
from sbp_kernels.linear_cross_entropy import linear_cross_entropy
from sbp_kernels.norm import rms_norm
from sbp_kernels.swiglu import swiglu, swiglu_linear

NAME = "sbp_packed"
PREVIOUS = "_attention_before_sbp_kernels"  # attribute of a patched model


def register_attention(name: str = NAME) -> str:
    """Make `attn_implementation=name` mean `attention_forward`, for every model that uses `AttentionInterface`.

    Nothing is registered with `AttentionMaskInterface`: transformers makes no mask for a name unknown there, while for a known
    one it looks for documents in the position ids first, and waits for the device to do so. It also drops a padding mask
    without a word then: packed input must have no padding. Returns the name.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(name, attention_forward)
    return name


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    packed_layout: PackedLayout | None = None,
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`packed_attention` with the signature of transformers' attention functions.

    The documents are those of `packed_layout`; without it those of `cu_seq_lens_q` (`cu_seq_lens_k` is taken to be equal);
    without either those that `position_ids` show by starting again, which on a device are read back once a forward pass.

    Args:
        module: the attention module; its `is_causal` is read.
        query: [1, Hq, T, D], the packed sequence as a batch of one.
        key: [1, Hkv, T, D].
        value: [1, Hkv, T, D].
        attention_mask: must be None.
        dropout: must be 0.
        scaling: factor of the scores; D ** -0.5 by default.
        packed_layout: see above.
        cu_seq_lens_q: see above.
        position_ids: see above.
        kwargs: options of other attentions, refused if they are set and change the result.

    Returns:
        [1, T, Hq, D], and None for the attention weights.

    Raises:
        ValueError: a batch of more than one, a cache, or an option that packed attention does not have.
    """
    refused = {"attention_mask": attention_mask, "dropout": dropout or None}
    refused |= {name: kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux", "position_bias")}
    if present := [name for name, given in refused.items() if given is not None]:
        raise ValueError(f"packed attention takes no {', '.join(present)}: leave it out, or use another attn_implementation")
    if (getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]) is False:
        raise ValueError("packed attention is causal: use another attn_implementation for is_causal=False")
    if key.shape[2] != query.shape[2]:
        given = f"{query.shape[2]} queries and {key.shape[2]} keys"
        raise ValueError(f"packed attention reads no cache, got {given}: use another attn_implementation to generate")
    layout = _layout_of(query.shape[0], query.shape[2], packed_layout, cu_seq_lens_q, position_ids)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if torch.is_autocast_enabled(query.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (q, k, v))
    return packed_attention(q, k, v, layout, softmax_scale=scaling).unsqueeze(0), None


def packed_inputs(layout: PackedLayout) -> dict[str, Any]:
    """Arguments of a model's forward call for a layout, beside `input_ids` [1, T]; needed for shared prefixes.

    For labels, put -100 wherever a token does not continue the one before it in the packed sequence, as transformers'
    `DataCollatorWithFlattening` does: at the first token of every segment but one that directly follows its parent.
    """
    return {"position_ids": layout.positions.long().unsqueeze(0), "packed_layout": layout, "use_cache": False}


def patch(model: nn.Module, *, name: str = NAME) -> nn.Module:
    """Put this package's operations into one Llama or Qwen3 causal language model, until `unpatch`; returns the model.

    - Attention: `attention_forward`. The model gets a config of its own, since models may share one.
    - RMSNorm: `rms_norm`, with the module's own weight.
    - Feed-forward: gate and up are copied side by side for `swiglu_linear`, which on CUDA saves these two numbers a feature
      where transformers' code saves four. Adapters on the projections work; hooks on a plain `down_proj` do not run. Under
      torch.compile, and with another activation, it stays as it is.
    - Loss: with labels, the result's logits are None, since they never exist together, and `loss` is
      `linear_cross_entropy`, called through `lm_head`, so that FSDP's hooks run. Without labels, logits are as ever. A batch
      in which no label counts has the loss 0, where transformers has NaN.

    Parameters, their names and the modules stay the same. Patch before wrapping (PEFT, FSDP, Accelerate, torch.compile).

    Raises:
        ValueError: another architecture; a model patched before, or with a loss function or modules' `forward` of its own.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.utils.generic import can_return_tuple

    replacements = list(_replacements(model))
    if any("forward" in vars(module) for module, _ in replacements):
        raise ValueError("model has modules with a forward of their own: it is patched already, or was wrapped before")
    if model.loss_function is not ForCausalLMLoss:
        raise ValueError("model has a loss function of its own, which a patched model would not call: remove it first")
    register_attention(name)
    shared: Any = model.config
    own = deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    setattr(model, PREVIOUS, own._attn_implementation)
    model.set_attn_implementation(name)  # type: ignore[operator]
    for module, forward in replacements:
        module.forward = MethodType(can_return_tuple(forward) if module is model else forward, module)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`, except that the model keeps a config of its own; returns the model.

    Raises:
        ValueError: the model is not patched.
    """
    if not hasattr(model, PREVIOUS):
        raise ValueError("model is not patched: there is nothing to undo")
    for module, _ in _replacements(model):
        vars(module).pop("forward", None)
    model.set_attn_implementation(getattr(model, PREVIOUS))  # type: ignore[operator]
    delattr(model, PREVIOUS)
    return model


def _replacements(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Each module that gets a forward function of its own, with that function."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP, LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3MLP, Qwen3RMSNorm

    if not isinstance(model, LlamaForCausalLM | Qwen3ForCausalLM):
        raise ValueError(f"model is a {type(model).__name__}: supported are LlamaForCausalLM and Qwen3ForCausalLM")
    yield model, _causal_lm_forward
    yield model.lm_head, _lm_head_forward
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm | Qwen3RMSNorm):
            yield module, _rms_norm_forward
        elif isinstance(module, LlamaMLP | Qwen3MLP) and model.config.hidden_act in ("silu", "swish"):
            yield module, _feed_forward_forward


def _causal_lm_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    logits_to_keep: Tensor | int = 0,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> Any:
    """`forward` of a patched model; see `patch`. The layout is made here, once for all layers."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if attention_mask is not None:
        raise ValueError("packed input has no padding: leave attention_mask out (to generate, unpatch the model)")
    if (given := input_ids if inputs_embeds is None else inputs_embeds) is None:
        raise ValueError("give either input_ids or inputs_embeds")
    batch, tokens = given.shape[:2]
    layout = _layout_of(batch, tokens, packed_layout, kwargs.get("cu_seq_lens_q"), position_ids).to(given.device)
    if position_ids is None:
        position_ids = layout.positions.long().unsqueeze(0)
    kwargs |= {"position_ids": position_ids, "packed_layout": layout}
    if labels is None:
        return type(self).forward(self, input_ids, inputs_embeds=inputs_embeds, logits_to_keep=logits_to_keep, **kwargs)
    if isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
        raise ValueError("logits_to_keep is for logits, and with labels there are none: leave one of them out")
    outputs = self.model(input_ids, inputs_embeds=inputs_embeds, **kwargs)
    hidden = outputs.last_hidden_state.flatten(0, 1)
    targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    options = {"ignore_index": ignore_index, "reduction": reduction, "normalizer": num_items_in_batch}
    loss = self.lm_head(hidden, targets.flatten().to(hidden.device), **options)
    others = {key: value for key, value in outputs.items() if key != "last_hidden_state"}
    return CausalLMOutputWithPast(loss=loss, **others)


def _lm_head_forward(self: Any, hidden: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
    """Logits, or with targets the loss."""
    if targets is None:
        return type(self).forward(self, hidden)
    return linear_cross_entropy(hidden, self.weight, targets, **options)


def _rms_norm_forward(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, self.weight, eps=self.variance_epsilon)


def _feed_forward_forward(self: Any, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return type(self).forward(self, x)
    gate_up = torch.cat([self.gate_proj(x), self.up_proj(x)], -1)
    down = self.down_proj
    if type(down) is nn.Linear and down.bias is None and "forward" not in vars(down):
        return swiglu_linear(gate_up, down.weight)
    return down(swiglu(gate_up))


def _layout_of(
    batch: int, tokens: int, packed_layout: PackedLayout | None, cu_seq_lens: Tensor | None, position_ids: Tensor | None
) -> PackedLayout:
    if batch != 1:
        raise ValueError(f"packed input is a batch of 1, not {batch}: join the sequences, as DataCollatorWithFlattening does")
    if packed_layout is not None:
        return packed_layout
    if cu_seq_lens is not None:
        return layout_of_documents(cu_seq_lens, tokens)
    if position_ids is not None:
        return _layout_of_positions(position_ids)
    return PackedLayout.from_lengths([tokens])


@cached_by_tensor
def _layout_of_positions(position_ids: Tensor) -> PackedLayout:
    """Layout of position ids [1, T]: a document begins wherever they do not increase by one, as in transformers."""
    positions = position_ids.reshape(-1).cpu()
    inner = (positions.diff() != 1).nonzero().squeeze(1) + 1
    ends = [*inner.tolist(), len(positions)]
    return PackedLayout.from_cu_seqlens([0, *ends]).to(position_ids.device)
