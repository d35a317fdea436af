"""What holds for every Enformer beside the contract: heads, crops, inputs, modes, initialisation, caches, freezing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import randomized
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import AutoConfig, AutoModel

from genesplice_hf.adaptation.adapt import adapt
from genesplice_hf.adaptation.freezing import (
    freeze_batch_norm,
    restore_requires_grad,
    train_only_last_n_layers,
    train_only_layer_norms,
)
from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.heads.track_adapters import ContextAttentionAdapter, activation
from genesplice_hf.heads.tracks import SpeciesTrackHeads, track_loss
from genesplice_hf.models.enformer import modeling_enformer_layer
from genesplice_hf.models.enformer.configuration_enformer import EnformerConfig
from genesplice_hf.models.enformer.modeling_enformer import (
    EnformerForSequenceClassification,
    EnformerForTrackPrediction,
)
from genesplice_hf.models.enformer.modeling_enformer_adaptation import (
    EnformerForContextAdaptation,
    EnformerForContextAttentionAdaptation,
    EnformerForHeadAdaptation,
)
from genesplice_hf.models.enformer.modeling_enformer_base import EnformerModel, crop_centre
from genesplice_hf.models.tiny_configs import tiny_enformer

HEADS = {"human": 4, "mouse": 3}
LENGTH = 80  # 10 bins of 8 bases


def made(model_class: type = EnformerForTrackPrediction, seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    config = tiny_enformer(**({"output_heads": dict(HEADS)} | fields))
    return randomized(model_class(config), seed).eval()


def ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 4, (rows, length), generator=torch.Generator().manual_seed(seed))


def targets(rows: int, bins: int, tracks: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, bins, tracks, generator=torch.Generator().manual_seed(seed)) * 5


def test_the_published_sizes() -> None:
    config = EnformerConfig()
    assert config.tower_widths == [768, 768, 896, 1024, 1152, 1280, 1536]
    assert (config.hidden_size, config.bin_size, config.num_bins(196_608)) == (3072, 128, 896)
    with torch.device("meta"):
        model = EnformerForTrackPrediction(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 251_221_292


def test_traps_of_the_config_are_errors() -> None:
    with pytest.raises(StrictDataclassClassValidationError, match="dim_divisible_by"):
        EnformerConfig(dim=192)
    with pytest.raises(StrictDataclassClassValidationError, match="dim_divisible_by"):
        EnformerConfig(dim=96, heads=2, dim_divisible_by=128)
    for name in ("all", "train", "a.b", ""):
        with pytest.raises(StrictDataclassClassValidationError, match="output_heads"):
            tiny_enformer(output_heads={name: 3})
    with pytest.raises(ValueError, match="num_tracks"):
        EnformerForHeadAdaptation(tiny_enformer())
    with pytest.raises(ValueError, match="context_dim"):
        EnformerForContextAdaptation(tiny_enformer())
    with pytest.raises(ValueError, match="post_transformer"):
        EnformerForTrackPrediction(tiny_enformer(post_transformer=True))
    with pytest.raises(ValueError, match="head_activation"):
        EnformerForHeadAdaptation(tiny_enformer(num_tracks=2, head_activation="nonsense"))


def test_species_are_the_same_heads_however_they_are_asked_for() -> None:
    model, batch = made(), ids(3)
    every = model(batch, species="all")
    assert every.logits is None and list(every.predictions) == ["human", "mouse"]
    for species in HEADS:
        assert torch.equal(model(batch, species=species).logits, every.predictions[species])
    assert torch.equal(model(batch).logits, every.predictions["human"])
    assert torch.equal(made(default_species="mouse")(batch).logits, every.predictions["mouse"])
    mixed = model(batch, species=["mouse", "human", "mouse"])
    torch.testing.assert_close(mixed.predictions["mouse"], every.predictions["mouse"][[0, 2]])
    torch.testing.assert_close(mixed.predictions["human"], every.predictions["human"][[1]])


def test_the_loss_over_species_is_the_mean_over_rows() -> None:
    model, batch = made(), ids(3)
    labels = {"human": targets(1, 10, 4), "mouse": targets(2, 10, 3)}
    labels["mouse"][1] = torch.nan
    found = model(batch, species=["mouse", "human", "mouse"], labels=labels)
    parts = {name: track_loss(found.predictions[name], labels[name], None, "poisson", 1e-20) for name in HEADS}
    torch.testing.assert_close(found.loss, (parts["human"] + 2 * parts["mouse"]) / 3)
    found.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["poisson", "poisson_multinomial", "mse"])
def test_the_loss_of_the_config(kind: str) -> None:
    model, labels = made(loss_type=kind), targets(2, 10, 4)
    labels[0, 3] = labels[1, :, 2] = torch.nan
    found = model(ids(), labels=labels)
    torch.testing.assert_close(found.loss, track_loss(found.logits, labels, None, kind, 1e-20))
    if kind == "poisson":
        known = ~labels.isnan()
        by_hand = (found.logits - labels * found.logits.log())[known].mean()
        torch.testing.assert_close(found.loss, by_hand)
    if kind == "mse":
        assert model(ids(), labels=labels - 9).loss.isfinite()
    else:
        with pytest.raises(SequenceError, match="negative"):
            model(ids(), labels=labels - 9)


def test_tiny_predictions_have_a_floor_in_the_logarithm() -> None:
    zero, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    for floor in (1e-20, 1e-7):
        assert track_loss(zero, one, None, "poisson", floor).item() == pytest.approx(-math.log(floor))


def test_some_tracks_alone() -> None:
    model, labels = made(), targets(2, 10, 2)
    whole = model(ids(), species="mouse").logits
    for chosen in ([2, 0], torch.tensor([2, 0])):
        found = model(ids(), species="mouse", track_indices=chosen, labels=labels)
        torch.testing.assert_close(found.logits, whole[..., [2, 0]])
        torch.testing.assert_close(found.loss, track_loss(whole[..., [2, 0]], labels, None, "poisson", 1e-20))


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"species": "fly"}, "human, mouse, got 'fly'"),
        ({"species": ["human"]}, "each of the 2 rows, got 1"),
        ({"species": ["human", "fly"]}, r"\['fly'\]"),
        ({"species": "all", "track_indices": [0]}, "belong to one species"),
        ({"track_indices": [4]}, "0 to 3"),
        ({"track_indices": []}, "at least one track"),
        ({"labels": {"human": targets(2, 10, 4)}}, "must be a tensor"),
        ({"labels": targets(2, 10, 4), "species": "all"}, "must be a dict"),
        ({"labels": {"human": targets(2, 10, 4)}, "species": "all"}, "human, mouse"),
        ({"labels": targets(2, 9, 4)}, r"\(2, 10, 4\)"),
        ({"labels": targets(2, 10, 3)}, r"\(2, 10, 4\)"),
        ({"target_length": 11}, "1 to 10"),
        ({"target_length": 0}, "1 to 10"),
    ],
)
def test_bad_requests_are_advice(given: dict[str, Any], advice: str) -> None:
    with pytest.raises(SequenceError, match=advice):
        made()(ids(), **given)


def test_heads_come_and_go(tmp_path: Path) -> None:
    model = made()
    before = model(ids(), species="all").predictions
    model.add_heads({"fly": 5})
    model.resize_head("human", 6, keep=[3, 1])
    assert model.config.output_heads == {"human": 6, "mouse": 3, "fly": 5}
    after = model(ids(), species="all").predictions
    assert list(after) == ["human", "mouse", "fly"] and after["fly"].shape == (2, 10, 5)
    torch.testing.assert_close(after["human"][..., :2], before["human"][..., [3, 1]])
    assert torch.equal(after["mouse"], before["mouse"])
    model.resize_head("fly", 2)
    model.config.default_species = "human"
    model.remove_head("human")
    assert model.config.default_species is None
    model.save_pretrained(tmp_path)
    loaded = EnformerForTrackPrediction.from_pretrained(tmp_path)
    assert loaded.config.output_heads == {"mouse": 3, "fly": 2}
    torch.testing.assert_close(loaded(ids()).logits, before["mouse"])
    model.remove_head("fly")
    for call, advice in (
        (lambda: model.remove_head("mouse"), "only head"),
        (lambda: model.remove_head("human"), "must be one of mouse"),
        (lambda: model.add_heads({"mouse": 3}), "have heads"),
        (lambda: model.resize_head("mouse", 1, keep=[0, 1]), "at most 1"),
        (lambda: model.resize_head("mouse", 2, keep=[3]), "0 to 2"),
        (lambda: model.add_heads({"a.b": 3}), "output_heads"),
    ):
        with pytest.raises((GeneSpliceError, ValueError), match=advice):
            call()
    assert model.config.output_heads == {"mouse": 3}


@pytest.mark.parametrize(
    ("bins", "length", "start"), [(7, 4, 1), (7, 7, 0), (8, 3, 2), (8, 4, 2), (5, 1, 2), (5, -1, 0)]
)
def test_the_crop_has_the_length_that_was_asked_for(bins: int, length: int, start: int) -> None:
    x = torch.arange(bins)[None, :, None]
    cut = crop_centre(x, length).flatten().tolist()
    assert cut == list(range(start, start + (bins if length == -1 else length)))


def test_a_crop_is_of_one_call() -> None:
    model = made(target_length=4)
    whole = model(ids(), target_length=-1).logits
    assert whole.shape[1] == 10
    torch.testing.assert_close(model(ids()).logits, whole[:, 3:7])
    torch.testing.assert_close(model(ids(), target_length=3).logits, whole[:, 3:6])
    assert model.config.target_length == 4


@pytest.mark.parametrize("length", [1, 7, 8, 9, 61])
def test_any_length_has_a_bin_for_every_begun_one(length: int) -> None:
    assert made()(ids(1, length)).logits.shape[1] == -(-length // 8)


def test_ids_of_any_kind_of_integer() -> None:
    model = made(pad_value=0.25)
    batch = ids()
    batch[0, :5], batch[1, -9:] = 4, 5
    expected = model(batch).logits
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(model(batch.to(dtype)).logits, expected)
    assert torch.equal(model(batch.masked_fill(batch == 5, -1)).logits, expected)
    hot = nn.functional.one_hot(batch.clamp(max=4), 5)[..., :4].float().masked_fill((batch == 5)[..., None], 0.25)
    assert torch.equal(model(inputs_embeds=hot).logits, expected)
    mask = torch.ones_like(batch)
    mask[1, -9:] = 0
    assert torch.equal(model(ids().masked_fill(batch == 4, 4), attention_mask=mask).logits, expected)
    assert not torch.equal(made(pad_value=0.0)(batch).logits, expected)


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"input_ids": ids()[0]}, r"add a batch axis: `input_ids\[None\]`"),
        ({"input_ids": ids() + 3}, "got 6"),
        ({"input_ids": ids() - 2}, "got -2"),
        ({"input_ids": ids().float()}, "integers"),
        ({"inputs_embeds": torch.ones(2, 8, 5)}, r"\(batch, length, 4\)"),
        ({"inputs_embeds": torch.ones(8, 4)}, r"\(batch, length, 4\)"),
    ],
)
def test_bad_bases_are_advice(given: dict[str, Any], advice: str) -> None:
    with pytest.raises(SequenceError, match=advice):
        made()(**given)


def test_four_channels_are_no_table_of_tokens() -> None:
    model = made()
    assert model.resize_token_embeddings(6) is model.get_input_embeddings()
    with pytest.raises(GeneSpliceError, match="must stay 6"):
        model.resize_token_embeddings(7)
    with pytest.raises(GeneSpliceError, match="four channels"):
        model.set_input_embeddings(nn.Embedding(6, 4))


def test_neighbours_change_nothing() -> None:
    model, batch = made(), ids(3)
    together = model(batch).logits
    for row in range(3):
        torch.testing.assert_close(model(batch[[row]]).logits, together[[row]], rtol=1e-5, atol=1e-5)


def test_classes_are_read_from_bins_with_real_bases() -> None:
    model = made(EnformerForSequenceClassification, num_labels=2, target_length=6)
    mask = torch.ones(2, LENGTH)
    mask[0, 29:] = 0
    state = model.enformer(ids(), attention_mask=mask).last_hidden_state
    # Bins 2 to 7 are left by the crop; row 0 has real bases in bins 0 to 3.
    pooled = torch.stack([state[0, :2].mean(0), state[1].mean(0)])
    torch.testing.assert_close(model(ids(), attention_mask=mask).logits, model.classifier.out_proj(pooled))


@pytest.mark.parametrize("training", [False, True])
def test_the_biased_sdpa_of_other_devices(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU `sdpa` takes the plain products; here it is made to take torch's kernel with the bias as a mask."""
    found, sdpa = [], modeling_enformer_layer.ALL_ATTENTION_FUNCTIONS["sdpa"]
    for kernel in (False, True):
        if kernel:
            monkeypatch.setattr(modeling_enformer_layer, "_biased_function", lambda config, query: sdpa)
        model = made()
        freeze_batch_norm(model)
        model.train(training)(ids(), labels=targets(2, 10, 4)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_flash_attention_takes_no_bias() -> None:
    model = made()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no positional bias"):
        model(ids())
    model = made(position_embedding_type="rope")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"set `attn_dim_key` to `dim` / `heads` \(12\), it is 8"):
        model(ids())
    with pytest.raises(ValueError, match="attn_dropout"):
        dropping = made(attn_dropout=0.1, attn_implementation="flex_attention").train()
        dropping(ids())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rotary_positions(implementation: str) -> None:
    model = made(position_embedding_type="rope", attn_implementation=implementation)
    names = [name for name, _ in model.named_parameters() if "rel_" in name]
    assert names == []
    plain = made(position_embedding_type="rope", attn_implementation="eager")
    torch.testing.assert_close(model(ids()).logits, plain(ids()).logits)
    # Order matters: bins in another order give other values.
    layer, x = plain.enformer.layers[0], torch.randn(1, 5, 24)
    positions = modeling_enformer_layer.Positions.of(plain.config, x)
    turned = layer(x.flip(1), positions).flip(1)
    assert (layer(x, positions) - turned).abs().max() > 1e-4
    model(ids(), labels=targets(2, 10, 4)).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "mouse" not in name)


def test_projected_positions_are_kept_until_the_weight_changes() -> None:
    model, attention = made(), None
    with torch.no_grad():
        first = model(ids()).logits
        attention = model.enformer.layers[0].attn
        kept = attention._rel_k[1]
        assert torch.equal(model(ids()).logits, first) and attention._rel_k[1] is kept
        model(ids(1, 40))
        assert attention._rel_k[1].shape[0] == 9
        attention.to_rel_k.weight.mul_(2)
        changed = model(ids()).logits
        assert not torch.equal(changed, first)
        attention.to_rel_k.weight.mul_(0.5)
        torch.testing.assert_close(model(ids()).logits, first)
        assert attention._rel_k is not None and model.train().enformer.layers[0].attn._rel_k is None
    assert attention.eval()._rel_k is None
    # With gradients nothing is kept, for the graph of one call is not that of the next.
    for _ in range(2):
        model.eval()(ids(), labels=targets(2, 10, 4)).loss.backward()
    assert attention._rel_k is None


def test_inference_mode_and_then_training() -> None:
    model = made()
    with torch.inference_mode():
        expected = model(ids()).logits
    model(ids(), labels=targets(2, 10, 4)).loss.backward()
    torch.testing.assert_close(model(ids()).logits, expected.clone())


def test_bfloat16_has_the_basis_of_float32() -> None:
    model = made()
    x = torch.zeros(1, 700, 24)
    wide = modeling_enformer_layer.Positions.of(model.config, x).basis
    half = modeling_enformer_layer.Positions.of(model.config, x.bfloat16()).basis
    assert torch.equal(half, wide.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids(), labels=targets(2, 10, 4))
        assert found.logits.dtype == found.loss.dtype == torch.float32
        with torch.no_grad():
            torch.testing.assert_close(model(ids()).logits, found.logits, rtol=0.1, atol=0.1)
    found.loss.backward()
    torch.testing.assert_close(found.logits, model(ids()).logits, rtol=0.1, atol=0.1)


def test_initialisation_as_in_tensorflow() -> None:
    torch.manual_seed(0)
    model = EnformerModel(tiny_enformer(dim=192, heads=4, attn_dim_key=32, dim_divisible_by=32))
    attention, block = model.layers[0].attn, model.conv_tower[1]
    truncated = 0.87962566103423978
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_rel_k):
        std = math.sqrt(2 / layer.in_features)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.06)
        assert layer.weight.abs().max() <= 2 * std / truncated
    for bias in (attention.rel_content_bias, attention.rel_pos_bias):
        assert bias.std().item() == pytest.approx(math.sqrt(2 / 4), rel=0.25)
    assert not attention.to_out.weight.any() and not attention.to_out.bias.any()
    assert torch.equal(block.pool.weight, 2 * torch.eye(block.pool.weight.shape[0]))
    for layer, fan_in in ((block.conv, 5 * 96), (block.pointwise, 192), (model.layers[0].fc2, 384)):
        assert layer.weight.std().item() == pytest.approx(truncated / math.sqrt(fan_in), rel=0.05)
        assert layer.weight.abs().max() <= 2 / math.sqrt(fan_in) and not layer.bias.any()
    other = EnformerModel(tiny_enformer(initializer="torch"))
    assert other.layers[0].attn.to_out.weight.any() and other.stem.conv.bias.any()


def test_layer_norms_alone_train_and_come_back() -> None:
    for depth in (1, 3):
        model = made(depth=depth)
        snapshot = train_only_layer_norms(model)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert len(trained) == 4 * depth and all("_norm." in name for name in trained)
        restore_requires_grad(model, snapshot)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_last_layers_are_the_transformers() -> None:
    model = made(depth=3)
    train_only_last_n_layers(model, 1)
    trained = {name.rsplit(".", 3)[0] for name, p in model.named_parameters() if p.requires_grad}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith(("enformer.layers.2.", "classifier.")) for name in names)


def test_batch_norms_stay_frozen_in_training() -> None:
    model = made()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.uniform_(-1, 1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = model(ids()).logits
    model.freeze_batch_norm()
    model.train()
    torch.testing.assert_close(model(ids()).logits, expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.unfreeze_batch_norm()
    model(ids())
    assert not any(
        torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if name.endswith("running_mean")
    )


def test_converted_batch_norms_give_the_same_and_freeze() -> None:
    model = made()
    expected = model(ids()).logits
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model.enformer.stem.norm, nn.SyncBatchNorm)
    torch.testing.assert_close(model(ids()).logits, expected)
    model.freeze_batch_norm()
    torch.testing.assert_close(model.train()(ids()).logits, expected)


def test_checkpointing_from_the_config() -> None:
    model = made(use_checkpointing=True)
    blocks = [model.enformer.stem, *model.enformer.conv_tower, *model.enformer.layers]
    assert all(block.gradient_checkpointing for block in blocks)


def test_adapters_reach_convolution_blocks() -> None:
    """LoRA on pointwise layers, whose weights fused products read."""
    model = made()
    expected = model(ids()).logits
    tuned = adapt(model, "lora", target_modules=["pointwise", "to_rel_k"], init_lora_weights=False).eval()
    with torch.no_grad():
        assert (tuned(ids()).logits - expected).abs().max() > 1e-3
        found = tuned(ids()).logits
        with_grad = tuned.train()
    for module in with_grad.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(with_grad(ids()).logits.detach(), found, rtol=1e-4, atol=1e-5)


def test_keys_of_older_configs_are_understood(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_enformer(use_convnext=False, use_tf_gamma=False)
    assert config.gamma_normalization == "position" and caplog.text == ""
    fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    assert isinstance(AutoModel.from_config(AutoConfig.for_model(config.model_type, **fields)), EnformerModel)


def slow_context_attention(
    head: ContextAttentionAdapter, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The equations of the docstring row by row, track by track, head by head."""
    rows = []
    for bins in x:
        tracks = []
        for track, tokens in enumerate(context):
            q = head.to_queries(head.query_norm(bins)).chunk(head.num_heads, -1)
            k, v = head.to_key_values(head.key_values_norm(tokens)).chunk(2, -1)
            k = torch.cat([head.null_key[None], k]).chunk(head.num_heads, -1)
            v = torch.cat([head.null_value[None], v]).chunk(head.num_heads, -1)
            seen = torch.ones(len(tokens) + 1, dtype=torch.bool)
            if mask is not None:
                seen[1:] = mask[track].bool()
            parts = [
                (qh @ kh[seen].t() * head.scaling).softmax(-1) @ vh[seen] for qh, kh, vh in zip(q, k, v, strict=True)
            ]
            tracks.append(head.to_pred(bins + head.to_out(torch.cat(parts, -1))).squeeze(-1))
        rows.append(torch.stack(tracks, -1))
    return nn.functional.softplus(torch.stack(rows))


@pytest.mark.parametrize("masked", [False, True])
def test_context_attention_is_its_equations(masked: bool) -> None:
    torch.manual_seed(0)
    head = randomized(ContextAttentionAdapter(10, 6, 2, 4, 1e-5, "softplus"), 0).double()
    x, context = torch.randn(2, 3, 10).double(), torch.randn(4, 5, 6).double()
    mask = torch.rand(4, 5) > 0.5 if masked else None
    if mask is not None:
        mask[2] = False
    torch.testing.assert_close(head(x, context, mask), slow_context_attention(head, x, context, mask))
    fast = torch.autograd.grad(head(x, context, mask).sum(), list(head.parameters()))
    slow = torch.autograd.grad(slow_context_attention(head, x, context, mask).sum(), list(head.parameters()))
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other)


def test_contexts_per_row_and_new_hypernetworks() -> None:
    model = made(EnformerForContextAdaptation, context_dim=5)
    context = torch.randn(2, 3, 5)
    found = model(ids(), context=context).logits
    for row in range(2):
        alone = model(ids()[[row]], context=context[row]).logits
        torch.testing.assert_close(found[[row]], alone, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    fresh = EnformerForContextAdaptation(tiny_enformer(context_dim=64))
    weights = fresh.classifier.to_context_weights
    assert weights.std().item() == pytest.approx((64 * 48) ** -0.5, rel=0.1)
    assert not fresh.classifier.to_context_bias.any()


@pytest.mark.parametrize(
    ("model_class", "given", "advice"),
    [
        (EnformerForContextAdaptation, {}, "got None"),
        (EnformerForContextAdaptation, {"context": torch.ones(3, 4)}, r"\(tracks, 5\)"),
        (EnformerForContextAdaptation, {"context": torch.ones(3, 2, 5)}, "3 rows for a batch of 2"),
        (EnformerForContextAttentionAdaptation, {"context": torch.ones(5)}, r"\(tracks, 5\)"),
        (
            EnformerForContextAttentionAdaptation,
            {"context": torch.ones(3, 2, 5), "context_mask": torch.ones(3, 4)},
            r"\(3, 2\), got \(3, 4\)",
        ),
    ],
)
def test_bad_contexts_are_advice(model_class: type, given: dict[str, Any], advice: str) -> None:
    with pytest.raises(SequenceError, match=advice):
        made(model_class, context_dim=5)(ids(), **given)


def test_activations_by_name() -> None:
    x = torch.linspace(-2, 2, 5)
    assert torch.equal(activation(None)(x), x)
    assert torch.equal(activation("relu")(x), x.relu())
    assert activation("softplus")(x.bfloat16()).dtype == torch.float32


def test_a_norm_before_new_tracks() -> None:
    for norm in (True, False):
        model = made(EnformerForHeadAdaptation, num_tracks=2, post_transformer=True, post_transformer_norm=norm)
        outputs = model(ids(), output_hidden_states=True)
        state = outputs.hidden_states[-1]
        read = model.classifier.norm(state) if norm else state
        torch.testing.assert_close(outputs.logits, nn.functional.softplus(model.classifier.to_tracks(read)))
        assert model.enformer.final is None


def test_species_heads_are_linear_layers_under_their_names() -> None:
    heads = SpeciesTrackHeads(3, {"fly-1": 2, "worm_2": 4})
    assert set(heads.state_dict()) == {f"{name}.{part}" for name in ("fly-1", "worm_2") for part in ("weight", "bias")}
    x = torch.randn(1, 2, 3).bfloat16()
    assert heads.bfloat16()(x, "worm_2").dtype == torch.float32


@pytest.mark.slow
def test_the_published_model_at_its_length() -> None:
    """Full size: 196,608 bases give 896 bins of 5,313 tracks."""
    torch.manual_seed(0)
    model = EnformerForTrackPrediction(EnformerConfig()).eval()
    with torch.no_grad():
        outputs = model(ids(1, 196_608))
    assert outputs.logits.shape == (1, 896, 5313) and outputs.last_hidden_state.shape == (1, 896, 3072)
    assert outputs.logits.isfinite().all() and (outputs.logits >= 0).all()


def test_a_mask_that_hides_a_window_is_advice() -> None:
    model, ids = EnformerModel(tiny_enformer()), torch.zeros(2, 16, dtype=torch.long)
    hidden = torch.ones_like(ids).index_fill(0, torch.tensor([1]), 0)
    short = torch.ones(2, 15, dtype=torch.long).index_fill(1, torch.tensor([14]), 0)
    for mask, words in ((hidden, "hides every base"), (short, "attention_mask.*16")):
        with pytest.raises(SequenceError, match=words):
            model(ids, attention_mask=mask)
