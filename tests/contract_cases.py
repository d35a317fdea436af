"""What the contract suite runs on: every head of every row of the registry, with a tiny model and a batch for it.

A new model becomes one row of `REGISTRY` and is found here by itself; the rules of its config are shown to bite in
`CONTRADICTIONS`. A new Auto class needs an entry in `LABELS` and `SHAPES`. A check that a model cannot pass is named
with its reason in `EXCEPTIONS`.

Shapes: B batch, L tokens, E hidden size, V vocabulary, C labels.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
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

from genesplice_hf.models.registry import REGISTRY, ModelEntry

Batch = dict[str, torch.Tensor]

NUM_LABELS = 3
IGNORED = -100
# Longer than three windows of the tiny models, so that banded attention is taken; and one shorter than a window.
LENGTHS_BP = (17, 3, 11, 14)

# (row, check) or (row/AutoClass, check) -> why the check does not apply; the check is the test's name.
EXCEPTIONS: dict[tuple[str, str], str] = {}

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
    ],
}


@dataclass(frozen=True)
class Case:
    """One head of one row."""

    row: str
    auto_class: str

    @property
    def name(self) -> str:
        return f"{self.row}/{self.auto_class}"

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
        return self.entry.tiny_config(**({"num_labels": NUM_LABELS} | causal | overrides))

    def model(self, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """A tiny model in eval mode; every parameter is off its initial value, which could hide mistakes."""
        torch.manual_seed(seed)
        return randomized(self.model_class(self.config(**overrides)), seed).eval()

    def batch(self, lengths_bp: tuple[int, ...] = LENGTHS_BP, labels: bool = False) -> Batch:
        """A right-padded batch of random bases."""
        batch = padded([self.ids(length, seed) for seed, length in enumerate(lengths_bp)], pad_id(self.row))
        return batch | {"labels": LABELS[self.auto_class](batch)} if labels and self.has_loss else batch

    def ids(self, length_bp: int, seed: int = 0) -> torch.Tensor:
        """(L,) token ids of a random sequence."""
        sequence = "".join(random.Random(seed).choices("ACGT", k=length_bp))
        return torch.tensor(tokenizer_of(self.row)([sequence])["input_ids"][0])


CASES = [Case(row, auto_class) for row, entry in REGISTRY.items() for auto_class in entry.auto_classes]


def cases(check: str, only: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """`@cases("test_name")` runs the test on every case that `only` accepts, exceptions skipped with their reason."""
    return pytest.mark.parametrize(
        "case",
        [pytest.param(case, id=case.name, marks=_marks(check, case.row, case.name)) for case in CASES if only(case)],
    )


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


LABELS: dict[str, Callable[[Batch], torch.Tensor]] = {
    "AutoModelForMaskedLM": _ids_where(_every_third),
    "AutoModelForCausalLM": _ids_where(lambda mask: torch.ones_like(mask).bool()),
    "AutoModelForSequenceClassification": lambda batch: torch.arange(len(batch["input_ids"])) % NUM_LABELS,
    "AutoModelForTokenClassification": lambda batch: (batch["input_ids"] % NUM_LABELS).masked_fill(
        batch["attention_mask"] == 0, IGNORED
    ),
}
SHAPES: dict[str, Callable[[PreTrainedConfig, int, int], tuple[int, ...]]] = {
    "AutoModel": lambda config, B, L: (B, L, config.hidden_size),
    "AutoModelForMaskedLM": lambda config, B, L: (B, L, config.vocab_size),
    "AutoModelForCausalLM": lambda config, B, L: (B, L, config.vocab_size),
    "AutoModelForSequenceClassification": lambda config, B, L: (B, config.num_labels),
    "AutoModelForTokenClassification": lambda config, B, L: (B, L, config.num_labels),
}


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
        return model(**{key: value for key, value in batch.items() if key != "labels"})[0]


def objective(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The model's loss; for a base model a fixed random projection of its states."""
    outputs = model(**batch)
    if "labels" in batch:
        return outputs.loss
    weight = torch.randn(outputs[0].shape[-1], generator=torch.Generator().manual_seed(0))
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
