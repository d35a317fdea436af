"""Interactions, their norms and the layers around them, against closed forms, loops and each other.

Shapes: B batch, H heads, T bins, R residues, K latent size.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensor_sizes import LargestTensor
from torch import nn

from genesplice_hf.layers.conditioning import AdaptiveLayerNorm, FiLM, HyperGrid, SqueezeExcite
from genesplice_hf.layers.cross_attention import ContextAttentionBlock, InducedJointBlock, JointAttentionBlock
from genesplice_hf.layers.interaction import Interaction, reduce_scores
from genesplice_hf.layers.interaction_norm import MODULES, InteractionNorm, normalize_map

DEFAULTS: dict[str, Any] = {
    "latent_heads": 3, "latent_dim": 4, "interaction": "filip", "filip_reduce": "logavgexp", "filip_temperature": 0.05,
    "learn_temperature": False, "interaction_similarity": "cosine", "interaction_norm": "none",
    "interaction_norm_affine": True, "interaction_norm_eps": 1e-5, "interaction_norm_position": "post",
    "null_residue": True, "normalize_null": True, "residue_dropout": 0.0, "interaction_chunk_size": None,
    "attn_heads": 2, "attn_dim_head": 4, "ff_mult": 2, "dropout": 0.0, "norm_type": "layernorm",
    "_attn_implementation": "eager",
}  # fmt: skip
REDUCTIONS = [{"filip_reduce": kind} for kind in ("logavgexp", "max", "softmax")] + [{"interaction": "mean"}]


def options(**given: Any) -> Any:
    return SimpleNamespace(**(DEFAULTS | given))


def interaction(seed: int = 0, **given: Any) -> Interaction:
    torch.manual_seed(seed)
    layer = Interaction(options(**given), 5, 6).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.eval()


def sides(residues: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    mask = torch.ones(2, residues).bool()
    mask[0, -3:] = mask[1, :2] = False
    return torch.randn(2, 4, 5).double(), torch.randn(2, residues, 6).double(), mask


def run(layer: Interaction, x: torch.Tensor, p: torch.Tensor, mask: torch.Tensor | None, **given: Any) -> torch.Tensor:
    return layer(layer.bin_latents(x), layer.residue_latents(p), mask, **given)


def test_the_interaction_is_its_definition() -> None:
    """Head by head, bin by bin, with a plain mean of exponentials over real residues and the null key."""
    layer, (x, p, mask) = interaction(), sides()
    found = run(layer, x, p, mask)
    a, b = (part(y).unflatten(-1, (3, 4)) for part, y in ((layer.to_latent, x), (layer.context_to_latent, p)))
    for row in range(2):
        for place in range(4):
            for head in range(3):
                keys = [layer.null_residue[head], *b[row, mask[row], head]]
                cosines = torch.stack([torch.cosine_similarity(a[row, place, head], key, dim=0) for key in keys])
                expected = 0.05 * (cosines / 0.05).exp().mean().log()
                torch.testing.assert_close(found[row, place, head], expected)


def test_the_limits_of_the_mean_of_exponentials() -> None:
    scores = torch.tensor([[[[0.3, -0.2, 0.9]]]], dtype=torch.float64)
    hidden = torch.tensor([[True, False, False]])
    assert reduce_scores(scores, hidden, "logavgexp", 0.05).item() == pytest.approx(0.3)
    assert reduce_scores(scores, None, "logavgexp", 1e-4).item() == pytest.approx(0.9, abs=2e-4)
    assert reduce_scores(scores, None, "logavgexp", 1e4).item() == pytest.approx(scores.mean().item(), abs=1e-4)
    assert reduce_scores(scores, None, "max", 1.0).item() == 0.9
    weights = (scores / 0.5).softmax(-1)
    assert reduce_scores(scores, None, "softmax", 0.5).item() == pytest.approx((weights * scores).sum().item())


def test_nothing_but_the_null_key() -> None:
    layer, (x, p, mask) = interaction(), sides()
    found = run(layer, x, p, torch.zeros_like(mask))
    a = layer.bin_latents(x).keys
    null = nn.functional.normalize(layer.null_residue, dim=-1)
    torch.testing.assert_close(found, (a * null[:, None]).sum(-1).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype: torch.dtype) -> None:
    layer, (x, p, mask) = interaction().to(dtype), sides()
    found = run(layer, x.to(dtype), p.to(dtype), mask)
    assert found.dtype == torch.float32 and found.isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("null_residue", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_are_the_whole_map(reduction: dict[str, Any], null_residue: bool, chunk_size: int) -> None:
    """Values and gradients, with a chunk that holds padding alone."""
    layer = interaction(null_residue=null_residue, learn_temperature=True, **reduction)
    layer.log_temperature.data.fill_(math.log(0.3))
    x, p, mask = sides()
    found = []
    for size in (None, chunk_size):
        inputs = [y.clone().requires_grad_() for y in (x, p)]
        layer.zero_grad()
        y = run(layer, *inputs, mask, chunk_size=size)
        y.square().sum().backward()
        used = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        found.append([y.detach(), *(tensor.grad for tensor in inputs), *(gradient.clone() for gradient in used)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_chunks_need_a_quarter_of_the_map() -> None:
    """At 896 bins, 1,000 residues and 32 heads, in float32."""
    torch.manual_seed(0)
    layer = Interaction(options(latent_heads=32, latent_dim=64), 8, 8)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, p, sizes, found = torch.randn(1, 896, 8), torch.randn(1, 1000, 8), [], []
    with torch.no_grad():
        for chunk_size in (None, 128):
            with LargestTensor() as largest:
                found.append(run(layer, x, p, None, chunk_size=chunk_size))
            sizes.append(largest.elements)
    assert sizes[0] == 896 * 1001 * 32 and sizes[1] <= sizes[0] / 4
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


def test_dropped_residues_leave_the_count() -> None:
    layer, (x, p, _) = interaction(residue_dropout=0.5).train(), sides()
    torch.manual_seed(1)
    kept = torch.rand(2, 7) >= 0.5
    torch.manual_seed(1)
    torch.testing.assert_close(run(layer, x, p, None), run(layer.eval(), x, p, kept))
    bare = interaction(residue_dropout=0.99, null_residue=False).train()
    assert run(bare, x, p, None).isfinite().all()


def test_attention_pools_values() -> None:
    layer, (x, p, mask) = interaction(interaction="attention"), sides()
    found = run(layer, x, p, mask)
    longer = nn.functional.pad(p, (0, 0, 0, 2), value=9.0), nn.functional.pad(mask, (0, 2))
    torch.testing.assert_close(run(layer, x, *longer), found)
    assert found.shape == (2, 4, 3)


@pytest.mark.parametrize("kind", MODULES)
def test_norms_are_their_definitions(kind: str) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 3).double(), torch.ones(2, 5).bool()
    mask[1, 3:] = False
    norm = InteractionNorm(kind, 3, 1e-5, True).double().train()
    found = norm(x, mask)
    if kind == "layernorm":
        expected = nn.functional.layer_norm(x, (3,))
    elif kind == "rmsnorm":
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    elif kind == "batchnorm":
        real = x[mask]
        expected = (x - real.mean(0)) / (real.var(0, unbiased=False) + 1e-5).sqrt()
    else:
        rows = [row[seen] for row, seen in zip(x, mask, strict=True)]
        expected = torch.stack(
            [(y - r.mean(0)) / (r.var(0, unbiased=False) + 1e-5).sqrt() for y, r in zip(x, rows, strict=True)]
        )
    torch.testing.assert_close(found[mask], expected[mask])
    assert len(list(norm.parameters())) == {"rmsnorm": 1, "zscore_bins": 0}.get(kind, 2)
    if kind == "batchnorm":
        held = norm.eval()(x, mask)[mask]
        assert not torch.equal(held, found[mask])


def test_a_map_is_normalised_over_heads_or_residues() -> None:
    torch.manual_seed(0)
    scores, mask = torch.randn(2, 3, 4, 6).double(), torch.ones(2, 6).bool()
    mask[0, 4:] = False
    over_heads = normalize_map(InteractionNorm("layernorm", 3, 1e-5, False), scores, mask)
    torch.testing.assert_close(over_heads, nn.functional.layer_norm(scores.transpose(1, 3), (3,)).transpose(1, 3))
    over_residues = normalize_map(InteractionNorm("instancenorm", 3, 1e-5, False), scores, mask)[0, 1, 2, :4]
    real = scores[0, 1, 2, :4]
    torch.testing.assert_close(over_residues, (real - real.mean()) / (real.var(unbiased=False) + 1e-5).sqrt())


def initialized(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        if hasattr(module, "initialize"):
            module.initialize()
    return layer.double()


def test_conditioning_is_the_identity_at_first() -> None:
    torch.manual_seed(0)
    x, c = torch.randn(2, 4, 5).double(), torch.randn(2, 6).double()
    for layer in (FiLM(5, 6), FiLM(5, 6, residual=False), SqueezeExcite(5, 6), AdaptiveLayerNorm(5, 6)):
        torch.testing.assert_close(initialized(layer)(x, c), x)
    block = initialized(ContextAttentionBlock(options(), 5, 6))
    torch.testing.assert_close(block(x, c[:, None], None), x)
    joint = initialized(InducedJointBlock(options(), 5, 6, 3, 6))
    one, other = (joint(x, torch.ones(2, 3, 6).double(), None, None, context)[0] for context in (c, c * 7))
    assert torch.equal(one, other)
    plain, modulated = (
        JointAttentionBlock(options(), 5, 6),
        JointAttentionBlock(options(), 5, 6, 6, ("dna", "protein")),
    )
    modulated.load_state_dict(plain.state_dict(), strict=False)
    p = torch.randn(2, 3, 6).double()
    expected = initialized(plain)(x, p, None, None)
    assert torch.equal(initialized(modulated)(x, p, None, None, c)[0], expected[0])


def test_squeeze_and_excitation_by_hand() -> None:
    """The mean of real rows 1 and 3 is 2; the gate reads [c; mean] = [10, 2] and is sigmoid(10 - 5 * 2) = 1/2."""
    layer = SqueezeExcite(1, 1, scale=3.0).double()
    layer.gate.weight.data, layer.gate.bias.data = torch.tensor([[1.0, -5.0]]).double(), torch.zeros(1).double()
    x = torch.tensor([[[1.0], [3.0], [100.0]]]).double()
    found = layer(x, torch.tensor([[10.0]]).double(), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, x * 1.5)


@pytest.mark.parametrize("grid", [None, 1, 2])
def test_the_hypergrid_is_a_loop(grid: int | None) -> None:
    torch.manual_seed(0)
    layer = HyperGrid(4, 6, 3, grid).double()
    nn.init.normal_(layer.weight)
    x, c = torch.randn(2, 5, 4).double(), torch.randn(2, 3).double()
    found, gates = layer(x, c), layer.gate(c).sigmoid()
    for row in range(2):
        for out in range(6):
            total = 0.0
            for place in range(4):
                if grid is None:
                    gate = gates[row, place * 6 + out]
                else:
                    gate = gates[row, place // (4 // grid)] * gates[row, grid + out // (6 // grid)]
                total = total + x[row, :, place] * layer.weight[place, out] * gate
            torch.testing.assert_close(found[row, :, out], total)


@pytest.mark.parametrize("masked", [False, True])
def test_two_calls_are_one_shared_matrix(masked: bool) -> None:
    """Values and gradients of the joint block, eager against sdpa."""
    torch.manual_seed(0)
    x, p = torch.randn(2, 4, 5).double(), torch.randn(2, 3, 6).double()
    masks = (torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool(), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    masks = masks if masked else (None, None)
    found = []
    for name in ("eager", "sdpa"):
        torch.manual_seed(1)
        block = JointAttentionBlock(options(_attn_implementation=name), 5, 6).double()
        outputs = block(x, p, *masks)
        (outputs[0].square().sum() + outputs[1].square().sum()).backward()
        found.append([outputs[0], outputs[1], *(parameter.grad for parameter in block.parameters())])
        assert (outputs[2] is None) == (name == "sdpa")
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
