"""Evaluation that stacks rows in another way than training: nothing is drawn at random, or always the same."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader


class EvaluationCollatorMixin:
    """For a `Trainer`: `eval_collator` in evaluation and prediction, `data_collator` in training.

    Args:
        eval_collator: list of rows -> batch.
        options: of the Trainer.
    """

    data_collator: Callable[..., Any]

    def __init__(self, eval_collator: Callable[..., Any], **options: Any) -> None:
        super().__init__(**options)
        self._eval_collator = eval_collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._for_evaluation(super().get_eval_dataloader, eval_dataset)  # type: ignore[misc]

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self._for_evaluation(super().get_test_dataloader, test_dataset)  # type: ignore[misc]

    def _for_evaluation(self, make: Callable[[Any], DataLoader], dataset: Any) -> DataLoader:
        training, self.data_collator = self.data_collator, self._eval_collator
        try:
            return make(dataset)
        finally:
            self.data_collator = training
