"""The cells of `benchmarks.long_context`: each builds a model, measures one thing, and returns its numbers.

A cell runs alone in a fresh process. Peers are a full-attention model of equal width and depth at the base level,
transformers' GPT-2 (exact causal attention), and torch's attention with a dense window mask.

Shapes: B batch, H heads, L tokens, D head size.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks.long_context_cuda import compile_gain, parity, throughput
from benchmarks.measuring import measure
from genesplice_hf.layers.attention import band_mask, causal_mask, window_attention
from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig
from genesplice_hf.models.genesplice.modeling_genesplice import GeneSpliceForMaskedLM, GeneSpliceModel

MASK_TOKEN = 4
# Enough to load every kernel; see `measuring` for what happens to its memory.
WARM_UP_TOKENS = 256
WINDOW = {"heads": 2, "head_dim": 32, "radius": 128}
PERFORMER = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}


def hierarchical_config(size: str) -> GeneSpliceConfig:
    """The `nano` (default) or `small` configuration."""
    return GeneSpliceConfig() if size == "nano" else GeneSpliceConfig.small()


def full_attention_config(size: str) -> GeneSpliceConfig:
    """A flat model with full attention, as wide and deep as the base level (encoder and decoder) of `size`."""
    base = hierarchical_config(size)
    return GeneSpliceConfig(
        hidden_sizes=base.hidden_sizes[:1],
        pool_sizes=[],
        num_attention_heads=base.num_attention_heads[:1],
        head_dims=base.head_dims[:1],
        intermediate_sizes=base.intermediate_sizes[:1],
        num_encoder_layers=[],
        num_tower_layers=base.num_encoder_layers[0] + base.num_decoder_layers[0],
        num_decoder_layers=[],
        local_windows=[],
    )


def config_of(size: str) -> GeneSpliceConfig:
    """`nano`, `small`, or `full_nano` and `full_small` for their full-attention peers."""
    return full_attention_config(size.removeprefix("full_")) if "full_" in size else hierarchical_config(size)


def random_bases(length: int) -> torch.Tensor:
    """(1, L) ids of random A, C, G, T."""
    return torch.randint(5, 9, (1, length))


def flops(size: str, length: int) -> dict[str, float]:
    """Floating-point operations of one forward: no memory, no time.

    Of a hierarchical model counted by torch on the meta device; of its full-attention peer by formula.
    """
    if size.startswith("full_"):
        return {"flops": full_attention_flops(config_of(size), length)}
    with torch.device("meta"):
        model = GeneSpliceModel(config_of(size)).eval()
        ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    return {"flops": float(counter.get_total_flops())}


def full_attention_flops(config: GeneSpliceConfig, length: int) -> float:
    """Matrix products of a flat model: projections, SwiGLU, q k^T and weights v in every block, and the stem."""
    width, heads = config.hidden_sizes[0], config.num_attention_heads[0] * config.head_dims[0]
    block = 2 * (4 * width * heads + 3 * width * config.intermediate_sizes[0]) + 2 * 2 * length * heads
    stem = 2 * config.stem_kernel_size * width**2
    return float(length * (config.num_tower_layers * block + stem))


def forward(size: str, length: int, repeats: int = 3) -> dict[str, Any]:
    """One forward of the base model in float32."""
    model = GeneSpliceModel._from_config(config_of(size), attn_implementation="sdpa").eval()
    ids, short = random_bases(length), random_bases(min(length, WARM_UP_TOKENS))
    with torch.inference_mode():
        measured = measure(lambda: model(ids), lambda: model(short), repeats)
    return measured | {"parameters": model.num_parameters()}


def train(size: str, length: int, repeats: int = 3) -> dict[str, Any]:
    """One forward and backward of the masked language model, 15 % of bases asked, blocks checkpointed."""
    model = GeneSpliceForMaskedLM._from_config(config_of(size), attn_implementation="sdpa").train()
    model.gradient_checkpointing_enable()
    measured = _measure_training(model, masked_bases(length), masked_bases(min(length, WARM_UP_TOKENS)), repeats)
    return measured | {"parameters": model.num_parameters()}


def masked_bases(length: int) -> dict[str, torch.Tensor]:
    """Ids with 15 % masked, and labels there."""
    ids = random_bases(length)
    asked = torch.rand(1, length) < 0.15
    return {"input_ids": ids.masked_fill(asked, MASK_TOKEN), "labels": ids.masked_fill(~asked, -100)}


def linear_train(length: int, chunk: int, states: str = "store", repeats: int = 3) -> dict[str, Any]:
    """One forward and backward of the causal Performer; `chunk` -1 is ordinary autograd over the whole sequence."""
    model = performer(chunk, states).train()
    return _measure_training(model, _causal(length), _causal(min(length, WARM_UP_TOKENS)), repeats)


def performer(chunk: int, states: str) -> PreTrainedModel:
    """The causal Performer of the measurements, with fresh weights."""
    config = AutoConfig.for_model("genesplice_performer", slim_chunk_size=chunk, slim_states=states, **PERFORMER)
    return AutoModelForCausalLM.from_config(config)


def state_bytes(length: int, chunk: int) -> int:
    """What `states="store"` keeps by its documentation: (S, z) of every layer and head per chunk, in float32."""
    head_dim = PERFORMER["hidden_size"] // PERFORMER["num_attention_heads"]
    per_chunk = PERFORMER["num_hidden_layers"] * PERFORMER["num_attention_heads"] * head_dim * (head_dim + 1) * 4
    return -(-length // chunk) * per_chunk


def exact_train(length: int, repeats: int = 1) -> dict[str, Any]:
    """One forward and backward of transformers' GPT-2 of the Performer's size, fused exact causal attention."""
    config = GPT2Config(
        vocab_size=16,
        n_positions=length,
        n_embd=PERFORMER["hidden_size"],
        n_layer=PERFORMER["num_hidden_layers"],
        n_head=PERFORMER["num_attention_heads"],
        n_inner=PERFORMER["intermediate_size"],
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").train()
    return _measure_training(model, _causal(length), _causal(min(length, WARM_UP_TOKENS)), repeats)


def _causal(length: int) -> dict[str, torch.Tensor]:
    ids = random_bases(length)
    return {"input_ids": ids, "labels": ids}


def _measure_training(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], warm_up: dict[str, torch.Tensor], repeats: int
) -> dict[str, Any]:
    """Measures loss and gradients; the gradients' own memory is part of the growth."""

    def step(inputs: dict[str, torch.Tensor]) -> None:
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    return measure(partial(step, batch), partial(step, warm_up), repeats)


def slim_gradient(length: int, chunks: list[int]) -> dict[str, float]:
    """Largest difference between the gradients of chunked and of ordinary training, relative to the largest gradient.

    In float64, over both ways of keeping states and all `chunks`.
    """
    batch, reference, worst = _causal(length), performer(-1, "store").double(), 0.0
    expected = _gradients(reference, batch)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for states in ("store", "reverse"):
        for chunk in chunks:
            model = performer(chunk, states).double()
            model.load_state_dict(reference.state_dict())
            found = _gradients(model, batch)
            worst = max(worst, *(float((found[name] - expected[name]).abs().max()) for name in expected))
    return {"relative_difference": worst / largest}


def _gradients(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.train()
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def generate(prefix: int, new_bases: int, repeats: int = 3) -> dict[str, Any]:
    """CPU time of `new_bases` cached single-base steps after a prefix, greedy; the prefix itself is not timed."""
    model = performer(-1, "store").eval()
    with torch.inference_mode():
        prefill = partial(model, random_bases(prefix), use_cache=True)

        def continued() -> dict[str, Any]:
            # A cache grows in place, so every repetition needs one of its own, made before the clock starts.
            return measure(partial(_decode, model, prefill(), new_bases), partial(_decode, model, prefill(), 8), 1)

        runs = [continued() for _ in range(repeats)]
    best = min(runs, key=lambda run: run["cpu_seconds"])
    return best | {"repeats": repeats, "milliseconds_per_base": best["cpu_seconds"] / new_bases * 1e3}


def _decode(model: PreTrainedModel, output: Any, new_bases: int) -> None:
    for _ in range(new_bases):
        base = output.logits[:, -1:].argmax(-1)
        output = model(base, past_key_values=output.past_key_values, use_cache=True)


def window(implementation: str, length: int, repeats: int = 3) -> dict[str, Any]:
    """Forward and backward of one attention layer with a window: `banded`, or `dense` (torch with an (L, L) mask)."""
    attend = banded_attention if implementation == "banded" else dense_attention
    inputs, short = _query_key_value(length, torch.float32), _query_key_value(WARM_UP_TOKENS, torch.float32)

    def step(tensors: list[torch.Tensor]) -> None:
        torch.autograd.grad(attend(*tensors, radius=WINDOW["radius"], is_causal=False).sum(), tensors)

    return measure(partial(step, inputs), partial(step, short), repeats)


def window_parity(length: int, radius: int) -> dict[str, float]:
    """Largest difference in float64 between banded attention and the dense mask, values and gradients."""
    worst = 0.0
    for is_causal in (False, True):
        results = []
        inputs = _query_key_value(length, torch.float64)
        weight = torch.randn_like(inputs[0])
        for attend in (banded_attention, dense_attention):
            out = attend(*inputs, radius=radius, is_causal=is_causal)
            results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
        differences = (float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True))
        worst = max(worst, *differences)
    return {"difference": worst}


def banded_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, radius: int, is_causal: bool
) -> torch.Tensor:
    """The package's window attention over torch's fused attention; (B, H, L, D)."""
    module = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation="sdpa"),
        is_causal=is_causal,
        num_key_value_groups=1,
        training=True,
    )
    out, _ = window_attention(_sdpa, module, query, key, value, None, radius, query.shape[-1] ** -0.5)
    return out.transpose(1, 2)


def _sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, None]:
    out = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=options["scaling"])
    return out.transpose(1, 2), None


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, radius: int, is_causal: bool
) -> torch.Tensor:
    """The same with an (L, L) mask, the textbook way; (B, H, L, D)."""
    length = query.shape[2]
    build: Callable[..., torch.Tensor] = causal_mask if is_causal else band_mask
    mask = build(length, length, query.device, window=radius)
    return nn.functional.scaled_dot_product_attention(query, key, value, mask)


def _query_key_value(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shape = (1, WINDOW["heads"], length, WINDOW["head_dim"])
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "flops": flops,
    "forward": forward,
    "train": train,
    "linear_train": linear_train,
    "exact_train": exact_train,
    "slim_gradient": slim_gradient,
    "generate": generate,
    "window": window,
    "window_parity": window_parity,
    "parity": parity,
    "throughput": throughput,
    "compile_gain": compile_gain,
}
