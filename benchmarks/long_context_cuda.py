"""The GPU cells of `benchmarks.long_context`: do the attention implementations agree, and how many bases per second?

Everything also runs on a CPU (`device="cpu"`), where it only shows that the code runs.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig
from genesplice_hf.models.genesplice.modeling_genesplice import GeneSpliceForMaskedLM, GeneSpliceModel

# Windows carry a mask, which torch's flash kernel does not take: they go to its memory-efficient kernel.
FLASH_WHERE_POSSIBLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
IMPLEMENTATIONS = {
    "eager": "eager",
    "sdpa": "sdpa",
    "sdpa-flash": "sdpa",
    "flex": "flex_attention",
    "flash": "flash_attention_2",
}


def parity(length: int, device: str = "cuda", names: Sequence[str] = tuple(IMPLEMENTATIONS)) -> dict[str, Any]:
    """The named implementations in bf16 against eager in float32, same weights and bases.

    Returns:
        Per implementation the largest difference of the states relative to the largest state, or why it cannot run.
    """
    reference = nano("eager", device, torch.float32)
    ids = torch.randint(5, 9, (1, length), device=device)
    expected = _states(reference, ids, "eager")
    differences: dict[str, Any] = {}
    for name in names:
        # A missing library or kernel is a finding of this cell, not a failure of the benchmark.
        try:
            model = nano(IMPLEMENTATIONS[name], device, torch.bfloat16)
            model.load_state_dict(reference.state_dict())
            found = _states(model, ids, name)
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            differences[name] = f"cannot run: {str(error).splitlines()[0]}"
            continue
        differences[name] = float((found - expected).abs().max() / expected.abs().max())
    return {"relative_difference": differences, "length": length}


def throughput(length: int, training: bool, device: str = "cuda", repeats: int = 3) -> dict[str, float]:
    """Bases per second of nano in bf16, batch 1: forward, or a checkpointed training step; and its peak memory."""
    call = _training_call(length, device) if training else _forward_call(nano("sdpa", device), length, device)
    seconds = _fastest(call, device, repeats)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else float("nan")
    return {"bases_per_second": length / seconds, "seconds": seconds, "peak_mib": peak, "repeats": repeats}


def compile_gain(length: int, device: str = "cuda", repeats: int = 3) -> dict[str, float]:
    """Forward time of nano in bf16 without `torch.compile` over that with it; compilation itself is not timed."""
    model = nano("sdpa", device)
    plain = _fastest(_forward_call(model, length, device), device, repeats)
    compiled = _fastest(_forward_call(torch.compile(model), length, device), device, repeats)
    return {"seconds": plain, "compiled_seconds": compiled, "gain": plain / compiled}


def nano(implementation: str, device: str, dtype: torch.dtype = torch.bfloat16) -> GeneSpliceModel:
    """The default model, untrained, ready for inference."""
    model = GeneSpliceModel._from_config(GeneSpliceConfig(), attn_implementation=implementation)
    return model.to(device, dtype).eval()


def _states(model: GeneSpliceModel, ids: torch.Tensor, name: str) -> torch.Tensor:
    kernels: AbstractContextManager = sdpa_kernel(FLASH_WHERE_POSSIBLE) if name == "sdpa-flash" else nullcontext()
    with torch.no_grad(), kernels:
        return model(ids).last_hidden_state.float()


def _forward_call(model: Callable[..., Any], length: int, device: str) -> Callable[[], Any]:
    ids = torch.randint(5, 9, (1, length), device=device)

    def forward() -> None:
        with torch.no_grad():
            model(ids)

    return forward


def _training_call(length: int, device: str) -> Callable[[], Any]:
    model: PreTrainedModel = GeneSpliceForMaskedLM._from_config(GeneSpliceConfig(), attn_implementation="sdpa")
    model.to(device).train().gradient_checkpointing_enable()
    ids = torch.randint(5, 9, (1, length), device=device)
    labels = ids.masked_fill(torch.rand(1, length, device=device) >= 0.15, -100)
    return partial(_training_step, model, ids, labels, device)


def _training_step(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor, device: str) -> None:
    with torch.autocast(device, torch.bfloat16):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def _fastest(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Wall seconds of the fastest call after one that is not counted, the device being idle before and after."""
    call()
    times = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
