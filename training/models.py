"""Networks for the scripts: by name, from scratch, and back from a folder that `finetune` wrote."""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as hf_logging

import genesplice_hf
from genesplice_hf.adaptation.adapt import merge
from genesplice_hf.adaptation.adapter_files import load_adapter, read_adapter_info, save_adapter
from genesplice_hf.errors import CheckpointError
from training.settings import ModelSettings
from training.task import Task, Tokens

NANO = Path(genesplice_hf.__file__).parent / "checkpoints" / "genesplice-nano"


def resolve_model(name: str) -> str:
    """`nano` becomes the folder of the checkpoint inside the package; any other name stays.

    Raises:
        CheckpointError: the installation holds no such checkpoint.
    """
    if name != "nano":
        return name
    if not (NANO / "config.json").is_file():
        raise CheckpointError(f"This installation has no checkpoint {NANO}; pass `--model` with a folder or Hub id.")
    return str(NANO)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer that the settings name, or the model's own."""
    source = settings.tokenizer or resolve_model(settings.model)
    return AutoTokenizer.from_pretrained(
        source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )


def load_classifier(settings: ModelSettings, task: Task, seed: int) -> PreTrainedModel:
    """The model with a fresh head for `task`; head, and with `random_weights` everything, drawn from `seed`."""
    shape = {"num_labels": task.num_labels, "problem_type": task.problem_type, **settings.model_options}
    set_seed(seed)
    return _load(AutoModelForSequenceClassification, settings, shape)


def load_body(settings: ModelSettings, seed: int) -> PreTrainedModel:
    """The model without a head, for embeddings."""
    set_seed(seed)
    return _load(AutoModel, settings, {})


def save_trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, method: str, settings: ModelSettings
) -> None:
    """Writes the adapter and head only, or the whole network where its base exists nowhere else."""
    if method == "full" or settings.random_weights:
        merge(model).save_pretrained(folder)
    else:
        save_adapter(
            model,
            folder,
            base_model_name=resolve_model(settings.model),
            base_model_revision=settings.revision,
            tokenizer_name=settings.tokenizer or resolve_model(settings.model),
        )
    tokenizer.save_pretrained(folder)


def load_trained(
    folder: str, base_model: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fine-tuned network and its tokenizer, in eval mode.

    Args:
        folder: of a whole model, or an adapter folder; a Hub id of a whole model works too.
        base_model: where the adapter's base is now; by default where it was when the adapter was written.
        trust_remote_code: run code that the repository brings.

    Raises:
        CheckpointError: the adapter does not fit its base.
    """
    info = read_adapter_info(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if info is None:
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return model.eval(), tokenizer
    base = base_model or info.get("base_model_name")
    if not base:
        raise CheckpointError(f"{folder} does not say where its base is; pass `--base_model`.")
    revision = None if base_model else info.get("base_model_revision")
    settings = ModelSettings(model=base, revision=revision, trust_remote_code=trust_remote_code)
    shape = {"num_labels": len(info["id2label"]), "problem_type": info["problem_type"]}
    return load_adapter(_load(AutoModelForSequenceClassification, settings, shape), folder), tokenizer


def predict_logits(model: PreTrainedModel, tokens: Tokens, batch_size: int, bf16: bool = False) -> np.ndarray:
    """Logits `(N, num_labels)` float32 of every row, in order; similar lengths share a batch."""
    device = next(model.parameters()).device
    lengths = torch.zeros(len(tokens.input_ids)) if tokens.mask is None else tokens.mask.sum(dim=1)
    order = torch.argsort(lengths, stable=True)
    batches = order.split(batch_size)
    parts = []
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    with torch.inference_mode(), autocast:
        for rows in hf_logging.tqdm(batches, desc="predicting", unit="batch", disable=len(batches) < 2):
            inputs = {name: tensor.to(device) for name, tensor in tokens.batch(rows).items()}
            parts.append(model(**inputs).logits.float().cpu())
    logits = torch.empty_like(torch.cat(parts))
    logits[order] = torch.cat(parts)
    return logits.numpy()


def _load(auto_class, settings: ModelSettings, shape: dict) -> PreTrainedModel:
    source = resolve_model(settings.model)
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    attention = {"attn_implementation": settings.attn_implementation}
    if settings.random_weights:
        config = AutoConfig.from_pretrained(source, **options, **shape)
        return auto_class.from_config(
            config, dtype=torch.float32, trust_remote_code=settings.trust_remote_code, **attention
        )
    # Small batches and adapters need the precision; training casts by autocast.
    return auto_class.from_pretrained(source, dtype=torch.float32, **options, **attention, **shape)
