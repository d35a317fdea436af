"""Settings of the training scripts: dataclasses read from a YAML file and the command line.

`python -m training.finetune --config x.yaml --key value`: the command line wins over the file, the file over the
defaults. An unknown key, in either place, is an error that names the nearest known one.
"""

import difflib
import json
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser

from genesplice_hf.errors import DataError
from genesplice_hf.objectives.schedules import SCHEDULES

Method = Literal["lora", "ia3", "layer_norm", "linear_probe", "full"]

# Adapters and heads start from zero and take large steps; a pretrained body does not.
LEARNING_RATES = {"lora": 1e-3, "ia3": 3e-3, "layer_norm": 1e-3, "linear_probe": 1e-3, "full": 1e-4}


@dataclass
class DataSettings:
    """Which tables, which columns, which rows."""

    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with train, dev and test tables (.csv, .tsv, .parquet, gzipped or not)."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Training table; wins over data_dir."})
    dev_file: str | None = field(default=None, metadata={"help": "Table for early stopping and layer choice."})
    test_file: str | None = field(default=None, metadata={"help": "Table that is measured, once, at the end."})
    sample: Literal["ars1"] | None = field(
        default=None, metadata={"help": "The embedded example task instead of tables."}
    )
    sequence_column: str = field(default="sequence", metadata={"help": "Column that holds the DNA."})
    label_columns: list[str] = field(
        default_factory=lambda: ["label"],
        metadata={"help": "Column of classes or values; several columns make a multi-label task."},
    )
    problem_type: Literal["auto", "single_label", "multi_label", "regression"] = field(
        default="auto", metadata={"help": "auto: whole numbers are classes, several columns are multi-label."}
    )
    remove_duplicates: bool = field(
        default=True, metadata={"help": "Drop repeated rows within a split and rows that stand in a later one too."}
    )
    dev_fraction: float = field(
        default=0.1, metadata={"help": "Share of train that becomes dev where no dev table exists."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Use a random part of train."})
    max_dev_rows: int | None = field(default=None, metadata={"help": "Use a random part of dev."})
    max_test_rows: int | None = field(default=None, metadata={"help": "Use a random part of test."})
    split_seed: int = field(default=0, metadata={"help": "Seed of every random choice of rows."})

    def __post_init__(self):
        if isinstance(self.label_columns, str):
            self.label_columns = [self.label_columns]
        wants_several = {"single_label": False, "multi_label": True}.get(self.problem_type)
        if wants_several is not None and wants_several != (len(self.label_columns) > 1):
            raise DataError(
                f"`problem_type` {self.problem_type!r} does not fit {len(self.label_columns)} `label_columns`: "
                "single_label takes one, multi_label one per label."
            )
        if not 0 < self.dev_fraction < 1:
            raise DataError(f"`dev_fraction` must lie between 0 and 1, got {self.dev_fraction}.")


@dataclass
class ModelSettings:
    """Which network."""

    model: str = field(
        default="nano", metadata={"help": "Hub id or folder; `nano` is the checkpoint inside the package."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Hub id or folder, when not the model's."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    random_weights: bool = field(
        default=False, metadata={"help": "Same architecture, no pretraining: the control run."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the repository brings."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, ...; below 500 bp on a CPU eager trains fastest."}
    )
    model_options: dict = field(
        default_factory=dict, metadata={"help": "Fields of the model's config to change, as JSON."}
    )


@dataclass
class MethodSettings:
    """What is trained. The LoRA fields are ignored by other methods."""

    method: Method = field(default="lora", metadata={"help": "What is trained besides the head."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the LoRA update."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scale; the update is multiplied by alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the LoRA update."})
    lora_targets: list[str] = field(
        default_factory=list, metadata={"help": "Names of the adapted modules; by default those of the model."}
    )


@dataclass
class TrainSettings:
    """How it is trained, measured and stored."""

    output_dir: str = field(default="runs/finetune", metadata={"help": "Folder for everything that is written."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run per seed."})
    epochs: float = field(default=3.0, metadata={"help": "Passes over train."})
    max_steps: int = field(default=-1, metadata={"help": "Optimiser steps; wins over epochs when positive."})
    batch_size: int = field(default=32, metadata={"help": "Sequences per process and forward."})
    eval_batch_size: int = field(default=256, metadata={"help": "The same, for evaluation."})
    gradient_accumulation: int = field(default=1, metadata={"help": "Forwards per optimiser step."})
    learning_rate: float | None = field(default=None, metadata={"help": "Peak rate; by default that of the method."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay."})
    warmup_fraction: float = field(default=0.05, metadata={"help": "Share of the steps with a rising rate."})
    schedule: str = field(default="cosine", metadata={"help": f"One of {', '.join(SCHEDULES)}."})
    schedule_options: dict = field(
        default_factory=dict, metadata={"help": "Its options, as JSON; see `objectives/schedules.py`."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    evaluations_per_epoch: int = field(default=1, metadata={"help": "Dev evaluations (and checkpoints) per epoch."})
    early_stopping_patience: int | None = field(
        default=3, metadata={"help": "Stop after so many evaluations without a better dev metric; null: never."}
    )
    best_metric: str | None = field(
        default=None, metadata={"help": "Dev metric that picks the checkpoint; by default mcc, auroc or pearson."}
    )
    precision: Literal["auto", "fp32", "bf16"] = field(
        default="auto", metadata={"help": "auto: bf16 on hardware that computes in it, fp32 otherwise."}
    )
    augment_reverse_complement: bool = field(
        default=False, metadata={"help": "Train on a random strand, drawn per sequence and epoch."}
    )
    average_reverse_complement: bool = field(
        default=False, metadata={"help": "Predict the mean logits of both strands."}
    )
    run_baselines: bool = field(default=True, metadata={"help": "Measure the baselines on the same rows."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last complete checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier run in output_dir."})
    trainer_options: dict = field(
        default_factory=dict, metadata={"help": "Further fields of transformers.TrainingArguments, as JSON."}
    )

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise DataError(f"`seeds` must be different whole numbers, at least one, got {self.seeds}.")
        if self.resume and self.overwrite:
            raise DataError("`resume` and `overwrite` exclude each other; give one of them.")
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation", "evaluations_per_epoch"):
            if getattr(self, name) < 1:
                raise DataError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def parse_settings(classes: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Fills `classes` (dataclasses) from `--config FILE.yaml` and `--key value` pairs.

    Args:
        classes: dataclasses without common field names.
        argv: arguments without the program name; by default those of the process.

    Returns:
        One instance per class, in order.

    Raises:
        DataError: a file that is missing or not a mapping, an unknown key, a value of the wrong type.
    """
    config, rest = _split_config(list(sys.argv[1:] if argv is None else argv))
    parser = _Parser(list(classes))
    names = [item.name for cls in classes for item in fields(cls)]
    from_file = _file_arguments(config, names) if config else []
    *settings, unknown = parser.parse_args_into_dataclasses(
        from_file + rest, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        _raise_unknown(unknown[0].split("=")[0].lstrip("-"), names, "the command line")
    return tuple(settings)


def settings_as_dict(*settings) -> dict[str, Any]:
    """All fields of several settings objects in one flat dict, for `settings.json`."""
    return {name: value for part in settings for name, value in asdict(part).items()}


def bf16_available(device: str | None = None) -> bool:
    """Does the hardware compute in bfloat16? A GPU that does, or a CPU with AVX512-BF16 or AMX.

    Args:
        device: "cuda" or "cpu"; by default the one that training would use.
    """
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # Private in torch, so a version without these names counts as a CPU without the instructions.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def use_bf16(precision: str) -> bool:
    """Turns the `precision` setting into a decision; "auto" takes bf16 wherever the hardware computes in it.

    Raises:
        DataError: bf16 is asked for and the hardware does not compute in it.
    """
    if precision == "bf16" and not bf16_available():
        raise DataError("`precision` is 'bf16', but this hardware does not compute in it; use 'fp32' or 'auto'.")
    return precision == "bf16" or (precision == "auto" and bf16_available())


def is_main_process() -> bool:
    """True in the process that prints and writes: rank 0 under torchrun, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """Processes that train together, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class _Parser(HfArgumentParser):
    """Adds `none` for optional settings, JSON for mappings, and errors of ours instead of an exit."""

    def __init__(self, classes: list[type]):
        hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
        self._optional = {name for name, hint in hints.items() if type(None) in get_args(hint)}
        super().__init__(classes, allow_abbrev=False)

    def add_argument(self, *names, **options):
        if options.get("type") is dict:
            options["type"] = _mapping
        if names[0].lstrip("-") in self._optional:
            options["type"] = _or_none(options["type"])
            if "choices" in options:
                options["choices"] = (*options["choices"], None)
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; run with --help to see every setting.")


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def converted(word: str) -> Any:
        return None if word.lower() in ("none", "null") else convert(word)

    converted.__name__ = getattr(convert, "__name__", "value")  # argparse names it in "invalid int value"
    return converted


def _mapping(word: str) -> dict:
    try:
        value = json.loads(word)
    except json.JSONDecodeError as error:
        raise ArgumentTypeError(f"{word!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{word!r} must be a JSON object")
    return value


def _split_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    for position, word in enumerate(argv):
        if word.startswith("--config="):
            return Path(word.removeprefix("--config=")), argv[:position] + argv[position + 1 :]
        if word == "--config":
            if position + 1 == len(argv):
                raise DataError("`--config` needs the path of a YAML file after it.")
            return Path(argv[position + 1]), argv[:position] + argv[position + 2 :]
    return None, argv


def _file_arguments(path: Path, names: Sequence[str]) -> list[str]:
    """The YAML file as command-line words, so that both take the same way through the parser."""
    arguments = []
    for name, value in _read_yaml(path).items():
        if name not in names:
            _raise_unknown(str(name), names, str(path))
        arguments += _words(name, value)
    return arguments


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise DataError(f"`--config` must be an existing YAML file, got {path}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
    return content


def _words(name: str, value) -> list[str]:
    if value is None:
        return [f"--{name}=none"]
    if isinstance(value, list):
        return [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
    if isinstance(value, dict):
        return [f"--{name}={json.dumps(value)}"]
    return [f"--{name}={value}"]


def _raise_unknown(name: str, names: Sequence[str], where: str) -> NoReturn:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean `{near[0]}`?" if near else "run with --help to see every setting."
    raise DataError(f"`{name}` in {where} is not a setting; {hint}")
