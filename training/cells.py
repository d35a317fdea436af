"""Train an expression model on cells: `python -m training.cells --config FILE.yaml --data CELLS.h5ad --key value`.

`masked_expression` trains scGPT, BioFormer or GeneGraph to predict hidden values, beside the mean of the cell and of
the gene. `cell_type` adapts one (fresh, from a folder, or pretrained on the training cells first) to label cells,
beside logistic regression on the same split. One run per seed with the stock `Trainer`; `output_dir` then holds
`metrics.json`, `settings.json`, plots, and per seed `seed-<n>/model` with its processor and `result.json`.
"""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from genesplice_hf.adaptation.adapt import trainable_report
from genesplice_hf.errors import DataError
from genesplice_hf.scoring.metrics import CLASSIFICATION_METRICS, summarize
from genesplice_hf.version import __version__
from training import cells_plots, reports
from training.cells_baselines import GENE_MEAN, ROW_MEAN, Baseline, cell_type_baselines, mean_sums
from training.cells_data import CellDataSettings, gene_means, load_cell_task
from training.cells_models import CellModelSettings, classifier, draft_config, save_classifier
from training.cells_training import (
    CLASSIFICATION,
    CellTaskSettings,
    CellTrainer,
    CellTrainSettings,
    Plan,
    classifier_trainer,
    held_out_vectors,
    logits_of,
    masked_metrics,
    masked_trainer,
)
from training.checkpoints import defined, last_complete_checkpoint, prepare_folder, stored_result
from training.command import run_command
from training.settings import MethodSettings, TrainSettings, is_main_process, parse_settings, settings_as_dict
from training.task import task_metrics

_FREE_ON_RESUME = ("output_dir", "data", "resume", "overwrite", "seeds", "run_baselines", "plot_embeddings")
_PACKAGES = ("transformers", "peft", "torch", "anndata", "scanpy", "scikit-learn")
_COMPARED = ("accuracy", "f1", "mcc")


SETTINGS = (CellTaskSettings, CellDataSettings, CellModelSettings, MethodSettings, CellTrainSettings)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Reads the settings and runs; returns the content of `metrics.json`."""
    cells, data, model, method, train = parse_settings(SETTINGS, argv)
    return train_cells(cells, data, model, method, train, callbacks)


def train_cells(
    cells: CellTaskSettings,
    data: CellDataSettings,
    model: CellModelSettings,
    method: MethodSettings,
    train: TrainSettings,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains one network per seed and reports mean and sd on valid and test; the door for use from Python.

    Returns:
        What `metrics.json` holds: `results` (split -> metric), `per_seed`, `baselines`, `comparison`, `task`,
        `settings`, `environment`.

    Raises:
        DataError: settings or cells that cannot be used; `output_dir` holds another run.
    """
    if train.augment_reverse_complement or train.average_reverse_complement:
        raise DataError("`augment_reverse_complement` and `average_reverse_complement` are of DNA; leave them out.")
    config = draft_config(model)
    task = load_cell_task(data, config, with_labels=cells.task == "cell_type", pretrained=model.model)
    plan = Plan(cells, data, task, model, config, method, train, callbacks)
    settings = settings_as_dict(cells, data, model, method, train)
    _demand_metric(plan)
    if is_main_process():
        prepare_folder(plan.folder, settings, resume=train.resume, overwrite=train.overwrite, free=_FREE_ON_RESUME)
    runs = [run_seed(plan, seed) for seed in train.seeds]
    if not is_main_process():
        return {}
    baselines = run_baselines(plan) if train.run_baselines else {}
    report = build_report(plan, runs, baselines, settings)
    write_report(plan, runs, report)
    return report


def run_seed(plan: Plan, seed: int) -> dict[str, Any]:
    """Trains, measures valid and test, and stores one seed; a seed that is finished already is read back."""
    folder = plan.folder / f"seed-{seed}"
    if (found := stored_result(folder / "result.json", plan.train.resume)) is not None:
        return found
    wall, cpu = time.perf_counter(), time.process_time()
    if plan.cells.task == "masked_expression":
        result = run_masked(plan, plan.train, seed, folder, folder / "model")
    else:
        result = run_cell_type(plan, seed, folder)
    result |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    if is_main_process():
        reports.write_json(folder / "result.json", result)
    return result


def run_masked(plan: Plan, train: TrainSettings, seed: int, folder: Path, saved: Path) -> dict[str, Any]:
    """Masked expression with all weights; checkpoints go to `folder`, the model with its processor to `saved`."""
    trainer = masked_trainer(plan, train, seed, folder)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) if train.resume else None)
    result = _described(trainer, seed)
    for split in ("valid", "test"):
        found = trainer.evaluate(plan.task.masked(split), metric_key_prefix=split)
        names = masked_metrics(plan.task.processor.settings.value)
        result[split] = {name: found[f"{split}_{name}"] for name in names}
    if is_main_process():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(saved)
        plan.task.processor.save_pretrained(saved)
    trainer.accelerator.wait_for_everyone()
    return result


def pretrained_body(plan: Plan, seed: int, folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Where the classifier's body comes from, and what its pretraining on the training cells measured."""
    if plan.cells.pretrain_epochs <= 0:
        return plan.model.model, {}
    saved = folder / "pretrained"
    if (found := stored_result(saved / "result.json", plan.train.resume)) is not None:
        return str(saved), found
    stage = replace(
        plan.train,
        epochs=plan.cells.pretrain_epochs,
        learning_rate=plan.cells.pretrain_learning_rate,
        max_steps=-1,
        best_metric=None,
        early_stopping_patience=None,
    )
    result = run_masked(plan, stage, seed, folder / "pretraining", saved)
    if is_main_process():
        reports.write_json(saved / "result.json", result)
    return str(saved), result


def run_cell_type(plan: Plan, seed: int, folder: Path) -> dict[str, Any]:
    """Adapts a classifier, and stores its logits on test and the vectors of held-out cells before and after."""
    source, pretraining = pretrained_body(plan, seed, folder)
    model = classifier(plan.model, source, plan.task.processor, plan.task.labels, seed)
    before = held_out_vectors(plan, model) if plan.cells.plot_embeddings else None
    trainer = classifier_trainer(plan, model, seed, folder)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) if plan.train.resume else None)
    result = _described(trainer, seed) | {"pretraining": pretraining}
    logits = {split: logits_of(trainer.predict(plan.task.labelled(split)).predictions) for split in ("valid", "test")}
    for split, scores in logits.items():
        result[split] = task_metrics(CLASSIFICATION, plan.task.classes(split), scores)
    if is_main_process():
        adapted = trainer.accelerator.unwrap_model(trainer.model)
        if before is not None:
            np.savez(folder / "embeddings.npz", before=before, after=held_out_vectors(plan, adapted))
        np.save(folder / "test_logits.npy", logits["test"])
        save_classifier(adapted, plan.task.processor, folder / "model", plan.method.method, source)
    trainer.accelerator.wait_for_everyone()
    return result


def run_baselines(plan: Plan) -> dict[str, Baseline]:
    """Name -> baseline, on the same cells and, for hidden values, the same hidden places."""
    if plan.cells.task == "cell_type":
        return cell_type_baselines(plan.task)
    collate = plan.collator(plan.data.split_seed, training=False, masked=True)
    means = gene_means(plan.task.masked("train"), len(plan.task.processor.tokenizer))
    found: dict[str, dict[str, dict[str, float]]] = {ROW_MEAN: {}, GENE_MEAN: {}}
    for split in ("valid", "test"):
        sums = mean_sums(plan.task.masked(split), collate, means, plan.train.eval_batch_size)
        found[ROW_MEAN][split] = {plan.mse: sums.row_mean_squares / sums.count}
        found[GENE_MEAN][split] = {plan.mse: sums.gene_mean_squares / sums.count}
    return {name: Baseline(metrics, {}, {}) for name, metrics in found.items()}


def build_report(
    plan: Plan, runs: Sequence[Mapping[str, Any]], baselines: Mapping[str, Baseline], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `metrics.json`."""
    return {
        "results": {split: summarize([defined(run[split]) for run in runs]) for split in ("valid", "test")},
        "per_seed": [_condensed(run) for run in runs],
        "baselines": {name: found.metrics for name, found in baselines.items()},
        "baseline_settings": {name: found.settings for name, found in baselines.items() if found.settings},
        "comparison": {name: compared(plan, runs, found) for name, found in baselines.items()},
        "task": {"task": plan.cells.task, **plan.task.report},
        "settings": settings,
        "environment": {
            "world_size": runs[0]["world_size"],
            "threads": torch.get_num_threads(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "python": platform.python_version(),
            "genesplice_hf": __version__,
            **{name: version(name) for name in _PACKAGES},
        },
    }


def compared(plan: Plan, runs: Sequence[Mapping[str, Any]], baseline: Baseline) -> dict[str, Any]:
    """Model minus baseline on test over seeds; for cell types also how many cells only one of the two has right."""
    names = [name for name in (plan.mse, *_COMPARED) if name in runs[0]["test"] and name in baseline.metrics["test"]]
    gaps = [{name: defined(run["test"])[name] - baseline.metrics["test"][name] for name in names} for run in runs]
    if "test" not in baseline.predicted:
        return dict(summarize(gaps))
    truth = plan.task.classes("test")
    right = baseline.predicted["test"] == truth
    ours = [_test_logits(plan, run).argmax(axis=1) == truth for run in runs]
    counts = [
        {"only_model_right": float((o & ~right).sum()), "only_baseline_right": float((~o & right).sum())} for o in ours
    ]
    return summarize(gaps) | summarize(counts)


def write_report(plan: Plan, runs: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    """`metrics.json`, the plots, and the table on the console."""
    folder, task, test = plan.folder, plan.task, report["task"]["cells"]["test"]
    reports.write_json(folder / "metrics.json", report)
    metric = plan.train.best_metric or (plan.mse if plan.cells.task == "masked_expression" else "mcc")
    histories = {f"seed {run['seed']}": run["history"] for run in runs}
    reports.plot_learning_curve(folder / "learning_curve.png", histories, metric)
    if plan.cells.task == "cell_type":
        predicted = [_test_logits(plan, run).argmax(axis=1) for run in runs]
        cells_plots.plot_confusion(folder / "confusion.png", task.classes("test"), predicted, task.labels)
        stored = folder / f"seed-{runs[0]['seed']}" / "embeddings.npz"
        if plan.cells.plot_embeddings and stored.is_file():
            names = np.array(task.labels)[np.concatenate([task.classes(split) for split in ("valid", "test")])]
            panels = {"before adaptation": np.load(stored)["before"], "after adaptation": np.load(stored)["after"]}
            cells_plots.plot_umap(folder / "umap.png", panels, names, str(plan.data.label_key))
    rows = {name: metrics["test"] for name, metrics in report["baselines"].items()}
    what = plan.method.method if plan.cells.task == "cell_type" else "masked expression"
    rows[f"{what}, {plan.config.model_type}"] = report["results"]["test"]
    reports.print_table(reports.metrics_table(f"test, {test:,} cells, {len(runs)} seed(s)", rows))


def _demand_metric(plan: Plan) -> None:
    value = plan.task.processor.settings.value
    masked = plan.cells.task == "masked_expression"
    # `mre` rewards predicting too little.
    known = {"loss", *masked_metrics(value)} - {"mre"} if masked else {"loss", *CLASSIFICATION_METRICS}
    if plan.train.best_metric is not None and plan.train.best_metric not in known:
        raise DataError(f"`best_metric` must be one of {', '.join(sorted(known))}, got {plan.train.best_metric!r}.")


def _described(trainer: CellTrainer, seed: int) -> dict[str, Any]:
    counts = trainable_report(trainer.model)
    return {
        "seed": seed,
        "best_step": trainer.state.best_global_step,
        "steps": trainer.state.global_step,
        "world_size": trainer.args.world_size,
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "history": list(trainer.state.log_history),
    }


def _test_logits(plan: Plan, run: Mapping[str, Any]) -> np.ndarray:
    return np.load(plan.folder / f"seed-{run['seed']}" / "test_logits.npy")


def _condensed(run: Mapping[str, Any]) -> dict[str, Any]:
    """Without histories, which stand in the folder of the seed."""
    kept = {key: value for key, value in run.items() if key != "history"}
    if kept.get("pretraining"):
        kept["pretraining"] = _condensed(kept["pretraining"])
    return kept


if __name__ == "__main__":
    run_command(main)
