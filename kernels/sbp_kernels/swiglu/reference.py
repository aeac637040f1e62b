"""SwiGLU by its definition in float64, for tests."""

from __future__ import annotations

from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """Return gate * sigmoid(gate) * up of gate_up [..., 2F], in float64."""
    gate, up = gate_up.double().chunk(2, -1)
    return gate * gate.sigmoid() * up


def swiglu_linear(gate_up: Tensor, down_weight: Tensor) -> Tensor:
    """Return swiglu(gate_up) @ down_weight.T, [..., W], in float64."""
    return swiglu(gate_up) @ down_weight.double().T
