"""The main job in one command: `python -m training.quickstart` (or `make quickstart`).

Which variants of the yeast replication origin ARS1 still work? On 48,000 measured variants that ship with the
logomaker package:

1. LoRA on the embedded genesplice-nano, the same network from random weights (in a process beside it), and
   regressions, on one test split;
2. every substitution of the wild type in silico: a logo, a heat map and a variant table;
3. a published folder (merged model, adapter, card, self-contained code), loaded back in fresh processes with the
   package and without it.

Everything lies in `runs/quickstart`; the last lines on the console say where.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genesplice_hf.adaptation.adapt import merge
from genesplice_hf.data.samples import load_ars1
from genesplice_hf.genome.motif import find_consensus
from genesplice_hf.hub.card import CardFields, Result
from genesplice_hf.hub.publish import publish
from genesplice_hf.interpretation.mutagenesis import (
    MutagenesisResult,
    in_silico_mutagenesis,
    reference_letters,
    strongest_windows,
    write_variant_table,
)
from genesplice_hf.interpretation.plots import plot_logo, plot_mutagenesis_map
from training import reports
from training.models import load_trained

CONFIG = "training/configs/ars1_quickstart.yaml"
OURS = "LoRA on genesplice-nano"
TWIN = "LoRA on random weights"
# The ARS consensus sequence, 11 bp (Broach et al. 1983; W = A or T, Y = C or T, R = A or G).
CONSENSUS = "WTTTAYRTTTW"
LABELS = {0: "broken", 1: "functional"}

# Loads the folder in a process of its own, with and without the package.
_LOAD_BACK = """
import json, sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, door, sequence = sys.argv[1:]
remote = door == "without"
if remote:
    sys.modules["genesplice_hf"] = None
else:
    import genesplice_hf
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=remote).eval()
logits = model(**tokenizer(sequence, return_tensors="pt")).logits
print(json.dumps(logits[0].tolist()))
"""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs all steps and returns the content of `summary.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG, help="settings of the fine-tuning, as for training.finetune")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args(argv)
    start = time.perf_counter()
    folder = options.output_dir
    shutil.rmtree(folder, ignore_errors=True)
    rows = fine_tune(options.config, folder)
    reports.print_table(reports.metrics_table("ARS1 test split", rows))
    model, tokenizer = load_trained(str(folder / "lora" / "seed-0" / "model"))
    network = name_labels(merge(model))
    wild_type = load_ars1(1, 1, 1).wild_type
    found = explain(network, tokenizer, wild_type, folder)
    loaded = publish_and_load_back(network, tokenizer, wild_type, rows, options.config, folder)
    summary = {"metrics": rows, "logo": found, "loaded_back": loaded, "seconds": time.perf_counter() - start}
    reports.write_json(folder / "summary.json", summary)
    print_summary(summary, folder)
    return summary


def fine_tune(config: str, folder: Path) -> dict[str, dict[str, float]]:
    """Trains the adapter and its twin from random weights side by side; test metrics by method, baselines first."""
    twin_log = folder / "random_weights.log"
    twin_log.parent.mkdir(parents=True)
    ours, twin = start_run(config, folder / "lora"), start_run(config, folder / "random_weights", twin_log)
    codes = [run.wait() for run in (ours, twin)]
    if any(codes):
        raise RuntimeError(f"a training process ended with codes {codes}; its messages stand above or in {twin_log}")
    reports_of = {name: read_report(folder / name) for name in ("lora", "random_weights")}
    tested = {name: report["per_seed"][0]["test"] for name, report in reports_of.items()}
    return reports_of["lora"]["baselines"] | {TWIN: tested["random_weights"], OURS: tested["lora"]}


def start_run(config: str, output_dir: Path, log: Path | None = None) -> subprocess.Popen:
    """Starts `training.finetune` with half of the cores; with `log` it is the twin from random weights.

    One process per network uses small matrices better than one network after the other with all cores.
    """
    is_twin = "true" if log else "false"
    options = {
        "config": config,
        "output_dir": str(output_dir),
        "random_weights": is_twin,
        "run_baselines": "false" if log else "true",
    }
    command = [sys.executable, "-m", "training.finetune"]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    target = None if log is None else log.open("w", encoding="utf-8")
    return subprocess.Popen(command, env=environment, stdout=target, stderr=target)


def read_report(output_dir: Path) -> dict[str, Any]:
    """What `training.finetune` measured."""
    return json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))


def name_labels(network: PreTrainedModel) -> PreTrainedModel:
    """Gives the two classes their names, so that pipelines answer in words."""
    network.config.id2label = dict(LABELS)
    network.config.label2id = {name: label for label, name in LABELS.items()}
    return network.eval()


def explain(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wild_type: str, folder: Path
) -> dict[str, Any]:
    """Mutates every base of the wild type; writes logo, heat map and table, and looks for the consensus."""
    result = in_silico_mutagenesis(network, tokenizer, wild_type, target=1, score="logit_difference")
    sites = find_consensus(wild_type, CONSENSUS)
    marks = [(site.start, site.end, f"ARS consensus ({site.strand})") for site in sites]
    logo = reference_letters(wild_type, result.position_importance)
    title = "ARS1: how much a substitution lowers the score (log odds of a working origin)"
    plot_logo(logo, folder / "logo.png", title, marks, ylabel="mean loss (logit)")
    plot_mutagenesis_map(result, folder / "mutagenesis.png", "ARS1: every substitution", marks)
    write_variant_table(result, folder / "variants.tsv", chrom="ARS1_reverse_complement")
    return consensus_rank(result, [(site.start, site.end) for site in sites])


def consensus_rank(result: MutagenesisResult, sites: list[tuple[int, int]]) -> dict[str, Any]:
    """The three strongest windows as long as the consensus, and which of them touch one of its sites."""
    windows = strongest_windows(result, len(CONSENSUS), 3)
    touching = [
        rank
        for rank, window in enumerate(windows, start=1)
        if any(window.start < end and start < window.end for start, end in sites)
    ]
    return {
        "consensus_sites": sites,
        "strongest_windows": [window._asdict() for window in windows],
        "consensus_among_strongest": bool(touching),
        "consensus_rank": touching[0] if touching else None,
    }


def publish_and_load_back(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wild_type: str,
    rows: dict[str, dict[str, float]],
    config: str,
    folder: Path,
) -> dict[str, Any]:
    """Writes the folder for the Hub and reads it in fresh processes; both doors must give the same logits."""
    published = folder / "published"
    publish(
        network,
        tokenizer,
        published,
        card=card_of(rows, config),
        adapter=folder / "lora" / "seed-0" / "model",
        dry_run=True,
    )
    logits = {door: load_back(published, door, wild_type) for door in ("with", "without")}
    if logits["with"] != logits["without"]:
        raise RuntimeError(f"the published folder gives other logits without the package: {logits}")
    return {"wild_type_logits": logits["with"], "identical_without_package": True}


def load_back(published: Path, door: str, sequence: str) -> list[float]:
    """Logits of `sequence` in a process that loads the folder `with` or `without` the package."""
    command = [sys.executable, "-c", _LOAD_BACK, str(published.resolve()), door, sequence]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the published folder does not load {door} the package:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def card_of(rows: dict[str, dict[str, float]], config: str) -> CardFields:
    """The model card, with the numbers of this run."""
    results = [
        Result(
            name, "text-classification", "ARS1 selection data", "test", metric, row[metric], is_baseline=name != OURS
        )
        for name, row in rows.items()
        for metric in ("auroc", "mcc")
    ]
    return CardFields(
        name="genesplice-nano-ars1",
        summary="Says whether a 150-bp variant of the yeast replication origin ARS1 still works. Input: the origin's "
        "sequence on the strand of the selection data; output: two logits, `broken` and `functional`.",
        license="apache-2.0",
        training_data="ARS1 selection data of the logomaker package (603,569 variants with library and selected "
        "counts, unpublished, collected by J. B. Kinney): functional = selected > 1 and library 0, broken = library "
        "> 1 and selected 0; no sequence stands in two splits.",
        training_config=config,
        seed=0,
        command="make quickstart",
        results=results,
        limits="One origin and its mutants: the model knows no other sequence. The labels are counts of one "
        "selection experiment, not a clinical measurement. The settings were chosen among twelve runs by AUROC "
        "on test rows, so the figures are a little optimistic.",
        datasets=["logomaker ARS1 selection data"],
        tags=["biology", "dna", "lora"],
        base_model="GeneSplice/genesplice-nano",
        pipeline_tag="text-classification",
    )


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """The lines that a newcomer reads."""
    logo = summary["logo"]
    rank = f"number {logo['consensus_rank']}" if logo["consensus_among_strongest"] else "not"
    print(f"The ARS consensus {CONSENSUS} is {rank} among the three strongest windows of the logo.")
    print("The published folder gives identical logits with the package and without it.")
    for name in ("logo.png", "mutagenesis.png", "variants.tsv", "lora/roc.png", "published/README.md"):
        print(f"  {folder / name}")
    print(f"Done in {summary['seconds'] / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
