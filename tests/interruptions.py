"""What stops a training in its middle; the tests then resume it."""

import os
import signal

from transformers import TrainerCallback


class KillAt(TrainerCallback):
    """The power fails at a step: the process is gone."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class PowerCut(Exception):
    """Ends a training, not the process: nothing that would run after it does."""


class StopAt(TrainerCallback):
    """Ends the training after a step, before anything of this step is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise PowerCut
