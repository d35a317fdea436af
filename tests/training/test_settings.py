"""Settings: defaults < YAML < command line, and errors that name the nearest key."""

from dataclasses import dataclass, field

import pytest
import torch

from genesplice_hf.errors import DataError
from training.settings import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    TrainSettings,
    bf16_available,
    is_main_process,
    parse_settings,
    use_bf16,
)


@dataclass
class Toy:
    rate: float | None = None
    steps: int = 5
    names: list[str] = field(default_factory=lambda: ["a"])
    flag: bool = True
    extra: dict = field(default_factory=dict)


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def parse(*argv):
    (toy,) = parse_settings([Toy], argv)
    return toy


def test_defaults_file_and_command_line_win_in_that_order(config):
    path = config("rate: 5e-4\nsteps: 7\n")
    assert parse() == Toy()
    assert parse("--config", path) == Toy(rate=5e-4, steps=7)
    assert parse("--steps", "9", "--config=" + path) == Toy(rate=5e-4, steps=9)


def test_lists_flags_mappings_and_null(config):
    path = config("names: [x, y]\nflag: false\nextra: {adam_beta2: 0.98}\nrate: null\n")
    assert parse("--config", path) == Toy(None, 5, ["x", "y"], False, {"adam_beta2": 0.98})
    assert parse("--config", path, "--names", "z", "--flag", "true").names == ["z"]
    assert parse("--rate", "0.1", "--rate", "none").rate is None
    assert parse("--extra", '{"a": 1}').extra == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", "`stepps` in .*config.yaml is not a setting; did you mean `steps`"),
        ("qqqqqq: 3", "run with --help"),
        ("steps: many", "invalid int value: 'many'"),
        ("steps: null", "invalid int value: 'none'"),
        ("flag: perhaps", "perhaps"),
        ("names: []", "expected at least one argument"),
        ("extra: 3", "JSON object"),
        ("- a\n- b", "must hold `key: value` lines, got a list"),
        ("a: [1, 2", "not valid YAML"),
    ],
)
def test_faults_in_the_file(config, text, message):
    with pytest.raises(DataError, match=message):
        parse("--config", config(text))


def test_faults_on_the_command_line(tmp_path):
    with pytest.raises(DataError, match="`step` in the command line is not a setting; did you mean `steps`"):
        parse("--step", "3")
    with pytest.raises(DataError, match="existing YAML file"):
        parse("--config", str(tmp_path / "absent.yaml"))
    with pytest.raises(DataError, match="path of a YAML file"):
        parse("--config")
    with pytest.raises(DataError, match="not JSON"):
        parse("--extra", "{")


def test_the_real_settings_parse_together_and_check_values():
    classes = (DataSettings, ModelSettings, MethodSettings, TrainSettings)
    data, model, method, train = parse_settings(
        classes, ["--sample", "ars1", "--method", "ia3", "--seeds", "0", "1", "--early_stopping_patience", "none"]
    )
    assert (data.sample, model.model, method.method) == ("ars1", "nano", "ia3")
    assert (train.seeds, train.early_stopping_patience) == ([0, 1], None)
    for wrong in (
        ["--problem_type", "multi_label"],
        ["--resume", "true", "--overwrite", "true"],
        ["--seeds", "1", "1"],
        ["--batch_size", "0"],
        ["--dev_fraction", "1"],
        ["--method", "prompt"],
    ):
        with pytest.raises(DataError):
            parse_settings(classes, wrong)


def test_bf16_is_used_only_where_the_hardware_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    assert not bf16_available("cpu")
    assert not use_bf16("auto")
    with pytest.raises(DataError, match="does not compute in it"):
        use_bf16("bf16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert use_bf16("bf16")
    assert use_bf16("auto")
    assert not use_bf16("fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert use_bf16("auto")


def test_rank_zero_is_the_main_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert is_main_process()
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()
