"""A published folder gives the logits of the model it was made from, on both doors; nothing else leaves the disk."""

import dataclasses
import json
import re

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from genesplice_hf.errors import PublishError
from genesplice_hf.hub.bundle import write_bundle
from genesplice_hf.hub.card import CardFields, Result
from genesplice_hf.hub.publish import publish, push_folder
from genesplice_hf.hub.verify import PROBE_SEQUENCES, verify_with_package, verify_without_package
from genesplice_hf.models.registry import REGISTRY
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

AUTO_CLASS = "AutoModelForSequenceClassification"
REPO = "me/toy"
CARD = CardFields(
    name="toy",
    summary="A toy.",
    license="apache-2.0",
    training_data="none",
    training_config="none: random weights",
    seed=11,
    command="none",
    results=(Result("toy", "text-classification", "nothing", "test", "accuracy", 0.5),),
    limits="A toy.",
    base_model="me/toy-base",
)

PUSH = """
import sys
from genesplice_hf.hub.publish import push_folder
result = push_folder(sys.argv[1], sys.argv[2], tag="v1")
print(result.commit, result.tag, result.dry_run)
"""
AFTER_SNIPPET = """
import sys
import torch
from safetensors.torch import save_file

def logits(model, tokenizer):
    torch.set_num_threads(1)
    batch = tokenizer(json.loads(sys.argv[1]), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

import json
found = {"logits": logits(model, tokenizer)}
model.save_pretrained("again")
tokenizer.save_pretrained("again")
again = dict(trust_remote_code="genesplice_hf" not in sys.modules)
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("again", **again)
found["again"] = logits(model, AutoTokenizer.from_pretrained("again", **again))
save_file(found, sys.argv[2])
print(type(model).__module__, type(tokenizer).__module__)
"""


def tiny():
    torch.manual_seed(11)
    entry = REGISTRY["genesplice"]
    return entry.auto_classes[AUTO_CLASS](entry.tiny_config(num_labels=3)).eval()


def tokenizer():
    return NucleotideTokenizer(preset="genesplice")


def expected_logits(model):
    batch = tokenizer()(list(PROBE_SEQUENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def files_under(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """What PEFT saves for a LoRA adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    get_peft_model(tiny(), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory, adapter):
    """A dry run with everything, into a folder that does not exist yet."""
    folder = tmp_path_factory.mktemp("work") / "out"
    card = dataclasses.replace(CARD, repo_id=REPO, revision="v1")
    return publish(tiny(), tokenizer(), folder, card=card, adapter=adapter)


@pytest.fixture
def online(monkeypatch):
    """The suite runs with HF_HUB_OFFLINE; these tests talk to the local double."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


# The folder


def test_a_dry_run_is_the_default_and_writes_the_whole_folder(published):
    assert (published.dry_run, published.commit, published.url) == (True, None, None)
    names = set(files_under(published.folder))
    assert {
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "bundle.json",
        "config.json",
        "configuration_genesplice.py",
        "model.safetensors",
        "modeling_genesplice.py",
        "tokenization_nucleotide.py",
        "tokenizer_config.json",
    } <= names
    assert [path.name for path in published.folder.parent.iterdir()] == ["out"]


def test_offline_the_default_is_a_dry_run_even_with_a_repository(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("genesplice_hf.hub.publish._send", lambda *args, **kwargs: sent.append(args))
    monkeypatch.setattr("genesplice_hf.hub.publish.verify_without_package", lambda *args, **kwargs: None)
    result = publish(tiny(), tokenizer(), tmp_path / "out", card=CARD, repo_id=REPO)
    assert result.dry_run
    assert not sent
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):
        publish(tiny(), tokenizer(), tmp_path / "two", card=CARD, repo_id=REPO, dry_run=False)


def test_the_config_names_the_code_and_no_attention_implementation(published):
    config = json.loads((published.folder / "config.json").read_text())
    assert config["auto_map"][AUTO_CLASS] == "modeling_genesplice.GeneSpliceForSequenceClassification"
    assert config["auto_map"]["AutoTokenizer"] == ["tokenization_nucleotide.NucleotideTokenizer", None]
    assert not [key for key in config if "attn_implementation" in key]
    tokenizer_config = json.loads((published.folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["auto_map"]["AutoTokenizer"] == ["tokenization_nucleotide.NucleotideTokenizer", None]
    assert tokenizer_config["tokenizer_class"] == "NucleotideTokenizer"


def test_the_adapter_names_a_base_that_others_can_reach(published, adapter):
    config = json.loads((published.folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/toy-base"
    name = "adapter_model.safetensors"
    assert (published.folder / "adapter" / name).read_bytes() == (adapter / name).read_bytes()


def test_the_card_counts_the_weights(published):
    weights = load_file(published.folder / "model.safetensors")
    count = sum(tensor.numel() for tensor in weights.values())
    assert f"- Parameters: {count:,}" in (published.folder / "README.md").read_text()


# To a Hub and back


def test_push_tag_and_the_snippets_of_the_card_give_identical_logits_on_both_doors(
    published, local_hub, run_isolated, tmp_path
):
    out = run_isolated(PUSH, published.folder, REPO, environment=local_hub.environment)
    commit, tag, dry_run = out.split()
    assert (tag, dry_run) == ("v1", "False")
    repository = local_hub.repositories["models", REPO]
    # One commit after the empty one that creates the repository.
    assert list(repository.commits)[1:] == [commit]
    assert repository.tags == {"v1": commit}
    assert local_hub.files(REPO, "v1") == files_under(published.folder)

    expected = expected_logits(tiny())
    snippets = re.findall(r"```python\n(.*?)```", (published.folder / "README.md").read_text(), flags=re.DOTALL)
    homes = ("genesplice_hf.", "transformers_modules.")
    for snippet, home, blocked in zip(snippets, homes, ((), ("genesplice_hf",)), strict=True):
        found = tmp_path / f"{home}safetensors"
        arguments = (json.dumps(PROBE_SEQUENCES), found)
        out = run_isolated(snippet + AFTER_SNIPPET, *arguments, environment=local_hub.environment, blocked=blocked)
        assert all(module.startswith(home) for module in out.split()[-2:])
        for name, logits in load_file(found).items():
            assert torch.equal(logits, expected), (home, name)


def test_a_push_can_go_to_a_private_repository_and_a_branch(published, local_hub, online):
    result = push_folder(
        published.folder, REPO, private=True, revision="draft", token="hf_secret", endpoint=local_hub.url
    )
    repository = local_hub.repositories["models", REPO]
    assert repository.private
    assert repository.branches["draft"] == result.commit != repository.branches["main"]
    assert local_hub.files(REPO, "main") == {}
    # Uploads of LFS content go to a storage address without the token.
    assert local_hub.tokens == {"", "hf_secret"}


def test_the_xet_switch_is_put_back(published, local_hub, online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    push_folder(published.folder, REPO, token="t", endpoint=local_hub.url)
    assert constants.HF_HUB_DISABLE_XET is False
    assert not [path for _, path in local_hub.requests if "xet" in path]


def test_a_hub_that_refuses_becomes_advice(published, local_hub, online):
    push_folder(published.folder, REPO, tag="v1", token="t", endpoint=local_hub.url)
    with pytest.raises(PublishError, match="push_folder"):
        push_folder(published.folder, REPO, tag="v1", token="t", endpoint=local_hub.url)
    with pytest.raises(PublishError, match="not a/valid/name"):
        push_folder(published.folder, "not a/valid/name", token="t", endpoint=local_hub.url)


# What must not leave


def test_a_failing_verification_pushes_nothing_and_leaves_nothing(tmp_path, local_hub, online):
    """A hook stands for state that is in the object but not in its files."""
    model = tiny()
    model.classifier.register_forward_hook(lambda module, inputs, output: output + 1.0)
    with pytest.raises(PublishError, match="differ by up to 1"):
        publish(model, tokenizer(), tmp_path / "out", card=CARD, repo_id=REPO, endpoint=local_hub.url, dry_run=False)
    assert local_hub.requests == []
    assert list(tmp_path.iterdir()) == []


def test_code_that_computes_something_else_without_the_package_is_noticed(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    write_bundle(tmp_path, model)
    path = tmp_path / "heads_sequence.py"
    path.write_text(path.read_text().replace("self.out_proj(", "2 * self.out_proj("))
    assert "2 * self.out_proj(" in path.read_text()
    with pytest.raises(PublishError, match="without the package the outputs differ"):
        verify_without_package(tmp_path)


def test_weights_that_do_not_fit_are_noticed(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_sizes": [47]}))
    with pytest.raises(PublishError, match="does not load through the package"):
        verify_with_package(tmp_path, model, {"input_ids": torch.tensor([[5, 6]])})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"card": dataclasses.replace(CARD, limits="", command="")}, "`command`, `limits`"),
        ({"dry_run": False}, "`repo_id`"),
        ({"adapter": "nowhere"}, r"adapter_model\.safetensors"),
    ],
)
def test_incomplete_wishes_write_nothing(tmp_path, options, message):
    with pytest.raises(PublishError, match=message):
        publish(tiny(), tokenizer(), tmp_path / "out", **({"card": CARD} | options))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_a_named_base_is_refused(tmp_path, adapter):
    card = dataclasses.replace(CARD, base_model=None)
    with pytest.raises(PublishError, match="`base_model`"):
        publish(tiny(), tokenizer(), tmp_path / "out", card=card, adapter=adapter)


def test_a_peft_model_is_refused_with_advice(tmp_path):
    wrapped = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    with pytest.raises(PublishError, match="merge_and_unload"):
        publish(wrapped, tokenizer(), tmp_path / "out", card=CARD)
    injected = tiny()
    injected.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(PublishError, match="merge it first"):
        publish(injected, tokenizer(), tmp_path / "out", card=CARD)


def test_a_folder_in_use_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(PublishError, match="new or empty"):
        publish(tiny(), tokenizer(), tmp_path, card=CARD)
    assert files_under(tmp_path) == {"mine.txt": b"mine"}


def test_a_folder_changed_after_verification_is_not_pushed(published, tmp_path, local_hub, online):
    copy = tmp_path / "copy"
    for name, content in files_under(published.folder).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    with open(copy / "modeling_genesplice.py", "a") as file:
        file.write("# changed\n")
    with pytest.raises(PublishError, match=r"modeling_genesplice\.py"):
        push_folder(copy, REPO, endpoint=local_hub.url)
    assert local_hub.requests == []
