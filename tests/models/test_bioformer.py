"""Laws of scGPT and BioFormer: one function under many switches, sets of genes, priors, generation, bad input.

Shapes: B cells, r genes of a cell, E hidden size, C channels of z.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from genesplice_hf.errors import CheckpointError, SequenceError
from genesplice_hf.layers.expression import DomainBatchNorm
from genesplice_hf.layers.gene_prior import GenePrior
from genesplice_hf.models.bioformer.configuration_bioformer import BioFormerConfig
from genesplice_hf.models.bioformer.modeling_bioformer import (
    BioFormerForEdgePrediction,
    BioFormerForMaskedExpression,
    BioFormerModel,
)
from genesplice_hf.models.scgpt.configuration_scgpt import ScGPTConfig
from genesplice_hf.models.scgpt.modeling_scgpt import ScGPTForMaskedExpression, ScGPTModel

VOCABULARY, PAD, CLS = 30, 0, 1
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": PAD, "cls_token_id": CLS, "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
PAIR: dict[str, Any] = {"pair_hidden_size": 6, "opm_hidden_size": 3, "pair_init": "gene", "pair_init_rank": 4}
FACTORIZED: dict[str, Any] = {"pair_mode": "factorized", "pair_layer_norm": False}
SWITCHES = [dict(zip(("use_pair_bias", "use_opm", "use_gating"), on, strict=True))
            for on in itertools.product((False, True), repeat=3)]  # fmt: skip


def bioformer(kind: type = BioFormerForMaskedExpression, seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    return noisy(kind(BioFormerConfig(**(SIZES | PAIR | fields)))).eval()


def scgpt(kind: type = ScGPTForMaskedExpression, seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    return noisy(kind(ScGPTConfig(**(SIZES | fields)))).eval()


def noisy(model: nn.Module) -> nn.Module:
    """Every parameter off its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def cells(genes: int = 9, rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Genes of cells with `<cls>` first, values with masked ones, and labels for these."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(VOCABULARY - 2, generator=generator)[:genes] + 2 for _ in range(rows)])
    ids[:, 0] = CLS
    values = torch.rand(ids.shape, generator=generator) * 6
    values[:, 0], values[:, 2::3] = 0.0, -1.0
    labels = torch.full(ids.shape, -100.0)
    labels[:, 2::3] = torch.rand(labels[:, 2::3].shape, generator=generator) * 6 - 2
    return {"input_ids": ids, "values": values, "labels": labels}


def padded(batch: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """The cells with `number` paddings, whose values and labels must not matter."""
    fill = {"input_ids": PAD, "values": 7.0, "labels": -100.0}
    return {name: nn.functional.pad(tensor, (0, number), value=fill[name]) for name, tensor in batch.items()}


def near(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


# One function


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_ablated_bioformer_is_scgpt_with_the_same_weights(norm_first: bool) -> None:
    switches = {"norm_first": norm_first, "attention_bias": True, "explicit_zero_prob": True}
    ours = bioformer(use_pair_bias=False, use_opm=False, pair_init="zeros", **switches)
    theirs = scgpt(seed=5, **switches)
    theirs.load_state_dict({key.replace("bioformer.", "scgpt."): value for key, value in ours.state_dict().items()})
    one, other = ours(**cells()), theirs(**cells())
    near(one.logits, other.logits, 1e-6)
    near(one.loss, other.loss, 1e-6)


@pytest.mark.parametrize("mode", [{}, FACTORIZED], ids=["full", "factorized"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_trains_every_parameter(switches: dict[str, bool], mode: dict[str, Any]) -> None:
    # Where nothing reads z, z begins as nothing.
    init = {"pair_init": "gene" if switches["use_pair_bias"] else "zeros"}
    model = bioformer(**switches, **mode, **init).train()
    model(**cells()).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == ([] if mode or not missing else missing_by_construction(model))


def missing_by_construction(model: nn.Module) -> list[str]:
    """None: z of the last block is not updated, for nothing reads it."""
    assert model.bioformer.encoder.layer[-1].opm is None
    return []


def test_a_z_of_zeros_gives_gradients_of_zero_to_the_first_bias() -> None:
    """Not none at all, or distributed training would wait for them."""
    model = bioformer(pair_init="zeros").train()
    model(**cells()).loss.backward()
    idle = {name for name, p in model.named_parameters() if not p.grad.any()}
    assert idle == {f"bioformer.encoder.layer.0.pair_bias.{name}.weight" for name in ("norm", "proj")}


def test_the_last_update_exists_where_z_is_read() -> None:
    assert bioformer(output_pair_states=True).bioformer.encoder.layer[-1].opm is not None
    assert bioformer(update_pair_in_last_block=True).bioformer.encoder.layer[-1].opm is not None
    assert bioformer().bioformer.encoder.layer[-1].opm is None
    alone = bioformer(use_pair_bias=False, pair_init="zeros")
    assert [block.opm for block in alone.bioformer.encoder.layer] == [None] * 3
    reading = bioformer(use_pair_bias=False, pair_init="zeros", output_pair_states=True)
    assert reading(**cells()).pair_states.shape == (2, 9, 9, 6)


def test_an_edge_head_makes_the_update_that_its_base_lacks() -> None:
    whole = bioformer(BioFormerForEdgePrediction, output_pair_states=True)
    lent = bioformer(BioFormerForEdgePrediction, seed=3)
    state = whole.state_dict()
    last = "bioformer.encoder.layer.2.opm."
    state = {
        key.replace(last, "classifier.opm.") if key.startswith(last) else key: value for key, value in state.items()
    }
    lent.load_state_dict(state)
    batch = {name: padded(cells(), 2)[name] for name in ("input_ids", "values")}
    near(lent(**batch).logits[:, :9, :9], whole(**batch).logits[:, :9, :9])


FORMS = {
    "full": {},
    "no norm": {"pair_layer_norm": False},
    "hadamard": {"pair_update": "hadamard"},
    "low rank": {"pair_update": "low_rank"},
    "symmetric": {"symmetrize_pair": True},
    "transition": {"pair_transition": True},
    "scalar": {"pair_init": "scalar_mlp"},
    "factorized": FACTORIZED,
    "gates, post-norm": {"use_gating": True, "norm_first": False, "final_layer_norm": True},
}
EVERY_FORM = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
EVERY_STYLE = pytest.mark.parametrize("style", ["continuous", "scaling", "autobin", "category"])


@pytest.mark.parametrize("kind", ["outer_product", "hadamard", "low_rank"])
@pytest.mark.parametrize("init", ["zeros", "gene", "prior"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_factorized_is_full(kind: str, init: str, attn_implementation: str) -> None:
    fields = {
        "pair_update": kind,
        "pair_init": init,
        "pair_layer_norm": False,
        "prior_channels": 2 * (init == "prior"),
    }
    full = bioformer(**fields, attn_implementation=attn_implementation)
    factorized = bioformer(**fields, pair_mode="factorized", attn_implementation=attn_implementation)
    factorized.load_state_dict({key: value for key, value in full.state_dict().items() if "opm.out.bias" not in key})
    batch = padded(cells(), 3)
    if init == "prior":
        batch["pair_values"] = torch.randn(2, 12, 12, 2) * (torch.rand(2, 12, 12, 1) < 0.3)
    one, other = full(**batch), factorized(**batch)
    near(one.logits, other.logits)
    one.loss.backward()
    other.loss.backward()
    for name, parameter in factorized.named_parameters():
        near(parameter.grad, full.get_parameter(name).grad, 1e-4)


@EVERY_FORM
def test_sdpa_is_eager(fields: dict[str, Any]) -> None:
    batch, found = padded(cells(), 2), []
    for attn_implementation in ("eager", "sdpa"):
        model = bioformer(**fields, attn_implementation=attn_implementation)
        loss = model(**batch).loss
        loss.backward()
        found.append((model(**batch).logits, {name: p.grad for name, p in model.named_parameters()}))
    near(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        near(gradient, found[1][1][name], 1e-4)


# Sets of genes


@EVERY_FORM
@pytest.mark.parametrize("pads", [1, 7])
def test_padding_changes_nothing(fields: dict[str, Any], pads: int) -> None:
    model = bioformer(**fields, cell_emb_style="avg-pool")
    batch = cells()
    expected = model(**batch)
    for training, grad in ((True, True), (False, True), (False, False)):
        with torch.set_grad_enabled(grad):
            found = model.train(training)(**padded(batch, pads))
        near(found.logits[:, :9], expected.logits)
        near(found.cell_embedding, expected.cell_embedding)
        near(found.loss, expected.loss)


@EVERY_STYLE
@pytest.mark.parametrize("pool", ["cls", "avg-pool", "w-pool"])
def test_padding_changes_nothing_in_scgpt(style: str, pool: str) -> None:
    model = scgpt(input_emb_style=style, cell_emb_style=pool, n_bins=9, explicit_zero_prob=True, do_mvc=True)
    batch = cells()
    batch["values"] = batch["values"].round()
    expected, found = model(**batch), model(**padded(batch, 5))
    for name in ("logits", "zero_logits", "mvc_logits", "mvc_zero_logits"):
        near(found[name][:, :9], expected[name])
    near(found.cell_embedding, expected.cell_embedding)


@EVERY_FORM
def test_genes_are_a_set(fields: dict[str, Any]) -> None:
    model = bioformer(**fields)
    batch, order = cells(), torch.tensor([0, 5, 3, 8, 1, 2, 7, 6, 4])
    shown = None if fields is FACTORIZED else True
    expected = model(**batch, output_pair_states=shown)
    found = model(**{name: tensor[:, order] for name, tensor in batch.items()}, output_pair_states=shown)
    near(found.logits, expected.logits[:, order])
    if shown:
        near(found.pair_states, expected.pair_states[:, order][:, :, order])


@EVERY_FORM
def test_small_and_empty_cells(fields: dict[str, Any]) -> None:
    model = bioformer(**fields)
    one_gene = model(torch.tensor([[CLS]]), torch.zeros(1, 1))
    assert one_gene.logits.shape == (1, 1) and one_gene.logits.isfinite().all()
    batch = cells()
    zeros = model(batch["input_ids"], torch.zeros(2, 9))
    assert zeros.logits.isfinite().all()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1] = 0
    empty = model.bioformer(batch["input_ids"], batch["values"], attention_mask=mask)
    assert not empty.last_hidden_state[1].any() and empty.last_hidden_state.isfinite().all()
    near(empty.last_hidden_state[:1], model.bioformer(batch["input_ids"][:1], batch["values"][:1]).last_hidden_state)


def test_no_labelled_gene_gives_a_loss_of_zero_with_a_graph() -> None:
    model = bioformer()
    batch = cells() | {"labels": torch.full((2, 9), -100.0)}
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# Priors


def prior(channels: int = 2, vocab_size: int = VOCABULARY) -> GenePrior:
    pairs = torch.randperm(vocab_size**2)[: vocab_size * 4]
    return GenePrior(pairs // vocab_size, pairs % vocab_size, torch.randn(len(pairs), channels), vocab_size)


def with_prior(**fields: Any) -> Any:
    model = bioformer(**({"pair_init": "prior", "prior_channels": 2} | fields))
    model.set_gene_prior(prior())
    return model


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("init", ["prior", "prior+gene"])
def test_the_prior_is_looked_up_and_can_be_passed(direction: str, init: str) -> None:
    model, batch = with_prior(prior_direction=direction, pair_init=init), cells()
    found = model(**batch).logits
    given = model(**batch, pair_values=model.gene_prior.lookup(batch["input_ids"])).logits
    assert torch.equal(found, given)
    none = model(**batch, pair_values=torch.zeros(2, 9, 9, 2)).logits
    assert (found - none).abs().max() > 1e-4


def test_directions_of_a_single_edge() -> None:
    """An edge 5 -> 7: forward biases the query of 5 at the key 7, backward that of 7 at the key 5."""
    channels = torch.zeros(1, 3, 3, 1)
    channels[0, 1, 2] = 1.0
    for direction, row, column in (("forward", 1, 2), ("backward", 2, 1)):
        fields = {"pair_init": "prior", "prior_channels": 1, "prior_direction": direction, "use_opm": False}
        model = bioformer(BioFormerModel, **fields, output_pair_states=True)
        z = model(torch.tensor([[CLS, 5, 7]]), torch.ones(1, 3), pair_values=channels).pair_states
        is_set = z[0].any(-1)
        assert is_set[row, column] and is_set.sum() == 1


def test_saved_with_its_prior(tmp_path: Path) -> None:
    model, batch = with_prior(), cells()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "gene_prior.safetensors").is_file()
    loaded = BioFormerForMaskedExpression.from_pretrained(tmp_path)
    # Exactly the same numbers; products with one row round by where a file's tensors lie in memory.
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    assert loaded.gene_prior.sha256() == loaded.config.prior_sha256 == model.gene_prior.sha256()
    base = BioFormerModel.from_pretrained(tmp_path)
    assert len(base.gene_prior) == len(model.gene_prior)


def test_a_changed_or_absent_prior_is_refused(tmp_path: Path) -> None:
    model = with_prior()
    model.save_pretrained(tmp_path)
    other = prior()
    other.value[0] += 1
    other.save(tmp_path / "gene_prior.safetensors")
    with pytest.raises(CheckpointError, match="was changed"):
        BioFormerForMaskedExpression.from_pretrained(tmp_path)
    (tmp_path / "gene_prior.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no gene_prior\.safetensors"):
        BioFormerForMaskedExpression.from_pretrained(tmp_path)
    given = BioFormerForMaskedExpression.from_pretrained(tmp_path, gene_prior=model.gene_prior)
    torch.testing.assert_close(given(**cells()).logits, model(**cells()).logits)


def test_more_genes_keep_the_prior(tmp_path: Path) -> None:
    model, batch = with_prior(), cells()
    before = model(**batch).logits
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    assert torch.equal(model(**batch).logits, before) and model.gene_prior.vocab_size == VOCABULARY + 3
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(BioFormerForMaskedExpression.from_pretrained(tmp_path)(**batch).logits, before)


def test_priors_that_do_not_fit_are_advice() -> None:
    with pytest.raises(CheckpointError, match="prior_channels"):
        bioformer(pair_init="prior", prior_channels=1).set_gene_prior(prior())
    with pytest.raises(SequenceError, match="set_gene_prior"):
        bioformer(pair_init="prior", prior_channels=1)(**cells())


def test_z_can_be_passed_and_cells_can_be_grouped() -> None:
    model = bioformer(pair_init="zeros", output_pair_states=True, use_opm=False)
    z = torch.randn(2, 9, 9, 6)
    near(model(**cells(), pair_values=z).pair_states, z)
    grouped = bioformer(opm_group_dim=True, output_pair_states=True, pair_init="zeros")
    batch = cells()
    batch["input_ids"] = batch["input_ids"][:1].repeat(2, 1)
    found = grouped(**batch, group_ids=torch.tensor([7, 7])).pair_states
    near(found[0], found[1])
    alone = grouped(**batch, group_ids=torch.tensor([7, 3])).pair_states
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    with pytest.raises(SequenceError, match="same genes"):
        grouped(**cells(), group_ids=torch.tensor([7, 7]))
    with pytest.raises(SequenceError, match="group_ids"):
        grouped(**batch)


# Values, batches, objectives


def test_unknown_values_are_masked_values() -> None:
    model, batch = scgpt(), cells()
    expected = torch.full((2, 9), -1.0)
    expected[:, 0] = 0.0
    assert torch.equal(model(batch["input_ids"]).logits, model(batch["input_ids"], expected).logits)


def test_a_learned_mask_replaces_the_value() -> None:
    for style in ("continuous", "scaling"):
        embeddings = scgpt(ScGPTModel, mask_embedding=True, input_emb_style=style).embeddings
        ids, real = torch.tensor([[CLS, 4]]), torch.ones(1, 2, dtype=torch.bool)
        genes = embeddings.genes(ids, None)
        found = embeddings(genes, torch.tensor([[0.0, -1.0]]), real)
        near(found[0, 1], genes[0, 1] + embeddings.mask_vector.weight[0])


def test_values_that_are_no_bins_are_advice() -> None:
    model = scgpt(input_emb_style="category", n_bins=5)
    ids = torch.tensor([[CLS, 4, 5]])
    for bad in (5.0, 2.5, -3.0):
        with pytest.raises(SequenceError, match=f"one was {bad:g}"):
            model(ids, torch.tensor([[0.0, 1.0, bad]]))
    assert model(ids, torch.tensor([[0.0, 4.0, -1.0]])).logits.isfinite().all()


def test_batch_statistics_are_per_label_and_without_padding() -> None:
    x, real = torch.randn(4, 5, 3) * 3 + 1, torch.ones(4, 5, dtype=torch.bool)
    real[1, 3:] = False
    norm, labels = DomainBatchNorm("do_affine", 3, 2, exclude_padding=True).train(), torch.tensor([0, 1, 0, 1])
    found = norm(x, labels, real)
    for label in range(2):
        rows = real & (labels == label)[:, None]
        expected = nn.BatchNorm1d(3, norm.EPS)
        near(found[rows], expected(x[rows]))
        near(norm.bns[label].running_var, expected.running_var)
    assert not found[~real].any()
    with pytest.raises(SequenceError, match="batch_labels"):
        norm(x, None, real)
    with pytest.raises(SequenceError, match="0 to 1"):
        norm(x, torch.tensor([0, 1, 2, 1]), real)


def test_true_means_dsbn() -> None:
    assert ScGPTConfig(**SIZES, domain_spec_batchnorm=True, num_batch_labels=2).domain_spec_batchnorm == "dsbn"


def test_all_objectives_together() -> None:
    fields = {"do_mvc": True, "do_ecs": True, "do_cce": True, "do_dab": True, "do_cls": True, "num_labels": 4}
    fields |= {"use_batch_labels": True, "num_batch_labels": 2, "domain_spec_batchnorm": "do_affine"}
    model = scgpt(**fields, explicit_zero_prob=True, use_generation_flag=True, hidden_dropout_prob=0.1).train()
    batch = cells(rows=4) | {
        "batch_labels": torch.tensor([0, 1, 1, 0]),
        "cell_type_labels": torch.tensor([0, 3, -100, 1]),
    }
    torch.manual_seed(0)
    outputs = model(**batch)
    per_gene = outputs.loss_mse + outputs.loss_zero + outputs.loss_mvc + outputs.loss_mvc_zero
    per_batch = outputs.loss_cls + 10 * outputs.loss_ecs + outputs.loss_cce + outputs.loss_dab
    near(outputs.loss, per_gene + per_batch)
    outputs.loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == ["scgpt.embeddings.generation_flag.weight"]
    torch.manual_seed(0)
    labelled = int((batch["labels"] != -100).sum())
    twice = model(**batch, num_items_in_batch=2 * labelled)
    near(twice.loss, outputs.loss / 2)


def test_a_start_for_the_output() -> None:
    config = ScGPTConfig(**SIZES, init_output_bias=3.5)
    assert ScGPTForMaskedExpression(config).expression_head[4].bias.item() == 3.5


# Generation


def test_generated_genes_see_the_given_ones_and_themselves() -> None:
    model = scgpt(ScGPTModel, use_generation_flag=True, attn_implementation="eager")
    batch = {name: cells()[name] for name in ("input_ids", "values")}
    generated = torch.zeros(2, 9, dtype=torch.bool)
    generated[:, 6:] = True
    outputs = model(**batch, generation_mask=generated, output_attentions=True)
    allowed = ~generated[:, None, :] | torch.eye(9, dtype=torch.bool)
    for weights in outputs.attentions:
        assert not weights.masked_select(~allowed[:, None]).any()
        assert weights.masked_select(allowed[:, None]).all()
    fewer = {name: tensor[:, :6] for name, tensor in batch.items()}
    near(outputs.last_hidden_state[:, :6], model(**fewer).last_hidden_state)
    fewer = {name: tensor[:, :7] for name, tensor in batch.items()}
    alone = model(**fewer, generation_mask=generated[:, :7]).last_hidden_state
    near(outputs.last_hidden_state[:, :7], alone)
    other = batch["values"].clone()
    other[:, 6:] += 1
    changed = model(batch["input_ids"], other, generation_mask=generated).last_hidden_state
    near(changed, outputs.last_hidden_state)
    with pytest.raises(SequenceError, match="use_generation_flag"):
        scgpt(ScGPTModel)(**batch, generation_mask=generated)


@pytest.mark.parametrize("flag", [True, False])
def test_generate_expression(flag: bool) -> None:
    model = scgpt(use_generation_flag=flag, explicit_zero_prob=True)
    batch = {name: cells()[name] for name in ("input_ids", "values")}
    unknown = batch["values"] == -1
    found = model.generate_expression(**batch)
    flags = {"generation_mask": unknown} if flag else {}
    assert torch.equal(found, torch.where(unknown, model(**batch, **flags).logits, batch["values"]))
    cell = torch.randn(2, 16)
    assert (model.generate_expression(**batch, cell_embedding=cell) - found).abs().max() > 1e-3
    steps = model.generate_expression(batch["input_ids"], iterations=3)
    assert torch.equal(steps[:, 0], torch.zeros(2)) and not (steps == -1).any()
    drawn = [model.generate_expression(**batch, sample_zeros=True, generator=torch.Generator().manual_seed(3))] * 2
    assert torch.equal(*drawn) and (drawn[0][unknown] == 0).any()
    with pytest.raises(SequenceError, match="iterations"):
        model.generate_expression(**batch, iterations=0)
    with pytest.raises(SequenceError, match="zero head"):
        scgpt().generate_expression(**batch, sample_zeros=True)


def test_chunked_prediction_is_prediction_of_the_chunks() -> None:
    model = scgpt(max_seq_len=4)
    batch = {name: cells(10)[name] for name in ("input_ids", "values")}
    found = model.chunked_predict(**batch)
    for start in (1, 4, 7):
        columns = [0, *range(start, start + 3)]
        expected = model(**{name: tensor[:, columns] for name, tensor in batch.items()}).logits
        near(found[:, start : start + 3], expected[:, 1:])
    near(model.chunked_predict(**batch, chunk=10), model(**batch).logits)


# Bad input


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"pair_init": "zeros"}, (2, 9, 9, 5), r"\(cells, 9, 9, 6\)"),
        ({"pair_init": "scalar_mlp"}, (2, 8, 8), r"\(cells, 9, 9, 1\) or"),
        ({"pair_init": "prior", "prior_channels": 2}, (2, 9, 9, 3), r"\(cells, 9, 9, 2\)"),
        ({"pair_init": "gene"}, (2, 9, 9), "left out"),
    ],
)
def test_pairs_of_another_shape_are_advice(fields: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SequenceError, match=message):
        bioformer(**fields)(**cells(), pair_values=torch.zeros(shape))


def test_input_that_does_not_fit_is_advice() -> None:
    model, batch = scgpt(), cells()
    bad = {
        "`values` must be": batch | {"values": batch["values"][:, :4]},
        "`labels` must be": batch | {"labels": batch["labels"][:, :4]},
        "`attention_mask` must be": batch | {"attention_mask": torch.ones(2, 4)},
        "`pair_values` have no effect": batch | {"pair_values": torch.zeros(2, 9, 9)},
    }
    for message, inputs in bad.items():
        with pytest.raises(SequenceError, match=message):
            model(**inputs)
    with pytest.raises(SequenceError, match="factorized"):
        bioformer(**FACTORIZED)(**batch, output_pair_states=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "use_pair_bias=True, pair_mode='full'"),
        (FACTORIZED | {"pair_init": "prior", "prior_channels": 1}, "prior"),
        (FACTORIZED | {"opm_hidden_size": 150}, "needs 312"),
    ],
)
def test_flash_attention_adds_nothing_to_logits(fields: dict[str, Any], message: str) -> None:
    config = BioFormerConfig(**(SIZES | PAIR | fields))
    with pytest.raises(ValueError, match=message):
        BioFormerModel._from_config(config, attn_implementation="flash_attention_2")


def test_seed_states_have_their_shapes() -> None:
    assert BioFormerConfig.seed("2024-09-05", hidden_size=32, num_attention_heads=4).head_dim == 32
    state = BioFormerConfig.seed("2024-09-11", hidden_size=32, num_attention_heads=4)
    assert (state.head_dim, state.pair_hidden_size, state.attention_scale) == (8, 32, 32**-0.5)
    with pytest.raises(ValueError, match="state"):
        BioFormerConfig.seed("2024-10-30")


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    """Less the bias of z's norm (8 x 128), which has no effect, in the first."""
    tokens = {"vocab_size": 257, "pad_token_id": 255, "cls_token_id": 256}
    with torch.device("meta"):
        assert parameters(BioFormerForMaskedExpression(BioFormerConfig.seed("head", **tokens))) == 7_921_282 - 1_024
        ablated = BioFormerConfig(**tokens, use_pair_bias=False, use_opm=False)
        assert parameters(BioFormerForMaskedExpression(ablated)) == 6_708_738
        baseline = ScGPTConfig.seed_baseline(256, **tokens, num_hidden_layers=8, explicit_zero_prob=True)
        assert parameters(ScGPTForMaskedExpression(baseline)) == 6_714_882
