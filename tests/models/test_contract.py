"""The contract of every head of every row: what a forward and a backward pass must be.

The bundle's part of the contract (every head without the package) stands in `tests/hub/test_bundle.py`.
"""

from dataclasses import fields

import pytest
import torch
from contract_cases import (
    CASES,
    LENGTHS_BP,
    SHAPES,
    Batch,
    Case,
    cases,
    gradients,
    no_label,
    objective,
    output,
    pad_id,
    padded,
)
from contract_rows import EXCEPTIONS, FORMS
from torch import nn

from genesplice_hf.models.registry import REGISTRY

HALF_PRECISION = 2**-8  # relative rounding of bfloat16: 7 explicit bits of mantissa


def real(values: torch.Tensor, batch: Batch, case: Case) -> list[torch.Tensor]:
    """Per row what stands at real positions; per-sequence outputs as they are."""
    if not case.per_token:
        return list(values)
    rows = [row[mask.bool()] for row, mask in zip(values, batch["attention_mask"], strict=True)]
    if not case.per_pair:
        return rows
    return [row[:, mask.bool()] for row, mask in zip(rows, batch["attention_mask"], strict=True)]


def assert_rows_equal(found: list[torch.Tensor], expected: list[torch.Tensor], atol: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


def assert_gradients_equal(found: Batch, expected: Batch, atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_exceptions_name_what_exists() -> None:
    names = {*REGISTRY, *(case.name for case in CASES), *(case.name.split("/")[0] for case in CASES)}
    assert {name for name, _ in EXCEPTIONS} <= names
    assert all(reason.strip() for reason in EXCEPTIONS.values())


@cases("test_forward_shapes")
@pytest.mark.parametrize("lengths_bp", [LENGTHS_BP, (1,), (4, 4), (40,)])
def test_forward_shapes(case: Case, lengths_bp: tuple[int, ...]) -> None:
    batch = case.batch(lengths_bp)
    model = case.model()
    found = output(model, batch)
    assert found.shape == SHAPES[case.auto_class](model.config, *batch["input_ids"].shape)
    assert found.isfinite().all()
    without_mask = output(model, {"input_ids": batch["input_ids"][:1]})
    assert without_mask.shape[1:] == found.shape[1:]


@cases("test_loss_is_a_scalar_that_training_lowers", lambda case: case.has_loss)
def test_loss_is_a_scalar_that_training_lowers(case: Case) -> None:
    model, batch = case.model(), case.batch(labels=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**batch).loss
        assert loss.shape == ()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@cases("test_every_parameter_gets_a_finite_gradient")
def test_every_parameter_gets_a_finite_gradient(case: Case) -> None:
    found = gradients(case.model().train(), case.batch(labels=True))
    missing = [name for name, gradient in found.items() if gradient is None]
    assert missing == []
    assert [name for name, gradient in found.items() if not gradient.isfinite().all()] == []
    assert [name for name, gradient in found.items() if not gradient.any()] == []


@cases("test_training_and_evaluation_give_the_same_loss", lambda case: case.has_loss)
def test_training_and_evaluation_give_the_same_loss(case: Case) -> None:
    """Without dropout, whatever short cut training takes."""
    model, batch = case.model(), case.batch(labels=True)
    one, other = gradients(model.train(), batch), gradients(model.eval(), batch)
    assert_gradients_equal(one, other, atol=1e-6)


@cases("test_eager_is_sdpa")
def test_eager_is_sdpa(case: Case) -> None:
    batch = case.batch(labels=True)
    found = {}
    for name in ("eager", "sdpa"):
        model = case.model(attn_implementation=name)
        assert model.config._attn_implementation == name
        found[name] = real(output(model, batch), batch, case), gradients(model, batch)
    assert_rows_equal(found["sdpa"][0], found["eager"][0])
    assert_gradients_equal(found["sdpa"][1], found["eager"][1])


@cases("test_flex_is_sdpa_in_inference")
def test_flex_is_sdpa_in_inference(case: Case) -> None:
    """Values only, for flex has no backward pass on a CPU; uncompiled, for compiling takes ten seconds a head."""
    batch = case.batch()
    flex, sdpa = (case.model(attn_implementation=name) for name in ("flex_attention", "sdpa"))
    with torch.compiler.set_stance("force_eager"):
        found = output(flex, batch)
    assert_rows_equal(real(found, batch, case), real(output(sdpa, batch), batch, case))


@cases("test_an_implementation_that_cannot_run_is_refused")
def test_an_implementation_that_cannot_run_is_refused(case: Case) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine may run flash attention; the refusal is that of a CPU")
    with pytest.raises(ImportError, match=r"[Ff]lash"):
        case.model_class._from_config(case.config(), attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="nonsense"):
        case.model_class._from_config(case.config(), attn_implementation="nonsense")


@cases("test_padding_and_neighbours_change_nothing")
@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("form", [{}, {"extra": 13}, {"left": None}, {"left": 6}, {"left": 5, "extra": 9}], ids=str)
def test_padding_and_neighbours_change_nothing(case: Case, form: dict, name: str) -> None:
    model, pad = case.model(attn_implementation=name), pad_id(case.row)
    sequences = [case.ids(length, seed) for seed, length in enumerate(LENGTHS_BP)]
    batch = padded(sequences, pad, **form)
    alone = [output(model, {"input_ids": ids[None]})[0] for ids in sequences]
    assert_rows_equal(real(output(model, batch), batch, case), alone)
    twice = padded([sequences[2], sequences[2].flip(0)], pad, **form)
    assert_rows_equal(real(output(model, twice), twice, case)[:1], alone[2:3])


@cases("test_padding_gets_no_gradient_and_no_loss", lambda case: case.has_loss)
def test_padding_gets_no_gradient_and_no_loss(case: Case) -> None:
    model, batch = case.model(), case.batch(labels=True)
    per_token = ("input_ids", "attention_mask", "values")
    wider = {name: nn.functional.pad(batch[name], (0, 8)) for name in per_token if name in batch}
    wider["input_ids"][:, -8:] = pad_id(case.row)
    labels = batch["labels"]
    if case.per_token:
        end = (0, 8, 0, 8) if case.per_pair else (0, 0) * (labels.dim() - 2) + (0, 8)
        labels = nn.functional.pad(labels, end, value=no_label(labels))
    assert_gradients_equal(gradients(model, batch | wider | {"labels": labels}), gradients(model, batch))


@cases("test_gradient_checkpointing_is_plain")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_is_plain(case: Case, use_reentrant: bool) -> None:
    batch = case.batch(labels=True)
    plain = gradients(case.model().train(), batch)
    model = case.model().train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_gradients_equal(gradients(model, batch), plain)


def with_dropout(case: Case) -> dict[str, float]:
    """Every dropout field that the form leaves open."""
    names = [
        field.name
        for field in fields(case.entry.config_class)
        if field.name.endswith(("dropout", "dropout_prob"))
        and field.type is not bool
        and field.name not in FORMS.get(case.row, {}).get(case.form, {})
    ]
    assert names, f"{case.row} has no dropout field"
    return dict.fromkeys(names, 0.3)


@cases("test_a_seed_determines_dropout")
def test_a_seed_determines_dropout(case: Case) -> None:
    model, batch = case.model(**with_dropout(case)).train(), case.batch(labels=True)

    def run(seed: int) -> Batch:
        torch.manual_seed(seed)
        return gradients(model, batch)

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["loss"], other["loss"])
    assert torch.equal(output(model.eval(), batch), output(case.model(), batch))


@cases("test_checkpointing_repeats_dropout")
def test_checkpointing_repeats_dropout(case: Case) -> None:
    batch, found = case.batch(labels=True), []
    for checkpointing in (False, True):
        model = case.model(**with_dropout(case)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        found.append(gradients(model, batch))
    assert_gradients_equal(found[1], found[0])


@cases("test_bf16_is_finite_and_near_fp32")
def test_bf16_is_finite_and_near_fp32(case: Case) -> None:
    batch = case.batch(labels=True)
    model = case.model()
    expected = real(output(model, batch), batch, case)
    model = model.to(torch.bfloat16)
    found = output(model, batch)
    # Counts beyond 256 have no exact bfloat16.
    assert found.dtype == (torch.float32 if "Track" in case.auto_class else torch.bfloat16)
    scale = torch.cat([rows.flatten() for rows in expected]).std()
    for one, other in zip(real(found.float(), batch, case), expected, strict=True):
        assert one.isfinite().all()
        # The error of a sum of roundings: a few times the rounding of one number, relative to the spread.
        assert (one - other).square().mean().sqrt() < 8 * HALF_PRECISION * scale
    objective(model.train(), batch).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@cases("test_declared_reverse_complement", lambda case: case.auto_class == "AutoModelForMaskedLM")
def test_declared_reverse_complement(case: Case) -> None:
    """A declaration of "none" must be true as well, so that an equivariant model does not go unnoticed."""
    model = case.model()
    complement = torch.tensor(model.config.complement_map)
    ids = torch.stack([case.ids(17, seed) for seed in range(3)])
    forward = output(model, {"input_ids": ids})
    backward = output(model, {"input_ids": complement[ids.flip(1)]}).flip(1)[..., complement]
    gap = (forward - backward).abs().max().item()
    is_declared = case.entry.reverse_complement == "equivariant" or getattr(model.config, "rc_equivariant", False)
    assert gap < 1e-4 if is_declared else gap > 1e-2


def over_tokens(case: Case) -> bool:
    return "LM" in case.auto_class or case.auto_class == "AutoModelForPreTraining"


@cases("test_more_tokens_change_nothing_for_the_old_ones")
@pytest.mark.parametrize("added", [1, 7])
def test_more_tokens_change_nothing_for_the_old_ones(case: Case, added: int, tmp_path) -> None:
    model, batch = case.model(), case.batch()
    before, size = output(model, batch), model.config.vocab_size
    model.resize_token_embeddings(size + added, mean_resizing=False)
    after = output(model, batch)
    over_vocabulary = before.shape[-1] == size and case.per_token and case.has_loss
    assert after.shape[-1] == (size + added if over_vocabulary and over_tokens(case) else before.shape[-1])
    torch.testing.assert_close(after[..., : before.shape[-1]], before)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size + added
    new = {"input_ids": torch.full((1, 5), size + added - 1)}
    assert output(model, new).isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path)
    # The weights exactly; a product over one row may round differently where the file's tensors are not aligned.
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(output(loaded, new), output(model, new))


@cases("test_recorded_outputs")
def test_recorded_outputs(case: Case) -> None:
    model, batch = case.model(attn_implementation="eager"), case.batch()
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    # A model with levels returns the attention over its bins.
    assert len(outputs.attentions) == getattr(model.config, "num_tower_layers", model.config.num_hidden_layers)
    bins = getattr(model.base_model(**batch), "bin_mask", None)
    mask = batch["attention_mask"] if bins is None else bins.long()
    if hasattr(model.config, "num_bins"):
        # A window has no padding, and all its bins attend to all.
        mask = torch.ones(len(mask), model.config.num_bins(mask.shape[1]), dtype=torch.long)
    for weights_BHLL in outputs.attentions:
        assert weights_BHLL.shape[-2:] == (mask.shape[1], mask.shape[1])
        from_real = weights_BHLL.transpose(1, 2)[mask.bool()]
        torch.testing.assert_close(from_real.sum(-1), torch.ones_like(from_real[..., 0]))
        assert not (weights_BHLL * (1 - mask)[:, None, None, :]).transpose(1, 2)[mask.bool()].any()
    assert_rows_equal(real(outputs[0], batch, case), real(output(model, batch), batch, case))


@cases("test_embeddings_instead_of_ids")
def test_embeddings_instead_of_ids(case: Case) -> None:
    model, batch = case.model(), case.batch()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    others = {name: values for name, values in batch.items() if name != "input_ids"}
    found = output(model, {"inputs_embeds": embeds} | others)
    torch.testing.assert_close(found, output(model, batch))


@cases("test_tuples_on_request")
def test_tuples_on_request(case: Case) -> None:
    model, batch = case.model(), case.batch()
    with torch.no_grad():
        found = model(**batch, return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], output(model, batch))


@cases("test_bad_input_is_advice")
def test_bad_input_is_advice(case: Case) -> None:
    model, batch = case.model(), case.batch((6, 6))
    hole = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])
    bad = {
        "exactly one": {},
        "at least one": {"input_ids": batch["input_ids"][:, :0]},
        "hole in row 1": {"input_ids": batch["input_ids"], "attention_mask": hole},
        "attention_mask": {"input_ids": batch["input_ids"], "attention_mask": hole[None]},
    }
    if case.reads_genes:
        # Genes are a set, in which any of them may be left out.
        bad.pop("hole in row 1")
    for message, inputs in bad.items():
        with pytest.raises(ValueError, match=message):
            model(**inputs)
