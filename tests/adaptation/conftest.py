"""Tiny models for the adaptation tests: a trunk that is the same in every call, a head that differs by seed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EsmConfig,
    EsmForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import genesplice_hf.models.genesplice  # noqa: F401, registers the Auto classes
from genesplice_hf.models.registry import REGISTRY

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NUM_LABELS = 3


def tiny_esm() -> PreTrainedModel:
    config = EsmConfig(
        vocab_size=16,
        mask_token_id=4,
        pad_token_id=0,
        position_embedding_type="rotary",
        num_labels=NUM_LABELS,
        **SIZES,
    )
    return EsmForSequenceClassification(config)


def tiny_bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(vocab_size=16, num_labels=NUM_LABELS, **SIZES))


def tiny_genesplice() -> PreTrainedModel:
    entry = REGISTRY["genesplice"]
    model_class = entry.auto_classes["AutoModelForSequenceClassification"]
    return model_class(entry.tiny_config(num_labels=NUM_LABELS))


class ToyConfig(PreTrainedConfig):
    """A convolutional trunk with batch normalisation; its targets come from the config class."""

    model_type = "adaptation_toy"
    lora_targets = ["proj"]
    ia3_targets = ["proj"]
    ia3_feedforward = []
    layer_norm_targets = ["norm"]


class ToyTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.batch_norm(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2)
        return self.norm(x + self.proj(x)).mean(dim=1)


class ToyForSequenceClassification(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "trunk"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.trunk = ToyTrunk()
        self.classifier = nn.Linear(8, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs) -> SequenceClassifierOutput:
        logits = self.classifier(self.trunk(input_ids))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def tiny_toy() -> PreTrainedModel:
    return ToyForSequenceClassification(ToyConfig(num_labels=NUM_LABELS))


def randomize(module: nn.Module, seed: int) -> None:
    """Moves every parameter off its initial value; a head of zeros or a norm of ones would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


BUILDERS = {"esm": tiny_esm, "bert": tiny_bert, "genesplice": tiny_genesplice, "toy": tiny_toy}


@pytest.fixture
def fresh_model() -> Callable[..., PreTrainedModel]:
    """Gives `fresh_model(family, head_seed, trunk_seed=1)`: eval mode, reproducible weights."""

    def build(family: str, head_seed: int = 0, trunk_seed: int = 1) -> PreTrainedModel:
        torch.manual_seed(trunk_seed)
        model = BUILDERS[family]().eval()
        randomize(model.base_model, trunk_seed)
        randomize(model.classifier, 100 + head_seed)
        return model

    return build


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Four sequences of twelve tokens, two of them padded, with labels."""
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(5, 9, (4, 12), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[2:, 9:] = 0
    input_ids[2:, 9:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": torch.tensor([0, 1, 2, 1])}
