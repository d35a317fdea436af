"""What the contract suite runs on: every head of every row of the registry, with a tiny model and a batch for it.

A new model becomes one row of `REGISTRY` and is found here by itself; the rules of its config are shown to bite in
`CONTRADICTIONS`, and further forms of it, to which all checks apply as well, stand in `FORMS`. A new Auto class needs
an entry in `LABELS` and `SHAPES`. A check that a model cannot pass is named
with its reason in `EXCEPTIONS`.

Shapes: B batch, L tokens, E hidden size, V vocabulary, C labels, T tracks.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from genesplice_hf.models.caduceus.configuration_caduceus import SSM_DEFAULTS as CADUCEUS_SSM
from genesplice_hf.models.registry import REGISTRY, ModelEntry

Batch = dict[str, torch.Tensor]

NUM_LABELS = 3
IGNORED = -100
# Longer than three windows of the tiny models, so that banded attention is taken; and one shorter than a window.
LENGTHS_BP = (17, 3, 11, 14)

# Per row: name of a further form -> fields on top of the tiny config.
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "genesplice": {
        # Bins of 2 and 4 bases: the shortest row fills none of the larger ones, the longest four and a part.
        "hierarchical": {
            "hidden_sizes": [16, 24, 32],
            "pool_sizes": [2, 2],
            "num_attention_heads": [2, 2, 4],
            "num_key_value_heads": [2, 1, 2],
            "head_dims": [8, 8, 8],
            "intermediate_sizes": [24, 24, 48],
            "num_encoder_layers": [1, 1],
            "num_tower_layers": 1,
            "num_decoder_layers": [1, 1],
            "local_windows": [4, 2],
            "tower_window": None,
            "tower_layer_types": ["full_attention"],
        },
        "both_strands": {"rc_equivariant": True},
    },
    "genesplice_caduceus": {"both_strands": {"rcps": True}},
}
_ONE_MECHANISM = "linear attention is a mechanism of its own, not an implementation of softmax attention"
_PUBLISHED_NAME = "the published key layout calls the LM head `output_logit_map`"
_TWO_KINDS = (
    "each class refuses the other's config (`is_decoder`); what the other heads lend is in test_modeling_performer.py"
)
_AMONG_EXAMPLES = "a contrast is among the examples of one batch: fewer of them, or other ones, are another task"
_NO_TASK = "pretraining has no task whose head an adapter carries, and no labels to count"
_PER_TOKEN = "a language model's head has one output per token of the vocabulary, none per label"
_LM_HEAD = "a language model's head is no task's: adapters of a masked LM leave it as it is"
_LONG_TOKENS = "nothing is promised, and tokens of several bases have no complement token each"
_NO_ATTENTION = "there is no attention, and so no implementations of it"
_NO_CACHE = "there is no cache of the past; generation without one is in the checks beside"
# (row, check), (row-form, check) or (row-form/AutoClass, check), the check being the test's name, -> why it does not
# apply.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("genesplice_caduceus", "test_flex_is_sdpa_in_inference"): _NO_ATTENTION + "; asking for flex raises",
    ("genesplice_caduceus", "test_an_implementation_that_cannot_run_is_refused"): (
        _NO_ATTENTION + "; asking for flash raises a ValueError whatever is installed (test_caduceus.py)"
    ),
    ("genesplice_caduceus", "test_recorded_outputs"): (
        _NO_ATTENTION + "; hidden states, and the refusal of attentions, are in test_caduceus.py"
    ),
    ("genesplice_caduceus-both_strands", "test_embeddings_instead_of_ids"): (
        "one strand's embeddings have no complement; those of both strands are in test_caduceus.py"
    ),
    **{
        (f"genesplice_caduceus{form}/{head}", "test_a_seed_determines_dropout"): (
            "the published network has no dropout; only a classifier drops out"
        )
        for form in ("", "-both_strands")
        for head in ("AutoModel", "AutoModelForMaskedLM")
    },
    ("genesplice-both_strands", "test_embeddings_instead_of_ids"): (
        "embeddings have no complement; that they are refused is in test_genesplice_strands.py"
    ),
    ("genesplice_performer", "test_flex_is_sdpa_in_inference"): _ONE_MECHANISM + "; asking for flex raises",
    ("genesplice_performer", "test_an_implementation_that_cannot_run_is_refused"): (
        _ONE_MECHANISM + "; asking for flash raises a ValueError whatever is installed (test_modeling_performer.py)"
    ),
    ("genesplice_performer", "test_declared_reverse_complement"): (
        "nothing is promised, and a config without complement map cannot be asked"
    ),
    ("genesplice_dnabert2", "test_an_implementation_that_cannot_run_is_refused"): (
        "asking for flash raises a ValueError whatever is installed, for it takes no ALiBi (test_dnabert2.py)"
    ),
    **{
        (row, "test_declared_reverse_complement"): _LONG_TOKENS
        for row in ("genesplice_nucleotide_transformer_v2", "genesplice_dnabert2")
    },
    **{
        (f"{row}/AutoModelForMaskedLM", check): reason
        for row in ("genesplice_nucleotide_transformer_v2", "genesplice_dnabert2")
        for check, reason in {
            "test_the_head_is_where_peft_looks_for_it": _LM_HEAD,
            "test_another_number_of_labels": _PER_TOKEN,
        }.items()
    },
    **{
        ("genesplice_hyenadna", check): reason
        for check, reason in {
            "test_flex_is_sdpa_in_inference": _NO_ATTENTION + "; asking for flex raises",
            "test_an_implementation_that_cannot_run_is_refused": (
                _NO_ATTENTION + "; asking for flash raises a ValueError whatever is installed (test_hyenadna.py)"
            ),
            "test_recorded_outputs": _NO_ATTENTION + "; the hidden states are in test_hyenadna.py",
            "test_step_by_step_with_a_cache_is_at_once_without": _NO_CACHE,
            "test_nothing_leaks_from_the_future": (
                "a Fourier transform rounds all positions together; causality to rounding is in test_hyenadna.py"
            ),
            "test_text_generation": (
                "its tokenizer ends a sequence with [SEP]; with add_special_tokens=False it is in test_hyenadna.py"
            ),
        }.items()
    },
    **{
        (f"genesplice{form}/AutoModelForPreTraining", check): reason
        for form in ("", "-hierarchical", "-both_strands")
        for check, reason in {
            "test_however_the_batch_is_cut": _AMONG_EXAMPLES,
            "test_the_logged_loss_is_the_models_loss": _AMONG_EXAMPLES,
            "test_an_ignored_row_counts_for_nothing": _AMONG_EXAMPLES,
            "test_the_head_is_where_peft_looks_for_it": _NO_TASK,
            "test_another_number_of_labels": _NO_TASK,
        }.items()
    },
    **{
        (f"genesplice_performer/{head}", check): reason
        for head in ("AutoModelForMaskedLM", "AutoModelForCausalLM")
        for check, reason in {
            "test_the_head_is_where_peft_looks_for_it": _PUBLISHED_NAME,
            "test_another_number_of_labels": _PER_TOKEN,
            "test_a_head_lends_its_base_to_another_head": _TWO_KINDS,
        }.items()
    },
}

# Per row: fields that contradict each other on top of the tiny config, and a word of the advice.
CONTRADICTIONS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "genesplice": [
        ({"hidden_sizes": [32, 32]}, "hidden_sizes"),
        ({"local_windows": [4]}, "local_windows"),
        ({"num_attention_heads": [3], "num_key_value_heads": [2]}, "num_key_value_heads"),
        ({"head_dims": [15]}, "head_dims"),
        ({"tower_window": None}, "tower_window"),
        ({"tower_window": 0}, "at least 1 token"),
        ({"tower_layer_types": ["full_attention"]}, "tower_layer_types"),
        ({"complement_map": [*range(1, 16), 0]}, "complement_map"),
        ({"vocab_size": 12, "complement_map": list(range(16))}, "complement_map"),
        ({"stem_kernel_size": 4}, "stem_kernel_size"),
        ({"token_strand_pairs": [1, 2]}, "token_strand_pairs"),
        ({"moe_num_experts": 2, "moe_top_k": 3}, "moe_top_k"),
        ({"track_bin_size": 0}, "track_bin_size"),
        ({"track_strand_pairs": [1, 2, 0]}, "track_strand_pairs"),
    ],
    "genesplice_performer": [
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"hidden_size": 30, "position_scheme": "concat"}, "hidden_size"),
        ({"position_scheme": "concat", "tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"stem_kernel_size": 4}, "stem_kernel_size"),
        ({"slim_chunk_size": 0}, "slim_chunk_size"),
        ({"slim_chunk_size": 8, "hidden_dropout": 0.1}, "hidden_dropout"),
        ({"attention_block_size": 0}, "attention_block_size"),
        ({"num_feature_blocks": 0}, "num_feature_blocks"),
        ({"feature_redraw": "interval", "feature_redraw_interval": 3}, "feature_redraw"),
        ({"feature_map": "favor+", "feature_redraw": "interval"}, "feature_redraw_interval"),
        ({"stabilizer": "global", "slim_chunk_size": 8}, "stabilizer"),
        ({"denominator_eps": -1.0}, "denominator_eps"),
    ],
    "genesplice_nucleotide_transformer_v2": [
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_attention_heads": 32}, "rotary"),
        ({"max_position_embeddings": 2}, "max_position_embeddings"),
        ({"token_dropout": True, "mask_token_id": None}, "mask_token_id"),
    ],
    "genesplice_dnabert2": [({"num_attention_heads": 5}, "num_attention_heads")],
    "genesplice_hyenadna": [
        ({"n_layer": 0}, "n_layer"),
        ({"hyena_order": 1}, "hyena_order"),
        ({"max_seq_len": 0}, "max_seq_len"),
        ({"filter_cache_size": -1}, "filter_cache_size"),
        ({"emb_dim": 4}, "emb_dim"),
        ({"decay_target": 1.0}, "decay_target"),
        ({"slow_decay_pct": 0.0}, "slow_decay_pct"),
    ],
    "genesplice_caduceus": [
        ({"n_layer": 0}, "n_layer"),
        ({"scan_chunk_size": 0}, "scan_chunk_size"),
        ({"ssm_cfg": {**CADUCEUS_SSM, "d_states": 4}}, "d_states"),
        ({"ssm_cfg": {**CADUCEUS_SSM, "d_conv": 0}}, "d_conv"),
        ({"ssm_cfg": {**CADUCEUS_SSM, "dt_rank": "full"}}, "dt_rank"),
        ({"ssm_cfg": {**CADUCEUS_SSM, "dt_init": "zero"}}, "dt_init"),
        ({"ssm_cfg": {**CADUCEUS_SSM, "dt_min": 2.0}}, "dt_min"),
        ({"initializer_cfg": {"std": 0.1}}, "initializer_cfg"),
        ({"complement_map": [*range(1, 16), 0]}, "complement_map"),
        ({"vocab_size": 12, "complement_map": list(range(16))}, "complement_map"),
        ({"token_strand_pairs": [1, 2]}, "token_strand_pairs"),
    ],
}


@dataclass(frozen=True)
class Case:
    """One head of one row, in the row's own form or in another one of it."""

    row: str
    auto_class: str
    form: str = ""

    @property
    def group(self) -> str:
        return f"{self.row}-{self.form}" if self.form else self.row

    @property
    def name(self) -> str:
        return f"{self.group}/{self.auto_class}"

    @property
    def labels_field(self) -> str:
        """The field of the config that says how many numbers the head gives."""
        return "num_tracks" if self.auto_class == "AutoModelForTrackPrediction" else "num_labels"

    def beside(self, auto_class: str) -> "Case":
        """Another head of the same row and form."""
        return replace(self, auto_class=auto_class)

    @property
    def entry(self) -> ModelEntry:
        return REGISTRY[self.row]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return self.entry.auto_classes[self.auto_class]

    @property
    def has_loss(self) -> bool:
        return self.auto_class in LABELS

    @property
    def per_token(self) -> bool:
        return self.auto_class != "AutoModelForSequenceClassification"

    def config(self, **overrides: Any) -> PreTrainedConfig:
        causal = self.entry.causal_overrides if self.auto_class == "AutoModelForCausalLM" else {}
        form = FORMS[self.row][self.form] if self.form else {}
        if self.auto_class == "AutoModelForPreTraining":
            form = form | {"next_segment_weight": 0.5}
        return self.entry.tiny_config(**({"num_labels": NUM_LABELS} | form | causal | overrides))

    def model(self, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """A tiny model in eval mode; every parameter is off its initial value, which could hide mistakes."""
        torch.manual_seed(seed)
        return randomized(self.model_class(self.config(**overrides)), seed).eval()

    def batch(self, lengths_bp: tuple[int, ...] = LENGTHS_BP, labels: bool = False) -> Batch:
        """A right-padded batch of random bases."""
        batch = padded([self.ids(length, seed) for seed, length in enumerate(lengths_bp)], pad_id(self.row))
        if not labels or not self.has_loss:
            return batch
        extras = EXTRAS[self.auto_class](batch) if self.auto_class in EXTRAS else {}
        return batch | {"labels": LABELS[self.auto_class](batch)} | extras

    def ids(self, length_bp: int, seed: int = 0) -> torch.Tensor:
        """(L,) token ids of a random sequence."""
        sequence = "".join(random.Random(seed).choices("ACGT", k=length_bp))
        return torch.tensor(tokenizer_of(self.row)([sequence])["input_ids"][0])


CASES = [
    Case(row, auto_class, form)
    for row, entry in REGISTRY.items()
    for form in ("", *FORMS.get(row, {}))
    for auto_class in entry.auto_classes
    if not (form == "both_strands" and auto_class == "AutoModelForCausalLM")  # generates in one direction
]


def cases(check: str, only: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """`@cases("test_name")` runs the test on every case that `only` accepts, exceptions skipped with their reason."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=case.name, marks=_marks(check, *{case.row, case.group, case.name}))
            for case in CASES
            if only(case)
        ],
    )


def cases_without(form: str) -> Callable[..., pytest.MarkDecorator]:
    """`cases` for checks of files, adapters and Trainer, which a form has no bearing on: saves its minutes."""

    def chosen(check: str, only: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
        return cases(check, lambda case: case.form != form and only(case))

    return chosen


def rows(check: str) -> pytest.MarkDecorator:
    """`@rows("test_name")` runs the test on every row, once."""
    return pytest.mark.parametrize(
        "entry", [pytest.param(entry, id=row, marks=_marks(check, row)) for row, entry in REGISTRY.items()]
    )


def _marks(check: str, *names: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.skip(reason=EXCEPTIONS[name, check]) for name in names if (name, check) in EXCEPTIONS]


@cache
def tokenizer_of(row: str) -> PreTrainedTokenizerBase:
    entry = REGISTRY[row]
    return getattr(import_module(entry.tokenizer_module), entry.tokenizer_class)(**entry.tokenizer_kwargs)


def pad_id(row: str) -> int:
    return tokenizer_of(row).pad_token_id


def padded(rows_of_ids: list[torch.Tensor], pad: int, left: int | None = 0, extra: int = 0) -> Batch:
    """Stacks rows of ids with `left` paddings before each (None: all of them) and at least `extra` after."""
    width = max(len(ids) for ids in rows_of_ids) + (left or 0) + extra
    input_ids = torch.full((len(rows_of_ids), width), pad)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows_of_ids):
        start = width - len(ids) if left is None else left
        input_ids[row, start : start + len(ids)] = ids
        mask[row, start : start + len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def _ids_where(keep: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Batch], torch.Tensor]:
    def labels(batch: Batch) -> torch.Tensor:
        wanted = keep(batch["attention_mask"]) & batch["attention_mask"].bool()
        return batch["input_ids"].masked_fill(~wanted, IGNORED)

    return labels


def _every_third(mask: torch.Tensor) -> torch.Tensor:
    return (torch.arange(mask.shape[1]) % 3 == 0).expand_as(mask)


def _track_targets(batch: Batch) -> torch.Tensor:
    """(B, L, T), the same number of values in every row: a mean over values must not depend on how rows are cut."""
    targets = (batch["input_ids"][..., None] - 4) * torch.tensor([0.2, 0.1, 0.6])
    targets[:, 3:] = torch.nan
    return targets.masked_fill(batch["attention_mask"][..., None] == 0, torch.nan)


def _views_and_segments(batch: Batch) -> Batch:
    """Second views, and the rows themselves as pairs of segments, for the objectives of pretraining."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    place = torch.arange(ids.shape[1]).expand_as(ids)
    # Copies, for a file holds no tensor twice.
    return {
        "view_input_ids": ids[:, 2:].clone(),
        "view_attention_mask": mask[:, 2:].clone(),
        "segment_input_ids": ids.clone(),
        "segment_attention_mask": mask.clone(),
        "segment_ids": torch.where(mask.bool(), (place >= mask.sum(1, keepdim=True) // 2).long(), -1),
        "follows": torch.arange(len(ids)) % 2,
    }


LABELS: dict[str, Callable[[Batch], torch.Tensor]] = {
    "AutoModelForPreTraining": _ids_where(_every_third),
    "AutoModelForMaskedLM": _ids_where(_every_third),
    "AutoModelForCausalLM": _ids_where(lambda mask: torch.ones_like(mask).bool()),
    "AutoModelForSequenceClassification": lambda batch: torch.arange(len(batch["input_ids"])) % NUM_LABELS,
    "AutoModelForTokenClassification": lambda batch: (batch["input_ids"] % NUM_LABELS).masked_fill(
        batch["attention_mask"] == 0, IGNORED
    ),
    "AutoModelForTrackPrediction": lambda batch: _track_targets(batch),
}
# How the names begin of what a batch holds for the loss alone.
_ASKED = ("labels", "view_", "segment_", "follows")
# What a batch with labels holds beside them.
EXTRAS: dict[str, Callable[[Batch], Batch]] = {"AutoModelForPreTraining": _views_and_segments}
SHAPES: dict[str, Callable[[PreTrainedConfig, int, int], tuple[int, ...]]] = {
    "AutoModelForPreTraining": lambda config, B, L: (B, L, config.vocab_size),
    "AutoModel": lambda config, B, L: (B, L, config.hidden_size),
    "AutoModelForMaskedLM": lambda config, B, L: (B, L, config.vocab_size),
    "AutoModelForCausalLM": lambda config, B, L: (B, L, config.vocab_size),
    "AutoModelForSequenceClassification": lambda config, B, L: (B, config.num_labels),
    "AutoModelForTokenClassification": lambda config, B, L: (B, L, config.num_labels),
    "AutoModelForTrackPrediction": lambda config, B, L: (B, L, config.num_tracks),
}


def no_label(labels: torch.Tensor) -> float:
    """What stands in such labels where nothing is asked."""
    return torch.nan if labels.is_floating_point() else IGNORED


def randomized(module: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    """Adds noise to every parameter, the embedding of the padding token too; ties stay ties."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def output(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits, or the last hidden state of a base model, without labels and without gradient."""
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if not key.startswith(_ASKED)})[0]


def objective(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The model's loss; for a base model a fixed random projection of its states."""
    outputs = model(**batch)
    if "labels" in batch:
        return outputs.loss
    size = outputs[0].shape[-1]
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0)) / size**0.5
    return (outputs[0] @ weight.to(outputs[0].dtype)).tanh().mean()


def gradients(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Gradient of the objective for every parameter (shared ones once), `loss` with the value itself."""
    model.zero_grad()
    loss = objective(model, batch)
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def head_keys(model: PreTrainedModel) -> set[str]:
    """State-dict keys of the head, without those tied to the base model."""
    prefix = model.base_model_prefix + "."
    tied = set(model.all_tied_weights_keys)
    return {key for key in model.state_dict() if not key.startswith(prefix) and key not in tied}


def edit_json(path: Path, **entries: Any) -> None:
    """Sets entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def train_two_steps(model: PreTrainedModel, batch: Batch, folder: Path, batch_size: int, accumulation: int) -> Trainer:
    """Trainer on the rows of `batch`, one optimiser step an epoch, two epochs; no clipping that would hide scales."""
    dataset = [{key: value[row] for key, value in batch.items()} for row in range(len(batch["input_ids"]))]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=default_data_collator)
    trainer.train()
    return trainer
