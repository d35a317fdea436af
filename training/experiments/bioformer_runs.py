"""Training and measuring one model of the BioFormer experiments, and the baselines that need no network.

Every model takes the same steps with the stock Trainer: AdamW, warm-up over a twentieth of the steps, cosine to zero.
The learning rate is chosen per model by the validation error of seed 0, the epoch by that of the run; test cells are
measured once, with what was chosen.

B cells of a batch, r genes of the longest, C test cells, V size of the vocabulary.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed

from genesplice_hf.objectives.expression import DataCollatorForMaskedExpression
from genesplice_hf.scoring.expression_metrics import IGNORED, ExpressionSums, expression_sums
from training.epochs import TellEpoch
from training.evaluation_collator import EvaluationCollatorMixin
from training.experiments.bioformer_data import ExpressionTask, fixed_masks
from training.experiments.bioformer_models import Candidate, build, parameter_split

Batch = Mapping[str, torch.Tensor]
Predict = Callable[[Batch], np.ndarray]  # (B, r) values
_PENALTIES = (10.0, 100.0, 1000.0)
_NEIGHBOURS = (5, 15, 50)
_INPUTS = ("input_ids", "values", "attention_mask", "labels")


class Budget(NamedTuple):
    """How every model is trained."""

    epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]
    use_cpu: bool


class Trained(NamedTuple):
    """A trained model, and how it came about."""

    model: PreTrainedModel
    learning_rate: float
    valid_mse: float
    history: list[tuple[int, float]]
    cpu_seconds: float


def run_seed(candidate: Candidate, task: ExpressionTask, seed: int, rate: float | None, budget: Budget) -> dict:
    """One line of `runs.jsonl`.

    Args:
        rate: learning rate; None tries all of the budget and keeps the best on the validation cells.
    """
    rates = budget.learning_rates if rate is None else (rate,)
    trained = [train(candidate, task, seed, each, budget) for each in rates]
    best = min(trained, key=lambda run: run.valid_mse)
    batches = task.questions[candidate.ties]["test"]
    return {
        "model": candidate.name,
        "seed": seed,
        "ties": candidate.ties,
        "learning_rate": best.learning_rate,
        "valid_mse": best.valid_mse,
        "valid_mse_of_rates": {str(run.learning_rate): run.valid_mse for run in trained},
        "history": best.history,
        "parameters": parameter_split(best.model),
        "cpu_seconds": best.cpu_seconds,
        "saved_mib": saved_mib(best.model, batches[0]),
        **measure(predictor(best.model), batches, task.gene_means(candidate.ties)),
    }


def train(candidate: Candidate, task: ExpressionTask, seed: int, rate: float, budget: Budget) -> Trained:
    """One run; the weights are those of the epoch with the lowest validation error."""
    rows, valid = task.rows[candidate.ties]["train"], task.rows[candidate.ties]["valid"]
    set_seed(seed)
    collator = DataCollatorForMaskedExpression(task.tokenizer, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MaskedExpressionTrainer(
            fixed_masks(task.tokenizer),
            model=build(candidate, task),
            args=training_arguments(folder, seed, rate, budget),
            data_collator=collator,
            train_dataset=rows,
            eval_dataset=valid,
            compute_metrics=lambda output: {"mse": mean_square(output.predictions)},
            preprocess_logits_for_metrics=cell_errors,
            callbacks=[TellEpoch(collator)],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
    history = [(entry["step"], entry["eval_mse"]) for entry in trainer.state.log_history if "eval_mse" in entry]
    return Trained(trainer.model, rate, float(trainer.state.best_metric), history, seconds)


class MaskedExpressionTrainer(EvaluationCollatorMixin, Trainer):
    """The stock Trainer with new masks in training and fixed ones in evaluation."""


def training_arguments(folder: str, seed: int, rate: float, budget: Budget) -> TrainingArguments:
    """The budget in transformers' words."""
    return TrainingArguments(
        output_dir=folder,
        seed=seed,
        num_train_epochs=budget.epochs,
        per_device_train_batch_size=budget.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=rate,
        weight_decay=0.01,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="mse",
        greater_is_better=False,
        logging_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=budget.use_cpu,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
    )


def cell_errors(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """(B, 2) float64: sum of squared errors and number of hidden values of every cell."""
    predicted = (logits[0] if isinstance(logits, tuple) else logits).double()
    asked = labels != IGNORED
    squares = (predicted - labels.double()).square() * asked
    return torch.stack([squares.sum(1), asked.sum(1).double()], dim=1)


def mean_square(errors: np.ndarray) -> float:
    """Mean over hidden values of rows of `cell_errors`."""
    squares, counts = np.asarray(errors).sum(0)
    return float(squares / counts)


def predictor(model: PreTrainedModel) -> Predict:
    """The trained model as a function of a batch."""

    @torch.inference_mode()
    def predict(batch: Batch) -> np.ndarray:
        inputs = {name: batch[name].to(model.device) for name in _INPUTS if name != "labels"}
        return model(**inputs).logits.float().cpu().numpy()

    model.eval()
    return predict


def measure(predict: Predict, batches: Sequence[Batch], gene_means: np.ndarray) -> dict[str, Any]:
    """Metrics of all hidden values, and the two columns of `cell_errors` for every cell."""
    sums, errors = ExpressionSums(), []
    for batch in batches:
        predicted, labels = predict(batch), batch["labels"]
        sums += expression_sums(predicted, labels.numpy(), batch["values"].numpy(), gene_means[batch["input_ids"]])
        errors.append(cell_errors(torch.from_numpy(np.asarray(predicted)), labels))
    of_cells = torch.cat(errors).numpy()
    squares, counts = of_cells[:, 0].round(4).tolist(), of_cells[:, 1].tolist()
    return {"test": sums.metrics(), "cell_squares": squares, "cell_counts": counts}


def saved_mib(model: PreTrainedModel, batch: Batch) -> float:
    """MiB that a training step keeps for its backward pass, parameters left out; every storage counts once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**{name: batch[name].to(model.device) for name in _INPUTS}).loss  # noqa: B018
    return sum(size for place, size in kept.items() if place not in weights) / 2**20


def baselines(task: ExpressionTask) -> dict[str, dict[str, Any]]:
    """What needs no network, on the same masks: means, a ridge regression per gene, and nearest neighbours.

    Penalty and number of neighbours are chosen on the validation cells.
    """
    means, questions = task.gene_means("mid"), task.questions["mid"]
    cells = np.concatenate([dense(row, len(task.tokenizer)) for row in _shown(task)])
    tried = {
        "row mean": [row_mean],
        "gene mean": [lambda batch: means[batch["input_ids"].numpy()]],
        "ridge regression": [RidgePerGene(cells, penalty, means) for penalty in _PENALTIES],
        "nearest neighbours": [Neighbours(cells, number, means) for number in _NEIGHBOURS],
    }
    return {name: _best(found, questions, means) for name, found in tried.items()}


def _best(found: Sequence[Predict], questions: Mapping[str, Sequence[Batch]], means: np.ndarray) -> dict[str, Any]:
    """Test figures of what has the lowest validation error."""
    errors = [measure(predict, questions["valid"], means)["test"]["mse_bin"] for predict in found]
    best = int(np.argmin(errors))
    return {"valid_mse": errors[best], **measure(found[best], questions["test"], means)}


def _shown(task: ExpressionTask) -> list[dict[str, torch.Tensor]]:
    """The training cells, nothing hidden, one by one."""
    rows = task.rows["mid"]["train"]
    return [{name: torch.tensor([row[name]]) for name in ("input_ids", "values")} for row in rows]


def dense(batch: Batch, size: int) -> np.ndarray:
    """(B, V) visible digits; 0 where a gene is hidden, silent or not there."""
    ids, values = batch["input_ids"].numpy(), batch["values"].numpy()
    table = np.zeros((len(ids), size))
    np.put_along_axis(table, ids, np.maximum(values, 0), axis=1)
    return table


def row_mean(batch: Batch) -> np.ndarray:
    """The mean of a cell's visible digits above 0."""
    values = batch["values"].numpy()
    visible = values > 0
    means = (values * visible).sum(1) / np.maximum(visible.sum(1), 1)
    return np.repeat(means[:, None], values.shape[1], axis=1)


class RidgePerGene:
    """A gene's digit from those of all others, fitted on the training cells that express it.

    Args:
        cells: (C, V) digits of the training cells.
        penalty: of the squared weights.
        means: (V,) answer for a gene that too few cells express.
    """

    def __init__(self, cells: np.ndarray, penalty: float, means: np.ndarray) -> None:
        self.means = means
        self.models = {
            gene: self._fitted(cells[cells[:, gene] > 0], gene, penalty)
            for gene in np.flatnonzero((cells > 0).sum(0) > 1)
        }

    def _fitted(self, cells: np.ndarray, gene: int, penalty: float) -> Ridge:
        return Ridge(alpha=penalty).fit(self._features(cells, gene), cells[:, gene])

    def _features(self, cells: np.ndarray, gene: int) -> np.ndarray:
        others = cells.copy()
        others[:, gene] = 0
        return np.concatenate([others, others > 0], axis=1)

    def __call__(self, batch: Batch) -> np.ndarray:
        ids, cells = batch["input_ids"].numpy(), dense(batch, len(self.means))
        predicted = self.means[ids]
        for row, column in zip(*np.nonzero(batch["labels"].numpy() != IGNORED), strict=True):
            model = self.models.get(ids[row, column])
            if model is not None:
                predicted[row, column] = model.predict(self._features(cells[row : row + 1], ids[row, column]))[0]
        return predicted


class Neighbours:
    """A gene's mean digit in the nearest training cells that express it; the gene's mean where none does.

    Args:
        cells: (C, V) digits of the training cells.
        number: of neighbours.
        means: (V,) mean digit of every gene.
    """

    def __init__(self, cells: np.ndarray, number: int, means: np.ndarray) -> None:
        self.cells, self.means = cells, means
        self.index = NearestNeighbors(n_neighbors=min(number, len(cells))).fit(cells)

    def __call__(self, batch: Batch) -> np.ndarray:
        ids = batch["input_ids"].numpy()
        near = self.cells[self.index.kneighbors(dense(batch, len(self.means)), return_distance=False)]
        expressed = (near > 0).sum(1)
        of_cells = np.where(expressed > 0, near.sum(1) / np.maximum(expressed, 1), self.means)
        return np.take_along_axis(of_cells, ids, axis=1)
