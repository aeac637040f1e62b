"""Use the attention and the loss in a model of your own: three documents in one packed sequence, the second after the first.

python examples/kernels_in_your_model.py
"""

import torch

import sbp_fast

HEADS, WIDTH, VOCABULARY = 4, 16, 100


def main() -> None:
    """Compute a loss and its gradients, and check that the third document does not see the other two."""
    torch.manual_seed(0)
    layout = sbp_fast.PackedLayout.from_tree([5, 7, 4], parents=[-1, 0, -1])  # a seed, its partner, another document
    tokens = torch.randint(VOCABULARY, (16,))
    table = torch.randn(VOCABULARY, HEADS * WIDTH, requires_grad=True)

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        x = table[tokens].unflatten(-1, (HEADS, WIDTH))
        return sbp_fast.packed_attention(x, x, x, layout).flatten(1)

    targets = tokens.roll(-1)
    targets[[4, 11, 15]] = -100  # the last token of a document predicts nothing
    loss = sbp_fast.linear_cross_entropy(hidden(tokens), table, targets)
    loss.backward()
    changed = tokens.clone()
    changed[0] = (changed[0] + 1) % VOCABULARY  # in the seed
    moved = (hidden(changed) - hidden(tokens)).abs().amax(1) > 0
    print(f"loss {loss.item():.3f}, gradient {table.grad.norm().item():.3f}")
    print(f"rows that a change of the first token moves: {moved.nonzero().flatten().tolist()}")


if __name__ == "__main__":
    main()
