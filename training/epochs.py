"""Tells whatever draws at random which epoch begins, so that every pass draws anew and a restart draws the same."""

from typing import Any, Protocol

from transformers import TrainerCallback


class DrawsByEpoch(Protocol):
    """A dataset or collator whose random choices hang on the number of the epoch."""

    def set_epoch(self, epoch: int) -> None: ...


class TellEpoch(TrainerCallback):
    """Calls `set_epoch` as an epoch begins, also after a restart in its middle."""

    def __init__(self, listener: DrawsByEpoch):
        self.listener = listener

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.listener.set_epoch(int(state.epoch or 0))
