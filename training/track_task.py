"""Tracks as a task: windows of a folder, the model with a head for them, and its predictions.

Shapes: N windows, L bases, M bins, T tracks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, set_seed

from genesplice_hf.data.target_table import TargetTable
from genesplice_hf.data.tracks import TrackCollator, TrackDataset, TrackOptions
from genesplice_hf.errors import DataError
from genesplice_hf.models.auto import AutoModelForTrackPrediction
from genesplice_hf.scoring.tracks import predict_ensemble
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

SPLITS = ("train", "valid", "test")


@dataclass
class TrackDataSettings:
    """Which windows, and how much of them a model reads."""

    data_dir: str = field(
        default="tracks",
        metadata={"help": "Folder with train.npz, valid.npz, test.npz (sequence, target) and targets.txt."},
    )
    bin_bp: int = field(default=128, metadata={"help": "Bases per value of the targets."})
    context_bp: int | None = field(
        default=None,
        metadata={"help": "Bases around the centre that the model reads; by default all that are stored."},
    )
    max_shift_bp: int = field(default=3, metadata={"help": "Largest random shift of the sequence in training."})

    def __post_init__(self) -> None:
        if self.bin_bp < 1 or self.max_shift_bp < 0:
            raise DataError(
                f"`bin_bp` must be at least 1 and `max_shift_bp` at least 0, were {self.bin_bp} and "
                f"{self.max_shift_bp}."
            )


@dataclass
class TrackModelSettings:
    """Which network; the head is made to fit the data."""

    model_config: dict = field(
        default_factory=lambda: {"model_type": "genesplice"},
        metadata={"help": "`model_type` and fields of its config, for fresh weights; as JSON."},
    )
    pretrained: str | None = field(
        default=None, metadata={"help": "Hub id or folder to start from; `model_config` then only changes fields."}
    )
    species: str = field(default="human", metadata={"help": "Name of the head, in models with a head per species."})
    start_at_means: bool = field(
        default=True, metadata={"help": "A fresh head begins near the mean of every track, not at 0.7 for all."}
    )


class TrackTask(NamedTuple):
    """Windows to learn from, to choose by and to report on, and what the tracks are.

    Attributes:
        train, valid, test: datasets of the same tracks; train asks for augmentation.
        targets: the table of the tracks.
    """

    train: TrackDataset
    valid: TrackDataset
    test: TrackDataset
    targets: TargetTable

    @property
    def descriptions(self) -> list[str]:
        """One per track; its identifier where it has none."""
        return [target.description or target.identifier for target in self.targets.targets]


def load_track_task(settings: TrackDataSettings) -> TrackTask:
    """Reads the folder of `settings`.

    Raises:
        DataError: a missing or damaged file, files of different tracks or bins, fewer bases than the bins need.
    """
    folder = Path(settings.data_dir)
    parts = {name: read_windows(folder / f"{name}.npz", folder / "targets.txt", settings, name) for name in SPLITS}
    bins = {part.num_bins for part in parts.values()}
    if len(bins) > 1:
        raise DataError(f"The files of {folder} must have the same number of bins, have {sorted(bins)}.")
    targets = parts["train"].targets
    assert targets is not None
    return TrackTask(**parts, targets=targets)


def read_windows(npz: Path, targets: Path, settings: TrackDataSettings, split: str = "test") -> TrackDataset:
    """One file; `split` "train" asks for augmentation."""
    options = TrackOptions(context_length=settings.context_bp, augment=split == "train")
    dataset = TrackDataset.from_npz(npz, options=options, targets=targets)
    length, needed = len(dataset[0]["input_ids"]), dataset.num_bins * settings.bin_bp
    if length < needed:
        raise DataError(
            f"`context_bp` ({length}) must hold the {dataset.num_bins} bins of {settings.bin_bp} bp of {npz}, "
            f"{needed} bp; raise it, or correct `bin_bp`."
        )
    return dataset


def build_track_model(settings: TrackModelSettings, task: TrackTask, bin_bp: int, seed: int) -> PreTrainedModel:
    """The network with a head for the tracks of `task`; what is not loaded is drawn from `seed`.

    Raises:
        DataError: a model without a track head, or with bins of another size.
    """
    fields = dict(settings.model_config)
    model_type = fields.pop("model_type", "genesplice")
    if settings.pretrained is None:
        config = AutoConfig.for_model(model_type, **fields)
    else:
        config = AutoConfig.from_pretrained(settings.pretrained, **fields)
    fit_head(config, task, bin_bp, settings.species)
    set_seed(seed)
    if settings.pretrained is None:
        return AutoModelForTrackPrediction.from_config(config)
    # The head of other tracks has another shape, and is made anew.
    return AutoModelForTrackPrediction.from_pretrained(
        settings.pretrained, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )


def fit_head(config: PreTrainedConfig, task: TrackTask, bin_bp: int, species: str) -> None:
    """Sets the fields of the two kinds of track models: a head per species, or one for all tracks."""
    pairs = task.targets.strand_pair
    if hasattr(config, "output_heads"):
        config.output_heads, config.default_species = {species: len(task.targets)}, species
        config.target_length = task.train.num_bins
    elif hasattr(config, "track_bin_size"):
        config.num_tracks, config.track_target_length = len(task.targets), task.train.num_bins
        if getattr(config, "rc_equivariant", False):
            config.track_strand_pairs = None if pairs is None else list(pairs)
    else:
        raise DataError(
            f"`model_type` {config.model_type!r} has no track head; use genesplice or genesplice_enformer."
        )
    found = bin_size(config)
    if found != bin_bp:
        raise DataError(f"`bin_bp` is {bin_bp}, but the model has bins of {found} bp; change one of the two.")


def start_at_means(model: PreTrainedModel, means_T: np.ndarray) -> None:
    """Sets the biases of the track head so that softplus gives `means_T` where the rest of the head says 0.

    Coverage is sparse: a head that begins at softplus(0) = 0.7 spends its first hundred steps on coming down.
    """
    bias = torch.from_numpy(np.log(np.expm1(np.maximum(means_T, 1e-4)))).float()
    layers = [part for part in model.get_submodule("classifier").modules() if isinstance(part, torch.nn.Linear)]
    with torch.no_grad():
        layers[-1].bias.copy_(bias)


def bin_size(config: PreTrainedConfig) -> int:
    """Bases per predicted bin."""
    return 2**config.num_downsamples if hasattr(config, "num_downsamples") else config.track_bin_size


def tokenizer_of(config: PreTrainedConfig) -> NucleotideTokenizer:
    """The single-base tokenizer that a model of this config was made for."""
    return NucleotideTokenizer(preset="enformer" if hasattr(config, "output_heads") else "genesplice")


def id_map_of(tokenizer: Any) -> list[int]:
    """The tokenizer's ids of A, C, G, T, N and padding, for `TrackCollator` and `predict_ensemble`.

    Raises:
        DataError: a tokenizer that has no token for one of them.
    """
    ids = [*tokenizer.convert_tokens_to_ids(list("ACGTN")), tokenizer.pad_token_id]
    if None in ids or len(set(ids)) < 6:
        raise DataError(f"The tokenizer must have a token each for A, C, G, T, N and padding, has the ids {ids}.")
    return ids


def predict_batches(
    model: PreTrainedModel,
    dataset: TrackDataset,
    id_map: Sequence[int],
    batch_size: int,
    average_strands: bool,
    bf16: bool = False,
    model_inputs: Mapping[str, Any] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Predictions and labels, (B, M, T) float32 each, of all windows in order; the mean of both strands if wanted."""
    device = next(model.parameters()).device
    collate = TrackCollator(augment=False)
    for start in range(0, len(dataset), batch_size):
        batch = collate([dataset[item] for item in range(start, min(start + batch_size, len(dataset)))])
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            predictions = predict_ensemble(
                model,
                batch["input_ids"].to(device),
                rc=average_strands,
                shifts=(0,),
                strand_pair=dataset.strand_pair,
                id_map=id_map,
                model_inputs=model_inputs,
            )
        yield predictions.cpu().numpy(), batch["labels"].numpy()
