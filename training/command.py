"""What every training script does when it is started from a shell."""

import gc
import logging
from collections.abc import Callable
from typing import Any

from torch import distributed

from genesplice_hf.errors import GeneSpliceError
from training.settings import is_main_process


def run_command(main: Callable[[], Any]) -> None:
    """Runs `main`; progress is logged by the main process, and a known error ends in its message and exit status 1."""
    logging.basicConfig(level=logging.INFO if is_main_process() else logging.WARNING, format="%(message)s")
    try:
        main()
    except GeneSpliceError as error:
        raise SystemExit(f"error: {error}") from error
    end_process_group()


def end_process_group() -> None:
    """Under torchrun, ends the process group, once nothing trains any more.

    Threads of the group that still run while Python shuts down may abort the process. And what holds the group
    (`DistributedDataParallel`) goes first: were it the last to let go of it, it would wait, holding the lock of
    the interpreter, for a thread that needs this lock.
    """
    if distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()
