"""What holds for TFBind by construction: padding, batches, orders, broadcasting, frozen encoders, caches, screening.

Shapes: B windows, F factors, T bins, R residues, N tokens of text.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import randomized
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, EsmConfig, PreTrainedModel

from genesplice_hf.errors import CheckpointError, GeneSpliceError, SequenceError
from genesplice_hf.layers.interaction import Interaction
from genesplice_hf.models.tfbind.configuration_tfbind import TFBindConfig
from genesplice_hf.models.tfbind.modeling_tfbind import (
    TFBindForDNATracks,
    TFBindForSequenceClassification,
    TFBindForTrackPrediction,
)
from genesplice_hf.models.tfbind.modeling_tfbind_base import TFBindModel
from genesplice_hf.models.tiny_configs import tiny_enformer, tiny_tfbind

WAYS = ("film", "squeeze_excite", "hypergrid", "context_cross_attention", "isab", "adaln", "concat_token")
NORMS = ("none", "layernorm", "rmsnorm", "batchnorm", "instancenorm", "softmax_residue", "zscore_bins")
REDUCTIONS = ("logavgexp", "max", "softmax")
HEADS = (TFBindForTrackPrediction, TFBindForSequenceClassification)
BERT = {"vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SIZES = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {"context_mode": "tokens", "text_config": BertConfig(**BERT, hidden_dropout_prob=0.0), "context_dim": None}
# Our residue ids in ESM's vocabulary, as `encoder_fields` finds them.
ESM_IDS = [5, 23, 13, 9, 18, 6, 21, 12, 15, 4, 20, 17, 14, 16, 10, 8, 11, 7, 22, 19, 1, 24]
ESM = {
    "protein_input": "encoder",
    "protein_config": EsmConfig(
        vocab_size=33, pad_token_id=1, mask_token_id=32, max_position_embeddings=80, emb_layer_norm_before=False,
        position_embedding_type="rotary", **SIZES,
    ),
    "protein_dim": None,
    "protein_token_ids": ESM_IDS,
    "protein_prefix_ids": [0],
    "protein_suffix_ids": [2],
}  # fmt: skip


def model(model_class: type = TFBindModel, seed: int = 0, **fields: Any) -> Any:
    """In float64 and evaluation mode; every parameter off its initial value."""
    torch.manual_seed(seed)
    return randomized(model_class(tiny_tfbind(**fields)), seed).double().eval()


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def bases(rows: int, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 9, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs(windows: int = 2, factors: int = 2, contexts: int = 2) -> dict[str, torch.Tensor]:
    mask = torch.ones(factors, 6).bool()
    mask[0, 4:] = False
    return {
        "input_ids": bases(windows),
        "protein_embeds": states(factors, 6, 10, seed=1),
        "protein_mask": mask,
        "context": states(contexts, 6, seed=2),
    }


def rows_of(batch: dict[str, torch.Tensor], index: Any) -> dict[str, torch.Tensor]:
    return {name: tensor[index] for name, tensor in batch.items()}


@torch.no_grad()
def said(found: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    return found(**batch)[0]


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


def grid() -> list[tuple[tuple[str, ...], int]]:
    sets = [(), *((way,) for way in WAYS), WAYS]
    return [(ways, depth) for ways in sets for depth in (0, 1) if depth or "adaln" not in ways]


def with_interaction(found: PreTrainedModel, **fields: Any) -> PreTrainedModel:
    """The same model with another interaction."""
    base = found.base_model
    for name, value in fields.items():
        setattr(base.config, name, value)
    torch.manual_seed(1)
    base.interaction = Interaction(base.config, base.widths["dna"], base.widths["protein"])
    base.interaction.initialize()
    randomized(base.interaction, 1)
    if base.interaction.norm is not None and base.interaction.norm.batch is not None:
        base.interaction.norm.batch.running_var.fill_(0.5)
    base.interaction.double().eval()
    return found


@pytest.mark.parametrize(("ways", "depth"), grid(), ids=str)
def test_padding_and_neighbours_change_nothing(ways: tuple[str, ...], depth: int) -> None:
    """Padded residues, padded texts, padded bins and other rows, for every way, norm and reduction."""
    found = model(conditioning=ways, joint_cross_attn_depth=depth, genome_self_attn_depth=1, **TEXT)
    dna, p, ids = states(2, 7, 32), states(2, 8, 10, seed=1), torch.randint(5, 20, (2, 6))
    dna_mask, p_mask, text_mask = torch.ones(2, 7), torch.ones(2, 8), torch.ones(2, 6)
    dna_mask[0, 5:] = p_mask[0, 3:5] = p_mask[0, 7:] = text_mask[0, 4:] = 0
    # Whatever stands in padding.
    p[0, 3] = torch.nan
    batch = {"dna_embeds": dna, "attention_mask": dna_mask, "protein_embeds": p, "protein_mask": p_mask,
             "context_input_ids": ids, "context_mask": text_mask}  # fmt: skip
    real = p_mask[0].bool()
    alone = {"dna_embeds": dna[:1, :5], "protein_embeds": p[:1, real], "context_input_ids": ids[:1, :4]}
    assert_close(said(found, batch)[0, :5], said(found, alone)[0])
    together_in, alone_in = encoded(found, batch), encoded(found, alone)
    for norm in NORMS:
        for position in ("post", "pre") if norm in ("layernorm", "rmsnorm", "instancenorm") else ("post",):
            for reduction in REDUCTIONS:
                with_interaction(
                    found, interaction_norm=norm, interaction_norm_position=position, filip_reduce=reduction
                )
                with torch.no_grad():
                    together, single = (found.compare(*given).last_hidden_state for given in (together_in, alone_in))
                assert together.isfinite().all() and not together[0, 5:].any()
                assert_close(together[0, :5], single[0])


@torch.no_grad()
def encoded(found: Any, batch: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What the encoders make of a batch."""
    return (
        found.encode_dna(dna_embeds=batch["dna_embeds"], attention_mask=batch.get("attention_mask")),
        found.encode_proteins(batch["protein_embeds"], batch.get("protein_mask")),
        found.encode_context(None, batch["context_input_ids"], batch.get("context_mask")),
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("windows", "factors", "contexts"), [(1, 3, 3), (3, 1, 1), (3, 1, 3), (1, 3, 1), (1, 1, 3)])
def test_a_batch_of_one_serves_all(head: type, depth: int, windows: int, factors: int, contexts: int) -> None:
    """With every way of conditioning; and the encoder sees the windows as they are, not repeated."""
    ways = tuple(way for way in WAYS if depth or way != "adaln")
    found = model(head, conditioning=ways, joint_cross_attn_depth=depth)
    batch = inputs(windows, factors, contexts)
    seen: list[int] = []
    found.tfbind.dna_encoder.register_forward_hook(lambda module, args, kwargs, output: seen.append(len(output[0])),
                                                   with_kwargs=True)  # fmt: skip
    once = said(found, batch)
    assert seen == [windows]
    many = {name: tensor.expand(3, *tensor.shape[1:]) for name, tensor in batch.items()}
    assert_close(once, said(found, many))


def test_pairs_run_encoders_once() -> None:
    found, batch = model(TFBindForTrackPrediction), inputs(2, 3, 3)
    pairs = torch.tensor([[0, 2], [1, 0], [0, 1], [1, 2]])
    window, factor = pairs.unbind(1)
    one_by_one = {"input_ids": batch["input_ids"][window]} | rows_of(
        {name: batch[name] for name in ("protein_embeds", "protein_mask", "context")}, factor
    )
    expected = said(found, one_by_one)
    assert_close(said(found, batch | {"pairs": pairs}), expected)
    triples = torch.cat([pairs, pairs[:, 1:]], dim=1)
    assert_close(said(found, batch | {"pairs": triples}), expected)
    assert_close(said(found, batch | {"pairs": pairs, "context": batch["context"][factor]}), expected)
    for bad in (torch.tensor([[0, 3]]), torch.tensor([[0, 1, 9]]), torch.tensor([0, 1]), torch.tensor([[0.0, 1.0]])):
        with pytest.raises(SequenceError, match="pairs"):
            found(**batch, pairs=bad)
    with pytest.raises(SequenceError, match="equal or 1"):
        found(**batch)


def test_labels_of_every_window_with_every_factor() -> None:
    found, batch = model(TFBindForTrackPrediction, num_tracks=1), inputs(2, 3, 3)
    labels = torch.rand(2, 3, 9).double()
    outputs = found(**batch, labels=labels)
    assert outputs.logits.shape == (2, 3, 9)
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    listed = found(**batch, pairs=pairs, labels=labels)
    assert_close(listed.logits, outputs.logits.flatten(0, 1))
    assert_close(listed.loss, outputs.loss)
    assert_close(found(**batch, pairs=pairs, labels=labels.flatten(0, 1)).loss, outputs.loss)
    binary = model(TFBindForSequenceClassification)
    assert binary(**batch, labels=torch.ones(2, 3)).logits.shape == (2, 3, 1)


def test_masks_and_orders() -> None:
    found, batch = model(chain_embedding=False), inputs()
    absent = {name: tensor for name, tensor in batch.items() if name != "protein_mask"}
    assert_close(said(found, absent), said(found, absent | {"protein_mask": torch.ones(2, 6)}))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = batch | {name: batch[name][:, order] for name in ("protein_embeds", "protein_mask")}
    assert_close(said(found, permuted), said(found, batch))
    chained = model(chain_embedding=True)
    chains = torch.tensor([[0, 0, 1, 1, 1, 1]]).expand(2, -1)
    one, other = (said(chained, batch | {"protein_chain_ids": ids}) for ids in (chains, 1 - chains))
    assert not torch.allclose(one, other)
    assert_close(said(found, batch | {"protein_chain_ids": chains}), said(found, batch))
    with pytest.raises(SequenceError, match="protein_chain_ids"):
        chained(**batch, protein_chain_ids=chains + 8)


def test_what_is_recorded() -> None:
    found = model(attn_implementation="eager", genome_self_attn_depth=1, conditioning=WAYS)
    batch = inputs()
    with torch.no_grad():
        outputs = found(
            **batch, output_hidden_states=True, output_attentions=True, output_residue_scores=True, output_states=True
        )
    assert outputs.residue_scores.shape == (2, 8, 9, 6) and not outputs.residue_scores[0, ..., 4:].any()
    assert outputs.residue_scores.abs().max() <= 1 + 1e-9
    assert [tuple(x.shape) for x in outputs.attentions] == [(2, 2, 9, 7)]
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 2, 9).double())
    assert len(outputs.hidden_states) == 4
    assert outputs.dna_states.shape == (2, 9, 32) and outputs.context_embed.shape == (2, 6)
    assert not outputs.attentions[0][0, ..., 4:6].any()
    with pytest.raises(ValueError, match="eager"):
        model()(**batch, output_attentions=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protein_embeds": None}, "`protein_embeds` is missing"),
        ({"protein_input_ids": torch.ones(2, 6).long()}, "not both"),
        ({"context": None}, "`context` is missing"),
        ({"context": torch.ones(2, 5)}, r"context.*\(batch, 6\)"),
        ({"protein_embeds": torch.ones(2, 6, 9)}, "protein_embeds.*10"),
        ({"protein_mask": torch.zeros(2, 6)}, "protein_mask.*every residue of row 0"),
        ({"protein_mask": torch.ones(2, 5)}, "protein_mask"),
        ({"attention_mask": torch.tensor([[1] * 9, [0] * 9])}, "attention_mask.*every base of row 1"),
        ({"dna_embeds": torch.ones(2, 9, 32)}, "exactly one"),
        ({"input_ids": None, "dna_embeds": torch.ones(2, 9, 31)}, "32 wide"),
        (
            {"input_ids": None, "dna_embeds": torch.ones(2, 9, 32), "attention_mask": torch.ones(2, 4)},
            "attention_mask",
        ),
    ],
)
def test_bad_input_is_advice(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SequenceError, match=message):
        model()(**(inputs() | change))


def test_the_crop() -> None:
    found, batch = model(), inputs()
    short = model(target_length=4)
    short.load_state_dict(found.state_dict())
    outputs = said(short, batch)
    assert outputs.shape[1] == 4
    # Attention between the sides sees the crop alone.
    dna = found.dna_encoder(batch["input_ids"])[0]
    proteins = {name: batch[name] for name in ("protein_embeds", "protein_mask", "context")}
    assert_close(outputs, said(found, proteins | {"dna_embeds": dna[:, 2:6]}))
    mask = torch.ones(2, 9)
    mask[0, 6:] = 0
    cropped = said(short, batch | {"attention_mask": mask})
    assert_close(cropped[0], said(short, rows_of(batch, slice(0, 1)) | {"input_ids": batch["input_ids"][:1, :6]})[0])
    with pytest.raises(SequenceError, match="target_length"):
        short(**batch | {"input_ids": batch["input_ids"][:, :3]})


def enformer(model_class: type, **fields: Any) -> Any:
    torch.manual_seed(0)
    return model_class(tiny_tfbind(dna_config=tiny_enformer(), freeze_dna=True, num_tracks=1, **fields))


def test_a_frozen_encoder_stays_as_it_is() -> None:
    """Parameters, gradients, batch-norm statistics and mode, over training steps."""
    found = enformer(TFBindForTrackPrediction).train()
    encoder = found.tfbind.dna_encoder
    before = copy.deepcopy(encoder.state_dict())
    batch = rows_of(inputs(), slice(None)) | {"input_ids": torch.randint(0, 4, (2, 256))}
    batch = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    labels = torch.rand(found(**batch).logits.shape)
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        found(**batch, labels=labels).loss.backward()
        optimizer.step()
    assert not any(module.training for module in encoder.modules()) and found.tfbind.interaction.training
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    embeds = nn.functional.one_hot(batch.pop("input_ids"), 4).float().requires_grad_()
    found(**batch, inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad.any()


def test_a_frozen_encoder_is_frozen_after_loading(tmp_path: Path) -> None:
    enformer(TFBindForSequenceClassification).save_pretrained(tmp_path)
    loaded = TFBindForSequenceClassification.from_pretrained(tmp_path).train()
    assert not any(parameter.requires_grad for parameter in loaded.tfbind.dna_encoder.parameters())
    assert not loaded.tfbind.dna_encoder.training
    free = TFBindForSequenceClassification.from_pretrained(tmp_path, freeze_dna=False).train()
    assert all(parameter.requires_grad for parameter in free.tfbind.dna_encoder.parameters())


def test_the_cache_never_crosses_models() -> None:
    fields = {"freeze_dna": True, "encoder_cache_size": 3}
    one, other, plain = model(seed=0, **fields), model(seed=1, **fields), model(seed=0, freeze_dna=True)
    batch, seen = inputs(), []
    one.dna_encoder.register_forward_hook(lambda module, args, kwargs, output: seen.append(len(output[0])),
                                          with_kwargs=True)  # fmt: skip
    expected = said(plain, batch)
    assert_close(said(one, batch), expected)
    assert_close(said(one, batch), expected)
    assert seen == [2] and len(one._cache) == 2
    assert not torch.allclose(said(other, batch), expected)
    more = batch | {"input_ids": torch.cat([batch["input_ids"][:1], bases(1, seed=5)])}
    assert_close(said(one, more), said(plain, more))
    assert seen == [2, 1] and len(one._cache) == 3
    shorter = batch | {"input_ids": batch["input_ids"][:, :8]}
    assert_close(said(one, shorter), said(plain, shorter))
    assert len(one._cache) == 3
    twin = copy.deepcopy(one)
    assert len(twin._cache) == 0
    for changed in (one, plain):
        with torch.no_grad():
            next(changed.dna_encoder.parameters()).add_(0.5)
    assert_close(said(one, batch), said(plain, batch))
    mask = torch.ones(2, 9)
    mask[0, 7:] = 0
    assert_close(said(one, batch | {"attention_mask": mask}), said(plain, batch | {"attention_mask": mask}))


def test_two_texts_and_proteins_in_one_process() -> None:
    """Encoders belong to their model: poolings and layers of one do not reach another."""
    ids = {"context_input_ids": torch.randint(5, 20, (2, 6))}
    proteins = {"protein_input_ids": torch.randint(0, 20, (2, 7))}
    batch = {"input_ids": bases(2)} | ids | proteins
    text = {"context_mode": "text", "text_config": BertConfig(**BERT), "context_dim": None, "encoder_cache_size": 9}
    first = model(**text, **ESM, text_pooling="cls")
    expected = said(first, batch)
    for change in ({"text_pooling": "mean"}, {"text_pooling": "last"}, {"protein_layer": 0}):
        second = model(**(text | ESM | {"text_pooling": "cls"} | change))
        second.load_state_dict(first.state_dict())
        assert not torch.allclose(said(second, batch), expected)
        assert_close(said(first, batch), expected)
        for name, value in change.items():
            setattr(first.config, name, value)
        assert_close(said(first, batch), said(second, batch))
        for name, value in (("text_pooling", "cls"), ("protein_layer", -1)):
            setattr(first.config, name, value)


def test_residues_of_an_esm() -> None:
    """As the encoder says of each subunit alone, without the states of its special tokens."""
    found = model(**ESM)
    ids = torch.randint(0, 20, (2, 9))
    ids[0, 7:] = 20
    chains = torch.zeros(2, 9).long()
    chains[1, 4:] = 1
    states, mask = found.encode_proteins(protein_input_ids=ids, protein_chain_ids=chains)
    assert mask.tolist() == [[True] * 7 + [False] * 2, [True] * 9] and not states[0, 7:].any()
    table = torch.tensor(ESM_IDS)
    for row, part in ((0, slice(0, 7)), (1, slice(0, 4)), (1, slice(4, 9))):
        framed = torch.cat([torch.tensor([0]), table[ids[row, part]], torch.tensor([2])])[None]
        with torch.no_grad():
            expected = found.protein_encoder(framed).last_hidden_state[0, 1:-1]
        assert_close(states[row, part], expected)


def test_long_proteins(caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.randint(0, 20, (1, 11))
    with pytest.raises(SequenceError, match=r"11 residues in row 0.*max_protein_length"):
        model(**ESM, max_protein_length=6, protein_overflow="error").encode_proteins(protein_input_ids=ids)
    with caplog.at_level(logging.WARNING, logger="genesplice_hf"):
        cut = model(**ESM, max_protein_length=6).encode_proteins(protein_input_ids=ids)
    assert "11 residues is cut to the first 6" in caplog.text
    whole = model(**ESM).encode_proteins(protein_input_ids=ids[:, :6])
    assert_close(cut.states[:, :6], whole.states)
    assert cut.mask.sum() == 6 and not cut.states[:, 6:].any()
    long = torch.randint(0, 20, (1, 150))
    windows = model(**ESM, max_protein_length=140, protein_overflow="window")
    cuts = (slice(0, 140), slice(10, 150))
    parts = [model(**ESM).encode_proteins(protein_input_ids=long[:, part]).states for part in cuts]
    found = windows.encode_proteins(protein_input_ids=long).states
    assert_close(found[:, :10], parts[0][:, :10])
    assert_close(found[:, 10:140], (parts[0][:, 10:] + parts[1][:, :130]) / 2)
    assert_close(found[:, 140:], parts[1][:, 130:])


def test_an_embedding_of_amino_acids() -> None:
    found = model(protein_input="tokens")
    ids = torch.randint(0, 20, (2, 6))
    ids[0, 4:] = 20
    batch = {"input_ids": bases(2), "context": states(2, 6), "protein_input_ids": ids}
    together, alone = said(found, batch), said(found, rows_of(batch, slice(0, 1)) | {"protein_input_ids": ids[:1, :4]})
    assert_close(together[0], alone[0])
    assert not torch.allclose(together, said(found, batch | {"protein_input_ids": ids.flip(1)}))
    for bad in (22, -1, 20):
        with pytest.raises(SequenceError, match="protein_input_ids"):
            found(**batch | {"protein_input_ids": ids.clone().fill_(bad)})
    with pytest.raises(SequenceError, match="protein_input_ids` is missing"):
        found(**{name: tensor for name, tensor in batch.items() if name != "protein_input_ids"})


def test_pooling_of_texts() -> None:
    fields = {"context_mode": "text", "text_config": BertConfig(**BERT), "context_dim": None}
    ids = torch.tensor([[2, 7, 8, 9, 3, 0, 0], [2, 7, 3, 0, 0, 0, 0]])
    mask = (ids > 0).long()
    found = model(**fields, text_pooling="mean")
    with torch.no_grad():
        states = found.text_encoder(ids, mask).last_hidden_state
        pooled = found.encode_context(context_input_ids=ids, context_mask=mask).vector
    assert_close(pooled, torch.stack([states[0, 1:4].mean(0), states[1, 1]]))
    named = model(**fields, text_pooling="mean", text_special_token_ids=[2, 3])
    assert_close(named.encode_context(context_input_ids=ids, context_mask=mask).vector, pooled)
    for pooling, places in (("cls", (0, 0)), ("last", (4, 2))):
        vector = model(**fields, text_pooling=pooling).encode_context(context_input_ids=ids, context_mask=mask).vector
        assert_close(vector, states[torch.arange(2), list(places)])
    with pytest.raises(SequenceError, match="context_mask"):
        found.encode_context(context_input_ids=ids, context_mask=torch.zeros(2, 7))
    with pytest.raises(SequenceError, match="context_input_ids"):
        found.encode_context(torch.ones(2, 6))


def test_context_of_fields() -> None:
    found = model(context_mode="ids", context_vocab_sizes=[3, 4])
    batch = inputs() | {"context": torch.tensor([[0, 3], [2, 1]])}
    tables = found.context_embeddings
    assert_close(found.encode_context(batch["context"]).vector, tables[0].weight[[0, 2]] + tables[1].weight[[3, 1]])
    for bad in (torch.tensor([[3, 0], [0, 0]]), torch.ones(2, 2), torch.tensor([[0], [0]])):
        with pytest.raises(SequenceError, match="context"):
            found(**batch | {"context": bad})
    without = model(conditioning=[], context_mode="none", context_dim=None)
    assert said(without, {name: tensor for name, tensor in batch.items() if name != "context"}).isfinite().all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "fields",
    [
        {"joint_cross_attn_depth": 0},
        {"joint_cross_attn_depth": 0, "conditioning": ["film", "squeeze_excite", "concat_token", "hypergrid"]},
        {"joint_cross_attn_depth": 0, "conditioning": ["film"], "conditioning_targets": ["protein"]},
        {"conditioning": list(WAYS)},
        {"joint_cross_attn_depth": 0, "interaction_norm": "instancenorm", "interaction_norm_position": "pre"},
        {"joint_cross_attn_depth": 0, "conditioning": [], "context_mode": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("contexts", [1, 5])
def test_screening_is_the_model_pair_by_pair(head: type, fields: dict[str, Any], contexts: int) -> None:
    found, batch = model(head, num_tracks=1, **fields), inputs(2, 5, contexts)
    calls = {"dna": 0, "protein": 0}
    found.tfbind.dna_encoder.register_forward_hook(lambda *args: calls.update(dna=calls["dna"] + 1))
    context = batch["context"] if found.config.uses_context else None
    proteins = {name: batch[name] for name in ("protein_embeds", "protein_mask")}
    scores = found.score({"input_ids": batch["input_ids"]}, proteins, context, factors_at_once=2, residues_at_once=2)
    assert calls["dna"] == 1 and not scores.requires_grad
    expected = [
        [
            said(found, {
                "input_ids": batch["input_ids"][w : w + 1],
                "protein_embeds": batch["protein_embeds"][f : f + 1, batch["protein_mask"][f]],
            } | ({} if context is None else {"context": context[f : f + 1] if contexts > 1 else context}))[0]
            for f in range(5)
        ]
        for w in range(2)
    ]  # fmt: skip
    assert_close(scores, torch.stack([torch.stack(row) for row in expected]))
    listed = [p[mask] for p, mask in zip(batch["protein_embeds"], batch["protein_mask"], strict=True)]
    assert_close(found.score({"input_ids": batch["input_ids"]}, listed, context), scores)


def test_screening_refuses_what_does_not_fit() -> None:
    found, batch = model(TFBindForTrackPrediction), inputs(2, 3, 2)
    windows, proteins = {"input_ids": batch["input_ids"]}, {"protein_embeds": batch["protein_embeds"]}
    with pytest.raises(SequenceError, match="1 row or one per factor"):
        found.score(windows, proteins, batch["context"])
    with pytest.raises(SequenceError, match="factors_at_once"):
        found.score(windows, proteins, batch["context"][:1], factors_at_once=0)


def test_the_read_value() -> None:
    found, batch = model(TFBindForSequenceClassification, aux_read_value=True, fourier_dims=8), inputs()
    more = {"read_value": torch.tensor([2.0, torch.nan]).double(), "peaks_nr": torch.tensor([[9.0], [torch.nan]])}
    outputs = found(**batch, **more, labels=torch.tensor([1.0, 0.0]))
    assert_close(outputs.loss, outputs.main_loss + 0.05 * outputs.aux_loss)
    assert_close(outputs.aux_loss, nn.functional.smooth_l1_loss(outputs.read_value[0], more["read_value"][:1]))
    half = found(**batch, **more, labels=torch.tensor([1.0, 0.0]), num_items_in_batch=4)
    assert_close(half.loss, outputs.loss / 2)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in found.classifier.parameters())
    assert found(**batch, labels=torch.ones(2)).aux_loss is None
    with pytest.raises(SequenceError, match="aux_read_value"):
        model(TFBindForSequenceClassification)(**batch, read_value=torch.ones(2))


def test_losses_belong_to_their_task() -> None:
    with pytest.raises(ValueError, match="loss_type"):
        TFBindForTrackPrediction(tiny_tfbind(loss_type="bce"))
    with pytest.raises(ValueError, match="loss_type"):
        TFBindForSequenceClassification(tiny_tfbind(loss_type="poisson"))
    config = tiny_tfbind()
    assert TFBindForSequenceClassification(config).config.task == "binary" and config.task == "track"


def test_dna_tracks_without_proteins(tmp_path: Path) -> None:
    heads = {"human": 4, "mouse": 2}
    found = model(TFBindForDNATracks, track_heads=heads)
    ids = bases(2)
    assert said(found, {"input_ids": ids}).shape == (2, 9, 4)
    outputs = found(ids, species="mouse", labels=torch.rand(2, 9, 2).double())
    assert outputs.logits.shape == (2, 9, 2) and (outputs.logits >= 0).all() and outputs.loss.isfinite()
    with pytest.raises(SequenceError, match="human, mouse"):
        found(ids, species="fly")
    with pytest.raises(ValueError, match="track_heads"):
        TFBindForDNATracks(tiny_tfbind())
    whole = model(TFBindForTrackPrediction, seed=3)
    whole.float().save_pretrained(tmp_path)
    taken = TFBindForDNATracks.from_pretrained(tmp_path, track_heads=heads)
    for key, tensor in whole.tfbind.dna_encoder.state_dict().items():
        assert torch.equal(taken.tfbind.dna_encoder.state_dict()[key], tensor)
    found.float().save_pretrained(tmp_path / "own")
    again = TFBindForDNATracks.from_pretrained(tmp_path / "own")
    assert torch.equal(said(again, {"input_ids": ids}), said(found, {"input_ids": ids}))


def test_all_encoders_in_one_file_and_back(tmp_path: Path) -> None:
    text = {"context_mode": "text", "text_config": BertConfig(**BERT), "context_dim": None}
    found = model(TFBindForSequenceClassification, **text, **ESM, conditioning=WAYS, hidden_dim=14).float()
    batch = {
        "input_ids": bases(2),
        "protein_input_ids": torch.randint(0, 20, (2, 7)),
        "context_input_ids": torch.randint(5, 20, (2, 6)),
    }
    found.save_pretrained(tmp_path)
    loaded = TFBindForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(said(loaded, batch), said(found, batch))
    assert isinstance(AutoConfig.from_pretrained(tmp_path).protein_config, EsmConfig)
    assert type(AutoModel.from_pretrained(tmp_path)) is TFBindModel


def test_frozen_encoders_can_stay_where_they_are(tmp_path: Path) -> None:
    text = {"context_mode": "text", "text_config": BertConfig(**BERT), "context_dim": None}
    torch.manual_seed(1)
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    found = model(TFBindForSequenceClassification, **text).float()
    with pytest.raises(CheckpointError, match="text_name_or_path"):
        found.save_pretrained(tmp_path / "tfbind", save_frozen_encoders=False)
    found.tfbind.load_encoders(text=str(tmp_path / "bert"))
    assert torch.equal(
        found.tfbind.text_encoder.embeddings.word_embeddings.weight,
        BertModel.from_pretrained(tmp_path / "bert").embeddings.word_embeddings.weight,
    )
    batch = {name: inputs()[name].float() for name in ("protein_embeds",)} | {
        "input_ids": bases(2), "context_input_ids": torch.randint(5, 20, (2, 6)),
    }  # fmt: skip
    found.save_pretrained(tmp_path / "tfbind", save_frozen_encoders=False)
    found.save_pretrained(tmp_path / "whole")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("tfbind", "whole")]
    assert sizes[0] < sizes[1] and found.config.text_name_or_path is None
    loaded = TFBindForSequenceClassification.from_pretrained(tmp_path / "tfbind")
    assert torch.equal(said(loaded, batch), said(found, batch))
    other = BertModel(BertConfig(**(BERT | {"intermediate_size": 8})))
    with pytest.raises(CheckpointError, match=r"text_config.*intermediate"):
        found.tfbind.load_encoders(text=other)


def test_the_references_arguments() -> None:
    config = TFBindConfig.from_tf_bind_kwargs(
        aa_embed_dim=512, contextual_embed_dim=256, use_squeeze_excite=True, binary_target=True, latent_heads=16,
        aux_read_value_loss=True, read_value_aux_loss_weight=0.1, condition_hypergrid=False,
    )  # fmt: skip
    assert (config.protein_dim, config.context_dim, config.latent_heads) == (512, 256, 16)
    assert (config.conditioning, config.task, config.loss_type) == (("squeeze_excite",), "binary", "bce")
    assert config.aux_read_value and config.aux_read_value_weight == 0.1
    free = TFBindConfig.from_tf_bind_kwargs(
        use_aa_embeds=True, use_free_text_context=True, free_text_embed_method="mean_pool", use_corr_coef_loss=True
    )
    assert (free.protein_dim, free.context_mode, free.text_pooling) == (1280, "text", "mean")
    assert (free.loss_type, free.conditioning, free.dna_config.model_type) == (
        "correlation", ("hypergrid",), "genesplice_enformer",
    )  # fmt: skip
    with pytest.raises(GeneSpliceError, match=r"binary_targets.*binary_target"):
        TFBindConfig.from_tf_bind_kwargs(binary_targets=True)
    with pytest.raises(GeneSpliceError, match="free_text_embed_method"):
        TFBindConfig.from_tf_bind_kwargs(free_text_embed_method="max")
    with pytest.raises(GeneSpliceError, match="genesplice_enformer"):
        TFBindConfig(dna_config={"model_type": "genesplice_enformr"})


def test_trunk_states_can_be_passed() -> None:
    found, batch = model(), inputs()
    with torch.no_grad():
        dna = found.dna_encoder(batch["input_ids"]).last_hidden_state
    given = {name: tensor for name, tensor in batch.items() if name != "input_ids"} | {"dna_embeds": dna}
    assert_close(said(found, given), said(found, batch))
