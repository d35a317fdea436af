"""GeneSplice with ALiBi and with experts: the network's laws, the losses, adapters and files under these options.

Shapes: B batch, L bases, M bins, E hidden size, n experts.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_cases import train_two_steps
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_genesplice import FORMS, change_base, random_bases, tiny, tiny_config
from transformers import AutoModel, AutoModelForMaskedLM

from genesplice_hf.heads.losses import shift_left
from genesplice_hf.models.genesplice.modeling_genesplice import (
    GeneSpliceForCausalLM,
    GeneSpliceForMaskedLM,
    GeneSpliceForSequenceClassification,
    GeneSpliceForTokenClassification,
)
from genesplice_hf.models.genesplice.modeling_genesplice_base import GeneSpliceModel

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
DIRECTIONS = pytest.mark.parametrize("is_decoder", [False, True], ids=["bidirectional", "causal"])
ALIBI: dict[str, Any] = {"position_embedding": "alibi"}
BLIND: dict[str, Any] = {"position_embedding": "none"}
EXPERTS: dict[str, Any] = {"moe_num_experts": 4, "moe_top_k": 2, "moe_layers": "all"}
OPTIONS = {"alibi": ALIBI, "experts": EXPERTS, "both": ALIBI | EXPERTS}
ALL_OPTIONS = pytest.mark.parametrize("option", OPTIONS)
HEADS = {
    GeneSpliceForMaskedLM: {},
    GeneSpliceForCausalLM: {"is_decoder": True},
    GeneSpliceForSequenceClassification: {"num_labels": 3},
    GeneSpliceForTokenClassification: {"num_labels": 3},
}
ALL_HEADS = pytest.mark.parametrize("head", HEADS)


def states(model: GeneSpliceModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).last_hidden_state


def batch_for(head: type, length: int = 150) -> dict[str, torch.Tensor]:
    """Two rows, the second with padding; labels of every kind lie below 3."""
    ids, mask = random_bases(2, length), torch.ones(2, length, dtype=torch.long)
    mask[1, 100:] = 0
    labels = (ids % 3).masked_fill(mask == 0, -100)
    if head is GeneSpliceForSequenceClassification:
        labels = torch.tensor([2, 0])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@DIRECTIONS
@BOTH_FORMS
@ALL_OPTIONS
def test_padding_changes_nothing(option, form, is_decoder) -> None:
    model = tiny(GeneSpliceModel, form, is_decoder=is_decoder, **OPTIONS[option]).double()
    for length in (1, 130):
        ids = random_bases(1, length)
        alone = states(model, ids)
        for before, after in ((0, 37), (53, 0), (200, 3)):
            padded = torch.nn.functional.pad(ids, (before, after))
            mask = torch.nn.functional.pad(torch.ones_like(ids), (before, after))
            nothing = torch.zeros_like(mask)
            found = states(model, torch.cat([padded, padded]), torch.cat([mask, nothing]))
            torch.testing.assert_close(found[:1, before : before + length], alone, rtol=0, atol=1e-10)
            assert not found[0, :before].any() and not found[0, before + length :].any() and not found[1].any()


@BOTH_FORMS
@ALL_OPTIONS
def test_the_past_does_not_see_the_future(option, form) -> None:
    """Experts see other batches of tokens when the future changes, so their matrix products may round differently."""
    model, ids = tiny(GeneSpliceModel, form, is_decoder=True, **OPTIONS[option]).double(), random_bases(2, 300)
    before = states(model, ids)
    for position in (0, 15, 16, 128, 255):
        moved = (states(model, change_base(ids, position)) - before).abs().amax((0, 2))
        assert moved[:position].sum() <= (0 if option == "alibi" else 1e-11)
        assert moved[position] > 1e-3 and moved[-1] > 0


@DIRECTIONS
@BOTH_FORMS
@ALL_OPTIONS
def test_the_implementations_agree(option, form, is_decoder) -> None:
    ids, results = random_bases(3, 200), []
    mask = torch.tensor([[start <= i < stop for i in range(200)] for start, stop in [(0, 200), (0, 90), (150, 200)]])
    # Without ALiBi flex would be compiled, which a CPU does not support with gradients.
    for name in ("eager", "sdpa", "flex_attention") if option != "experts" else ("eager", "sdpa"):
        model = tiny(GeneSpliceModel, form, is_decoder=is_decoder, attn_implementation=name, **OPTIONS[option])
        assert model.config._attn_implementation == name
        loss = model(input_ids=ids, attention_mask=mask).last_hidden_state.square().mean()
        results.append((states(model, ids, mask), torch.autograd.grad(loss, list(model.parameters()))))
    for found, gradients in results[1:]:
        torch.testing.assert_close(found, results[0][0], rtol=0, atol=1e-5)
        for first, second in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@BOTH_FORMS
@ALL_OPTIONS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_equals_plain(option, form, use_reentrant) -> None:
    """With weights under which the routers' losses are most of the loss."""
    batch, gradients = batch_for(GeneSpliceForMaskedLM), []
    for is_checkpointed in (False, True):
        weights = {"moe_aux_weight": 3.0, "moe_z_weight": 2.0}
        model = tiny(GeneSpliceForMaskedLM, form, **OPTIONS[option], **weights).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**batch).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)


@BOTH_FORMS
@ALL_OPTIONS
def test_a_cache_changes_nothing(option, form) -> None:
    """In pieces that end inside, at and behind the borders of bins, and rows of different lengths."""
    model = tiny(GeneSpliceModel, form, is_decoder=True, **OPTIONS[option]).double()
    ids, mask = random_bases(2, 300), torch.ones(2, 300, dtype=torch.long)
    mask[1, :21] = 0
    whole, cache, pieces, start = states(model, ids, mask), None, [], 0
    for size in (40, 1, 23, 64, 1, 1, 170):
        stop = start + size
        with torch.no_grad():
            call = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            out = model(**call, past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, stop
        pieces.append(out.last_hidden_state)
    assert start == 300
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)


@BOTH_FORMS
@ALL_OPTIONS
def test_saved_and_loaded_is_the_same(option, form, tmp_path) -> None:
    model, batch = tiny(GeneSpliceForMaskedLM, form, **OPTIONS[option]), batch_for(GeneSpliceForMaskedLM)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is GeneSpliceForMaskedLM
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)


@BOTH_FORMS
@ALL_OPTIONS
def test_half_precision_is_close(option, form) -> None:
    """Whole, and under autocast. Experts may change where two of them are nearly equal, so most tokens count."""
    model, ids = tiny(GeneSpliceModel, form, **OPTIONS[option]), random_bases(2, 150)
    exact = states(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = states(model, ids)
    for found in (mixed, states(model.bfloat16(), ids)):
        error = (found.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error.median() <= 0.1


@BOTH_FORMS
def test_alibi_matters_in_window_and_full_layers(form) -> None:
    """The same weights without positions give something else, layer by layer."""
    layers = {"flat": [["sliding_attention"] * 2, ["full_attention"] * 2], "hierarchical": [["full_attention"]]}
    ids = random_bases(2, 300)
    for kinds in layers[form]:
        models = [tiny(GeneSpliceModel, form, tower_layer_types=kinds, **option) for option in (ALIBI, BLIND)]
        for name, parameter in models[0].named_parameters():
            assert torch.equal(parameter, models[1].get_parameter(name))
        assert not torch.allclose(*(states(model, ids) for model in models), atol=1e-3)


def test_alibi_has_no_parameters_and_no_odd_head_sizes_to_fear() -> None:
    model = tiny(GeneSpliceModel, "flat", head_dims=[7], num_attention_heads=[3], **ALIBI)
    assert states(model, random_bases(1, 50)).isfinite().all()
    blind = tiny(GeneSpliceModel, "flat", head_dims=[7], num_attention_heads=[3], **BLIND)
    assert model.state_dict().keys() == blind.state_dict().keys()


def test_flash_with_alibi_is_refused_at_every_door(tmp_path) -> None:
    asked, refusal = {"attn_implementation": "flash_attention_2"}, r'cannot add the bias.*use "sdpa"'
    config = tiny_config("flat", **ALIBI)
    with pytest.raises(ValueError, match=refusal):
        AutoModel.from_config(config, **asked)
    with pytest.raises(ValueError, match=refusal):
        GeneSpliceForMaskedLM(tiny_config("hierarchical", **ALIBI, **asked))
    tiny(GeneSpliceModel, "flat", **ALIBI).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=refusal):
        AutoModel.from_pretrained(tmp_path, **asked)
    model = tiny(GeneSpliceModel, "flat", **ALIBI)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=refusal):
        model(input_ids=random_bases(1, 5))


@pytest.mark.parametrize(("layers", "with_experts"), [("alternate", [1, 3]), ("all", [0, 1, 2, 3, 4])])
def test_which_tower_layers_have_experts(layers, with_experts) -> None:
    fields = EXPERTS | {"moe_layers": layers, "num_tower_layers": 5}
    model = tiny(GeneSpliceModel, "hierarchical", **fields)
    routers = [name for name in model.state_dict() if name.endswith("mlp.router.weight")]
    assert routers == [f"tower.{layer}.mlp.router.weight" for layer in with_experts]
    experts = [name for name in model.state_dict() if "tower.1.mlp.experts.3" in name]
    assert experts == [f"tower.1.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up", "down")]
    out = model(input_ids=random_bases(2, 300), output_hidden_states=True)
    assert [logits.shape for logits in out.router_logits] == [(2, 3, 4)] * len(with_experts)
    assert len(out.hidden_states) == 1 + 5 + 4


def test_router_logits_without_experts() -> None:
    """None where the config has none; empty where it has, but every layer of the tower is a dense one."""
    ids = random_bases(1, 20)
    assert tiny(GeneSpliceModel, "flat")(input_ids=ids).router_logits is None
    lonely = tiny(GeneSpliceForTokenClassification, "hierarchical", **(EXPERTS | {"moe_layers": "alternate"}))
    assert lonely.genesplice(input_ids=ids).router_logits == ()
    assert lonely(input_ids=ids, labels=ids % 2).loss.isfinite()


@BOTH_FORMS
def test_one_expert_is_the_dense_model(form) -> None:
    dense = tiny(GeneSpliceModel, form)
    single = tiny(GeneSpliceModel, form, moe_num_experts=1, moe_top_k=1, moe_layers="all")
    weights = {}
    for name in single.state_dict():
        source = name.replace("experts.0.", "")
        weights[name] = single.state_dict()[name] if "router" in name else dense.state_dict()[source]
    single.load_state_dict(weights)
    ids, mask = random_bases(2, 200), torch.ones(2, 200)
    mask[1, :77] = 0
    torch.testing.assert_close(states(single, ids, mask), states(dense, ids, mask), rtol=0, atol=1e-5)


def test_more_experts_than_tokens() -> None:
    model = tiny(GeneSpliceForMaskedLM, "hierarchical", **(EXPERTS | {"moe_num_experts": 16, "moe_top_k": 3}))
    ids = random_bases(1, 1)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_experts_start_like_the_dense_layer() -> None:
    fields = {"hidden_sizes": [128], "intermediate_sizes": [512], "initializer_range": 0.02}
    model = tiny(GeneSpliceModel, "flat", **EXPERTS, **fields)
    for expert in model.tower[1].mlp.experts:
        assert expert.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert expert.down_proj.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.03)
    assert model.tower[1].mlp.router.weight.std().item() == pytest.approx(0.02, rel=0.1)


def routing_losses(outputs: Any, top_k: int) -> tuple[float, float]:
    """Balance and z in numpy, one token at a time."""
    balances, zs = [], []
    for layer in outputs.router_logits:
        tokens = layer.detach().double().numpy()[outputs.bin_mask.numpy()]
        num_experts = tokens.shape[1]
        slots, probability, z = np.zeros(num_experts), np.zeros(num_experts), 0.0
        for token in tokens:
            slots[np.argsort(-token)[:top_k]] += 1
            probability += np.exp(token) / np.exp(token).sum()
            z += np.log(np.exp(token).sum()) ** 2
        balances.append(num_experts * (slots / slots.sum() * probability / len(tokens)).sum())
        zs.append(z / len(tokens))
    return float(np.mean(balances)), float(np.mean(zs))


def labelled(head: type, labels: torch.Tensor) -> int:
    return int(((shift_left(labels, -100) if head is GeneSpliceForCausalLM else labels) != -100).sum())


@ALL_HEADS
@BOTH_FORMS
@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
def test_every_head_adds_the_routers_losses(head, form, is_training) -> None:
    fields = HEADS[head] | EXPERTS
    weights = {"moe_aux_weight": 0.7, "moe_z_weight": 0.3}
    model = tiny(head, form, **fields, **weights).train(is_training)
    plain = tiny(head, form, **fields, moe_aux_weight=0, moe_z_weight=0).train(is_training)
    batch = batch_for(head)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    balance, z = routing_losses(model.genesplice(**inputs), 2)
    extra = 0.7 * balance + 0.3 * z
    assert balance != pytest.approx(1, abs=1e-3)
    assert (model(**batch).loss - plain(**batch).loss).item() == pytest.approx(extra, rel=1e-4)
    # A pass that holds a third of the labels of the step brings a third of these losses.
    step = {"num_items_in_batch": 3 * labelled(head, batch["labels"])}
    assert (model(**batch, **step).loss - plain(**batch, **step).loss).item() == pytest.approx(extra / 3, rel=1e-4)


@pytest.mark.parametrize("head", [GeneSpliceForCausalLM, GeneSpliceForSequenceClassification])
def test_accumulation_does_not_multiply_the_routers_losses(head, tmp_path: Path) -> None:
    """On equal rows any cut of the batch has the same means, so the trained weights must be the same."""
    row = {name: values[:1] for name, values in batch_for(head, 40).items()}
    batch = {name: values.repeat(4, *[1] * (values.dim() - 1)) for name, values in row.items()}
    trained = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = tiny(head, "flat", **HEADS[head], **EXPERTS, moe_aux_weight=1.0, moe_z_weight=0.1)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trained.append(train_two_steps(model, batch, tmp_path, batch_size, accumulation).model)
    assert (trained[0].genesplice.tower[1].mlp.router.weight - before["genesplice.tower.1.mlp.router.weight"]).any()
    for name, parameter in trained[0].named_parameters():
        torch.testing.assert_close(trained[1].get_parameter(name), parameter, rtol=0, atol=1e-5)


def test_the_balance_loss_balances() -> None:
    """Gradient descent on it alone spreads tokens that all went to one expert."""
    torch.manual_seed(0)
    fields = EXPERTS | {"moe_top_k": 1, "moe_aux_weight": 1.0, "moe_z_weight": 0.0}
    model = tiny(GeneSpliceForMaskedLM, "flat", **fields)
    ids = random_bases(4, 60)
    before = routing_losses(model.genesplice(input_ids=ids), 1)[0]
    routers = [block.mlp.router.weight for block in model.genesplice.tower]
    optimizer = torch.optim.Adam(routers, lr=0.04)
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = routing_losses(model.genesplice(input_ids=ids), 1)[0]
    assert before > 1.1 and after < 1 + 0.3 * (before - 1)


@BOTH_FORMS
def test_lora_on_experts_and_router_trains_and_comes_back(form, tmp_path) -> None:
    head, batch = GeneSpliceForSequenceClassification, batch_for(GeneSpliceForSequenceClassification)
    targets = ["router", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets)
    model = get_peft_model(tiny(head, form, num_labels=3, **EXPERTS), config).train()
    adapted = {name.split(".lora_")[0] for name, parameter in model.named_parameters() if "lora_" in name}
    assert len([name for name in adapted if "experts" in name]) % (3 * 4) == 0
    assert any(name.endswith("experts.3.down_proj") for name in adapted)
    assert any(name.endswith("mlp.router") for name in adapted)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**batch)
        untouched = tiny(head, form, num_labels=3, **EXPERTS)
        assert not torch.allclose(untouched(**batch).logits, expected.logits, atol=1e-3)
        fresh = PeftModel.from_pretrained(tiny(head, form, num_labels=3, **EXPERTS), tmp_path).eval()
        torch.testing.assert_close(fresh(**batch).logits, expected.logits, rtol=0, atol=1e-6)
        merged = fresh.merge_and_unload()(**batch)
        torch.testing.assert_close(merged.logits, expected.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(merged.loss, expected.loss, rtol=0, atol=1e-4)


@BOTH_FORMS
def test_experts_of_both_strands_count(form) -> None:
    """With `rc_equivariant` the routers see both strands, and their losses are means over both."""
    fields, ids = EXPERTS | {"rc_equivariant": True}, random_bases(2, 256)
    mask = torch.ones_like(ids)
    mask[1, 128:] = 0
    model = tiny(GeneSpliceForMaskedLM, form, **fields, moe_aux_weight=0.7, moe_z_weight=0.3)
    plain = tiny(GeneSpliceForMaskedLM, form, **fields, moe_aux_weight=0, moe_z_weight=0)
    with torch.no_grad():
        outputs = model.genesplice(input_ids=ids, attention_mask=mask)
        both = [model(input_ids=ids, attention_mask=mask, labels=ids).loss for model in (model, plain)]
        # The twin: one strand as a batch of its own, then the other.
        strand = tiny(GeneSpliceModel, form, **EXPERTS)
        strand.load_state_dict(model.genesplice.state_dict())
        reverse = ids.clone()
        reverse[0], reverse[1, :128] = 13 - ids[0].flip(0), 13 - ids[1, :128].flip(0)
        strands = strand(input_ids=torch.cat([ids, reverse]), attention_mask=mask.repeat(2, 1))
    for found, expected in zip(outputs.router_logits, strands.router_logits, strict=True):
        torch.testing.assert_close(found[strands.bin_mask], expected[strands.bin_mask], rtol=0, atol=1e-4)
    balance, z = routing_losses(strands, 2)
    assert (both[0] - both[1]).item() == pytest.approx(0.7 * balance + 0.3 * z, rel=1e-3)
