"""Finding the checkpoint that an interrupted run goes on from."""

import json
from pathlib import Path


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
