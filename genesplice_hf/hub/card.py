"""Write a model card from measured facts: YAML metadata for the Hub, and a page that a biologist can read.

The card holds only what the caller passes; a number that nobody measured has no place to stand.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from genesplice_hf.errors import PublishError
from genesplice_hf.version import __version__

# `model_cards/template.md` shows the same text to people; a test keeps the two equal.
TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ summary }}

{{ facts }}

## How to load

With the package (`pip install genesplice-hf`), which brings reviewed code and the training, scoring and
interpretation commands:

```python
{{ load_with_package }}
```

Without the package, from the code in this repository. Read that code first, and pin the revision that you
read:

```python
{{ load_without_package }}
```

## Training

{{ training }}

## Results

{{ results }}

## Limits

{{ limits }}

## Licence

{{ licence }}
"""


@dataclass(frozen=True)
class Result:
    """One measured number.

    Attributes:
        model: who was measured: a name for the row of the table, such as `"5-mer logistic regression"`.
        task: the task identifier of the Hub, such as `"text-classification"`.
        dataset: the name of the data set.
        split: the part that was measured, such as `"test"`.
        metric: the name of the metric, such as `"auroc"`.
        value: the number; the mean when there are several seeds.
        sd: standard deviation over seeds, where there are several.
        seeds: how many runs stand behind `value`.
        is_baseline: False for the model of this card, True for what it is compared with.
    """

    model: str
    task: str
    dataset: str
    split: str
    metric: str
    value: float
    sd: float | None = None
    seeds: int = 1
    is_baseline: bool = False


@dataclass(frozen=True)
class CardFields:
    """Everything that a card says. Fields without a default must be filled.

    Attributes:
        name: the name of the model.
        summary: what it is, what goes in and what comes out; a few sentences.
        license: licence identifier of the Hub, such as `"apache-2.0"`.
        training_data: which sequences, from where, what was held out.
        training_config: the configuration, or the path of the file that holds it.
        seed: the seed, or the seeds.
        command: the command that trained this checkpoint.
        results: measured numbers, ours and the baselines.
        limits: what the model cannot do and should not be used for.
        datasets: names of the data sets, for the metadata.
        tags: further tags for the metadata.
        base_model: Hub id of the model that this one was tuned from.
        pipeline_tag: Hub task, such as `"text-classification"`.
        license_note: one paragraph for the licence section, where the identifier does not say enough.
        repo_id: where the card will stand; `publish` fills it in.
        revision: the tag or commit to pin; `publish` fills it in.
        auto_class: the Auto class that loads the weights; `publish` fills it in.
        class_reference: `module.Class` inside the bundle; `publish` fills it in.
        num_parameters: number of weights; `publish` fills it in.
        has_tokenizer: whether tokenizer files stand beside the weights; `publish` fills it in.
    """

    name: str
    summary: str
    license: str
    training_data: str
    training_config: str
    seed: int | Sequence[int]
    command: str
    results: Sequence[Result]
    limits: str
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    base_model: str | None = None
    pipeline_tag: str | None = None
    license_note: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    auto_class: str | None = None
    class_reference: str | None = None
    num_parameters: int | None = None
    has_tokenizer: bool = True


REQUIRED = (
    "name",
    "summary",
    "license",
    "training_data",
    "training_config",
    "seed",
    "command",
    "results",
    "limits",
    "auto_class",
    "num_parameters",
)


def render_card(card: CardFields) -> str:
    """Fill the template.

    Returns:
        The text of README.md: YAML metadata with a `model-index` of our own results, then the page.

    Raises:
        PublishError: required fields are empty (all are named), or a result is not a finite number.
    """
    _check(card)
    page = ModelCard.from_template(
        _metadata(card),
        template_str=TEMPLATE,
        name=card.name,
        summary=card.summary.strip(),
        facts=_facts(card),
        load_with_package=_load_with_package(card),
        load_without_package=_load_without_package(card),
        training=_training(card),
        results=_results_table(card.results),
        limits=card.limits.strip(),
        licence=card.license_note or f"`{card.license}`, for the weights and for the code in this repository.",
    )
    return str(page).rstrip() + "\n"


def check_card(card: CardFields, filled_later: Sequence[str] = ()) -> None:
    """Say at once what `render_card` would miss.

    Args:
        card: the fields.
        filled_later: names of required fields that the caller will still fill in.

    Raises:
        PublishError: as `render_card`.
    """
    _check(card, filled_later)


def _check(card: CardFields, filled_later: Sequence[str] = ()) -> None:
    empty = [name for name in REQUIRED if name not in filled_later and _is_empty(getattr(card, name))]
    if empty:
        raise PublishError(f"The model card lacks `{'`, `'.join(empty)}`; fill them in with what was measured.")
    if not any(not result.is_baseline for result in card.results):
        raise PublishError("`results` of the model card must hold a number of this model, not only baselines.")
    for result in card.results:
        _check_result(result)


def _is_empty(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, Sequence) and not len(value))


def _check_result(result: Result) -> None:
    blank = [f.name for f in fields(result) if f.name != "sd" and _is_empty(getattr(result, f.name))]
    if blank:
        raise PublishError(f"A result of the model card lacks `{'`, `'.join(blank)}`: {result}.")
    numbers = [result.value] if result.sd is None else [result.value, result.sd]
    if not all(math.isfinite(number) for number in numbers):
        raise PublishError(f"A result of the model card must be a finite number, was {result}; measure it again.")
    if result.seeds < 1 or (result.seeds > 1) != (result.sd is not None):
        raise PublishError(f"A result over several `seeds` needs `sd`, one over a single seed has none: {result}.")


def _metadata(card: CardFields) -> ModelCardData:
    ours = [result for result in card.results if not result.is_baseline]
    return ModelCardData(
        library_name="transformers",
        license=card.license,
        tags=list(dict.fromkeys(["genomics", "dna", "genesplice-hf", *card.tags])),
        datasets=list(card.datasets) or None,
        metrics=list(dict.fromkeys(result.metric for result in ours)),
        base_model=card.base_model,
        pipeline_tag=card.pipeline_tag,
        model_name=card.name,
        eval_results=[_eval_result(result) for result in ours],
    )


def _eval_result(result: Result) -> EvalResult:
    return EvalResult(
        task_type=result.task,
        dataset_type=result.dataset.lower().replace(" ", "-"),
        dataset_name=result.dataset,
        dataset_split=result.split,
        metric_type=result.metric,
        metric_value=float(result.value),
    )


def _facts(card: CardFields) -> str:
    lines = [f"- Parameters: {card.num_parameters:,}", f"- Loads as: `{card.auto_class}`"]
    if card.base_model:
        lines.append(f"- Tuned from: `{card.base_model}`")
    lines.append(f"- Written by genesplice-hf {__version__} with transformers {transformers.__version__}")
    return "\n".join(lines)


def _is_stock_auto_class(card: CardFields) -> bool:
    return hasattr(transformers, card.auto_class or "")


def _load_with_package(card: CardFields) -> str:
    home = "transformers" if _is_stock_auto_class(card) else "genesplice_hf.models.auto"
    lines = ["import genesplice_hf  # registers the classes", *_imports(card, home), ""]
    return "\n".join(lines + _calls(card, card.auto_class or ""))


def _load_without_package(card: CardFields) -> str:
    """A head whose Auto class is ours has no Auto class without the package: it is loaded by reference."""
    trust = ", trust_remote_code=True"
    if _is_stock_auto_class(card):
        calls = _calls(card, card.auto_class or "", tokenizer_trust=trust, model_trust=trust)
        return "\n".join([*_imports(card, "transformers"), "", *calls])
    imports = ["from transformers import AutoTokenizer"] if card.has_tokenizer else []
    imports.append("from transformers.dynamic_module_utils import get_class_from_dynamic_module")
    get_class = f'model_class = get_class_from_dynamic_module("{card.class_reference}", {_where(card)})'
    return "\n".join([*imports, "", get_class, *_calls(card, "model_class", tokenizer_trust=trust)])


def _where(card: CardFields) -> str:
    if not card.repo_id:
        return '"path/to/this/folder"'
    return f'"{card.repo_id}"' + (f', revision="{card.revision}"' if card.revision else "")


def _imports(card: CardFields, home: str) -> list[str]:
    if home == "transformers":
        names = {card.auto_class or "", *(["AutoTokenizer"] if card.has_tokenizer else [])}
        return [f"from transformers import {', '.join(sorted(names))}"]
    tokenizer = ["from transformers import AutoTokenizer"] if card.has_tokenizer else []
    return [*tokenizer, f"from {home} import {card.auto_class}"]


def _calls(card: CardFields, loader: str, tokenizer_trust: str = "", model_trust: str = "") -> list[str]:
    tokenizer = [f"tokenizer = AutoTokenizer.from_pretrained({_where(card)}{tokenizer_trust})"]
    return [
        *(tokenizer if card.has_tokenizer else []),
        f"model = {loader}.from_pretrained({_where(card)}{model_trust})",
    ]


def _training(card: CardFields) -> str:
    seeds = card.seed if isinstance(card.seed, int) else ", ".join(str(seed) for seed in card.seed)
    return (
        f"- Data: {card.training_data.strip()}\n"
        f"- Configuration: {card.training_config.strip()}\n"
        f"- Seed: {seeds}\n\n"
        f"```bash\n{card.command.strip()}\n```"
    )


def _results_table(results: Sequence[Result]) -> str:
    """Ours and the baselines side by side, in the order of the caller; our rows are bold."""
    rows = ["| data set | split | metric | model | value | sd | seeds |", "|---|---|---|---|---|---|---|"]
    for result in results:
        name = result.model if result.is_baseline else f"**{result.model}**"
        sd = "" if result.sd is None else f"{result.sd:.4g}"
        rows.append(
            f"| {result.dataset} | {result.split} | {result.metric} | {name} | {result.value:.4g} | {sd} "
            f"| {result.seeds} |"
        )
    return "\n".join(rows)
