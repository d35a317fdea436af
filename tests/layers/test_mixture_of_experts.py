"""Mixture of experts: a loop over tokens and experts, transformers' Mixtral, and the losses by hand.

Shapes: B batch, L tokens, T real tokens, E hidden size, n experts, k experts per token.
"""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from genesplice_hf.layers.feed_forward import SwiGLU
from genesplice_hf.layers.mixture_of_experts import MixtureOfExperts, Router, router_losses, share_of_step

HIDDEN, INNER = 6, 10
# (experts, experts per token): one, some, all, and more experts than there are tokens.
SIZES = pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 2), (3, 3), (64, 2)])


def make(experts: int, top_k: int, dtype: torch.dtype = torch.float64) -> MixtureOfExperts:
    """A layer of which every weight matters."""
    layer = MixtureOfExperts(HIDDEN, INNER, experts, top_k).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    return layer


def padding() -> torch.Tensor:
    """(3, 9): a whole row, an end, nothing."""
    return torch.tensor([[i < real for i in range(9)] for real in (9, 4, 0)])


def one_token(layer: MixtureOfExperts, x_E: torch.Tensor, top_k: int) -> torch.Tensor:
    """The slow twin: one token, one expert after the other."""
    scores = (layer.router.weight @ x_E).exp()
    best = sorted(range(len(scores)), key=lambda expert: -scores[expert].item())[:top_k]
    total = sum(scores[expert] for expert in best)
    out = torch.zeros_like(x_E)
    for number in best:
        expert = layer.experts[number]
        gate, up = expert.gate_proj.weight @ x_E, expert.up_proj.weight @ x_E
        out = out + scores[number] / total * (expert.down_proj.weight @ (gate / (1 + (-gate).exp()) * up))
    return out


def slow_layer(layer: MixtureOfExperts, x: torch.Tensor, mask: torch.Tensor, top_k: int) -> torch.Tensor:
    tokens = zip(x.flatten(0, 1), mask.flatten(), strict=True)
    return torch.stack([one_token(layer, token, top_k) if seen else token * 0 for token, seen in tokens]).view_as(x)


@SIZES
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
def test_the_layer_is_a_loop_over_tokens_and_experts(experts, top_k, is_padded) -> None:
    layer, x = make(experts, top_k), torch.randn(3, 9, HIDDEN, dtype=torch.float64, requires_grad=True)
    mask = padding() if is_padded else None
    out, logits = layer(x, mask)
    expected = slow_layer(layer, x, torch.ones(3, 9) if mask is None else mask, top_k)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits, x @ layer.router.weight.T, rtol=0, atol=1e-10)
    inputs, upstream = [x, *layer.parameters()], torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream, allow_unused=True)
    for found, wanted in zip(ours, theirs, strict=True):
        wanted = torch.zeros_like(found) if wanted is None else wanted
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_the_layer_is_mixtrals() -> None:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=4, num_experts_per_tok=2)
    theirs, ours = MixtralSparseMoeBlock(config), make(4, 2, torch.float32)
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        for number, expert in enumerate(ours.experts):
            both = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            theirs.experts.gate_up_proj[number] = both
            theirs.experts.down_proj[number] = expert.down_proj.weight
    x = torch.randn(3, 9, HIDDEN)
    torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-5, atol=1e-5)


def test_one_expert_is_the_dense_layer() -> None:
    layer, dense = make(1, 1), SwiGLU(HIDDEN, INNER).double()
    dense.load_state_dict(layer.experts[0].state_dict())
    x = torch.randn(3, 9, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], dense(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_exactly_the_experts_that_got_a_token_learn(top_k) -> None:
    """The others get a gradient of zeros, which data-parallel training needs, and not none at all."""
    layer, x = make(8, top_k), torch.randn(1, 5, HIDDEN, dtype=torch.float64)
    out, logits = layer(x)
    out.square().sum().backward()
    used = set(logits.topk(top_k).indices.flatten().tolist())
    assert 0 < len(used) < 8
    for number, expert in enumerate(layer.experts):
        for parameter in expert.parameters():
            assert bool(parameter.grad.any()) == (number in used)
    # With one expert per token the renormalised weight is the constant 1.
    assert bool((layer.router.weight.grad.abs() > 1e-12).any()) == (top_k == 2)


def test_padding_is_not_routed() -> None:
    layer, mask = make(4, 2), padding()
    x = torch.randn(3, 9, HIDDEN, dtype=torch.float64)
    other = torch.where(mask[..., None], x, torch.randn_like(x) * 100)
    out, logits = layer(x, mask)
    assert torch.equal(out, layer(other, mask)[0])
    assert not out[~mask].any()
    assert router_losses([logits], mask, 2) == router_losses([layer(other, mask)[1]], mask, 2)
    alone = layer(x[1:2, :4])[0]
    torch.testing.assert_close(out[1:2, :4], alone, rtol=0, atol=1e-12)


def test_a_batch_of_padding_gives_zeros() -> None:
    layer, x = make(4, 2), torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    out, logits = layer(x, nothing)
    losses = router_losses([logits], nothing, 2)
    assert not out.any() and losses == (0, 0)
    (out.sum() + losses.balance + losses.z).backward()
    assert not any(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("uses_autocast", [False, True])
def test_the_router_computes_in_float32(uses_autocast) -> None:
    router, x = Router(64, 4, bias=False).bfloat16(), torch.randn(5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=uses_autocast):
        logits = router(x)
    assert torch.equal(logits, x.float() @ router.weight.float().T)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_half_precision_stays_half_precision() -> None:
    layer, x = make(4, 2, torch.bfloat16), torch.randn(3, 9, HIDDEN).bfloat16()
    out, logits = layer(x)
    assert (out.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), layer.float()(x.float())[0], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_uniform_router_has_a_balance_of_one(top_k) -> None:
    losses = router_losses([torch.zeros(2, 7, 5)], None, top_k)
    assert losses.balance.item() == pytest.approx(1)
    assert losses.z.item() == pytest.approx(1.6094379124341003**2)  # ln(5)^2


def test_a_router_that_knows_one_expert_has_a_balance_of_their_number() -> None:
    logits = torch.tensor([40.0, 0, 0, 0, 0]).expand(2, 7, 5)
    assert router_losses([logits], None, 1).balance.item() == pytest.approx(5)


def test_losses_by_hand() -> None:
    """Two experts, three tokens of which the last is padding: P = (0.75 + 0.4) / 2 and f = (1 / 2, 1 / 2)."""
    logits = torch.tensor([[[0.75, 0.25], [0.4, 0.6], [0.1, 0.9]]]).log()
    losses = router_losses([logits + 2], torch.tensor([[True, True, False]]), 1)
    assert losses.balance.item() == pytest.approx(2 * (0.5 * 0.575 + 0.5 * 0.425))
    assert losses.z.item() == pytest.approx(4)
    unequal = router_losses([logits], None, 1)
    assert unequal.balance.item() == pytest.approx(2 * (1 / 3 * 1.25 / 3 + 2 / 3 * 1.75 / 3))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_balance_is_mixtrals(top_k) -> None:
    """Theirs counts every token k times."""
    logits, mask = torch.randn(3, 9, 4, requires_grad=True), padding()
    theirs = load_balancing_loss_func((logits.flatten(0, 1),), 4, top_k, mask.long()) / top_k
    ours = router_losses([logits], mask, top_k).balance
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


def test_losses_are_means_over_layers_and_know_both_strands() -> None:
    first, second, mask = torch.randn(3, 9, 4), torch.randn(3, 9, 4), padding()
    alone = [router_losses([logits], mask, 2) for logits in (first, second)]
    both = router_losses([first, second], mask, 2)
    torch.testing.assert_close(both.balance, (alone[0].balance + alone[1].balance) / 2)
    torch.testing.assert_close(both.z, (alone[0].z + alone[1].z) / 2)
    strands = router_losses([torch.cat([first, second])], mask, 2)
    assert strands == router_losses([torch.cat([first[mask], second[mask]])[None]], None, 2)


def test_a_pass_counts_by_its_labels() -> None:
    labels = torch.tensor([[1, -100, 2], [3, -100, -100]])
    assert share_of_step(labels, None) == 1
    assert share_of_step(labels, 12) == 0.25
    parts = [share_of_step(row, torch.tensor(3)) for row in labels]
    assert sum(parts) == 1


def test_residual_outputs_are_marked() -> None:
    layer = make(3, 1)
    marked = [name for name, module in layer.named_modules() if getattr(module, "feeds_residual", False)]
    assert marked == [f"experts.{number}.down_proj" for number in range(3)]


def test_names_of_the_checkpoint() -> None:
    experts = [f"experts.{e}.{name}_proj.weight" for e in range(2) for name in ("gate", "up", "down")]
    assert list(make(2, 1).state_dict()) == ["router.weight", *experts]
