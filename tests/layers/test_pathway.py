"""Pathway tokens and annotations against dense twins; only members may speak."""

import pytest
import torch
from torch import nn

from genesplice_hf.layers.pathway import GeneAnnotationEmbedding, MaskedLinear, PathwayTokens, attention_rollout

VOCAB, WIDTH, SIZE = 12, 3, 5
MEMBERS = [[0, 3, 4], [3, 7], [9]]
GENES = torch.tensor([gene for members in MEMBERS for gene in members])
PATHWAYS = torch.tensor([p for p, members in enumerate(MEMBERS) for _ in members])


def dense(module: MaskedLinear, x_BVC: torch.Tensor) -> torch.Tensor:
    """The slow twin: a dense weight (V, C, P, k) that is zero outside the members."""
    weight = x_BVC.new_zeros(VOCAB, x_BVC.shape[-1], len(MEMBERS), WIDTH)
    for number, (gene, pathway) in enumerate(zip(GENES.tolist(), PATHWAYS.tolist(), strict=True)):
        weight = _put(weight, gene, pathway, module.weight[:, number])
    return torch.einsum("bvc,vcpk->bpk", x_BVC, weight) + module.bias


def _put(weight: torch.Tensor, gene: int, pathway: int, value: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(weight)
    mask[gene, :, pathway] = 1
    return weight + mask * value[None, :, None]


def test_values_and_gradients_are_those_of_the_dense_form() -> None:
    torch.manual_seed(0)
    module = MaskedLinear(GENES, PATHWAYS, len(MEMBERS), WIDTH, bias=True, channels=2).double()
    x = torch.randn(4, VOCAB, 2, dtype=torch.float64)
    found = []
    for run in (module, lambda x: dense(module, x)):
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        out = run(inputs)
        (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()).sum().backward()
        found.append([out.detach(), inputs.grad, module.weight.grad.clone(), module.bias.grad.clone()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def tokens(num_unannotated: int = 1, **options) -> PathwayTokens:
    torch.manual_seed(0)
    module = PathwayTokens(GENES, PATHWAYS, VOCAB, len(MEMBERS), num_unannotated, WIDTH, SIZE, **options)
    return module.double()


def cells() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.arange(VOCAB), torch.arange(VOCAB).flip(0)])
    values = torch.rand(2, VOCAB, dtype=torch.float64) * 5 + 0.5
    return ids, values, torch.zeros(2, VOCAB, dtype=torch.bool)


@pytest.mark.parametrize("norm", [True, False])
def test_only_members_reach_a_token(norm: bool) -> None:
    """A fault of a published mask: columns ordered (k, P) were read as (P, k), and tokens mixed pathways."""
    module = tokens(norm=norm)
    ids, values, masked = cells()
    for pathway, members in enumerate([*MEMBERS, list(range(VOCAB))]):
        inputs = values.clone().requires_grad_()
        module(ids, inputs, masked)[:, pathway, 0].sum().backward()
        for row in range(2):
            reached = {int(ids[row, place]) for place in inputs.grad[row].nonzero().flatten()}
            assert reached == set(members)


def test_hidden_values_show_in_a_channel_of_their_own() -> None:
    module = tokens(0)
    ids, values, masked = cells()
    masked[:, 3] = True
    hidden = torch.where(masked, 0.0, values)
    changed = (module(ids, hidden, masked) - module(ids, hidden, torch.zeros_like(masked))).abs().amax(-1) > 0
    gene = ids[:, 3].tolist()
    assert changed.tolist() == [[gene[row] in members for members in MEMBERS] for row in range(2)]


def test_order_and_padding_change_nothing() -> None:
    module = tokens()
    ids, values, masked = cells()
    expected = module(ids, values, masked)
    order = torch.randperm(VOCAB)
    torch.testing.assert_close(module(ids[:, order], values[:, order], masked[:, order]), expected)
    wider = [nn.functional.pad(x, (0, 3)) for x in (ids, values, masked)]
    torch.testing.assert_close(module(*wider), expected)


def test_every_parameter_learns() -> None:
    for options in ({}, {"bias": False, "norm": False}):
        module = tokens(2, **options)
        ids, values, masked = cells()
        masked[:, ::2] = True
        module(ids, values, masked).pow(3).sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_annotations_are_the_mean_of_terms() -> None:
    torch.manual_seed(0)
    terms_of = {1: [0, 2], 4: [2], 5: [0, 1, 3]}
    genes = torch.tensor([gene for gene, terms in terms_of.items() for _ in terms])
    terms = torch.tensor([term for found in terms_of.values() for term in found])
    module = GeneAnnotationEmbedding(genes, terms, VOCAB, 4, SIZE)
    with torch.no_grad():
        module.scale.fill_(0.7)
    found = module()
    for gene in range(VOCAB):
        expected = torch.zeros(SIZE)
        if gene in terms_of:
            expected = 0.7 * module.embedding.weight[terms_of[gene]].mean(0)
        torch.testing.assert_close(found[gene], expected)
    found.pow(2).sum().backward()
    assert module.scale.grad.abs() > 0 and (module.embedding.weight.grad.abs().sum(-1) > 0).all()


def test_rollout_is_the_product_of_mixed_layers() -> None:
    torch.manual_seed(0)
    attentions = tuple(torch.rand(2, 3, 4, 4).softmax(-1) for _ in range(3))
    expected = torch.eye(4).expand(2, 4, 4)
    for weights in attentions:
        mixed = weights.mean(1) + torch.eye(4)
        expected = (mixed / mixed.sum(-1, keepdim=True)) @ expected
    found = attention_rollout(attentions)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4))
