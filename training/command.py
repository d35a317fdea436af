"""What every training script does when it is started from a shell."""

import logging
from collections.abc import Callable
from typing import Any

from genesplice_hf.errors import GeneSpliceError
from training.settings import is_main_process


def run_command(main: Callable[[], Any]) -> None:
    """Runs `main`; progress is logged by the main process, and a known error ends in its message and exit status 1."""
    logging.basicConfig(level=logging.INFO if is_main_process() else logging.WARNING, format="%(message)s")
    try:
        main()
    except GeneSpliceError as error:
        raise SystemExit(f"error: {error}") from error
