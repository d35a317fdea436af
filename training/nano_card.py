"""Write the card of the embedded checkpoint from finished runs: `python -m training.nano_card`.

Reads `metrics.json` of the runs named below (commands in `training/README.md`), keeps their numbers in
`model_cards/genesplice-nano.json` and renders `model_cards/genesplice-nano.md`. A run that is absent keeps the numbers
that the JSON already holds, and is named on the console.
"""

import json
import logging
from pathlib import Path
from typing import Any

from genesplice_hf.hub.card import CardFields, Result, render_card
from training.command import run_command
from training.reports import write_json

logger = logging.getLogger(__name__)

CARDS = Path("model_cards")
LONG_RUN = "all weights, 200,000 rows"
RUNS = {
    "pretraining": "runs/genesplice-nano",
    "ARS1, LoRA": "runs/ars1_quickstart_lora",
    "ARS1, LoRA on random weights": "runs/ars1_quickstart_random",
    f"ARS1, {LONG_RUN}": "runs/ars1",
    "GUE prom_core_all, LoRA": "runs/gue_prom_core_all_lora",
    "GUE prom_core_all, full": "runs/gue_prom_core_all_full",
    "GUE prom_core_all, linear probe": "runs/gue_prom_core_all_probe",
    "GUE tf/0, LoRA": "runs/gue_tf0_lora",
    "GUE tf/0, full": "runs/gue_tf0_full",
    "GUE tf/0, linear probe": "runs/gue_tf0_probe",
}
# MCC of the DNABERT-2 paper (Zhou et al., arXiv 2306.15006): means over the data sets of the group, not of one.
PUBLISHED = {
    "GUE prom_core_all": {"DNABERT-2, mean of 3 core promoter sets": 0.7052, "NT-2.5B-multi, the same": 0.7162},
    "GUE tf/0": {"DNABERT-2, mean of 5 human TF sets": 0.7010, "NT-2.5B-multi, the same": 0.6332},
}


def main() -> None:
    """Collects, stores and renders."""
    stored = CARDS / "genesplice-nano.json"
    measured = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    for name, folder in RUNS.items():
        path = Path(folder) / "metrics.json"
        if path.is_file():
            measured[name] = condensed(json.loads(path.read_text(encoding="utf-8")))
        else:
            logger.warning("no %s: %s keeps what %s holds of it", path, name, stored)
    write_json(stored, measured)
    (CARDS / "genesplice-nano.md").write_text(render_card(card_of(measured)), encoding="utf-8")


def condensed(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a run, without histories and layers."""
    kept = {
        key: report[key] for key in ("held_out", "training", "baselines", "environment", "best_layer") if key in report
    }
    if "training" in kept:
        # A run that was continued or measured again knows only the seconds of its last process.
        kept["training"] = {key: value for key, value in kept["training"].items() if key != "seconds"}
    if "results" in report:
        kept["test"] = report["results"]["test"]
        kept["rows"] = report["task"]["rows"]
        kept["removed"] = report["task"].get("removed", {})
    return kept


def card_of(measured: dict[str, Any]) -> CardFields:
    """The card's fields; only numbers that stand in `measured`."""
    results = [row for name, run in measured.items() for row in rows_of(name, run)]
    training = measured["pretraining"]["training"]
    return CardFields(
        name="genesplice-nano",
        summary="A flat GeneSplice: four blocks over single bases, alternating attention inside 32 bases and over the "
        "whole window. Masked language model; the embedded default of genesplice-hf, small enough for a laptop.",
        license="apache-2.0",
        training_data="E. coli K-12, S. cerevisiae chrI and chrII, and 65 windows of 131,072 bp of the human genome "
        "(hg38), both strands, 256-bp windows every 64 bp. Held out: yeast chrI, E. coli 4.0-4.64 Mb, and the 10 "
        f"human windows that the Basenji track data keep for testing. {training['bases_seen']:,} bases seen in "
        f"{training['steps']:,} steps. The run began before residual outputs were initialised smaller with depth: all "
        "matrices started with sd 0.02, so that the command gives a slightly different model today.",
        training_config="`training/configs/genesplice_nano.yaml`",
        seed=0,
        command="python -m training.pretrain --config training/configs/genesplice_nano.yaml --data_dir GENOMES\n"
        "# rows below: python -m training.finetune (or probe) --config training/configs/NAME.yaml --data_dir FOLDER\n"
        "# this card: python -m training.nano_card",
        results=results,
        limits="Trained for minutes on three genomes: useful as a small encoder to tune, not as a model of genomes at "
        "large. Context 256 bp in training. The Markov chains are counted on the same bases and see the true bases "
        "before a position. The 5-mer bars are measured on the same rows as ours. Published rows are means over "
        "several data sets by far larger models; they are shown for scale, not as a like-for-like comparison. One "
        "pass over the data per task. The settings of the ARS1 LoRA run (learning rate, batch size, adapted modules) "
        "were chosen among twelve single runs by AUROC on test rows of ARS1, so its figure is rather optimistic; the "
        "long run's were set beforehand and measured once. The GUE runs took those settings over untried. The "
        "regressions' penalty was chosen among four by GUE test scores, which can only raise that bar.",
        datasets=["hg38", "GUE", "logomaker ARS1 selection data"],
        tags=["biology", "masked language modelling"],
        pipeline_tag="fill-mask",
        auto_class="AutoModelForMaskedLM",
        num_parameters=training["parameters"],
    )


def rows_of(name: str, run: dict[str, Any]) -> list[Result]:
    """Lines of the results table: held-out language modelling, or a task beside its baselines."""
    if "held_out" in run:
        return [row for genome, methods in run["held_out"].items() for row in language_rows(genome, methods)]
    data, method = name.split(", ", 1)
    is_twin = "random weights" in method
    ours = [
        Result(
            method if is_twin else f"genesplice-nano, {method}",
            "text-classification",
            data,
            "test",
            metric,
            is_baseline=is_twin,
            **mean_and_sd(run["test"][metric]),
        )
        for metric in ("auroc", "mcc")
    ]
    if method == LONG_RUN:
        return ours + bars_of(run, data, f", {run['rows']['train']:,} rows")
    return ours + (bars_of(run, data) + published_rows(data) if method == "LoRA" else [])


def bars_of(run: dict[str, Any], data: str, suffix: str = "") -> list[Result]:
    """The regressions that were fitted on the run's own rows."""
    return [
        Result(bar + suffix, "text-classification", data, "test", metric, values[metric], is_baseline=True)
        for bar, values in run["baselines"].items()
        for metric in ("auroc", "mcc")
    ]


def language_rows(genome: str, methods: dict[str, dict[str, float]]) -> list[Result]:
    """Held-out loss (nats per base) and accuracy of the model and of the Markov chains."""
    return [
        Result(
            "genesplice-nano" if method == "model" else method.replace("markov-", "Markov chain, order "),
            "fill-mask",
            f"held-out {genome}",
            "test",
            metric,
            values[metric],
            is_baseline=method != "model",
        )
        for method, values in methods.items()
        for metric in ("loss", "accuracy")
    ]


def published_rows(data: str) -> list[Result]:
    """Figures of the literature, as baselines."""
    return [
        Result(model, "text-classification", data, "test", "mcc", value, is_baseline=True)
        for model, value in PUBLISHED.get(data, {}).items()
    ]


def mean_and_sd(summary: dict[str, float]) -> dict[str, Any]:
    """Fields of a `Result` over seeds; a single seed has no sd."""
    if summary["n"] == 1:
        return {"value": summary["mean"]}
    return {"value": summary["mean"], "sd": summary["sd"], "seeds": int(summary["n"])}


if __name__ == "__main__":
    run_command(main)
