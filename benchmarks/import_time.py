"""How much `import genesplice_hf` adds to the transformers import that every user pays anyway.

`python -m benchmarks.import_time` times both in fresh interpreters, alternating, so that a busy machine slows
both alike. It prints the median of the differences within a round (demanded: under 0.5 s) and, less shaken by
load, the time of the second import inside one process; writes `benchmarks/results/import_time.json`; and exits
with 1 where the demand is missed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.surroundings import environment

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "import_time.json"
REPEATS = 7
LIMIT_SECONDS = 0.5
BASELINE = "from transformers import AutoModel, AutoTokenizer, PreTrainedModel"
SECOND_IMPORT = {"transformers": "pass", "genesplice_hf": "import genesplice_hf"}
# The clock starts inside the interpreter: its own start-up is nobody's import.
_TIMED = """
import time
start = time.perf_counter()
{first}
between = time.perf_counter()
{second}
end = time.perf_counter()
print(end - start, end - between)
"""


class Timing(NamedTuple):
    """Wall times in seconds: both imports, and the second one alone."""

    total: float
    second: float


def time_imports(second: str) -> Timing:
    """Times the baseline followed by the statement `second` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", _TIMED.format(first=BASELINE, second=second)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return Timing(*map(float, done.stdout.split()[-2:]))


def measure(repeats: int) -> dict[str, list[Timing]]:
    """Times both `repeats` times, alternating, after a round that only fills the caches."""
    rounds = [{name: time_imports(code) for name, code in SECOND_IMPORT.items()} for _ in range(repeats + 1)]
    return {name: [one[name] for one in rounds[1:]] for name in SECOND_IMPORT}


def summary(times: dict[str, list[Timing]]) -> dict[str, float]:
    """Medians of the totals, of the differences within each round and of the second import alone."""
    theirs, ours = times["transformers"], times["genesplice_hf"]
    return {
        "transformers_seconds": median(one.total for one in theirs),
        "genesplice_hf_seconds": median(one.total for one in ours),
        "added_seconds": median(b.total - a.total for a, b in zip(theirs, ours, strict=True)),
        "added_in_process_seconds": median(one.second for one in ours),
        "limit_seconds": LIMIT_SECONDS,
    }


def main() -> int:
    """Measures, prints, writes the JSON; the exit code says whether the demand is met."""
    times = measure(REPEATS)
    result = summary(times)
    print(f"medians of {REPEATS} alternating rounds, fresh interpreters")
    print(f"  transformers alone          {result['transformers_seconds']:6.2f} s")
    print(f"  with genesplice_hf          {result['genesplice_hf_seconds']:6.2f} s")
    print(f"  added, round by round       {result['added_seconds']:6.2f} s   demanded < {LIMIT_SECONDS} s")
    print(f"  added, in the same process  {result['added_in_process_seconds']:6.2f} s")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        json.dumps(
            {**result, "rounds": times, "environment": environment(seed=0, threads=torch.get_num_threads())}, indent=2
        )
        + "\n"
    )
    return int(result["added_seconds"] >= LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
