"""A tiny pretrained-looking model and a planted-motif task for the training scripts."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

from genesplice_hf.models.registry import REGISTRY
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

# Long and its own reverse complement: a network of a few thousand weights finds it in seconds, on both strands.
MOTIF = "TATATATATATATATATA"


def planted(num_rows: int, length: int = 40, seed: int = 0) -> pd.DataFrame:
    """Random sequences; those of class 1 hold MOTIF in their middle."""
    rng = np.random.default_rng(seed)
    rows = ["".join(rng.choice(list("ACGT"), length)) for _ in range(num_rows)]
    labels = rng.integers(0, 2, num_rows)
    middle = (length - len(MOTIF)) // 2
    for row in np.flatnonzero(labels):
        rows[row] = rows[row][:middle] + MOTIF + rows[row][middle + len(MOTIF) :]
    return pd.DataFrame({"sequence": rows, "label": labels})


def tiny_model(auto_class: str, seed: int = 0, **overrides) -> PreTrainedModel:
    entry = REGISTRY["genesplice"]
    torch.manual_seed(seed)
    return entry.auto_classes[auto_class](entry.tiny_config(**overrides)).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A masked language model with its tokenizer, as pretraining leaves it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("AutoModelForMaskedLM").save_pretrained(folder)
    NucleotideTokenizer(preset="genesplice").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def motif_folder(tmp_path_factory) -> str:
    """train.csv, dev.csv, test.csv with the planted motif."""
    folder: Path = tmp_path_factory.mktemp("motif")
    for seed, (name, rows) in enumerate({"train": 256, "dev": 64, "test": 96}.items()):
        planted(rows, seed=seed).to_csv(folder / f"{name}.csv", index=False)
    return str(folder)
