"""Measures one call in a fresh process: CPU time and growth of the peak resident memory. It needs torch alone.

Memory is the growth during the first call after a warm-up, so that nothing that an earlier call left to the
allocator is mistaken for nothing used; time is the minimum over all calls.
"""

import ctypes
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
GIB = 2**30
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def measure(call: Callable[[], Any], warm_up: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Runs `warm_up` once and `call` `repeats` times.

    Returns:
        `cpu_seconds` and `wall_seconds` (minimum over the calls), `growth_mib` (first call), `peak_from` (the kernel's
        counter that was read) and `repeats`.
    """
    warm_up()
    _return_free_memory()
    source, before = _start_of_peak()
    times = [_timed(call)]
    growth = _peak_bytes(source) - before
    times += [_timed(call) for _ in range(repeats - 1)]
    cpu, wall = (min(column) for column in zip(*times, strict=True))
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "growth_mib": growth / MIB,
        "peak_from": source,
        "repeats": repeats,
    }


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Minimum times of several calls, which take turns: whatever else the machine does meets all of them.

    Call each of them once before, or the first turn counts what is done only once.

    Returns:
        `<name>_cpu_seconds` and `<name>_wall_seconds` of every call.
    """
    rounds = [{name: _timed(call) for name, call in calls.items()} for _ in range(repeats)]
    return {
        f"{name}_{clock}_seconds": min(times[name][index] for times in rounds)
        for name in calls
        for index, clock in enumerate(("cpu", "wall"))
    }


def _return_free_memory() -> None:
    """Hands the allocator's free pages back, or the call could use what the warm-up left without any growth."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def _start_of_peak() -> tuple[str, int]:
    """Which counter holds the peak from here on, and the resident bytes it starts from.

    Linux can set the high-water mark back to the present size; elsewhere the peak of the whole process counts, and a
    call that stays below the peak of what came before shows no growth.
    """
    try:
        _CLEAR.write_text("5")
    except OSError:
        return "getrusage", _peak_bytes("getrusage")
    return "VmHWM", _status_bytes("VmRSS")


def _peak_bytes(source: str) -> int:
    if source == "VmHWM":
        return _status_bytes("VmHWM")
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def available_gib() -> float:
    """Memory that a process can still get without swapping; 8 where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return 8.0
    line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024 / GIB


def limit_memory(gib: float) -> None:
    """Lets this process map at most `gib` more than now, so that a cell fails alone and not the machine."""
    if not _STATUS.is_file():
        return
    limit = _status_bytes("VmSize") + int(gib * GIB)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors that Python and torch raise when an allocation is refused."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
