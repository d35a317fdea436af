"""Losses, asked positions, generation and learning of GeneSplice's task classes.

Shapes: B batch, L bases, V vocabulary, E hidden size.
"""

import math

import pytest
import torch
from tiny_genesplice import FORMS, random_bases, tiny, tiny_config

from genesplice_hf.heads.pooling import masked_max, masked_mean
from genesplice_hf.layers.hierarchical_cache import GeneSpliceCache
from genesplice_hf.models.genesplice.modeling_genesplice import (
    GeneSpliceForCausalLM,
    GeneSpliceForMaskedLM,
    GeneSpliceForSequenceClassification,
    GeneSpliceForTokenClassification,
    GeneSpliceModel,
)

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
LENGTH = 150


def masked_batch() -> dict[str, torch.Tensor]:
    """Two rows, one with padding; a fifth of the bases is asked for."""
    ids, mask = random_bases(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 100:] = 0
    asked = (torch.rand(2, LENGTH) < 0.2) & mask.bool()
    labels = ids.masked_fill(~asked, -100)
    return {"input_ids": ids.masked_fill(asked, 4), "attention_mask": mask, "labels": labels}


def nats(logits: torch.Tensor, label: int) -> float:
    scores = logits.tolist()
    return math.log(sum(math.exp(score) for score in scores)) - scores[label]


def losses_by_hand(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, shift: int = 0):
    """(weight, nats) of every label; with shift 1 the logits of one position earlier predict it."""
    return [
        (1.0 if weight is None else float(weight[b, i]), nats(logits[b, i - shift], int(labels[b, i])))
        for b in range(len(labels))
        for i in range(shift, labels.shape[1])
        if labels[b, i] != -100
    ]


@BOTH_FORMS
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("num_items", [None, 1000])
def test_masked_loss_is_the_sum_by_hand(form, is_weighted, num_items) -> None:
    model, batch = tiny(GeneSpliceForMaskedLM, form), masked_batch()
    weight = torch.rand(2, LENGTH) if is_weighted else None
    out = model(**batch, loss_weight=weight, num_items_in_batch=num_items)
    parts = losses_by_hand(out.logits, batch["labels"], weight)
    total = sum(w * loss for w, loss in parts)
    expected = total / (num_items or sum(w for w, _ in parts))
    assert out.loss.item() == pytest.approx(expected, rel=1e-4)


@BOTH_FORMS
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("num_items", [None, 1000])
def test_training_looks_at_labelled_positions_alone_and_learns_the_same(form, is_weighted, num_items) -> None:
    model, batch = tiny(GeneSpliceForMaskedLM, form), masked_batch()
    options = {"loss_weight": torch.rand(2, LENGTH) if is_weighted else None, "num_items_in_batch": num_items}
    rows, results = [], []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.numel() // 16))
    for is_training in (False, True):
        out = model.train(is_training)(**batch, **options)
        results.append((out, torch.autograd.grad(out.loss, list(model.parameters()))))
    (whole, whole_gradients), (short, short_gradients) = results
    labelled = batch["labels"] != -100
    assert rows == [2 * LENGTH, int(labelled.sum())]
    torch.testing.assert_close(short.logits, whole.logits[labelled])
    torch.testing.assert_close(short.loss, whole.loss)
    for mine, expected in zip(short_gradients, whole_gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)], ids=["none", "zero", "tensor"])
def test_a_batch_without_labels_teaches_nothing(num_items) -> None:
    model, batch = tiny(GeneSpliceForMaskedLM, "flat").train(), masked_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, num_items_in_batch=num_items).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


@BOTH_FORMS
def test_logits_where_they_are_wanted(form) -> None:
    model, batch = tiny(GeneSpliceForMaskedLM, form), masked_batch()
    positions = torch.tensor([[3, 0, 149], [7, 7, 99]])
    whole = model(**batch).logits
    weight = torch.rand(2, LENGTH)
    labels = batch["labels"].clone()
    labels[0, 3], labels[1, 99] = 5, 8
    batch["labels"] = labels
    out = model(**batch, loss_weight=weight, logits_positions=positions)
    expected = torch.stack([whole[b, row] for b, row in enumerate(positions)])
    torch.testing.assert_close(out.logits, expected)
    asked = losses_by_hand(expected, labels.gather(1, positions), weight.gather(1, positions))
    assert out.loss.item() == pytest.approx(sum(w * n for w, n in asked) / sum(w for w, _ in asked), rel=1e-4)


@BOTH_FORMS
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("num_items", [None, 1000])
def test_causal_loss_asks_each_position_for_the_next_base(form, is_weighted, num_items) -> None:
    model, ids = tiny(GeneSpliceForCausalLM, form, is_decoder=True), random_bases(2, 140)
    labels = ids.clone()
    labels[1, 90:] = -100
    weight = torch.rand(2, 140) if is_weighted else None
    out = model(input_ids=ids, labels=labels, loss_weight=weight, num_items_in_batch=num_items)
    parts = losses_by_hand(out.logits, labels, weight, shift=1)
    assert len(parts) == 139 + 89
    expected = sum(w * loss for w, loss in parts) / (num_items or sum(w for w, _ in parts))
    assert out.loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_last_logits_alone() -> None:
    model, ids = tiny(GeneSpliceForCausalLM, "hierarchical", is_decoder=True), random_bases(2, 140)
    whole = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, logits_to_keep=3).logits, whole[:, -3:])


@pytest.mark.parametrize("kept", [5, torch.tensor([0, 17, 139])], ids=["last", "chosen"])
def test_the_loss_of_the_computed_logits(kept) -> None:
    """Each computed logit is asked for the base after it; the last base of the row has none."""
    model, ids = tiny(GeneSpliceForCausalLM, "hierarchical", is_decoder=True), random_bases(2, 140)
    out = model(input_ids=ids, labels=ids, logits_to_keep=kept)
    places = [*range(135, 139)] if isinstance(kept, int) else [0, 17]
    whole = model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(
        whole[:, places].flatten(0, 1), ids[:, [place + 1 for place in places]].flatten()
    )
    torch.testing.assert_close(out.loss, expected)


@BOTH_FORMS
@pytest.mark.parametrize("num_items", [None, 1000])
def test_a_label_per_base(form, num_items) -> None:
    model, ids = tiny(GeneSpliceForTokenClassification, form, num_labels=3), random_bases(2, 140)
    labels = torch.randint(0, 3, (2, 140))
    labels[:, ::3] = -100
    out = model(input_ids=ids, labels=labels, num_items_in_batch=num_items)
    assert out.logits.shape == (2, 140, 3)
    parts = losses_by_hand(out.logits, labels, None)
    assert out.loss.item() == pytest.approx(sum(loss for _, loss in parts) / (num_items or len(parts)), rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("form", "pooling", "use_decoder"),
    [
        ("flat", "mean", True),
        ("flat", "max", True),
        ("flat", "bin_mean", True),
        ("hierarchical", "mean", True),
        ("hierarchical", "max", True),
        ("hierarchical", "bin_mean", True),
        ("hierarchical", "mean", False),
        ("hierarchical", "max", False),
    ],
)
def test_a_sequence_is_judged_by_its_real_states(form, pooling, use_decoder, side) -> None:
    model = tiny(
        GeneSpliceForSequenceClassification, form, classifier_pooling=pooling, use_decoder=use_decoder, num_labels=3
    )
    ids, mask = random_bases(2, 300), torch.ones(2, 300, dtype=torch.long)
    mask[1, slice(0, 170) if side == "left" else slice(130, None)] = 0
    states = model.genesplice(input_ids=ids, attention_mask=mask)
    pooled = {"mean": masked_mean, "bin_mean": masked_mean, "max": masked_max}[pooling]
    if pooling == "bin_mean" or not use_decoder:
        vector = pooled(states.bin_hidden_state, states.bin_mask)
    else:
        vector = pooled(states.last_hidden_state, mask.bool())
    out = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([2, 0]), num_items_in_batch=8)
    torch.testing.assert_close(out.logits, model.classifier.out_proj(vector))
    assert out.loss.item() == pytest.approx((nats(out.logits[0], 2) + nats(out.logits[1], 0)) / 8, rel=1e-4)


@pytest.mark.parametrize("model_class", [GeneSpliceForMaskedLM, GeneSpliceForTokenClassification])
def test_heads_on_bases_need_the_way_back_to_bases(model_class) -> None:
    with pytest.raises(ValueError, match=f"{model_class.__name__} needs one state per base; set `use_decoder=True`"):
        tiny(model_class, "hierarchical", use_decoder=False)
    tiny(model_class, "flat", use_decoder=False)


def test_the_direction_must_fit_the_head_and_the_config_is_left_alone() -> None:
    causal, both = tiny_config("flat", is_decoder=True), tiny_config("flat")
    with pytest.raises(ValueError, match=r"no masked LM; use GeneSpliceForCausalLM"):
        GeneSpliceForMaskedLM(causal)
    with pytest.raises(ValueError, match=r"needs a causal config; set `is_decoder=True`"):
        GeneSpliceForCausalLM(both)
    assert causal.is_decoder and not both.is_decoder


@BOTH_FORMS
def test_the_head_of_a_language_model_is_its_embedding(form) -> None:
    for model in (tiny(GeneSpliceForMaskedLM, form), tiny(GeneSpliceForCausalLM, form, is_decoder=True)):
        assert model.lm_head.weight is model.genesplice.embeddings.weight


def best_next_bases(model: GeneSpliceForCausalLM, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy search the long way: the whole sequence again for every base."""
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@BOTH_FORMS
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt_bp", [3, 126])
def test_generation_is_repeated_prediction(form, use_cache, prompt_bp) -> None:
    """With or without a cache, also where the form has none, and over the border of a bin."""
    model, ids = tiny(GeneSpliceForCausalLM, form, seed=3, is_decoder=True), random_bases(2, prompt_bp)
    expected = best_next_bases(model, ids, 5)
    assert len(expected[:, prompt_bp:].unique()) > 1
    made = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=use_cache)
    assert made.tolist() == expected.tolist()


@BOTH_FORMS
def test_a_prompt_with_padding_before_it_goes_on_as_it_would_alone(form) -> None:
    model, ids = tiny(GeneSpliceForCausalLM, form, seed=3, is_decoder=True), random_bases(1, 30)
    padded = torch.nn.functional.pad(ids, (7, 0))
    made = model.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=5, do_sample=False)
    assert made[:, 7:].tolist() == best_next_bases(model, ids, 5).tolist()


def test_generating_in_training_mode_is_not_cut_short() -> None:
    """No cache is kept then, so that every step must read everything."""
    model, ids = tiny(GeneSpliceForCausalLM, "flat", seed=3, is_decoder=True), random_bases(1, 30)
    expected = best_next_bases(model, ids, 5)
    assert model.train().generate(ids, max_new_tokens=5, do_sample=False).tolist() == expected.tolist()


@pytest.mark.parametrize("chunks", [[140], [1] * 12 + [128], [50, 3, 87], [139, 1]])
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_prompt_may_be_read_in_any_pieces(chunks, is_padded) -> None:
    model, ids = tiny(GeneSpliceForCausalLM, "flat", is_decoder=True).double(), random_bases(2, 140)
    mask = torch.ones_like(ids)
    if is_padded:
        mask[1, :20] = 0
    cache, pieces, start = None, [], 0
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits
        for size in chunks:
            stop = start + size
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, stop
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-10)
    assert cache.get_seq_length() == 140
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(100)


@BOTH_FORMS
def test_only_causal_models_have_a_cache(form) -> None:
    model, ids = tiny(GeneSpliceModel, form), random_bases(1, 20)
    assert model(input_ids=ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="`past_key_values` needs a causal config"):
        model(input_ids=ids, past_key_values=GeneSpliceCache())


def test_a_repeat_is_learned() -> None:
    """Every row repeats five random bases of its own: what comes next stands five bases back, and nowhere else."""
    model = tiny(
        GeneSpliceForCausalLM,
        "flat",
        is_decoder=True,
        initializer_range=0.1,
        tower_layer_types=["sliding_attention"] * 2,
    )
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)

    def batch() -> dict[str, torch.Tensor]:
        ids = random_bases(64, 5).repeat(1, 6)
        labels = ids.clone()
        labels[:, :5] = -100
        return {"input_ids": ids, "labels": labels}

    for _ in range(150):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert model.eval()(**batch()).loss.item() < 0.1
