"""The token head projects every position by itself."""

import torch

from genesplice_hf.heads.token import TokenClassificationHead


def test_each_position_is_projected_alone() -> None:
    head, x = TokenClassificationHead(4, 3, dropout=0.0), torch.randn(2, 5, 4)
    expected = torch.stack([torch.stack([head.out_proj(token) for token in row]) for row in x])
    assert head(x).shape == (2, 5, 3)
    torch.testing.assert_close(head(x), expected)


def test_dropout_acts_in_training_alone() -> None:
    head, x = TokenClassificationHead(64, 3, dropout=0.5), torch.randn(2, 5, 64)
    assert torch.equal(head.eval()(x), head(x))
    assert not torch.equal(head(x), head.train()(x))
