"""What the contract suite runs on: every head of every row of the registry, with a tiny model and a batch for it.

A new model becomes one row of `REGISTRY` and is found here by itself; what is peculiar to it stands in
`contract_rows`. A new Auto class needs an entry in `LABELS` and `SHAPES`.

Shapes: B batch, L tokens, E hidden size, V vocabulary, C labels, T tracks.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from contract_rows import COMPANIONS, EXCEPTIONS, FORMS, TABLES
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from genesplice_hf.models.registry import REGISTRY, ModelEntry

Batch = dict[str, torch.Tensor]

NUM_LABELS = 3
IGNORED = -100
# Longer than three windows of the tiny models, so that banded attention is taken; and one shorter than a window.
LENGTHS_BP = (17, 3, 11, 14)


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

    def sized(self, size: int) -> dict[str, Any]:
        """The field of the config that says how many numbers the head gives, set to `size`."""
        if self.auto_class == "AutoModelForContactPrediction":
            return {"num_targets": size}
        if self.auto_class != "AutoModelForTrackPrediction":
            return {"num_labels": size}
        return {"output_heads": {"human": size}} if hasattr(self.config(), "output_heads") else {"num_tracks": size}

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
        """Whether output i belongs to token i; bins, and pairs of bins, do not."""
        return self.auto_class != "AutoModelForSequenceClassification" and not self.has_bins

    @property
    def has_bins(self) -> bool:
        """Whether outputs stand for bins of bases, of which padding is a part."""
        return hasattr(self.entry.config_class, "num_bins")

    @property
    def per_pair(self) -> bool:
        """Whether output (i, j) belongs to tokens i and j."""
        return self.auto_class == "AutoModelForEdgePrediction"

    @property
    def reads_genes(self) -> bool:
        """Whether a row is a cell: a set of genes, each with a value, rather than a sequence."""
        return self.entry.tokenizer_class == "GeneTokenizer"

    def config(self, **overrides: Any) -> PreTrainedConfig:
        causal = self.entry.causal_overrides if self.auto_class == "AutoModelForCausalLM" else {}
        form = FORMS[self.row][self.form] if self.form else {}
        if self.auto_class == "AutoModelForPreTraining":
            form = form | {"next_segment_weight": 0.5}
        return self.entry.tiny_config(**({"num_labels": NUM_LABELS} | form | causal | overrides))

    def model(self, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """A tiny model in eval mode; every parameter is off its initial value, which could hide mistakes.

        Batch norms are held on statistics of their own, in training too: with a batch's statistics every row depends
        on its neighbours. Live ones are in the models' own tests.
        """
        torch.manual_seed(seed)
        model = self.model_class(self.config(**overrides))
        if self.row in TABLES:
            TABLES[self.row](model)
        return hold_batch_norm(randomized(model, seed)).eval()

    def batch(self, lengths_bp: tuple[int, ...] = LENGTHS_BP, labels: bool = False) -> Batch:
        """A right-padded batch of random bases with the same companions for every row, or of genes and values."""
        batch = padded([self.ids(length, seed) for seed, length in enumerate(lengths_bp)], pad_id(self.row))
        batch |= {"values": _values(batch)} if self.reads_genes else {}
        batch |= companions(self.row, len(lengths_bp))
        if not labels or not self.has_loss:
            return batch
        extras = EXTRAS[self.auto_class](batch) if self.auto_class in EXTRAS else {}
        return batch | {"labels": self.in_bins(LABELS[self.auto_class](batch))} | extras

    def in_bins(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels of bases as those of bins, where the row has bins: what the first base of each says."""
        if labels.dim() < 2 or not self.has_bins or self.auto_class not in PER_BASE:
            return labels
        return labels[:, :: self.config().bin_size].contiguous()

    def ids(self, length_bp: int, seed: int = 0) -> torch.Tensor:
        """(L,) token ids of a random sequence."""
        return torch.tensor(tokenizer_of(self.row)([self.text(length_bp, seed)])["input_ids"][0])

    def text(self, length_bp: int, seed: int = 0) -> str:
        """A random sequence of bases, or so many different genes."""
        if self.reads_genes:
            return " ".join(random.Random(seed).sample(self.entry.tokenizer_kwargs["genes"], length_bp))
        return "".join(random.Random(seed).choices("ACGT", k=length_bp))


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


def _expression(batch: Batch) -> torch.Tensor:
    """(B, L) values of genes, 0 for `<cls>` and padding."""
    return (batch["input_ids"] % 6).float().masked_fill(batch["input_ids"] < 3, 0.0)


def _values(batch: Batch) -> torch.Tensor:
    """The values as a model reads them, every third one masked."""
    return _expression(batch).masked_fill(_every_third(batch["attention_mask"]) & (batch["input_ids"] >= 3), -1.0)


def _masked_values(batch: Batch) -> torch.Tensor:
    is_asked = _every_third(batch["attention_mask"]) & (batch["input_ids"] >= 3)
    return _expression(batch).masked_fill(~is_asked, IGNORED)


def _edges(batch: Batch) -> torch.Tensor:
    """(B, L, L) every third pair is an edge."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    is_edge = ((ids[:, :, None] + 2 * ids[:, None]) % 3 == 0).float()
    return is_edge.masked_fill(~(mask[:, :, None] & mask[:, None]), IGNORED)


def _track_targets(batch: Batch) -> torch.Tensor:
    """(B, L, T), the same number of values in every row: a mean over values must not depend on how rows are cut."""
    first_base = batch["input_ids"][batch["attention_mask"].bool()].min()
    targets = (batch["input_ids"][..., None] - first_base + 1) * torch.tensor([0.2, 0.1, 0.6])
    targets[:, 3:] = torch.nan
    return targets.masked_fill(batch["attention_mask"][..., None] == 0, torch.nan)


def _contact_targets(batch: Batch) -> torch.Tensor:
    """(B, P, T), the same number of values in every row."""
    rows, length = batch["input_ids"].shape
    pairs = REGISTRY["genesplice_akita"].tiny_config().num_pairs(length)
    targets = torch.linspace(-1, 1, rows * pairs * NUM_LABELS).view(rows, pairs, NUM_LABELS)
    return torch.where(torch.arange(pairs)[:, None] % 4 == 1, torch.nan, targets)


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


def _places(config: PreTrainedConfig, length: int) -> int:
    """What a model gives for so many tokens: as many tokens, or bins."""
    return getattr(config, "num_bins", int)(length)


def _num_tracks(config: PreTrainedConfig) -> int:
    heads = getattr(config, "output_heads", None)
    return next(iter(heads.values())) if heads else config.num_tracks


LABELS: dict[str, Callable[[Batch], torch.Tensor]] = {
    "AutoModelForPreTraining": _ids_where(_every_third),
    "AutoModelForMaskedLM": _ids_where(_every_third),
    "AutoModelForCausalLM": _ids_where(lambda mask: torch.ones_like(mask).bool()),
    "AutoModelForSequenceClassification": lambda batch: torch.arange(len(batch["input_ids"])) % NUM_LABELS,
    "AutoModelForTokenClassification": lambda batch: (batch["input_ids"] % NUM_LABELS).masked_fill(
        batch["attention_mask"] == 0, IGNORED
    ),
    "AutoModelForTrackPrediction": lambda batch: _track_targets(batch),
    "AutoModelForContactPrediction": lambda batch: _contact_targets(batch),
    "AutoModelForMaskedExpression": lambda batch: _masked_values(batch),
    "AutoModelForEdgePrediction": lambda batch: _edges(batch),
}
# Labels that stand for bins where a model has bins.
PER_BASE = ("AutoModelForTokenClassification", "AutoModelForTrackPrediction")
# How the names begin of what a batch holds for the loss alone.
_ASKED = ("labels", "view_", "segment_", "follows")
# What a batch with labels holds beside them.
EXTRAS: dict[str, Callable[[Batch], Batch]] = {"AutoModelForPreTraining": _views_and_segments}
SHAPES: dict[str, Callable[[PreTrainedConfig, int, int], tuple[int, ...]]] = {
    "AutoModelForPreTraining": lambda config, B, L: (B, L, config.vocab_size),
    "AutoModel": lambda config, B, L: (B, _places(config, L), config.hidden_size),
    "AutoModelForMaskedLM": lambda config, B, L: (B, L, config.vocab_size),
    "AutoModelForCausalLM": lambda config, B, L: (B, L, config.vocab_size),
    "AutoModelForSequenceClassification": lambda config, B, L: (B, config.num_labels),
    "AutoModelForTokenClassification": lambda config, B, L: (B, _places(config, L), config.num_labels),
    "AutoModelForTrackPrediction": lambda config, B, L: (B, _places(config, L), _num_tracks(config)),
    "AutoModelForContactPrediction": lambda config, B, L: (B, config.num_pairs(L), config.num_targets),
    "AutoModelForMaskedExpression": lambda config, B, L: (B, L),
    "AutoModelForEdgePrediction": lambda config, B, L: (B, L, L),
}


def no_label(labels: torch.Tensor) -> float:
    """What stands in such labels where nothing is asked."""
    is_track = labels.is_floating_point() and not bool((labels == IGNORED).any())
    return torch.nan if is_track else IGNORED


def randomized(module: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    """Adds noise to every parameter, the embedding of the padding token too; ties stay ties."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def hold_batch_norm(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Keeps batch norms on stored statistics, off their initial values, whatever `train()` says; weights train."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) * 2 + 2)
    return stay_in_eval(model)


def stay_in_eval(model: PreTrainedModel) -> PreTrainedModel:
    """Batch norms stay in eval mode, also in copies."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train = MethodType(lambda self, mode=True: nn.Module.train(self, False), module)
            module.eval()
    return model


def companions(row: str, rows: int = 1) -> Batch:
    """What a row's model needs beside sequences, the same for every row of a batch.

    A batch of one would do, but a product over one row rounds by where its tensors lie in memory.
    """
    return {name: torch.cat([tensor] * rows) for name, tensor in COMPANIONS.get(row, dict)().items()}


def accompanied(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch with what a model of its type needs beside sequences, where it does not hold it yet."""
    rows = next((len(tensor) for tensor in batch.values()), 1)
    return companions(model.config.model_type, rows) | batch


def output(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits, or the last hidden state of a base model, without labels and without gradient."""
    asked = {key: value for key, value in batch.items() if not key.startswith(_ASKED)}
    with torch.no_grad():
        return model(**accompanied(model, asked))[0]


def objective(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The model's loss; for a base model a fixed random projection of its states."""
    outputs = model(**accompanied(model, batch))
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
