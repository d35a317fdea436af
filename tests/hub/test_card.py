"""The model card says what the caller measured, in a form that the Hub's own parser reads back."""

import dataclasses
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from genesplice_hf.errors import PublishError
from genesplice_hf.hub.card import REQUIRED, TEMPLATE, CardFields, Result, check_card, render_card

OURS = Result("toy", "text-classification", "Toy set", "test", "auroc", 0.9125, sd=0.0031, seeds=3)
BASELINE = Result(
    "5-mer logistic regression", "text-classification", "Toy set", "test", "auroc", 0.887, is_baseline=True
)
CARD = CardFields(
    name="toy-model",
    summary="Tells toys from tools.",
    license="apache-2.0",
    training_data="12 toy sequences",
    training_config="`training/configs/toy.yaml`",
    seed=(1, 2, 3),
    command="python training/finetune.py training/configs/toy.yaml",
    results=(OURS, BASELINE),
    limits="Toys only.",
    datasets=("toy/set",),
    tags=("toy",),
    base_model="me/base",
    pipeline_tag="text-classification",
    repo_id="me/toy-model",
    revision="v1",
    auto_class="AutoModelForSequenceClassification",
    class_reference="modeling_toy.ToyForSequenceClassification",
    num_parameters=12345,
)


def test_the_hubs_parser_reads_the_metadata_back():
    data = ModelCard(render_card(CARD)).data
    assert (data.library_name, data.license, data.base_model) == ("transformers", "apache-2.0", "me/base")
    assert data.tags == ["genomics", "dna", "genesplice-hf", "toy"]
    assert (data.datasets, data.metrics, data.pipeline_tag) == (["toy/set"], ["auroc"], "text-classification")
    assert [(r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("Toy set", "test", "auroc", 0.9125)
    ]


def test_baselines_stand_in_the_table_but_not_in_the_model_index():
    text = render_card(CARD)
    table = [line for line in text.splitlines() if line.startswith("| Toy set")]
    assert table == [
        "| Toy set | test | auroc | **toy** | 0.9125 | 0.0031 | 3 |",
        "| Toy set | test | auroc | 5-mer logistic regression | 0.887 |  | 1 |",
    ]


def test_no_number_appears_that_was_not_passed():
    """Every decimal number of the results section comes from the results."""
    section = render_card(CARD).split("## Results")[1].split("## Limits")[0]
    assert set(re.findall(r"\d+\.\d+", section)) == {"0.9125", "0.0031", "0.887"}


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(name):
    empty = () if name in ("results", "seed") else None
    with pytest.raises(PublishError, match=f"`{name}`"):
        render_card(dataclasses.replace(CARD, **{name: empty}))


def test_all_missing_fields_are_named_at_once():
    with pytest.raises(PublishError, match="`summary`, `limits`"):
        render_card(dataclasses.replace(CARD, summary="", limits=""))


def test_fields_filled_later_are_not_missed_yet():
    card = dataclasses.replace(CARD, auto_class=None, num_parameters=None)
    check_card(card, filled_later=("auto_class", "num_parameters"))
    with pytest.raises(PublishError, match="auto_class"):
        check_card(card)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": float("nan")}, "finite"),
        ({"value": float("inf")}, "finite"),
        ({"sd": None}, "needs `sd`"),
        ({"seeds": 1}, "single seed"),
        ({"metric": ""}, "`metric`"),
    ],
)
def test_a_result_that_is_no_measurement_is_refused(change, message):
    with pytest.raises(PublishError, match=message):
        render_card(dataclasses.replace(CARD, results=(dataclasses.replace(OURS, **change),)))


def test_baselines_alone_are_refused():
    with pytest.raises(PublishError, match="not only baselines"):
        render_card(dataclasses.replace(CARD, results=(BASELINE,)))


def test_seed_zero_is_a_seed():
    assert "- Seed: 0\n" in render_card(dataclasses.replace(CARD, seed=0))


def test_snippets_are_python_and_the_one_without_the_package_pins_the_revision():
    with_package, without = re.findall(r"```python\n(.*?)```", render_card(CARD), flags=re.DOTALL)
    compile(with_package, "card", "exec")
    compile(without, "card", "exec")
    assert "import genesplice_hf" in with_package
    assert "genesplice_hf" not in without
    assert without.count('"me/toy-model", revision="v1", trust_remote_code=True') == 2


def test_an_auto_class_of_ours_is_loaded_by_its_reference_without_the_package():
    card = dataclasses.replace(
        CARD, auto_class="AutoModelForTrackPrediction", class_reference="modeling_toy.ToyForTrackPrediction"
    )
    with_package, without = re.findall(r"```python\n(.*?)```", render_card(card), flags=re.DOTALL)
    compile(without, "card", "exec")
    assert "from genesplice_hf.models.auto import AutoModelForTrackPrediction" in with_package
    assert 'get_class_from_dynamic_module("modeling_toy.ToyForTrackPrediction", "me/toy-model"' in without
    assert 'AutoTokenizer.from_pretrained("me/toy-model", revision="v1", trust_remote_code=True)' in without


def test_a_card_without_tokenizer_does_not_load_one():
    assert "AutoTokenizer" not in render_card(dataclasses.replace(CARD, has_tokenizer=False))


def test_the_template_for_people_is_the_template_of_the_code():
    template = Path(__file__).parents[2] / "model_cards" / "template.md"
    assert template.read_text(encoding="utf-8") == TEMPLATE
