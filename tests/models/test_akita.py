"""Akita against a plain twin, and the laws of its blocks: sizes, symmetry, identity at the start, fast paths.

Shapes: B batch, L bases, N bins of the map, P pairs, T targets.
"""

import copy
from pathlib import Path

import pytest
import torch
from akita_twin import SMALL, bases, small, twin
from tensor_sizes import LiveBytes
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModel, Trainer, TrainingArguments, default_data_collator

import genesplice_hf
from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.models.akita.configuration_akita import PUBLISHED_TARGETS, AkitaConfig
from genesplice_hf.models.akita.modeling_akita import AkitaForContactPrediction
from genesplice_hf.models.akita.modeling_akita_base import AkitaModel
from genesplice_hf.models.auto import AutoModelForContactPrediction
from genesplice_hf.models.tiny_configs import tiny_akita


def test_published_sizes() -> None:
    config = AkitaConfig()
    model = AkitaForContactPrediction(config)
    statistics = sum(t.numel() for name, t in model.named_buffers() if "running" in name)
    assert sum(p.numel() for p in model.parameters()) == 746_149
    assert statistics == 5_504
    assert config.pool_factor == 2_048
    assert config.num_bins(1 << 20) == 512 and config.map_size(1 << 20) == 448
    assert config.num_pairs(1 << 20) == 99_681
    assert config.dilations == [1, 2, 3, 5, 9, 16, 29, 50]
    assert config.dilations2d == [1, 2, 3, 5, 9, 16]
    assert tuple(config.target_names) == PUBLISHED_TARGETS


def test_published_keys() -> None:
    shapes = {
        key: tuple(tensor.shape) for key, tensor in AkitaForContactPrediction(AkitaConfig()).state_dict().items()
    }
    expected = {
        "akita.stem.conv.weight": (96, 4, 11),
        "akita.conv_tower.9.conv.weight": (96, 96, 5),
        "akita.dilated.7.conv1.weight": (48, 96, 3),
        "akita.dilated.7.conv2.weight": (96, 48, 1),
        "akita.trunk_out.conv.weight": (64, 96, 5),
        "classifier.conv.weight": (48, 65, 3, 3),
        "classifier.dilated.5.conv1.weight": (24, 48, 3, 3),
        "classifier.dilated.5.conv2.weight": (48, 24, 1, 1),
        "classifier.final.weight": (5, 48),
        "classifier.final.bias": (5,),
    }
    assert {key: shapes[key] for key in expected} == expected


@pytest.mark.slow
def test_one_million_bases() -> None:
    model = AkitaForContactPrediction(AkitaConfig()).eval()
    with torch.no_grad():
        logits = model(bases(1, 1 << 20)).logits
    assert logits.shape == (1, 99_681, 5)
    assert logits.isfinite().all()


def test_bins_of_64_bases() -> None:
    config = tiny_akita(seq_length=16_384, tower_repeat=5, target_crop=8, diagonal_offset=2)
    model = AkitaForContactPrediction(config).eval()
    with torch.no_grad():
        outputs = model(bases(1, 16_384), return_maps=True)
    assert outputs.last_hidden_state.shape == (1, 256, 8)
    assert outputs.contact_maps.shape == (1, 240, 240, 3)
    assert outputs.logits.shape == (1, config.num_pairs(16_384), 3)


@pytest.mark.parametrize("fields", [{}, {"dilated2d_symmetric": False}, {"head2d_kernel_size": 3, "tower_repeat": 1}])
@pytest.mark.parametrize("length", [256, 251, 97])
def test_the_plain_twin(fields: dict, length: int) -> None:
    model, ids = small(**fields), bases(2, length)
    states, logits = twin(model, ids)
    with torch.no_grad():
        outputs = model(ids, return_maps=True)
    torch.testing.assert_close(outputs.last_hidden_state, states, atol=1e-11, rtol=0)
    torch.testing.assert_close(outputs.logits, logits, atol=1e-10, rtol=1e-12)
    with_graph = model(ids).logits
    torch.testing.assert_close(with_graph, logits, atol=1e-10, rtol=1e-12)


def test_gradients_of_the_plain_twin() -> None:
    model = small()
    plain = copy.deepcopy(model)
    # The twin reads the state dict, whose tensors share memory with the parameters but have no graph.
    parameters = dict(plain.named_parameters())
    plain.state_dict = lambda: parameters | dict(plain.named_buffers())  # type: ignore[method-assign]
    weight = torch.randn(model.config.num_pairs(256), 3, dtype=torch.float64)
    (model(bases()).logits * weight).sum().backward()
    (twin(plain, bases())[1] * weight).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, atol=1e-8, rtol=1e-9, msg=name)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small(), bases(2, 251)
    with torch.no_grad():
        expected = model(ids).logits
        for tile in (1, 16, 50):
            monkeypatch.setattr("genesplice_hf.models.akita.modeling_akita_layer.TILE_SIZE", tile)
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-12, rtol=1e-12)


def test_the_fast_forward_takes_at_most_six_tenths_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plain chain, with the published network and its tiles on an eighth of the window; and the same result."""
    torch.manual_seed(0)
    model = AkitaForContactPrediction(AkitaConfig(seq_length=131_072, target_crop=4)).eval()
    monkeypatch.setattr("genesplice_hf.models.akita.modeling_akita_layer.TILE_SIZE", 4_096)
    ids = bases(1, 131_072)
    peaks, outputs = [], []
    for run in (lambda: twin(model, ids)[1], lambda: model(ids).logits):
        with torch.no_grad(), LiveBytes() as memory:
            outputs.append(run())
        peaks.append(memory.peak)
    assert (outputs[1] - outputs[0]).abs().max() <= 1e-4 * outputs[0].abs().max()
    assert peaks[1] <= 0.6 * peaks[0], f"{peaks[1] / peaks[0]:.2f}"


def test_maps_are_exactly_symmetric() -> None:
    model = small(dtype=torch.float32)
    with torch.no_grad():
        outputs = model(bases(), return_maps=True)
    maps = outputs.contact_maps
    assert maps.shape == (2, 28, 28, 3)
    assert torch.equal(maps, maps.transpose(1, 2))
    rows, columns = torch.triu_indices(28, 28, 2)
    assert torch.equal(maps[:, rows, columns], outputs.logits)
    assert not maps[:, torch.arange(28), torch.arange(28)].any()
    assert not maps[:, torch.arange(27), torch.arange(1, 28)].any()


def test_residual_branches_start_as_the_identity() -> None:
    """So the symmetric map of the first convolution reaches the last layer unchanged, in training too."""
    torch.manual_seed(0)
    model = AkitaForContactPrediction(tiny_akita(**SMALL)).train()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("dilated"):
            module.register_forward_hook(
                lambda module, args, out, name=name: seen.__setitem__(name, (args[0].clone(), out))
            )
    model(bases())
    assert len(seen) == 6
    for name, (given, out) in seen.items():
        assert torch.equal(given, out), name


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = AkitaModel(AkitaConfig())
    kernel = model.conv_tower[0].conv.weight
    assert kernel.std().item() == pytest.approx((2 / (96 * 5)) ** 0.5, rel=0.02)
    # Truncated at two standard deviations of the normal that is cut.
    assert kernel.abs().max().item() <= 2 * (2 / 480) ** 0.5 / 0.8796 + 1e-6
    assert not model.dilated[0].norm2.weight.any() and bool((model.dilated[0].norm1.weight == 1).all())
    assert {module.momentum for module in model.modules() if isinstance(module, _BatchNorm)} == {0.0735}
    assert {module.eps for module in model.modules() if isinstance(module, _BatchNorm)} == {1e-3}


def test_neighbours_in_a_batch_change_nothing() -> None:
    model, ids = small(), bases(3)
    with torch.no_grad():
        together, alone = model(ids).logits, [model(row[None]).logits[0] for row in ids]
    for row, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(row, expected, atol=1e-10, rtol=1e-12)


def test_a_masked_base_is_an_unknown_one() -> None:
    model, ids = small(), bases()
    mask = torch.ones_like(ids)
    mask[:, 200:] = 0
    unknown = ids.clone()
    unknown[:, 200:] = 4
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, model(unknown).logits)


def test_real_values_go_through_the_first_relu() -> None:
    model = small()
    soft = torch.randn(1, 256, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=soft).logits, model(inputs_embeds=soft.clamp(min=0)).logits)
    soft.requires_grad_()
    model(inputs_embeds=soft).logits.sum().backward()
    assert soft.grad.isfinite().all() and bool(soft.grad.any())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_live_norms(use_reentrant: bool) -> None:
    """Equal gradients and equal statistics: a block that is computed twice counts its batch once."""
    found = []
    for checkpointing in (False, True):
        model = small(dilated_dropout=0.2, dilated2d_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        model(bases()).logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-12, rtol=1e-12, msg=name)
    assert int(found[1]["akita.conv_tower.0.norm.num_batches_tracked"]) == 1


def test_hidden_states_of_every_block() -> None:
    model, ids = small(), bases()
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        expected = model.akita(ids).last_hidden_state
    # The input, stem, 2 of the tower, 3 dilated ones, and the last state.
    assert [tuple(state.shape[1:]) for state in outputs.hidden_states] == [
        (4, 256), (12, 128), (12, 64), (12, 32), (12, 32), (12, 32), (12, 32), (32, 8),
    ]  # fmt: skip
    assert torch.equal(outputs.hidden_states[-1], expected)


def test_what_there_is_not_is_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match="output_attentions"):
        model(bases(), output_attentions=True)
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises((ValueError, ImportError)):
            AkitaModel._from_config(tiny_akita(), attn_implementation=name)
    with pytest.raises(GeneSpliceError, match="new_num_tokens"):
        model.resize_token_embeddings(7)
    with pytest.raises(SequenceError, match="target_crop"):
        model(bases(1, 40))
    with pytest.raises(SequenceError, match="labels"):
        model(bases(), labels=torch.zeros(2, 5, 3))


def test_bf16_adds_distances_as_float32_does() -> None:
    """Only distances speak: their part of a folded bfloat16 head is float32's, rounded once."""
    model = small(dtype=torch.float32, head2d_filters=6)
    with torch.no_grad():
        head = model.classifier.bfloat16()
        state = torch.zeros(1, 300, 8)
        affine = genesplice_hf.models.akita.modeling_akita_head.foldable(head.conv, head.norm)
        found = head.conv(state.transpose(1, 2).bfloat16(), None, affine)
        expected = head.conv.float()(state.transpose(1, 2), None, affine)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


def test_saved_loaded_and_half_precision(tmp_path: Path) -> None:
    model = small(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForContactPrediction.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(bases()).logits, model(bases()).logits)
        trunk = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(trunk(bases()).last_hidden_state, model.akita(bases()).last_hidden_state)
    half = AutoModelForContactPrediction.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        found, expected = half(bases()).logits.float(), model(bases()).logits
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize("operation", ["mean", "max", "multiply", "multiply1", "concat"])
@pytest.mark.parametrize("fields", [{}, {"hidden_act": "quick_gelu"}, {"concat_distance": False}])
def test_every_form_trains(operation: str, fields: dict) -> None:
    model = small(one_to_two=operation, **fields).train()
    loss = model(bases(), labels=torch.randn(2, model.config.num_pairs(256), 3)).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_widths_of_the_tower() -> None:
    grown = AkitaConfig(tower_filters_init=10, tower_filters_mult=1.25, tower_repeat=4, seq_length=1 << 18)
    assert grown.tower_filters == [10, 12, 16, 20]  # 10, 12.5, 15.625, 19.53; half to even
    assert AkitaConfig(tower_filters_mult=1.1, tower_divisible_by=8).tower_filters[:4] == [96, 104, 120, 128]
    rounded = AkitaConfig(dilated_round=True).dilations
    assert rounded == [1, 2, 4, 7, 12, 21, 37, 65]


PATTERN = torch.tensor([2, 0, 1, 1, 3, 2, 0, 3, 3, 1, 2, 2])


def planted(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A window of 32 bins with a motif in two of them; their bins, and the dot where they meet, are stripes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 4, (256,), generator=generator)
    bins = sorted(torch.randperm(20, generator=generator)[:2].add(4).tolist())
    contact = torch.zeros(28, 28)
    for place in bins:
        ids[place * 8 : place * 8 + len(PATTERN)] = PATTERN
        contact[place - 2] += 1
        contact[:, place - 2] += 1
    rows, columns = torch.triu_indices(28, 28, 2)
    return ids, contact[rows, columns][:, None]


def test_trainer_overfits_planted_stripes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_akita(**(SMALL | {"num_targets": 1, "stem_kernel_size": 11, "dilated2d_repeat": 2}))
    model = AkitaForContactPrediction(config)
    dataset = [dict(zip(("input_ids", "labels"), planted(seed), strict=True)) for seed in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=150, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        lr_scheduler_type="constant", logging_steps=150, save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=default_data_collator).train()
    model.eval()
    labels = torch.stack([row["labels"] for row in dataset])
    with torch.no_grad():
        predicted = model(torch.stack([row["input_ids"] for row in dataset])).logits
    assert (predicted - labels).square().mean() < 0.1 * labels.var()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 256), "hides every base"),
        (torch.cat([torch.ones(2, 255), torch.zeros(2, 2)], dim=1), "attention_mask"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(SequenceError, match=message):
        small()(bases(), attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_ids_of_every_integer_type(dtype: torch.dtype) -> None:
    model = small()
    with torch.no_grad():
        assert torch.equal(model(bases().to(dtype)).logits, model(bases()).logits)
        padded = bases()
        padded[:, -9:] = -1
        assert torch.equal(model(padded).logits, model(padded.where(padded >= 0, 5)).logits)
