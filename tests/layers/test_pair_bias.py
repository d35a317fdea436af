"""The pair path: golden cases of the first BioFormer, and every fast form against the formula written down.

Shapes: B cells, i rows and j columns of r genes, H heads, C channels of z, P and Q channels of a product.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from genesplice_hf.layers import pair_bias
from genesplice_hf.layers.expression_block import ExpressionAttention, expression_context
from genesplice_hf.layers.expression_config import PairExpressionConfig
from genesplice_hf.layers.pair_bias import (
    FactorizedPairBias,
    GenePairProduct,
    OuterProductUpdate,
    PairBias,
    effective_weight,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-5
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
UPDATES = pytest.mark.parametrize("kind", ["outer_product", "hadamard", "low_rank"])


def config(**fields: Any) -> PairExpressionConfig:
    sizes = {"vocab_size": 9, "pad_token_id": 0, "cls_token_id": 1, "hidden_size": 8, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 8, "pair_hidden_size": 6, "opm_hidden_size": 3}
    switches = {
        "use_pair_bias": True,
        "use_opm": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return PairExpressionConfig(**(sizes | switches | {"opm_rank": 2} | fields))


def golden(name: str, dtype: torch.dtype) -> tuple[dict[str, Any], dict, dict, dict]:
    folder = GOLDEN / name
    parts = [load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs")]
    given = [{key: tensor.to(dtype) for key, tensor in part.items()} for part in parts[:2]]
    return json.loads((folder / "config.json").read_text())["args"], *given, parts[2]


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.detach().float() - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max().item())


def load(module: nn.Module, weights: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, str]:
    """Fills the module from the reference's modules; {their key: our key} of all that were used."""
    keys = {
        f"{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in names.items()
        for part in ("weight", "bias")
        if f"{theirs}.{part}" in weights
    }
    module.load_state_dict({ours: weights[theirs] for theirs, ours in keys.items()})
    return keys


@EVERY_DTYPE
def test_golden_outer_product(dtype: torch.dtype) -> None:
    args, weights, inputs, outputs = golden("outer_product_mean", dtype)
    sizes = {"hidden_size": args["c_m"], "pair_hidden_size": args["c_z"], "opm_hidden_size": args["c_hidden"]}
    module = OuterProductUpdate(config(**sizes)).to(dtype)
    keys = load(module, weights, {"layer_norm": "norm", "linear_1": "a", "linear_2": "b", "linear_out": "out"})
    m = inputs["m"].clone().requires_grad_()
    update = module(None, m).transpose(2, 3)
    loss = (update * inputs["cotangent"]).sum()
    loss.backward()
    near(update, outputs["z_update"])
    assert abs(loss.item() - outputs["loss"].item()) < 2e-3
    near(m.grad, outputs["grad_input.m"])
    assert len(keys) == 8
    for theirs, ours in keys.items():
        near(module.get_parameter(ours).grad, outputs[f"grad.{theirs}"])


class NormedAttention(nn.Module):
    """What the reference calls row attention: norm, bias of z, attention."""

    def __init__(self, settings: PairExpressionConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(settings.hidden_size)
        self.attention = ExpressionAttention(settings)
        self.pair_bias = PairBias(settings)

    def forward(self, m: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        context = expression_context(self.attention.config, m, torch.ones(m.shape[:2], dtype=torch.bool))
        return self.attention(self.norm(m), context, self.pair_bias(z.transpose(2, 3)))


@EVERY_DTYPE
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["pair_bias_attention", "pair_bias_attention_ungated"])
def test_golden_attention(name: str, attn_implementation: str, dtype: torch.dtype) -> None:
    args, weights, inputs, outputs = golden(name, dtype)
    settings = config(
        hidden_size=args["c_in"], num_attention_heads=args["no_heads"], pair_hidden_size=args["c_z"],
        use_gating=args["gating"], attention_bias=False, attn_implementation=attn_implementation,
    )  # fmt: skip
    module = NormedAttention(settings).to(dtype)
    names = {f"linear_{letter}": f"attention.{letter}_proj" for letter in "qkv"} | {"linear_o": "attention.out_proj"}
    names |= {"layer_norm_m": "norm", "layer_norm_z": "pair_bias.norm", "linear_z": "pair_bias.proj"}
    weights.pop("layer_norm_z.bias")
    keys = load(module, weights, names | {"linear_g": "attention.gate_proj"})
    m, z = (inputs[part].clone().requires_grad_() for part in ("m", "z"))
    update, probabilities = module(m, z)
    loss = (update * inputs["cotangent"]).sum()
    loss.backward()
    near(update, outputs["m_update"])
    if probabilities is not None:
        near(probabilities, outputs["attention_probs"])
    near(loss, outputs["loss"])
    near(m.grad, outputs["grad_input.m"])
    near(z.grad, outputs["grad_input.z"])
    compared = [key for key in keys if f"grad.{key}" in outputs]
    assert len(compared) >= 7
    for key in compared:
        near(module.get_parameter(keys[key]).grad, outputs[f"grad.{key}"])


@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 2e-6), (10.0, 1e-5), (100.0, 1e-4)])
def test_folded_norm_is_norm_then_projection(offset: float, tolerance: float, monkeypatch) -> None:
    """The slow twin in float64; a few rows at a time must not show."""
    settings = config(pair_hidden_size=16, num_attention_heads=4)
    module = PairBias(settings)
    nn.init.normal_(module.norm.weight)
    z = torch.randn(2, 7, 16, 7) + offset
    cotangent = torch.randn(2, 4, 7, 7)
    twin = nn.Sequential(nn.LayerNorm(16, settings.layer_norm_eps, bias=False), nn.Linear(16, 4, bias=False)).double()
    twin.load_state_dict({"0.weight": module.norm.weight, "1.weight": module.proj.weight})
    wide = z.double().requires_grad_()
    expected = twin(wide.transpose(2, 3)).permute(0, 3, 1, 2)
    (expected * cotangent).sum().backward()
    for numbers in (2**18, 3 * 16 * 7, 1):
        monkeypatch.setattr(pair_bias, "_CPU_NUMBERS", numbers)
        module.zero_grad()
        narrow = z.clone().requires_grad_()
        bias = module(narrow)
        (bias * cotangent).sum().backward()
        for found, other in (
            (bias, expected), (narrow.grad, wide.grad), (module.proj.weight.grad, twin[1].weight.grad),
            (module.norm.weight.grad, twin[0].weight.grad),
        ):  # fmt: skip
            assert (found - other).abs().max() <= tolerance * max(1.0, other.abs().max().item())


def test_folded_norm_in_float64_is_exact_and_without_a_norm_plain() -> None:
    for pair_layer_norm in (True, False):
        module = PairBias(config(pair_layer_norm=pair_layer_norm)).double()
        z = torch.randn(1, 3, 6, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(module, z)


def literal(module: OuterProductUpdate, m: torch.Tensor) -> torch.Tensor:
    """(B, i, j, C) as it is written down: every product of channels."""
    x = module.norm(m)
    a, b = module.a(x), module.b(x)
    if module.left is not None:
        a, b = module.left(a), module.right(b)
    if module.is_outer:
        return module.out(torch.einsum("bip,bjq->bijpq", a, b).flatten(3))
    return module.out(torch.einsum("bip,bjp->bijp", a, b))


@UPDATES
def test_reordered_update_is_the_literal_one(kind: str) -> None:
    module = OuterProductUpdate(config(pair_update=kind))
    m, z, cotangent = torch.randn(2, 5, 8), torch.randn(2, 5, 6, 5), torch.randn(2, 5, 6, 5)
    found, expected = (m.clone().requires_grad_() for _ in range(2))
    one = module(z, found)
    (one * cotangent).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    other = z + literal(module, expected).transpose(2, 3)
    (other * cotangent).sum().backward()
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4)


@UPDATES
def test_padding_gets_no_update(kind: str) -> None:
    module = OuterProductUpdate(config(pair_update=kind))
    real = torch.tensor([[True, True, True, False], [True, False, False, False]])
    update = module(None, torch.randn(2, 4, 8), real).transpose(2, 3)
    pairs = real[:, :, None] & real[:, None]
    assert not update[~pairs].any() and update[pairs].any(-1).all()


def test_a_group_gets_its_mean_update() -> None:
    module = OuterProductUpdate(config(opm_group_dim=True))
    m, z = torch.randn(3, 4, 8), torch.randn(3, 4, 6, 4)
    alone = module(None, m)
    found = module(z, m, None, torch.tensor([1, 0, 1])) - z
    torch.testing.assert_close(found[0], (alone[0] + alone[2]) / 2)
    torch.testing.assert_close(found[2], found[0])
    torch.testing.assert_close(found[1], alone[1])


@UPDATES
def test_factorized_bias_is_the_bias_of_z(kind: str) -> None:
    """Up to a constant per head, which the bias of the update adds and a softmax does not see."""
    settings = config(pair_update=kind, pair_mode="factorized", pair_layer_norm=False, pair_init="gene")
    updates = [OuterProductUpdate(settings), OuterProductUpdate(settings)]
    start, bias = GenePairProduct(settings), FactorizedPairBias(settings)
    m, genes = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    factors = [*start.factors(genes, None), *updates[0].factors(m, None), *updates[1].factors(m * 2, None)]
    extra_q, extra_k = bias([start, *updates], factors)
    z = start.add(None, *start.factors(genes, None), None)
    z = updates[1](updates[0](z, m), m * 2)
    expected = torch.matmul(bias.proj.weight, z).transpose(1, 2)
    torch.testing.assert_close(extra_q @ extra_k.transpose(-1, -2), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_on_the_update_has_its_effect() -> None:
    module = OuterProductUpdate(config())
    m = torch.randn(1, 4, 8)
    adapted = inject_adapter_in_model(LoraConfig(target_modules=["out"], r=2, init_lora_weights=False), module)
    assert type(adapted.out) is not nn.Linear
    expected = literal(adapted, m).transpose(2, 3)
    assert (expected - literal_without_adapter(adapted, m).transpose(2, 3)).abs().max() > 1e-2
    torch.testing.assert_close(adapted(None, m), expected, atol=1e-5, rtol=1e-5)


def literal_without_adapter(module: OuterProductUpdate, m: torch.Tensor) -> torch.Tensor:
    for adapter in module.modules():
        if hasattr(adapter, "disable_adapters"):
            adapter.enable_adapters(False)
    found = literal(module, m)
    for adapter in module.modules():
        if hasattr(adapter, "enable_adapters"):
            adapter.enable_adapters(True)
    return found


def test_the_weight_of_a_plain_map_is_itself() -> None:
    plain = nn.Linear(3, 2)
    assert effective_weight(plain, 3) is plain.weight
    torch.testing.assert_close(effective_weight(nn.Sequential(plain), 3), plain.weight)
