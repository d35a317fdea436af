"""`load_dna_lm` and `convert` on folders that look as published ones do: what is loaded belongs together."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    EsmConfig,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
    PreTrainedConfig,
)
from typer.testing import CliRunner

import genesplice_hf
from genesplice_hf.adaptation.adapt import adapt, get_peft_config
from genesplice_hf.adaptation.targets import default_targets
from genesplice_hf.cli import app
from genesplice_hf.errors import CheckpointError, GeneSpliceError, SequenceError, UnknownCheckpointError
from genesplice_hf.hub import originals
from genesplice_hf.hub.original_tokenizers import MAKERS, TokenizerFiles, make_tokenizer
from genesplice_hf.hub.originals import convert, load_dna_lm
from genesplice_hf.models import detection
from genesplice_hf.models.detection import detect_dna_lm
from genesplice_hf.models.original import SOURCES, load_original
from genesplice_hf.models.registry import REGISTRY
from genesplice_hf.tokenization.tokenization_bpe import BPEDnaTokenizer
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import MSATokenizer, NucleotideTokenizer
from genesplice_hf.version import __version__

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SEQUENCES = ["ACGTGTACNTGCACGGANCGACTAGTCTGA", "acgtryACGT"]
THIN = ["nt_v1", "dnabert1"]


def write_nt_v1(folder: Path, **changes: Any) -> Path:
    """NT v1 as published: 4,105 embedded tokens, 4,107 in vocab.txt, EsmTokenizer named in tokenizer_config.json."""
    torch.manual_seed(1)
    config = EsmConfig(
        vocab_size=4105, pad_token_id=1, mask_token_id=2, max_position_embeddings=102, token_dropout=True,
        emb_layer_norm_before=False, tie_word_embeddings=False, **TINY,
    )  # fmt: skip
    EsmForMaskedLM(config).save_pretrained(folder, save_original_format=False)
    tokens = list(KmerTokenizer(preset="nt_v1").vocabulary.tokens())
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    write_json(folder / "tokenizer_config.json", tokenizer_class="EsmTokenizer", model_max_length=1000)
    return edit(folder, changes)


def write_dnabert1(folder: Path, **changes: Any) -> Path:
    """DNABERT as published: 3-mers, a pooler, a tokenizer config that folds case."""
    torch.manual_seed(2)
    config = BertConfig(vocab_size=69, max_position_embeddings=64, pad_token_id=0, **TINY)
    model = BertForMaskedLM(config)
    model.save_pretrained(folder)
    pooler = {"bert.pooler.dense.weight": torch.randn(16, 16), "bert.pooler.dense.bias": torch.randn(16)}
    path = folder / "model.safetensors"
    save_file(load_file(path) | pooler, path, {"format": "pt"})
    (folder / "vocab.txt").write_text("\n".join(KmerTokenizer(preset="dnabert3").vocabulary.tokens()) + "\n")
    write_json(folder / "tokenizer_config.json", do_lower_case=True, model_max_length=512)
    return edit(folder, changes)


def edit(folder: Path, changes: dict[str, Any]) -> Path:
    path = folder / "config.json"
    write_json(path, **(json.loads(path.read_text()) | changes))
    return folder


def write_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


WRITERS = {"nt_v1": write_nt_v1, "dnabert1": write_dnabert1}
CLASSES = {
    "nt_v1": [EsmModel, EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification],
    "dnabert1": [BertModel, BertForMaskedLM, BertForSequenceClassification],
}
EVERY_SOURCE = pytest.mark.parametrize("source", THIN)


def logits(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@EVERY_SOURCE
def test_model_tokenizer_and_facts(source: str, tmp_path: Path) -> None:
    folder = WRITERS[source](tmp_path)
    model, tokenizer, spec = genesplice_hf.load_dna_lm(folder)
    assert type(model) is CLASSES[source][1] and not model.training
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[key], stored[key]) for key in stored if "pooler" not in key)
    assert type(tokenizer) is KmerTokenizer and tokenizer.vocab_source == "vocab.txt"
    assert len(tokenizer) == model.config.vocab_size
    assert spec.family == source and set(spec.source_keys) == set(stored)
    assert spec.ignored_keys == tuple(model.config.conversion["ignored_keys"])
    batch = tokenizer(SEQUENCES, padding=True, return_tensors="pt")
    assert logits(model, batch).shape == (2, batch["input_ids"].shape[1], len(tokenizer))


def test_facts_of_nt_v1(tmp_path: Path) -> None:
    model, tokenizer, spec = load_dna_lm(write_nt_v1(tmp_path))
    assert tokenizer("ACGTAC")["input_ids"] == [3, 726]
    assert (spec.tokenization, spec.k, spec.n_prefix, spec.n_suffix) == ("kmer_nonoverlap", 6, 1, 0)
    assert (spec.max_tokens, spec.max_bp, spec.soft_max_bp, spec.rc) == (100, 594, 594, "none")
    assert spec.nucleotide_token_ids == (4100, 4102, 4103, 4101)
    assert any("<eos>" in fix for fix in spec.fixes)
    assert spec.plan_length(594) == (100, 0, 594)
    assert spec.plan_length(601) == (1 + 100 + 1, 0, 594)
    with pytest.raises(SequenceError, match="594"):
        tokenizer("A" * 600)
    resized = model.resize_token_embeddings(len(tokenizer))
    assert resized.weight.shape == (4105, 16)


def test_facts_of_dnabert1(tmp_path: Path) -> None:
    _, tokenizer, spec = load_dna_lm(write_dnabert1(tmp_path))
    assert tokenizer("acgt")["input_ids"] == tokenizer("ACGT")["input_ids"] != [2, 1, 1, 3]
    assert (spec.tokenization, spec.k, spec.n_prefix, spec.n_suffix) == ("kmer_overlap", 3, 1, 1)
    assert (spec.max_tokens, spec.max_bp, spec.nucleotide_token_ids) == (64, 64, None)
    assert spec.plan_length(64).tokens == 64 and spec.plan_length(1).tokens == 3 and spec.plan_length(0).tokens == 2
    assert spec.ignored_keys == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")


def test_no_id_of_nt_v1_lies_beyond_the_table(tmp_path: Path) -> None:
    """On 10^5 random strings of A, C, G, T and N; written <eos> and <bos> are no tokens."""
    tokenizer = load_dna_lm(write_nt_v1(tmp_path)).tokenizer
    letters = np.random.default_rng(0).choice(list("ACGTNacgtn"), size=(100_000, 23))
    rows = ["".join(row) for row in letters]
    ids = np.concatenate(tokenizer(rows, return_attention_mask=False)["input_ids"])
    assert ids.max() == 4104 and ids.min() >= 3
    for special in ("<eos>", "<bos>"):
        with pytest.raises(SequenceError):
            tokenizer(f"ACGT{special}")


@EVERY_SOURCE
def test_every_task(source: str, tmp_path: Path) -> None:
    folder = WRITERS[source](tmp_path)
    stored = load_file(folder / "model.safetensors")
    for task, model_class in SOURCES[source].classes.items():
        model = load_dna_lm(folder, task, id2label={0: "x", 1: "y", 2: "z"}, problem_type="regression").model
        assert type(model) is model_class
        body = model.base_model.state_dict()
        prefix = f"{model.base_model_prefix}."
        assert all(torch.equal(body[key], stored[prefix + key]) for key in body if prefix + key in stored)
        assert set(body) - {key.removeprefix(prefix) for key in stored} == set()
        if "classification" in task:
            assert (model.num_labels, model.config.problem_type) == (3, "regression")
    with pytest.raises(CheckpointError, match=r"task.*auto.*causal_lm"):
        load_dna_lm(folder, "causal_lm")


@EVERY_SOURCE
def test_options_of_loading(source: str, tmp_path: Path) -> None:
    folder = WRITERS[source](tmp_path)
    model = load_dna_lm(folder, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu").model
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert load_dna_lm(folder, dtype="auto").model.dtype == torch.float32
    with pytest.raises(TypeError, match="revison"):
        load_dna_lm(folder, revison="main")


def test_epsilon(tmp_path: Path) -> None:
    folder = write_nt_v1(tmp_path)
    values = [
        load_dna_lm(folder, layer_norm_eps=value).model.config.layer_norm_eps for value in ("config", "original", 1e-6)
    ]
    assert values == [1e-12, 1e-5, 1e-6]


@EVERY_SOURCE
def test_no_more_than_the_header_is_read_to_tell_the_model(source: str, tmp_path: Path) -> None:
    """A file whose tensors are cut off is still told, and then refused as damaged."""
    folder = WRITERS[source](tmp_path)
    config = json.loads((folder / "config.json").read_text())
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(folder / "model.safetensors").items()}
    assert detect_dna_lm(config, shapes) == source
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cut short"):
        load_dna_lm(folder)


@EVERY_SOURCE
@pytest.mark.parametrize("change", ["swapped", "short", "json"])
def test_vocabularies_in_another_order_are_refused(source: str, change: str, tmp_path: Path) -> None:
    folder = WRITERS[source](tmp_path)
    tokens = (folder / "vocab.txt").read_text().split()
    if change == "short":
        tokens = tokens[:40]
    else:
        tokens[8], tokens[9] = tokens[9], tokens[8]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    if change == "json":
        (folder / "vocab.txt").unlink()
        vocabulary = {token: index for index, token in enumerate(tokens)}
        Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])).save(str(folder / "tokenizer.json"))
    message = "lists 40 tokens" if change == "short" else f"{tokens[8]!r} as id 8 where this family has {tokens[9]!r}"
    with pytest.raises(CheckpointError, match=message):
        load_dna_lm(folder)


@EVERY_SOURCE
def test_without_a_vocabulary_file_the_known_order_holds(source: str, tmp_path: Path) -> None:
    folder = WRITERS[source](tmp_path)
    expected = load_dna_lm(folder).tokenizer
    (folder / "vocab.txt").unlink()
    tokenizer = load_dna_lm(folder).tokenizer
    assert tokenizer.vocab_source == "preset" and tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer(SEQUENCES)["input_ids"] == expected(SEQUENCES)["input_ids"]


def test_a_protein_model_is_refused(tmp_path: Path) -> None:
    config = EsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, max_position_embeddings=40, **TINY)
    EsmForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="protein"):
        load_dna_lm(tmp_path)


def test_unknown_architectures_and_empty_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    BertForMaskedLM(BertConfig(vocab_size=77, **TINY)).save_pretrained(folder)
    with pytest.raises(UnknownCheckpointError, match=r"bert\.embeddings"):
        load_dna_lm(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(GeneSpliceError):
        load_dna_lm(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_dna_lm(folder)


def test_files_with_the_older_names_of_norms(tmp_path: Path) -> None:
    """As transformers 5 writes them when it saves an ESM again."""
    expected = load_dna_lm(write_nt_v1(tmp_path)).model
    stored = load_file(tmp_path / "model.safetensors")
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for key, tensor in stored.items():
        ending = next((ending for ending in older if key.endswith(ending)), "")
        renamed[key.removesuffix(ending) + older.get(ending, "")] = tensor
    assert renamed.keys() != stored.keys()
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    found = load_dna_lm(tmp_path).model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.state_dict().items())


def test_strict_can_be_turned_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_nt_v1(tmp_path)
    stored = load_file(folder / "model.safetensors")
    stored["esm.stranger"] = stored.pop("lm_head.dense.bias")
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.dense\.bias; unexpected: esm\.stranger"):
        load_dna_lm(folder)
    assert type(load_dna_lm(folder, strict=False).model) is EsmForMaskedLM
    assert "missing: lm_head.dense.bias; unexpected: esm.stranger" in caplog.text


def test_the_licence_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    originals._show_licence.cache_clear()
    folder = write_nt_v1(tmp_path / "nt")
    with caplog.at_level(logging.WARNING, logger="genesplice_hf"):
        load_dna_lm(folder)
        load_dna_lm(folder)
        load_dna_lm(write_dnabert1(tmp_path / "dnabert"))
    assert caplog.text.count("CC-BY-NC-SA") == 1


@EVERY_SOURCE
def test_convert_writes_a_folder_that_auto_classes_load(source: str, tmp_path: Path) -> None:
    folder, out = WRITERS[source](tmp_path / "published"), tmp_path / "ours"
    done = CliRunner().invoke(app, ["convert", str(folder), str(out)])
    assert done.exit_code == 0 and source in done.output.replace("\n", "")
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    expected = load_dna_lm(folder)
    assert type(tokenizer) is KmerTokenizer
    batch = tokenizer(SEQUENCES, padding=True, return_tensors="pt")
    assert torch.equal(
        batch["input_ids"], expected.tokenizer(SEQUENCES, padding=True, return_tensors="pt")["input_ids"]
    )
    assert torch.equal(logits(model, batch), logits(expected.model, batch))
    record = model.config.conversion
    assert (record["source"], record["repository"], record["revision"]) == (source, "published", None)
    assert record["sha256"] == {"model.safetensors": originals.sha256(folder / "model.safetensors")}
    assert load_file(out / "model.safetensors").keys() <= expected.model.state_dict().keys()
    assert record["converter_version"] == __version__
    assert record["ignored_keys"] == list(expected.spec.ignored_keys)
    again = load_dna_lm(out)
    assert torch.equal(logits(again.model, batch), logits(model, batch)) and again.spec.family == source


@EVERY_SOURCE
def test_convert_takes_a_task_and_refuses_a_folder_with_files(source: str, tmp_path: Path) -> None:
    folder, out = WRITERS[source](tmp_path / "published"), tmp_path / "ours"
    out.mkdir()
    assert type(convert(folder, out, task="base").model) is CLASSES[source][0]
    before = sorted((path.name, path.read_bytes()) for path in out.iterdir())
    done = CliRunner().invoke(app, ["convert", str(folder), str(out)])
    assert done.exit_code != 0 and "holds files" in str(done.exception)
    assert sorted((path.name, path.read_bytes()) for path in out.iterdir()) == before


def test_our_own_folders_load_as_well(tmp_path: Path) -> None:
    entry = REGISTRY["genesplice"]
    model = entry.auto_classes["AutoModelForMaskedLM"](entry.tiny_config()).eval()
    model.save_pretrained(tmp_path)
    NucleotideTokenizer().save_pretrained(tmp_path)
    loaded = load_dna_lm(tmp_path)
    assert type(loaded.model) is type(model) and loaded.spec.family == "genesplice"
    batch = loaded.tokenizer(SEQUENCES, padding=True, return_tensors="pt")
    assert torch.equal(logits(loaded.model, batch), logits(model, batch))
    assert type(load_dna_lm(tmp_path, "base").model) is entry.auto_classes["AutoModel"]
    assert load_dna_lm(tmp_path, "sequence_classification", num_labels=4).model.config.num_labels == 4
    with pytest.raises(CheckpointError, match="our layout already"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="task"):
        load_dna_lm(tmp_path, "tracks")


@EVERY_SOURCE
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_adapters_train_save_and_reload_equal_on_a_fresh_base(source: str, method: str, tmp_path: Path) -> None:
    folder = WRITERS[source](tmp_path / "published")
    _, tokenizer, spec = load_dna_lm(folder)
    batch = tokenizer(SEQUENCES, padding=True, return_tensors="pt")
    base = load_original(source, folder, "sequence_classification", fields={"num_labels": 3})
    adapted = adapt(base, method)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**batch, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora_" in name or "ia3_" in name or "modules_to_save" in name for name in changed)
    expected = logits(adapted.eval(), batch)
    adapted.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(9)
    fresh = load_original(source, folder, "sequence_classification", fields={"num_labels": 3})
    fresh.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(fresh, batch), expected)
    wanted = tuple(spec.lora_targets if method == "lora" else spec.ia3_targets)
    found = get_peft_config(fresh, method).target_modules
    assert ((found,) if isinstance(found, str) else tuple(sorted(found))) == tuple(sorted(wanted))


@EVERY_SOURCE
def test_targets_in_the_spec_are_those_that_adapters_use(source: str, tmp_path: Path) -> None:
    model, _, spec = load_dna_lm(WRITERS[source](tmp_path))
    for attribute in ("lora_targets", "ia3_targets", "ia3_feedforward"):
        used = default_targets(model, attribute)
        assert getattr(spec, attribute) == ((used,) if isinstance(used, str) else tuple(used))


def test_every_family_with_a_model_has_a_tokenizer() -> None:
    families = set(MAKERS)
    assert families == set(detection._RULES)
    # No language model of DNA, or none that was published with a tokenizer.
    others = {"slim_performer", "enformer", "enformer_tf", "akita", "tfbind", "scgpt", "bioformer"}
    assert set(SOURCES) - families == others
    with pytest.raises(CheckpointError, match="from_original"):
        make_tokenizer("slim_performer", TokenizerFiles(None, None), PreTrainedConfig())


def config(**fields: Any) -> Any:
    found = PreTrainedConfig()
    for name, value in fields.items():
        setattr(found, name, value)
    return found


NOWHERE = TokenizerFiles(None, None)


@pytest.mark.parametrize(
    ("source", "fields", "tokenizer_class", "ids"),
    [
        ("nt_v2", {"vocab_size": 4107, "max_position_embeddings": 2050}, KmerTokenizer, [3, 728, 4102]),
        ("nt_v2", {"vocab_size": 75, "max_position_embeddings": 2050}, KmerTokenizer, None),
        ("hyenadna", {"vocab_size": 12, "max_seq_len": 1026}, NucleotideTokenizer, [7, 8, 9, 10, 7, 8, 7, 1]),
        ("caduceus", {"vocab_size": 12}, NucleotideTokenizer, [7, 8, 9, 10, 7, 8, 7, 1]),
        ("caduceus", {"vocab_size": 8}, NucleotideTokenizer, [3, 4, 5, 6, 3, 4, 3]),
        ("gpn_convnet", {"vocab_size": 7}, NucleotideTokenizer, [3, 4, 5, 6, 3, 4, 3]),
        ("gpn", {"vocab_size": 7}, NucleotideTokenizer, [3, 4, 5, 6, 3, 4, 3]),
        ("gpn_msa", {"vocab_size": 6, "max_position_embeddings": 1536}, MSATokenizer, [1, 2, 3, 4, 1, 2, 1]),
    ],
)
def test_tokenizers_of_every_family(source: str, fields: dict, tokenizer_class: type, ids: list[int] | None) -> None:
    tokenizer = make_tokenizer(source, NOWHERE, config(**fields))
    assert type(tokenizer) is tokenizer_class and tokenizer.padding_side == "right"
    if ids is not None:
        assert tokenizer("ACGTACA")["input_ids"] == tokenizer("acgtaca")["input_ids"] == ids


def test_limits_of_every_family() -> None:
    hyena = make_tokenizer("hyenadna", NOWHERE, config(vocab_size=12, max_seq_len=1026))
    assert hyena.max_bp == 1024
    nt = make_tokenizer("nt_v2", NOWHERE, config(vocab_size=4107, max_position_embeddings=2050))
    assert nt.max_bp == 12_282
    unlimited = make_tokenizer("gpn", NOWHERE, config(vocab_size=7, encoder="bytenet", max_position_embeddings=8))
    assert unlimited.max_bp is None
    assert (
        make_tokenizer("gpn", NOWHERE, config(vocab_size=7, encoder="roformer", max_position_embeddings=8)).max_bp == 8
    )


def test_merges_come_from_the_checkpoint(tmp_path: Path) -> None:
    BPEDnaTokenizer.train(["ACGTACGTAACCGGTT" * 20], vocab_size=20).save_pretrained(tmp_path)
    files = TokenizerFiles(None, str(tmp_path / "tokenizer.json"))
    assert type(make_tokenizer("dnabert2", files, config(vocab_size=32))) is BPEDnaTokenizer
    with pytest.raises(CheckpointError, match=r"embeds 8"):
        make_tokenizer("dnabert2", files, config(vocab_size=8))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        make_tokenizer("dnabert2", NOWHERE, config(vocab_size=32))


def test_single_bases_in_another_order_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[MASK]", "[UNK]", *"acgt"]) + "\n")
    assert make_tokenizer("gpn", TokenizerFiles(str(path), None), config(vocab_size=7)).vocab_source == "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[MASK]", "[UNK]", *"agct"]) + "\n")
    with pytest.raises(SequenceError, match=r"'g' as id 4"):
        make_tokenizer("gpn", TokenizerFiles(str(path), None), config(vocab_size=7))
