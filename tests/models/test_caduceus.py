"""Caduceus against a plain twin of its layers, and the laws of its strands, padding, heads and new weights.

Its golden cases stand in `test_conversion_caduceus.py`.

Shapes: B batch, L tokens, E width of one strand, V vocabulary, C labels.
"""

from functools import partial
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.reverse_complement import average_over_strands
from genesplice_hf.models.caduceus.configuration_caduceus import CaduceusConfig
from genesplice_hf.models.caduceus.modeling_caduceus import (
    CaduceusForMaskedLM,
    CaduceusForSequenceClassification,
    CaduceusForTokenClassification,
)
from genesplice_hf.models.caduceus.modeling_caduceus_base import CaduceusModel
from genesplice_hf.models.caduceus.modeling_caduceus_layer import CausalConv

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "d_model": 12,
    "n_layer": 3,
    "ssm_cfg": {"d_state": 4, "dt_min": 0.1, "dt_max": 1.0},
    "scan_chunk_size": 8,
    "num_labels": 3,
}
COMPLEMENT = [{7: 10, 8: 9, 9: 8, 10: 7}.get(token, token) for token in range(16)]
BOTH_ORDERS = pytest.mark.parametrize("order", ["exchange", "straight"])
PRECISIONS = pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
# Rows: whole, padded on the right, on the left, on both sides.
SPANS = [(0, 40), (0, 13), (11, 40), (5, 30)]


def tiny(model_class: type[PreTrainedModel], dtype: torch.dtype = torch.float64, **fields: Any) -> PreTrainedModel:
    """Every parameter random and off its initial value."""
    torch.manual_seed(0)
    model = model_class(CaduceusConfig(**(SIZES | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.tensor([[start <= place < stop for place in range(40)] for start, stop in SPANS])
    return torch.randint(7, 12, mask.shape).masked_fill(~mask, 4), mask


def other_strand(ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Base by base, inside the real span of each row."""
    other = ids.clone()
    for row in range(len(ids)):
        places = range(ids.shape[1]) if mask is None else mask[row].nonzero().flatten().tolist()
        for place, opposite in zip(places, reversed(places), strict=True):
            other[row, place] = COMPLEMENT[int(ids[row, opposite])]
    return other


def backwards(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    turned = x.clone()
    for row in range(len(x)):
        places = mask[row].nonzero().flatten()
        turned[row, places] = x[row, places.flip(0)]
    return turned


def logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=None if mask is None else mask.long()).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol * max(1.0, expected.abs().max().item()))


class Twin:
    """One row of Caduceus-Ph as the equations say, step by step, every direction with its own projections."""

    def __init__(self, model: CaduceusModel) -> None:
        self.config, self.state = model.config, model.state_dict()

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        x, residual = self.state["embeddings.weight"][ids], 0.0
        for layer in range(self.config.n_layer):
            residual = x + residual
            x = self.mixer(self.norm(residual, f"layers.{layer}.norm"), f"layers.{layer}.mixer")
        return self.norm(x + residual, "norm_f")

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, eps = self.state[f"{name}.weight"], self.config.norm_epsilon
        if self.config.rms_norm:
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + self.state[f"{name}.bias"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0.0)

    def mixer(self, u: torch.Tensor, name: str) -> torch.Tensor:
        forward = self.mamba(u, name, f"{name}.forward_ssm")
        if not self.config.bidirectional:
            return forward
        around = name if self.config.bidirectional_weight_tie else f"{name}.reverse_ssm"
        reverse = self.mamba(u.flip(0), around, f"{name}.reverse_ssm").flip(0)
        return forward + reverse if self.config.bidirectional_strategy == "add" else forward * reverse

    def mamba(self, u: torch.Tensor, around: str, name: str) -> torch.Tensor:
        x, z = self.linear(u, f"{around}.in_proj").chunk(2, dim=-1)
        weight, bias = self.state[f"{name}.conv1d.weight"], self.state.get(f"{name}.conv1d.bias")
        before = nn.functional.pad(x.T, (weight.shape[-1] - 1, 0))
        x = nn.functional.silu(nn.functional.conv1d(before[None], weight, bias, groups=len(weight))[0].T)
        steps, B, C = self.linear(x, f"{name}.x_proj").split([self.config.dt_rank, 4, 4], dim=-1)
        delta = nn.functional.softplus(self.linear(steps, f"{name}.dt_proj"))
        A, state, outputs = -self.state[f"{name}.A_log"].exp(), 0.0, []
        for t in range(len(x)):
            state = (delta[t, :, None] * A).exp() * state + (delta[t] * x[t])[:, None] * B[t]
            outputs.append(state @ C[t] + self.state[f"{name}.D"] * x[t])
        return self.linear(torch.stack(outputs) * nn.functional.silu(z), f"{around}.out_proj")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rms_norm": False},
        {"bidirectional": False},
        {"bidirectional_strategy": "ew_multiply"},
        {"bidirectional_weight_tie": False},
        {"bidirectional_weight_tie": False, "bidirectional_strategy": "ew_multiply"},
        {"ssm_cfg": {"d_state": 4, "bias": True, "conv_bias": False, "d_conv": 1, "dt_rank": 3, "expand": 1}},
        {"ssm_cfg": {"d_state": 4, "bias": True, "d_conv": 2}, "bidirectional_weight_tie": False},
    ],
    ids=str,
)
def test_the_layers_are_their_equations(fields: dict[str, Any]) -> None:
    """Whatever is computed once for both directions."""
    model, ids = tiny(CaduceusModel, **fields), torch.randint(7, 12, (2, 21))
    found = model(ids).last_hidden_state
    for row in range(2):
        torch.testing.assert_close(found[row], Twin(model)(ids[row]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_the_convolution_is_torchs(taps: int) -> None:
    conv, x = CausalConv(5, taps, bias=True).double(), torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    padded = nn.functional.pad(x.transpose(1, 2), (taps - 1, 0))
    expected = nn.functional.conv1d(padded, conv.weight, conv.bias, groups=5).transpose(1, 2)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-14)
    for given in (x, conv.weight, conv.bias):
        slopes = [torch.autograd.grad(y.square().sum(), given, retain_graph=True)[0] for y in (conv(x), expected)]
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


@BOTH_ORDERS
@PRECISIONS
@pytest.mark.parametrize("length", [1, 2, 41])
def test_states_and_logits_turn_with_the_strand(order: str, dtype: torch.dtype, atol: float, length: int) -> None:
    """Every recorded state is read backwards in length and width; logits in length, with letters exchanged."""
    model, ids = tiny(CaduceusForMaskedLM, dtype, rcps=True, rcps_half_order=order), torch.randint(7, 12, (2, length))
    with torch.no_grad():
        here, there = (model(given, output_hidden_states=True) for given in (ids, other_strand(ids)))
    for one, other in zip(here.hidden_states, there.hidden_states, strict=True):
        assert_close(other, one.flip(1, 2), atol)
    assert_close(there.logits, here.logits.flip(1)[..., COMPLEMENT], atol)
    if length > 2:
        assert not torch.allclose(here.logits, here.logits.flip(1)[..., COMPLEMENT], atol=1e-2)


@BOTH_ORDERS
def test_strands_with_padding_on_either_side(order: str) -> None:
    model = tiny(CaduceusForMaskedLM, rcps=True, rcps_half_order=order)
    ids, mask = padded_batch()
    out, other = logits(model, ids, mask), logits(model, other_strand(ids, mask), mask)
    assert_close(other[mask], backwards(out, mask)[..., COMPLEMENT][mask], 1e-12)
    for row, (start, stop) in enumerate(SPANS):
        assert_close(out[row, start:stop], logits(model, ids[row : row + 1, start:stop])[0], 1e-12)


def test_the_two_orders_are_two_functions() -> None:
    """With the same weights; after one block already, for the halves carry different channels."""
    ids = torch.randint(7, 12, (1, 20))
    one, other = (
        logits(tiny(CaduceusForMaskedLM, rcps=True, n_layer=1, rcps_half_order=order), ids)
        for order in ("exchange", "straight")
    )
    assert (one - other).abs().max() > 0.1


@BOTH_ORDERS
@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last"])
@pytest.mark.parametrize("special", [[], [1, 4]], ids=["all", "bases"])
def test_a_sequence_is_one_whichever_strand_is_given(order: str, pooling: str, special: list[int]) -> None:
    fields = {"rcps_half_order": order, "classifier_pooling": pooling, "special_token_ids": special}
    model = tiny(CaduceusForSequenceClassification, rcps=True, **fields)
    ids, mask = padded_batch()
    ids[0, 39] = 1
    assert_close(logits(model, other_strand(ids, mask), mask), logits(model, ids, mask), 1e-12)
    one_strand = tiny(CaduceusForSequenceClassification, rcps=False, **fields)
    gap = logits(one_strand, other_strand(ids, mask), mask) - logits(one_strand, ids, mask)
    assert gap.abs().max() > 1e-3


def test_special_tokens_are_not_pooled() -> None:
    """The mean over bases, by hand; the first token whatever it is."""
    ids = torch.tensor([[7, 8, 9, 10, 7, 1]])
    model = tiny(CaduceusForSequenceClassification, special_token_ids=[1])
    state = model.caduceus(ids).last_hidden_state
    torch.testing.assert_close(logits(model, ids), model.classifier.out_proj(state[:, :5].mean(1)))
    last = tiny(CaduceusForSequenceClassification, special_token_ids=[1], classifier_pooling="last")
    torch.testing.assert_close(logits(last, ids), last.classifier.out_proj(last.caduceus(ids)[0][:, 4]))
    first = tiny(CaduceusForSequenceClassification, special_token_ids=[7], classifier_pooling="cls")
    torch.testing.assert_close(logits(first, ids), first.classifier.out_proj(first.caduceus(ids)[0][:, 0]))


@BOTH_ORDERS
@pytest.mark.parametrize("pairs", [None, [0, 2, 1]], ids=["own", "paired"])
def test_labels_of_tokens_turn_with_the_strand(order: str, pairs: list[int] | None) -> None:
    fields = {"rcps": True, "rcps_half_order": order, "token_strand_pairs": pairs}
    model = tiny(CaduceusForTokenClassification, **fields)
    ids, mask = padded_batch()
    out, other = logits(model, ids, mask), logits(model, other_strand(ids, mask), mask)
    assert_close(other[mask], backwards(out, mask)[..., pairs or [0, 1, 2]][mask], 1e-12)


def test_ph_is_equivariant_on_average_only() -> None:
    model = tiny(CaduceusForMaskedLM)
    ids, mask = padded_batch()
    average = partial(
        average_over_strands,
        partial(logits, model),
        complement_map=COMPLEMENT,
        partner=COMPLEMENT,
        attention_mask=mask,
    )
    out, other = average(ids_BL=ids), average(ids_BL=other_strand(ids, mask))
    assert_close(other[mask], backwards(out, mask)[..., COMPLEMENT][mask], 1e-12)
    alone = logits(model, other_strand(ids, mask), mask) - backwards(logits(model, ids, mask), mask)[..., COMPLEMENT]
    assert alone[mask].abs().max() > 1e-2


@pytest.mark.parametrize("rcps", [False, True])
def test_recorded_states(rcps: bool) -> None:
    model, (ids, mask) = tiny(CaduceusModel, rcps=rcps), padded_batch()
    outputs = model(ids, mask.long(), output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.n_layer + 1
    assert all(state.shape == (4, 40, model.config.hidden_size) for state in outputs.hidden_states)
    given = model.embeddings(ids)
    torch.testing.assert_close(outputs.hidden_states[0][..., :12], given)
    if rcps:
        complement = model.embeddings(torch.tensor(COMPLEMENT)[ids])
        torch.testing.assert_close(outputs.hidden_states[0][..., 12:], complement.flip(-1))
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert not outputs.last_hidden_state[~mask].any()
    assert model(ids).hidden_states is None


def test_there_is_no_attention_to_choose_or_to_record() -> None:
    with pytest.raises(ValueError, match=r"`output_attentions` must be False.*no attention weights"):
        tiny(CaduceusModel)(torch.tensor([[7, 8]]), output_attentions=True)
    with pytest.raises(ValueError, match="Flash Attention 2"):
        CaduceusModel._from_config(CaduceusConfig(**SIZES), attn_implementation="flash_attention_2")


def test_embeddings_of_both_strands() -> None:
    model, ids = tiny(CaduceusModel, rcps=True), torch.randint(7, 12, (2, 9))
    outputs = model(ids, output_hidden_states=True)
    found = model(inputs_embeds=outputs.hidden_states[0]).last_hidden_state
    torch.testing.assert_close(found, outputs.last_hidden_state)
    with pytest.raises(SequenceError, match=r"`inputs_embeds` must hold both strands \(24 wide\).*got 12"):
        model(inputs_embeds=model.embeddings(ids))


@pytest.mark.parametrize("rcps", [False, True])
def test_logits_at_some_positions(rcps: bool) -> None:
    model, (ids, mask) = tiny(CaduceusForMaskedLM, rcps=rcps), padded_batch()
    places = torch.tensor([[0, 39], [3, 2], [20, 20], [29, 5]])
    rows, labels, weight = torch.arange(4)[:, None], ids.masked_fill(~mask, -100), torch.rand(4, 40).double()
    found = model(ids, mask.long(), labels=labels, loss_weight=weight, logits_positions=places)
    expected = logits(model, ids, mask)[rows, places]
    torch.testing.assert_close(found.logits, expected)
    losses = nn.functional.cross_entropy(expected.transpose(1, 2), labels[rows, places], reduction="none")
    torch.testing.assert_close(found.loss, (losses * weight[rows, places]).sum() / weight[rows, places].sum())


def test_the_weighted_loss_leaves_the_weights_alone() -> None:
    model, ids = tiny(CaduceusForMaskedLM), torch.randint(7, 12, (2, 9))
    labels, weight = ids.clone(), torch.rand(2, 9).double()
    labels[:, ::2], before = -100, weight.clone()
    found = model(ids, labels=labels, loss_weight=weight)
    assert torch.equal(weight, before)
    losses = nn.functional.cross_entropy(found.logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(found.loss, (losses * weight).sum() / weight[:, 1::2].sum())


def test_the_published_size() -> None:
    """7.72 million parameters, 482,560 a block."""
    with torch.device("meta"):
        model = CaduceusForMaskedLM(CaduceusConfig(vocab_size=16))
    assert sum(parameter.numel() for parameter in model.caduceus.layers[0].parameters()) == 482_560
    assert sum(parameter.numel() for parameter in model.parameters()) == 16 * 482_560 + 16 * 256 + 256


def test_new_weights() -> None:
    """Decay rates 1 .. N; steps between the limits; outputs that shrink with depth; tables of the asked spread."""
    sizes = {"d_model": 64, "n_layer": 4, "vocab_size": 512, "ssm_cfg": {"dt_min": 0.01, "dt_max": 0.2}}
    torch.manual_seed(0)
    model = CaduceusModel(CaduceusConfig(**sizes, initializer_cfg={"initializer_range": 0.05}))
    mixer = model.layers[0].mixer
    for ssm in (mixer.forward_ssm, mixer.reverse_ssm):
        torch.testing.assert_close(ssm.A_log.exp(), torch.arange(1.0, 17.0).expand(128, 16))
        steps = nn.functional.softplus(ssm.dt_proj.bias)
        assert 0.0099 < steps.min() < 0.012 and 0.15 < steps.max() < 0.2001
        assert ssm.dt_proj.weight.abs().max() <= 0.5 and torch.equal(ssm.D, torch.ones(128))
    assert model.embeddings.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert mixer.out_proj.weight.std().item() == pytest.approx((3 * 128 * 4) ** -0.5, rel=0.05)
    assert mixer.in_proj.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)


def test_steps_of_one_size_and_unscaled_outputs() -> None:
    config = CaduceusConfig(
        **(SIZES | {"ssm_cfg": {"dt_init": "constant", "dt_scale": 2.0, "dt_rank": 4}}),
        initializer_cfg={"rescale_prenorm_residual": False},
    )
    mixer = CaduceusModel(config).layers[0].mixer
    assert torch.equal(mixer.forward_ssm.dt_proj.weight, torch.ones(24, 4))
    assert mixer.out_proj.weight.std().item() == pytest.approx((3 * 24) ** -0.5, rel=0.15)


@pytest.mark.parametrize("wide", [False, True])
def test_the_residual_stream_may_be_wider_than_the_model(wide: bool) -> None:
    model, seen = tiny(CaduceusModel, torch.bfloat16, residual_in_fp32=wide), []
    model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.randint(7, 12, (1, 5)))
    x, residual = seen[0]
    assert x.dtype == torch.bfloat16 and residual.dtype == (torch.float32 if wide else torch.bfloat16)


@pytest.mark.parametrize(("is_tied", "per_layer"), [(True, 1), (False, 2)])
def test_an_adapter_wraps_shared_projections_once(is_tied: bool, per_layer: int) -> None:
    model = tiny(CaduceusForMaskedLM, rcps=True, bidirectional_weight_tie=is_tied)
    targets = CaduceusConfig.lora_targets
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    wrapped = [name for name, _ in adapted.named_modules() if name.endswith("_proj.lora_A.default")]
    assert len(wrapped) == SIZES["n_layer"] * (2 * per_layer + 2)
    ids = torch.randint(7, 12, (1, 20))
    expected = logits(adapted, ids)
    assert_close(logits(adapted, other_strand(ids)), expected.flip(1)[..., COMPLEMENT], 1e-12)
    assert_close(logits(adapted.merge_and_unload(), ids), expected, 1e-12)


def test_bases_keep_their_complements() -> None:
    model = tiny(CaduceusForMaskedLM, rcps=True)
    with pytest.raises(ValueError, match=r"`new_num_tokens` \(10\) would drop a base"):
        model.resize_token_embeddings(10)
    model.resize_token_embeddings(12)
    assert model.config.complement_map == COMPLEMENT[:12]
    with pytest.raises(StrictDataclassClassValidationError, match="`complement_map` must map each of the 12 ids"):
        CaduceusConfig(vocab_size=12, complement_map=COMPLEMENT)


def test_the_fused_flag_gives_the_order_its_default() -> None:
    assert CaduceusConfig(rcps=True).rcps_half_order == "exchange"
    assert CaduceusConfig(rcps=True, fused_add_norm=False).rcps_half_order == "straight"
    assert CaduceusConfig(rcps=True, fused_add_norm=False, rcps_half_order="exchange").rcps_half_order == "exchange"
    assert (CaduceusConfig(rcps=True).hidden_size, CaduceusConfig().hidden_size) == (512, 256)
    assert CaduceusConfig(vocab_size=8).complement_map == [0, 1, 2, 6, 5, 4, 3, 7]
    assert CaduceusConfig().complement_map == COMPLEMENT[:12] and CaduceusConfig(vocab_size=5).complement_map == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip
