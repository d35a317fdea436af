"""Batch norms that are held keep their statistics whatever the mode; copies, pickles and release."""

import copy
import pickle

import pytest
import torch
from torch import nn

from genesplice_hf.layers.norm import FreezesBatchNorm, HeldBatchNorm, freeze_batch_norm, unfreeze_batch_norm

KINDS = {
    "1d": lambda: nn.BatchNorm1d(3),
    "2d": lambda: nn.BatchNorm2d(3),
    "3d": lambda: nn.BatchNorm3d(3),
    "sync": lambda: nn.SyncBatchNorm(3),
}


class Toy(FreezesBatchNorm, nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), KINDS[kind]())
        self.axes = {"1d": 0, "sync": 0, "2d": 2, "3d": 3}[kind]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body[0](x)
        return self.body[1](x[(..., *[None] * self.axes)])


@pytest.mark.parametrize("kind", KINDS)
def test_held_through_train(kind: str) -> None:
    torch.manual_seed(0)
    toy, x = Toy(kind), torch.randn(7, 3) * 2 + 1
    assert freeze_batch_norm(toy) == ["body.1"] and freeze_batch_norm(toy) == []
    before = copy.deepcopy(toy.state_dict())
    expected = copy.deepcopy(toy).eval()(x)
    toy.train()
    assert toy.body.training and not toy.body[1].training
    assert torch.equal(toy(x), expected)
    assert all(torch.equal(toy.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in toy.body[1].parameters())
    assert toy.body[1].track_running_stats
    again = pickle.loads(pickle.dumps(toy.body[1]))
    assert isinstance(again, HeldBatchNorm) and type(again) is type(toy.body[1])
    assert not again.train().training
    twin = copy.deepcopy(toy)
    assert unfreeze_batch_norm(twin) == ["body.1"] and twin.body[1].training
    assert not toy.train().body[1].training
    toy.unfreeze_batch_norm()
    assert type(toy.body[1]) is type(KINDS[kind]())
    assert toy.body[1].training and all(parameter.requires_grad for parameter in toy.body[1].parameters())
    toy.freeze_batch_norm()
    assert not toy.train().body[1].training
