"""A task: cleaned train, dev and test rows, and their tokens as tensors that a batch is cut from.

Shapes: N sequences, L tokens (of the longest), B batch, T targets.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from scipy.special import expit, softmax
from transformers import PreTrainedTokenizerBase

from genesplice_hf.data.samples import load_ars1
from genesplice_hf.data.splits import deduplicate, random_split, remove_overlap
from genesplice_hf.data.tables import read_table
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement
from genesplice_hf.scoring.metrics import classification_metrics, regression_metrics
from training.baselines import LabelledSequences
from training.settings import DataSettings

logger = logging.getLogger(__name__)

_SUFFIXES = (".csv", ".tsv", ".parquet", ".csv.gz", ".tsv.gz")
_PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_BEST_METRIC = {
    "single_label_classification": "mcc",
    "multi_label_classification": "auroc",
    "regression": "pearson",
}
_SAMPLE_ROWS = {"train": 32_000, "dev": 4_000, "test": 8_000}
Parts = dict[str, Dataset]


class Task(NamedTuple):
    """Rows to learn from, to choose by, and to report on.

    Attributes:
        problem_type: one of the three names of transformers.
        num_labels: classes, labels, or 1 for a regression on one column.
        report: counts of rows per split, and what the cleaning removed.
    """

    train: LabelledSequences
    dev: LabelledSequences
    test: LabelledSequences
    problem_type: str
    num_labels: int
    report: dict[str, Any]

    @property
    def best_metric(self) -> str:
        """The dev metric that picks a checkpoint or a layer unless settings say otherwise."""
        return _BEST_METRIC[self.problem_type]

    @property
    def regression(self) -> bool:
        """Are the labels measured values?"""
        return self.problem_type == "regression"


def load_task(settings: DataSettings) -> Task:
    """Reads, cleans and cuts the tables (or the sample) that `settings` name.

    With `remove_duplicates`, repeated rows of train and dev go, and rows of train (dev) that stand in dev or test
    (test) too; the test table stays whole, so that results compare with published ones.

    Raises:
        DataError: no or contradicting sources, damaged tables, or a split that cleaning leaves empty.
    """
    parts = _sample(settings) if settings.sample else _tables(settings)
    problem_type = _problem_type(parts["train"], settings)
    removed: dict[str, Any] = {}
    if settings.remove_duplicates and not settings.sample:
        parts, removed = _clean(parts, problem_type)
    if "dev" not in parts:
        fractions = {"train": 1 - settings.dev_fraction, "dev": settings.dev_fraction}
        parts |= random_split(parts["train"], fractions, seed=settings.split_seed).datasets
    parts = {name: _draw(part, name, settings) for name, part in parts.items()}
    labelled = {name: _labelled(part) for name, part in parts.items()}
    report = {"rows": {name: len(part) for name, part in parts.items()}, "removed": removed}
    return Task(**labelled, problem_type=problem_type, num_labels=_num_labels(labelled, problem_type), report=report)


def read_rows(path: str, settings: DataSettings, problem_type: str | None) -> Dataset:
    """One table with the columns `sequence` and `label`, every row in order; see `data.tables.read_table`."""
    columns = settings.label_columns
    if len(columns) > 1:
        table = read_table(path, settings.sequence_column, label_column=None)
        return _join_labels(table, columns, path, problem_type)
    kind = None if problem_type == "multi_label_classification" else problem_type
    return read_table(path, settings.sequence_column, columns[0], problem_type=kind)


def task_metrics(problem_type: str, labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """The metrics of a task from logits, or from predicted values for a regression."""
    if problem_type == "regression":
        return regression_metrics(labels, logits)
    return classification_metrics(labels, logits, kind="logits")


def probabilities(problem_type: str, logits: np.ndarray) -> np.ndarray:
    """Logits as probabilities; values of a regression stay as they are."""
    if problem_type == "regression":
        return logits
    return softmax(logits, axis=-1) if problem_type == "single_label_classification" else expit(logits)


class Tokens(NamedTuple):
    """Token ids `(N, L)` int32 and, where lengths differ, a mask `(N, L)` bool; None: every token is real."""

    input_ids: torch.Tensor
    mask: torch.Tensor | None
    left_padded: bool

    def batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs of a model for `rows`, cut to the longest of them."""
        ids_BL = self.input_ids[rows].long()
        if self.mask is None:
            return {"input_ids": ids_BL}
        mask_BL = self.mask[rows]
        longest = int(mask_BL.sum(dim=1).max())
        cut = slice(-longest, None) if self.left_padded else slice(longest)
        return {"input_ids": ids_BL[:, cut], "attention_mask": mask_BL[:, cut].long()}


def tokenize(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[str]) -> Tokens:
    """All sequences at once.

    Raises:
        DataError: a sequence has more tokens than the tokenizer's `model_max_length`; nothing is truncated.
    """
    encoded = tokenizer(list(sequences), padding=True, return_tensors="np", return_attention_mask=True)
    ids_NL = np.asarray(encoded["input_ids"])
    if ids_NL.shape[1] > tokenizer.model_max_length:
        raise DataError(
            f"The longest sequence gives {ids_NL.shape[1]} tokens, the tokenizer's `model_max_length` is "
            f"{tokenizer.model_max_length}; cut the sequences into windows."
        )
    mask_NL = np.asarray(encoded["attention_mask"]).astype(bool)
    mask = None if mask_NL.all() else torch.from_numpy(mask_NL)
    return Tokens(torch.from_numpy(ids_NL.astype(np.int32)), mask, tokenizer.padding_side == "left")


def flipped(sequences: Sequence[str]) -> list[str]:
    """The reverse complement of each sequence."""
    return [reverse_complement(sequence) for sequence in sequences]


class TokenDataset(torch.utils.data.Dataset):
    """Whole batches cut from tensors: no per-row Python work, and no collator to wait for.

    Args:
        tokens: of N sequences; or of 2 N, the second half their reverse complements in the same order. Then
            each row is drawn from either strand, anew in every epoch, by a rule that depends on seed, epoch
            and row only (not on batch size, process or a restart).
        labels: `(N,)` or `(N, T)`; a column of integers is classes, everything else becomes float32.
        seed: of that rule.
    """

    def __init__(self, tokens: Tokens, labels: np.ndarray, seed: int = 0):
        single = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
        self.tokens = tokens
        self.labels = torch.from_numpy(labels.astype(np.int64 if single else np.float32))
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws the strands of `epoch`."""
        self.token_rows = torch.arange(len(self))
        if len(self.tokens.input_ids) > len(self):
            coins = np.random.default_rng([self.seed, epoch]).random(len(self)) < 0.5
            self.token_rows += len(self) * torch.from_numpy(coins)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        index = torch.as_tensor(rows)
        return self.tokens.batch(self.token_rows[index]) | {"labels": self.labels[index]}


def as_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collator of `TokenDataset`, whose batches are whole already."""
    return batch


def predict_strands(
    predict: Callable[[Sequence[str]], np.ndarray], sequences: Sequence[str], average: bool
) -> np.ndarray:
    """`predict(sequences)`, or with `average` the mean over both strands."""
    forward = predict(sequences)
    return (forward + predict(flipped(sequences))) / 2 if average else forward


def _sample(settings: DataSettings) -> Parts:
    if settings.data_dir or settings.train_file or settings.test_file:
        raise DataError("`sample` and tables exclude each other; give one of them.")
    asked = {name: getattr(settings, f"max_{name}_rows") or rows for name, rows in _SAMPLE_ROWS.items()}
    ars1 = load_ars1(asked["train"], asked["dev"], asked["test"], seed=settings.split_seed)
    return {"train": ars1.train, "dev": ars1.dev, "test": ars1.test}


def _tables(settings: DataSettings) -> Parts:
    paths = {name: _table_path(settings, name) for name in ("train", "dev", "test")}
    for name in ("train", "test"):
        if paths[name] is None:
            raise DataError(f"No {name} table: give `--{name}_file`, or a `--data_dir` that holds {name}.csv.")
    train = read_rows(paths.pop("train"), settings, _PROBLEM_TYPES.get(settings.problem_type))
    # What train holds decides how the others are read: classes there are classes everywhere.
    problem_type = _problem_type(train, settings)
    others = {name: read_rows(path, settings, problem_type) for name, path in paths.items() if path}
    return {name: part.select_columns(["sequence", "label"]) for name, part in ({"train": train} | others).items()}


def _table_path(settings: DataSettings, name: str) -> str | None:
    explicit = getattr(settings, f"{name}_file")
    if explicit or not settings.data_dir:
        return explicit
    candidates = [Path(settings.data_dir) / f"{name}{suffix}" for suffix in _SUFFIXES]
    return next((str(path) for path in candidates if path.is_file()), None)


def _join_labels(table: Dataset, columns: Sequence[str], path: str, problem_type: str | None) -> Dataset:
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise DataError(f"{path} has no columns {missing}; it has {table.column_names}.")
    labels = np.stack([np.asarray(table[name], dtype=np.float64) for name in columns], axis=1)
    if problem_type != "regression":
        if not np.isin(labels, (0, 1)).all():
            raise DataError(f"The label columns {list(columns)} of {path} must hold 0 and 1 only.")
        labels = labels.astype(np.int64)
    return table.select_columns(["sequence"]).add_column("label", labels.tolist())


def _problem_type(train: Dataset, settings: DataSettings) -> str:
    if settings.problem_type != "auto":
        return _PROBLEM_TYPES[settings.problem_type]
    if len(settings.label_columns) > 1:
        return "multi_label_classification"
    whole = isinstance(train[0]["label"], int)
    return "single_label_classification" if whole else "regression"


def _clean(parts: Parts, problem_type: str) -> tuple[Parts, dict[str, Any]]:
    """Test stays whole; dev gives way to test, train to both."""
    # Two measured values of one sequence are replicates, two classes a contradiction.
    conflicts: Literal["keep_first", "drop"] = "keep_first" if problem_type == "regression" else "drop"
    cleaned, removed = {"test": parts["test"]}, dict[str, Any]()
    for name in ("dev", "train"):
        if name not in parts:
            continue
        unique, duplicates = deduplicate(parts[name], conflicting_labels=conflicts)
        cleaned[name], overlap = remove_overlap(unique, *cleaned.values())
        removed[name] = {
            "duplicates": duplicates.duplicates,
            "conflicting_labels": duplicates.conflicts,
            "in_a_later_split": overlap.overlaps,
        }
        logger.info("%s: removed %s", name, removed[name])
        if not len(cleaned[name]):
            raise DataError(f"Cleaning leaves no row of {name}; check the tables, or pass `remove_duplicates` false.")
    return {name: cleaned[name] for name in parts}, removed


def _draw(part: Dataset, name: str, settings: DataSettings) -> Dataset:
    most = getattr(settings, f"max_{name}_rows")
    if most is None or most >= len(part):
        return part
    rows = np.random.default_rng(settings.split_seed).permutation(len(part))[:most]
    return part.select(np.sort(rows), keep_in_memory=True)


def _labelled(part: Dataset) -> LabelledSequences:
    return LabelledSequences(list(part["sequence"]), np.asarray(part["label"]))


def _num_labels(labelled: dict[str, LabelledSequences], problem_type: str) -> int:
    if problem_type == "single_label_classification":
        return max(2, 1 + max(int(part.labels.max()) for part in labelled.values()))
    labels = labelled["train"].labels
    return labels.shape[1] if labels.ndim == 2 else 1
