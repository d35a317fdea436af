"""Batch normalisation stays on its stored statistics in train mode, and comes back when released."""

import copy

import pytest
import torch
from torch import nn

from genesplice_hf.adaptation.freezing import (
    freeze,
    freeze_all,
    freeze_batch_norm,
    restore_requires_grad,
    train_only_last_n_layers,
    train_only_layer_norms,
    unfreeze,
    unfreeze_batch_norm,
)
from genesplice_hf.errors import GeneSpliceError


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
    assert freeze_batch_norm(toy, skip=["classifier"]).batch_norms == ["trunk.1"]
    assert freeze_batch_norm(toy, skip=["classifier"]).batch_norms == []
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


class Stack(nn.Module):
    """Two stacks of layers, the one that counts after the other, and a head with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)) for _ in range(3))
        self.norm = nn.BatchNorm1d(2)
        self.classifier = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1))
        # A second name of one tensor.
        self.layers[0][1].weight = self.layers[2][1].weight


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_layer_norms_alone_train():
    stack = Stack()
    norms = {f"layers.{index}.0.{part}" for index in range(3) for part in ("weight", "bias")}
    everything = trainable(stack)
    snapshot = train_only_layer_norms(stack)
    assert trainable(stack) == norms
    restore_requires_grad(stack, snapshot)
    assert trainable(stack) == everything
    train_only_layer_norms(stack, include_head=True)
    assert trainable(stack) == norms | {name for name in everything if name.startswith("classifier")}
    with pytest.raises(GeneSpliceError, match="has no layer norms"):
        train_only_layer_norms(nn.Linear(2, 2))


def test_the_last_layers_train():
    stack = Stack()
    head = {name for name in trainable(stack) if name.startswith("classifier")}
    first = train_only_last_n_layers(stack, 1)
    # The tensor with two names trains, under the first of them.
    last = {"layers.2.0.weight", "layers.2.0.bias", "layers.2.1.bias", "layers.0.1.weight"}
    assert trainable(stack) == last | head
    second = train_only_last_n_layers(stack, 0, include_head=False)
    assert trainable(stack) == set()
    restore_requires_grad(stack, second)
    assert trainable(stack) == last | head
    restore_requires_grad(stack, first)
    assert trainable(stack) == trainable(Stack())
    for n in (-1, 4):
        with pytest.raises(GeneSpliceError, match="must be 0 to 3"):
            train_only_last_n_layers(stack, n)
    with pytest.raises(GeneSpliceError, match="no ModuleList"):
        train_only_last_n_layers(nn.Linear(2, 2), 1)
    with pytest.raises(GeneSpliceError, match="needs a task head"):
        train_only_last_n_layers(nn.Sequential(stack), 1)


def test_a_snapshot_brings_everything_back():
    stack = Stack()
    freeze(stack.tower)
    before = trainable(stack)
    one = freeze_batch_norm(stack)
    two = freeze_all(stack)
    assert trainable(stack) == set() and not stack.train().norm.training
    restore_requires_grad(stack, two)
    assert not stack.norm.training and trainable(stack) == before - {"norm.weight", "norm.bias"}
    restore_requires_grad(stack, one)
    assert stack.norm.training and trainable(stack) == before
    with pytest.raises(GeneSpliceError, match="of another model"):
        restore_requires_grad(Stack(), one)
