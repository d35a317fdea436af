"""Gradient checkpointing of expression models, reentrant or not, gives every tensor the gradient it has without."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_genegraph import give_tables
from torch import nn

from genesplice_hf.layers.gene_prior import GenePrior
from genesplice_hf.models.bioformer.modeling_bioformer import BioFormerForEdgePrediction, BioFormerForMaskedExpression
from genesplice_hf.models.genegraph.modeling_genegraph import GeneGraphForEdgePrediction, GeneGraphForMaskedExpression
from genesplice_hf.models.tiny_configs import tiny_bioformer, tiny_genegraph

VOCABULARY, GENES = 48, 9
# Three blocks: a tensor that blocks share is then read by blocks whose input is another block's output.
PRIOR: dict[str, Any] = {"pair_init": "prior", "prior_channels": 2, "num_hidden_layers": 3}
FACTORIZED: dict[str, Any] = PRIOR | {"pair_mode": "factorized", "pair_layer_norm": False}
PLAIN: dict[str, Any] = {"use_graph_encoder": False, "use_gene_annotations": False, "gene_feature_size": 0}
PAIRS: dict[str, Any] = {"use_pair_bias": True, "use_opm": True, "pair_hidden_size": 6, "opm_hidden_size": 3}
PATHWAYS: dict[str, Any] = {"use_pathway_tokens": True, "num_pathways": 4, "num_pathway_genes": 24}
CASES: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "bioformer": (BioFormerForMaskedExpression, tiny_bioformer, PRIOR),
    "bioformer prior+gene": (BioFormerForMaskedExpression, tiny_bioformer, PRIOR | {"pair_init": "prior+gene"}),
    "bioformer factorized": (BioFormerForMaskedExpression, tiny_bioformer, FACTORIZED),
    "bioformer factorized edges": (BioFormerForEdgePrediction, tiny_bioformer, FACTORIZED),
    "genegraph bias": (GeneGraphForMaskedExpression, tiny_genegraph, {"graph_attention_mode": "bias"}),
    "genegraph bias, pathways": (
        GeneGraphForMaskedExpression,
        tiny_genegraph,
        PLAIN | PATHWAYS | {"graph_attention_mode": "bias"},
    ),
    "genegraph masked, full": (
        GeneGraphForMaskedExpression,
        tiny_genegraph,
        PAIRS | PRIOR | {"graph_attention_mode": "masked"},
    ),
    "genegraph factorized": (GeneGraphForMaskedExpression, tiny_genegraph, PAIRS | FACTORIZED),
    "genegraph bias, factorized": (
        GeneGraphForEdgePrediction,
        tiny_genegraph,
        PAIRS | FACTORIZED | {"graph_attention_mode": "bias"},
    ),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def built(case: tuple[type, Any, dict[str, Any]], attn_implementation: str = "sdpa") -> Any:
    kind, config, fields = case
    torch.manual_seed(0)
    model = kind(config(**fields, attn_implementation=attn_implementation))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if "genegraph" in model.config.model_type:
        give_tables(model)
    if model.config.prior_channels:
        generator = torch.Generator().manual_seed(4)
        ends = torch.randint(3, VOCABULARY, (2, 600), generator=generator)
        model.set_gene_prior(GenePrior(*ends, torch.randn(600, 2, generator=generator), VOCABULARY))
    return model.train()


def batch(model: Any) -> dict[str, torch.Tensor]:
    """Two cells, one of them padded, with labels for values or for pairs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(VOCABULARY - 3, generator=generator)[:GENES] + 3 for _ in "ab"])
    ids[:, 0], ids[1, -2:] = model.config.cls_token_id, model.config.pad_token_id
    values = torch.rand(ids.shape, generator=generator) * 6
    values[:, 2::3] = model.config.mask_value
    labels = torch.where(values == model.config.mask_value, 3.0, -100.0)
    if "EdgePrediction" in type(model).__name__:
        labels = torch.randint(0, 2, (2, GENES, GENES), generator=generator).float()
    return {"input_ids": ids, "values": values, "labels": labels}


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor], **more: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    loss = model(**inputs, **more).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: name + text
        )


@EVERY_CASE
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_every_parameter_gets_its_gradient(case: Any, use_reentrant: bool) -> None:
    plain, model = built(case), built(case)
    expected = gradients(plain, batch(plain))
    shared = [name for name in expected if "pair_embedding" in name or "graph_bias" in name]
    assert all(expected[name].any() for name in shared)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(gradients(model, batch(model)), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bioformer", "bioformer factorized", "genegraph bias, factorized"])
def test_adapters_of_the_prior_get_theirs(name: str, use_reentrant: bool) -> None:
    """An adapted map is no parameter by the time that the blocks read it."""
    found = []
    for checkpointing in (False, True):
        model = built(CASES[name])
        inputs = batch(model)
        config = LoraConfig(r=2, target_modules=["q_proj", "pair_embedding.prior"], init_lora_weights=False)
        torch.manual_seed(2)
        adapted = get_peft_model(model, config)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        found.append(gradients(adapted, inputs))
    assert sum("pair_embedding" in key for key in found[0]) == 2
    assert_same(found[1], found[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bioformer", "bioformer factorized", "genegraph factorized"])
def test_a_given_prior_gets_its_gradient(name: str, use_reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = built(CASES[name])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        generator = torch.Generator().manual_seed(3)
        pairs = torch.randn(2, GENES, GENES, 2, generator=generator).requires_grad_()
        gradients(model, batch(model), pair_values=pairs)
        found.append(pairs.grad)
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-5)
