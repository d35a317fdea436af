"""Heads of expression models: the golden query decoders, and losses against their formulas.

Shapes: B cells, r genes of a cell, E hidden size.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from genesplice_hf.heads.expression import (
    BatchDiscriminator,
    EdgeHead,
    MVCDecoder,
    cell_embedding,
    contrastive_cells,
    counted,
    elastic_similarity,
    presence_loss,
    squared_error,
)
from genesplice_hf.layers.expression_config import ExpressionConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "scgpt_mvc_query_styles"
NAMES = {"gene2query": "query", "fc1": "fc1", "fc2": "fc2", "hidden_activation": "activation"}
SIZES = {"vocab_size": 9, "pad_token_id": 0, "cls_token_id": 1, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_golden_query_decoders() -> None:
    weights, inputs, outputs = (load_file(GOLDEN / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    cell, genes = (inputs[name].clone().requires_grad_() for name in ("cell_emb", "gene_embs"))
    loss, compared = torch.zeros(()), 0
    decoders = {}
    for style in ("concat_query", "sum_query"):
        config = ExpressionConfig(**SIZES, hidden_size=32, mvc_decoder_style=style.replace("_", " "))
        decoders[style] = decoder = MVCDecoder(config)
        own = {key.removeprefix(f"{style}."): tensor for key, tensor in weights.items() if key.startswith(style)}
        decoder.load_state_dict({renamed(key): tensor for key, tensor in own.items()})
        values, zero_logits = decoder(cell, genes)
        assert zero_logits is None
        near(values, outputs[f"{style}.pred"])
        loss = loss + (values * inputs["cotangent"]).sum()
    loss.backward()
    near(loss, outputs["loss"])
    near(cell.grad, outputs["grad_input.cell_emb"])
    near(genes.grad, outputs["grad_input.gene_embs"])
    for key in outputs:
        if key.startswith("grad."):
            style, name = key.removeprefix("grad.").split(".", 1)
            near(decoders[style].get_parameter(renamed(name)).grad, outputs[key])
            compared += 1
    assert compared == 4


def renamed(key: str) -> str:
    module, _, name = key.partition(".")
    return f"{NAMES[module]}.{name}"


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.detach() - expected).abs().max() <= 2e-5 * max(1.0, expected.abs().max().item())


def test_cell_embeddings_leave_padding_out() -> None:
    states, values = torch.randn(2, 4, 3), torch.tensor([[0.0, 2.0, 1.0, 9.0], [0.0, 3.0, 9.0, 9.0]])
    real = torch.tensor([[True, True, True, False], [True, True, False, False]])
    torch.testing.assert_close(cell_embedding(states, values, real, "cls"), states[:, 0])
    torch.testing.assert_close(cell_embedding(states, values, real, "avg-pool")[1], states[1, :2].mean(0))
    weighted = 2 * states[0, 1] + states[0, 2]
    torch.testing.assert_close(cell_embedding(states, values, real, "w-pool")[0], weighted / weighted.norm())
    no_values = cell_embedding(states, torch.zeros(2, 4), real, "w-pool")
    assert torch.equal(no_values, torch.zeros(2, 3))
    left = torch.tensor([[False, True, True, True], [False, False, True, True]])
    torch.testing.assert_close(cell_embedding(states, values, left, "cls"), states[[0, 1], [1, 2]])


def test_losses_count_labelled_genes_alone() -> None:
    predictions, labels = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, -100.0, 5.0]])
    assert squared_error(predictions, labels, *counted(labels, None)).item() == pytest.approx((1 + 4) / 2)
    assert squared_error(predictions, labels, *counted(labels, 10)).item() == pytest.approx((1 + 4) / 10)
    probability = predictions.sigmoid()
    expected = -((1 - probability[0, 0]).log() + probability[0, 2].log()) / 2
    torch.testing.assert_close(presence_loss(predictions, labels, *counted(labels, None)), expected)
    nothing = torch.full((1, 3), -100.0)
    predictions.requires_grad_()
    loss = squared_error(predictions, nothing, *counted(nothing, None))
    loss.backward()
    assert loss.item() == 0 and not predictions.grad.any()


def test_elastic_similarity_is_its_formula() -> None:
    cells = torch.randn(4, 6)
    total = 0.0
    for one in range(4):
        for other in range(4):
            cosine = 0.0 if one == other else max(0.0, torch.cosine_similarity(cells[one], cells[other], dim=0).item())
            total += 1 - (cosine - 0.3) ** 2
    assert elastic_similarity(cells, 0.3).item() == pytest.approx(total / 16, abs=1e-6)


def test_contrast_of_cells_is_a_cross_entropy_of_cosines() -> None:
    first, second = torch.randn(3, 5), torch.randn(3, 5)
    cosines = torch.stack([torch.cosine_similarity(row[None], second) for row in first]) / 0.5
    expected = nn.functional.cross_entropy(cosines, torch.arange(3))
    torch.testing.assert_close(contrastive_cells(first, second, 0.5), expected)


def test_gradients_turn_before_the_discriminator() -> None:
    config = ExpressionConfig(**SIZES, hidden_size=4, do_dab=True, num_batch_labels=2)
    head, cell = BatchDiscriminator(config), torch.randn(3, 4, requires_grad=True)
    head(cell).square().sum().backward()
    turned, own = cell.grad.clone(), head.out.weight.grad.clone()
    cell.grad, head.out.weight.grad = None, None
    head.out(head.hidden(cell)).square().sum().backward()
    torch.testing.assert_close(turned, -cell.grad)
    torch.testing.assert_close(own, head.out.weight.grad)


def test_edges_from_states_are_their_formula(monkeypatch) -> None:
    head = EdgeHead(ExpressionConfig(**SIZES, hidden_size=4))
    monkeypatch.setattr("genesplice_hf.heads.expression._PAIR_NUMBERS", 2 * 5 * 4 * 2)
    states = torch.randn(2, 5, 4, requires_grad=True)
    found = head(states, None, torch.ones(2, 5, dtype=torch.bool))
    one, other = states[:, :, None], states[:, None]
    expected = head.product(one * other).squeeze(-1) + head.difference((one - other).abs()).squeeze(-1)
    torch.testing.assert_close(found, expected)
    gradient, twin = (torch.autograd.grad(x.square().sum(), states, retain_graph=True)[0] for x in (found, expected))
    torch.testing.assert_close(gradient, twin)
