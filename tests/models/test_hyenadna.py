"""HyenaDNA against a plain twin, and the laws of its filters, padding, limit and kept filters.

Weights of the original are in `test_conversion_hyenadna.py`.

Shapes: B batch, L tokens, E hidden size, V vocabulary.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import randomized
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, pipeline

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.models.hyenadna import modeling_hyenadna_layer
from genesplice_hf.models.hyenadna.configuration_hyenadna import HyenaDNAConfig
from genesplice_hf.models.hyenadna.modeling_hyenadna import (
    HyenaDNAForCausalLM,
    HyenaDNAForSequenceClassification,
    HyenaDNAForTokenClassification,
)
from genesplice_hf.models.hyenadna.modeling_hyenadna_base import HyenaDNAModel
from genesplice_hf.models.hyenadna.modeling_hyenadna_layer import HyenaFilter, decay_rates, filter_positions
from genesplice_hf.tokenization.dna_lm_spec import dna_lm_spec
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

SIZES: dict[str, Any] = {
    "d_model": 16, "n_layer": 2, "d_inner": 24, "max_seq_len": 48, "filter_order": 8, "initializer_range": 0.3,
}  # fmt: skip
HEADS = [HyenaDNAModel, HyenaDNAForCausalLM, HyenaDNAForSequenceClassification, HyenaDNAForTokenClassification]
EVERY_HEAD = pytest.mark.parametrize("model_class", HEADS)
FORMS: dict[str, dict[str, Any]] = {
    "published": {},
    "order_3": {"hyena_order": 3},
    "stored": {"filter_positions": "stored"},
    "trained": {"filter_positions": "trained"},
    "plain": {"train_freq": False, "use_bias": False, "modulate": False, "short_filter_order": 4, "emb_dim": 3},
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def tiny(model_class: type[PreTrainedModel] = HyenaDNAModel, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A float64 model in evaluation mode, every parameter off its initial value."""
    torch.manual_seed(seed)
    return randomized(model_class(HyenaDNAConfig(**(SIZES | fields))).double(), seed).eval()


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(7, 12, shape, generator=torch.Generator().manual_seed(seed))


def slow_taps(filter: HyenaFilter, length: int) -> torch.Tensor:
    """(L, O E): the filters written out position after position."""
    config, rows = filter.config, []
    for j in range(length):
        time, bands = j / (config.max_seq_len - 1), (config.emb_dim - 1) // 2
        turns = [2 * math.pi * j / config.max_seq_len * (1e-4 + b * (bands - 1 - 1e-4) / max(bands - 1, 1))
                 for b in range(bands)]  # fmt: skip
        h = torch.tensor([time, *map(math.cos, turns), *(-math.sin(turn) for turn in turns)], dtype=torch.float64)
        for linear in filter.linears[:-1]:
            frequency = config.activation_freq if filter.freq is None else filter.freq[0]
            h = torch.sin(frequency * (linear.weight @ h + linear.bias))
        h = filter.linears[-1].weight @ h
        if config.modulate:
            target = math.log(config.decay_target)
            slow, fast = target / config.slow_decay_pct, target / config.fast_decay_pct
            rate = torch.linspace(abs(slow), abs(fast), config.filter_width, dtype=torch.float64)
            h = h * ((-time * rate).exp() + config.modulation_shift)
        rows.append(h)
    return torch.stack(rows)


def slow_mixer(mixer: nn.Module, x_LE: torch.Tensor) -> torch.Tensor:
    """One row through a mixer, with sums in place of transforms."""
    length, width = len(x_LE), mixer.d_model
    u, taps = mixer.in_proj(x_LE), slow_taps(mixer.filter, length)
    weight, reach = mixer.short_filter.weight[:, 0], mixer.short_filter.weight.shape[-1]
    short = [
        mixer.short_filter.bias + sum(weight[:, reach - 1 - lag] * u[t - lag] for lag in range(min(reach, t + 1)))
        for t in range(length)
    ]
    first, *gates, v = torch.stack(short).split(width, dim=1)
    for index, gate in enumerate(reversed(gates)):
        part = slice(index * width, (index + 1) * width)
        v = v * gate
        long = torch.stack([sum(taps[t - s, part] * v[s] for s in range(t + 1)) for t in range(length)])
        v = long if mixer.filter.bias is None else long + v * mixer.filter.bias[part]
    return mixer.out_proj(v * first)


def slow_states(model: HyenaDNAModel, ids_L: torch.Tensor) -> torch.Tensor:
    r = model.word_embeddings(ids_L)
    for layer in model.layers:
        r = r + slow_mixer(layer.mixer, layer.norm1(r))
        y = layer.mlp.fc1(layer.norm2(r))
        gelu = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        r = r + layer.mlp.fc2(gelu)
    return model.ln_f(r)


@EVERY_FORM
@pytest.mark.parametrize("length", [1, 2, 19])
def test_values_and_gradients_are_those_of_the_plain_twin(form: str, length: int) -> None:
    fields = FORMS[form]
    if "filter_positions" in fields:
        # The rule's positions, for the twin knows no others; noise on them is in the test of stored ones.
        torch.manual_seed(0)
        model = HyenaDNAModel(HyenaDNAConfig(**SIZES, **fields)).double().eval()
    else:
        model = tiny(**fields)
    ids, found, wanted = ids_of(length), {}, {}
    for values, states in ((found, model(ids[None]).last_hidden_state[0]), (wanted, slow_states(model, ids))):
        model.zero_grad()
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        values |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        values["states"] = states.detach()
    # Positions and decay rates are float32 by nature; a frequency and a sine make more of their rounding.
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=2e-4, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@EVERY_FORM
@pytest.mark.parametrize("left", [None, 0, 3])
def test_blocks_without_gradients_give_the_states_of_the_whole(
    form: str, left: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(**FORMS[form]), ids_of(2, 31)
    mask = None if left is None else torch.ones_like(ids).index_fill(1, torch.arange(left), 0)
    whole = model(ids, attention_mask=mask).last_hidden_state
    monkeypatch.setattr(modeling_hyenadna_layer, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(modeling_hyenadna_layer, "CHANNELS_AT_ONCE", 3)
    assert modeling_hyenadna_layer.runs_in_blocks(whole) is False
    with torch.no_grad():
        assert modeling_hyenadna_layer.runs_in_blocks(whole)
        torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state, whole, rtol=0, atol=1e-10)


def test_blocks_leave_dropout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(hyena_dropout=0.5).train(), ids_of(1, 31)
    monkeypatch.setattr(modeling_hyenadna_layer, "TOKENS_AT_ONCE", 7)
    with torch.no_grad():
        assert not torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)


def test_published_size() -> None:
    """d=256, n=8: 6.55 million parameters."""
    with torch.device("meta"):
        model = HyenaDNAForCausalLM(HyenaDNAConfig(tie_word_embeddings=True))
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_550_528
    assert model.lm_head.weight.shape == (16, 256)


@EVERY_FORM
def test_a_base_changes_nothing_before_itself(form: str) -> None:
    model, ids = tiny(HyenaDNAForCausalLM, **FORMS[form]), ids_of(1, 40)
    with torch.no_grad():
        expected = model(ids).logits
        for place in (0, 1, 17, 39):
            other = ids.clone()
            other[0, place] = 7 + (other[0, place] - 6) % 5
            found = model(other).logits
            torch.testing.assert_close(found[:, :place], expected[:, :place], atol=1e-10, rtol=0)
            assert ((found - expected)[0, place:].abs().amax(-1) > 1e-6).all()


@EVERY_FORM
@pytest.mark.parametrize(("left", "right"), [(0, 9), (9, 0), (4, 5)])
def test_padding_on_either_side_changes_nothing(form: str, left: int, right: int) -> None:
    model, ids = tiny(HyenaDNAForCausalLM, **FORMS[form]), ids_of(2, 17)
    padded = nn.functional.pad(ids, (left, right), value=4)
    mask = nn.functional.pad(torch.ones_like(ids), (left, right))
    with torch.no_grad():
        expected, found = model(ids).logits, model(padded, attention_mask=mask).logits
        unmasked = model(padded).logits
    torch.testing.assert_close(found[:, left : left + 17], expected, atol=1e-9, rtol=0)
    if left:
        assert (unmasked[:, left : left + 17] - expected).abs().max() > 1e-3
    states = model.hyenadna(padded, attention_mask=mask).last_hidden_state
    assert not states[mask == 0].any()


def test_filters_depend_on_the_limit_and_not_on_the_length() -> None:
    model = tiny()
    whole = model.layers[0].mixer.filter(48, torch.float64)
    torch.testing.assert_close(model.layers[0].mixer.filter(13, torch.float64), whole[..., :13], atol=1e-14, rtol=0)
    other = tiny(max_seq_len=96).layers[0].mixer.filter(13, torch.float64)
    assert (other - whole[..., :13]).abs().max() > 1e-3


def test_stored_positions_are_used_and_the_rule_is_what_they_start_as() -> None:
    model = tiny(filter_positions="stored")
    filter, config = model.layers[0].mixer.filter, model.config
    assert torch.equal(filter.positions.float(), filter_positions(config)[0])
    assert torch.equal(filter.decay.float(), decay_rates(config))
    ids = ids_of(1, 20)
    with torch.no_grad():
        before = model(ids).last_hidden_state
        torch.testing.assert_close(before, tiny().eval()(ids).last_hidden_state, atol=1e-10, rtol=0)
        for buffer in (filter.positions, filter.times, filter.decay):
            kept = buffer.clone()
            buffer.mul_(1.1)
            assert (model(ids).last_hidden_state - before).abs().max() > 1e-6
            buffer.copy_(kept)
    assert not any(parameter is filter.positions for parameter in model.parameters())
    assert tiny(filter_positions="trained").layers[0].mixer.filter.positions.requires_grad


@EVERY_HEAD
def test_beyond_the_limit_is_advice(model_class: type[PreTrainedModel]) -> None:
    model = tiny(model_class)
    model(ids_of(1, 48))
    with pytest.raises(SequenceError, match=r"49 tokens.*at most 48 .*max_seq_len.*46 bp"):
        model(ids_of(1, 49))


class TestKeptFilters:
    """Filters that nothing trains are made once; what is kept always is what would be made."""

    @staticmethod
    def made(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The lengths that filters are made for, from now on."""
        lengths: list[int] = []
        plain = HyenaFilter.forward

        def counted(self: HyenaFilter, length: int, dtype: torch.dtype) -> torch.Tensor:
            lengths.append(length)
            return plain(self, length, dtype)

        monkeypatch.setattr(HyenaFilter, "forward", counted)
        return lengths

    def test_equal_to_filters_made_anew(self) -> None:
        keeping, forgetful = tiny(), tiny(filter_cache_size=0)
        with torch.no_grad():
            for length in (20, 20, 7, 48, 19, 20):
                ids = ids_of(2, length)
                found = keeping(ids).last_hidden_state
                torch.testing.assert_close(found, forgetful(ids).last_hidden_state, atol=1e-10, rtol=0)

    def test_once_for_neighbouring_lengths(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny()
        lengths = self.made(model, monkeypatch)
        with torch.no_grad():
            for length in (38, 39, 40, 39):  # all of them transform 80 tokens
                model(ids_of(1, length))
        assert lengths == [40, 40]  # one for each layer
        with torch.no_grad():
            model(ids_of(1, 41))
        assert lengths[2:] == [45, 45]

    @pytest.mark.parametrize("how", ["in_place", "data", "new_data", "load", "dtype"])
    @pytest.mark.parametrize("name", ["freq", "linears.0.bias", "linears.3.weight"])
    def test_forgotten_when_a_parameter_changes(self, how: str, name: str) -> None:
        model, ids = tiny(), ids_of(1, 20)
        with torch.no_grad():
            before = model(ids).last_hidden_state
            parameter = model.layers[1].mixer.filter.get_parameter(name)
            changed = parameter.detach() * 1.5
            if how == "in_place":
                parameter.copy_(changed)
            elif how == "data":
                parameter.data.mul_(1.5)
            elif how == "new_data":
                parameter.data = changed
            elif how == "load":
                model.load_state_dict(model.state_dict() | {f"layers.1.mixer.filter.{name}": changed})
            else:
                model.float()(ids)
                model.double()
                parameter.copy_(changed)
            found = model(ids).last_hidden_state
            model.config.filter_cache_size = 0
            torch.testing.assert_close(found, model(ids).last_hidden_state, atol=1e-10, rtol=0)
        assert (found - before).abs().max() > 1e-5

    def test_not_while_they_are_trained(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, ids = tiny().train(), ids_of(1, 20)
        lengths = self.made(model, monkeypatch)
        for _ in range(2):
            model(ids).last_hidden_state.sum().backward()
        assert lengths == [20] * 4
        assert all(layer.mixer.filter._kept is None for layer in model.layers)

    def test_frozen_filters_are_kept_in_training_and_pass_gradients_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As under LoRA; also after `inference_mode`, whose tensors could not be saved for a backward pass."""
        model, ids = tiny(), ids_of(1, 20)
        for layer in model.layers:
            layer.mixer.filter.requires_grad_(False)
        with torch.inference_mode():
            model(ids)
        lengths = self.made(model, monkeypatch)
        grads = []
        for size in (model.config.filter_cache_size, 0):
            model.config.filter_cache_size = size
            model.train().zero_grad()
            torch.manual_seed(0)
            model(ids).last_hidden_state.square().mean().backward()
            grads.append(model.layers[0].mixer.in_proj.weight.grad.clone())
        torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=1e-8)
        assert lengths == [20, 20]  # of the second pass, which may keep nothing

    def test_an_adapter_on_the_filters_is_never_kept(self) -> None:
        ids = ids_of(1, 20)
        adapted = get_peft_model(tiny(), LoraConfig(target_modules=["linears.3"], init_lora_weights=False)).double()
        with torch.no_grad():
            found = adapted.eval()(ids).last_hidden_state
            with adapted.disable_adapter():
                plain = adapted(ids).last_hidden_state
            assert torch.equal(adapted(ids).last_hidden_state, found)
            torch.testing.assert_close(plain, tiny()(ids).last_hidden_state, atol=1e-10, rtol=0)
        assert (found - plain).abs().max() > 1e-3


def test_hidden_states_are_what_every_block_adds() -> None:
    model, ids = tiny(HyenaDNAForCausalLM, n_layer=3), ids_of(2, 11)
    found: list[torch.Tensor] = []
    for layer in model.hyenadna.layers:
        layer.register_forward_hook(lambda module, args, output: found.append(output[0]))
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        last = model.hyenadna(ids).last_hidden_state
    expected = (model.hyenadna.word_embeddings(ids), *found[:2], last)
    assert len(outputs.hidden_states) == 4
    assert all(torch.equal(one, other) for one, other in zip(outputs.hidden_states, expected, strict=True))
    torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)


@EVERY_HEAD
def test_what_it_does_not_have_is_refused(model_class: type[PreTrainedModel]) -> None:
    model, ids = tiny(model_class), ids_of(1, 8)
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match=r"(?i)attention"):
            model_class._from_config(HyenaDNAConfig(**SIZES), attn_implementation=name)
    with pytest.raises(GeneSpliceError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(GeneSpliceError, match="past_key_values"):
        model(ids, past_key_values=object())


def test_the_head_may_be_the_embedding_or_its_own(tmp_path: Path) -> None:
    ids = ids_of(2, 12)
    for tied in (True, False):
        model = tiny(HyenaDNAForCausalLM, tie_word_embeddings=tied)
        assert (model.lm_head.weight is model.hyenadna.word_embeddings.weight) == tied
        model.save_pretrained(tmp_path / str(tied))
        loaded = HyenaDNAForCausalLM.from_pretrained(tmp_path / str(tied), dtype=torch.float64)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert (loaded.lm_head.weight is loaded.hyenadna.word_embeddings.weight) == tied


def test_logits_to_keep_and_their_loss() -> None:
    model, ids = tiny(HyenaDNAForCausalLM), ids_of(2, 12)
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
        places = torch.tensor([3, 7])
        kept = model(ids, labels=ids, logits_to_keep=places)
        torch.testing.assert_close(kept.logits, whole[:, places])
        expected = nn.functional.cross_entropy(whole[:, places].flatten(0, 1), ids[:, places + 1].flatten())
        torch.testing.assert_close(kept.loss, expected)
        weight = torch.zeros(2, 12).double()
        weight[0, 4] = 2.0
        one = model(ids, labels=ids, loss_weight=weight).loss
        torch.testing.assert_close(one, nn.functional.cross_entropy(whole[0, 3], ids[0, 4]))


@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last"])
def test_poolings_read_real_positions(pooling: str) -> None:
    model = tiny(HyenaDNAForSequenceClassification, classifier_pooling=pooling, special_token_ids=[1], num_labels=3)
    ids = nn.functional.pad(ids_of(1, 10), (0, 1), value=1)
    padded, mask = nn.functional.pad(ids, (3, 2), value=4), nn.functional.pad(torch.ones_like(ids), (3, 2))
    with torch.no_grad():
        states = model.hyenadna(ids).last_hidden_state[0]
        pooled = {"mean": states[:10].mean(0), "max": states[:10].amax(0), "cls": states[0], "last": states[10]}
        expected = model.classifier.out_proj(pooled[pooling])
        torch.testing.assert_close(model(ids).logits[0], expected)
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[0], expected, atol=1e-9, rtol=0)


def test_generation_stops_at_the_limit_with_advice() -> None:
    model = tiny(HyenaDNAForCausalLM)
    settings = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=4)
    assert model.generate(ids_of(1, 45), generation_config=settings).shape == (1, 49)
    with pytest.raises(SequenceError, match="max_seq_len"):
        model.generate(ids_of(1, 46), generation_config=settings)


def test_text_generation_without_the_separator(tmp_path: Path) -> None:
    model, tokenizer = tiny(HyenaDNAForCausalLM).float(), NucleotideTokenizer(preset="hyenadna")
    model.resize_token_embeddings(len(tokenizer))
    assert model.config.vocab_size == 12
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    serve = pipeline("text-generation", model=str(tmp_path), device="cpu")
    bases = tokenizer.convert_tokens_to_ids(list("ACGT"))
    settings = GenerationConfig(
        max_new_tokens=5, do_sample=False, suppress_tokens=[token for token in range(12) if token not in bases]
    )
    found = serve("ACGTTGCA", add_special_tokens=False, generation_config=settings)[0]["generated_text"]
    expected = "ACGTTGCA"
    for _ in range(5):
        ids = tokenizer(expected, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected += "ACGT"[int(model(ids).logits[0, -1, bases].argmax())]
    assert found == expected


def test_facts_for_loading_and_scoring() -> None:
    spec = dna_lm_spec(HyenaDNAConfig(max_seq_len=1026), NucleotideTokenizer(preset="hyenadna"))
    assert (spec.objective, spec.tokenization, spec.n_prefix, spec.n_suffix) == ("clm", "char", 0, 1)
    assert (spec.max_tokens, spec.soft_max_bp, spec.nucleotide_token_ids) == (1026, 1024, (7, 8, 9, 10))
    assert (spec.lora_targets, spec.ia3_targets) == (("in_proj", "out_proj"), ("fc2",))


def test_vocabularies_are_padded_once(tmp_path: Path) -> None:
    config = HyenaDNAConfig(**SIZES, vocab_size=12)
    assert config.vocab_size == 16
    config.save_pretrained(tmp_path)
    assert HyenaDNAConfig.from_pretrained(tmp_path).vocab_size == 16
    assert HyenaDNAConfig(**SIZES, vocab_size=13, pad_vocab_size_multiple=1).vocab_size == 13


def test_bf16_keeps_sum_and_filters_wide() -> None:
    model, ids = tiny().to(torch.bfloat16), ids_of(1, 20)
    residuals: list[torch.dtype] = []
    model.layers[0].register_forward_hook(lambda module, args, output: residuals.append(output[1].dtype))
    with torch.no_grad():
        assert model(ids).last_hidden_state.dtype == torch.bfloat16
    assert residuals == [torch.float32]
    assert model.layers[0].mixer.filter._kept[2].dtype == torch.complex64
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wide = tiny().float()
        near = wide(ids).last_hidden_state
    expected = wide(ids).last_hidden_state
    assert (near.float() - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_compiles_whole_at_a_fixed_length() -> None:
    model, ids = tiny(HyenaDNAForCausalLM), ids_of(1, 16)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids).logits
        torch.testing.assert_close(found, model(ids).logits, atol=1e-10, rtol=0)
