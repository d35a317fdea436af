"""Batch normalisation stays on its stored statistics in train mode, and comes back when released."""

import copy

import torch
from torch import nn

from genesplice_hf.adaptation.freezing import freeze, freeze_batch_norm, unfreeze, unfreeze_batch_norm


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
        self.classifier = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.trunk(x))


def test_freeze_and_unfreeze():
    toy = Toy()
    assert freeze(toy) is toy and not any(p.requires_grad for p in toy.parameters())
    assert all(p.requires_grad for p in unfreeze(toy.trunk).parameters())
    assert not any(p.requires_grad for p in toy.classifier.parameters())


def test_statistics_stand_still_in_train_mode_and_the_head_is_left_alone():
    toy = Toy()
    assert freeze_batch_norm(toy, skip=["classifier"]) == freeze_batch_norm(toy, skip=["classifier"]) == 1
    before = copy.deepcopy(toy.state_dict())
    x = torch.randn(5, 2, 4) * 3 + 1
    toy.train()(x)
    after = toy.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {f"classifier.1.{name}" for name in statistics}
    # In train mode the trunk computes what it computes in eval mode.
    torch.testing.assert_close(toy.train().trunk(x), copy.deepcopy(toy).eval().trunk(x), atol=0, rtol=0)
    assert not toy.trunk[1].weight.requires_grad and toy.classifier[1].weight.requires_grad


def test_release():
    toy = Toy()
    assert unfreeze_batch_norm(toy) == 0
    freeze_batch_norm(toy)
    assert unfreeze_batch_norm(toy.train()) == 2
    before = toy.trunk[1].running_mean.clone()
    toy(torch.randn(5, 2, 4) + 1)
    assert not torch.equal(before, toy.trunk[1].running_mean)
    assert toy.trunk[1].weight.requires_grad


def test_a_copy_keeps_the_freeze_and_can_be_released_alone():
    toy = Toy()
    freeze_batch_norm(toy)
    twin = copy.deepcopy(toy)
    assert unfreeze_batch_norm(twin.train()) == 2
    means = [toy.trunk[1].running_mean.clone(), twin.trunk[1].running_mean.clone()]
    x = torch.randn(5, 2, 4) + 1
    toy.train()(x), twin(x)
    assert torch.equal(means[0], toy.trunk[1].running_mean)
    assert not torch.equal(means[1], twin.trunk[1].running_mean)
