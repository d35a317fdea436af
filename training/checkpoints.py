"""The folder of a run: never two runs in one, and the checkpoint that an interrupted one goes on from."""

import json
import logging
import math
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from genesplice_hf.errors import DataError
from training.reports import write_json

logger = logging.getLogger(__name__)


def prepare_folder(
    folder: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool, free: Collection[str]
) -> None:
    """Writes `settings.json`, and refuses to mix two runs in one folder.

    Args:
        folder: where the run writes.
        settings: all settings of the run.
        resume: go on with the same settings.
        overwrite: start anew; the folder is removed.
        free: names of settings that may differ when a run goes on.

    Raises:
        DataError: the folder holds another run.
    """
    stored_path = folder / "settings.json"
    if stored_path.is_file() and not overwrite:
        if not resume:
            raise DataError(
                f"`output_dir` {folder} already holds a run; pass `--resume true` to go on with it, "
                "`--overwrite true` to replace it, or another folder."
            )
        _check_same_settings(json.loads(stored_path.read_text(encoding="utf-8")), settings, free)
    if overwrite and stored_path.is_file():
        shutil.rmtree(folder)
    write_json(stored_path, settings)


def stored_result(path: Path, resume: bool) -> dict[str, Any] | None:
    """What a part of the run wrote as it ended; None if it has to run, or goes on."""
    if not (resume and path.is_file()):
        return None
    logger.info("%s is finished already.", path.parent)
    return json.loads(path.read_text(encoding="utf-8"))


def defined(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Metrics of a run or of its stored result, which has null where a metric is not defined."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _check_same_settings(stored: dict[str, Any], now: dict[str, Any], free: Collection[str]) -> None:
    now = json.loads(json.dumps(now))
    different = sorted(key for key in now if key not in free and stored.get(key) != now[key])
    if different:
        listed = ", ".join(f"{key} was {stored.get(key)!r}, is {now[key]!r}" for key in different)
        raise DataError(f"`--resume` needs the settings the run began with: {listed}.")


def last_complete_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint that was written to its end; `trainer_state.json` is the last of its files."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_whole_json(path)]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def _is_whole_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
