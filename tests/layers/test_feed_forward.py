"""SwiGLU, worked out by hand."""

import math

import torch

from genesplice_hf.layers.feed_forward import SwiGLU


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def test_two_units_by_hand() -> None:
    layer = SwiGLU(hidden_size=2, intermediate_size=3)
    gate, up = [[1.0, 0.0], [0.0, -1.0], [2.0, 1.0]], [[0.5, 0.5], [1.0, 0.0], [0.0, 3.0]]
    down = [[1.0, 0.0, 2.0], [0.0, -1.0, 1.0]]
    weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    layer.load_state_dict({name: torch.tensor(rows) for name, rows in weights.items()}, strict=True)
    x = [1.5, -0.5]
    hidden = [
        silu(sum(w * v for w, v in zip(g, x, strict=True))) * sum(w * v for w, v in zip(u, x, strict=True))
        for g, u in zip(gate, up, strict=True)
    ]
    expected = [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in down]
    torch.testing.assert_close(layer(torch.tensor(x)), torch.tensor(expected))


def test_it_works_on_each_token_alone() -> None:
    layer = SwiGLU(4, 6)
    x = torch.randn(2, 3, 4)
    alone = torch.stack([torch.stack([layer(token) for token in row]) for row in x])
    torch.testing.assert_close(layer(x), alone)
