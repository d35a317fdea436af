"""ALiBi in all its ways (dense, in chunks of queries, flex) against the formula written out, values and gradients.

Shapes: B batch, H heads, L tokens, D head size.
"""

import pytest
import torch
from tensor_sizes import LargestTensor
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genesplice_hf.layers import alibi_attention as subject
from genesplice_hf.layers.alibi import alibi_slopes
from genesplice_hf.layers.alibi_attention import AlibiContext, alibi_attention
from genesplice_hf.layers.attention import eager_attention

HEADS, LENGTH, SIZE = 3, 23, 8
IMPLEMENTATIONS = pytest.mark.parametrize("name", ["eager", "sdpa"])
MASKS = pytest.mark.parametrize("padding", ["none", "right", "left", "whole row"])


class Caller(nn.Module):
    """What an attention function wants to know of its caller."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, name: str) -> None:
        super().__init__()
        self.config = PreTrainedConfig()
        self.config.num_attention_heads = HEADS
        self.config._attn_implementation = name
        self.function = None if "flash" in name else ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)


def inputs(length: int = LENGTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, HEADS, length, SIZE)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def key_mask(padding: str) -> torch.Tensor | None:
    if padding == "none":
        return None
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, {"right": slice(9, None), "left": slice(0, 9), "whole row": slice(None)}[padding]] = False
    return mask


def twin(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, L, H, D), one query at a time."""
    out = torch.zeros_like(value)
    slopes = alibi_slopes(HEADS)
    for row in range(len(query)):
        keys = torch.arange(query.shape[2]) if mask is None else mask[row].nonzero()[:, 0]
        for head in range(HEADS):
            for i in range(query.shape[2]):
                scores = key[row, head, keys] @ query[row, head, i] / SIZE**0.5 - slopes[head] * (keys - i).abs()
                out[row, head, i] = scores.softmax(0) @ value[row, head, keys]
    return out.transpose(1, 2)


def run(name: str, tensors: list[torch.Tensor], mask: torch.Tensor | None, training: bool = False) -> torch.Tensor:
    caller = Caller(name).train(training)
    states = torch.zeros(2, tensors[0].shape[2], 1, dtype=tensors[0].dtype)
    context = AlibiContext.of(caller.config, states, mask, output_attentions=False)
    return alibi_attention(caller.function, caller, *tensors, context, SIZE**-0.5)[0]


def compare(found: torch.Tensor, mask: torch.Tensor | None, tensors: list[torch.Tensor]) -> None:
    """Values and gradients at real queries; the rest is finite."""
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask
    expected = twin(*tensors, mask)
    assert found.isfinite().all()
    torch.testing.assert_close(found[real], expected[real])
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) * real[..., None, None]
    grads, wanted = (torch.autograd.grad((out * weight).sum(), tensors) for out in (found, expected))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other)


@IMPLEMENTATIONS
@MASKS
@pytest.mark.parametrize("chunk", [None, 5, 23, 40])
def test_it_is_the_formula(name: str, padding: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunk is not None:
        monkeypatch.setattr(subject, "MAX_DENSE_TOKENS", 4)
        monkeypatch.setattr(subject, "QUERY_CHUNK", chunk)
    tensors, mask = inputs(), key_mask(padding)
    compare(run(name, tensors, mask), mask, tensors)
    with torch.no_grad():
        torch.testing.assert_close(run(name, tensors, mask), run(name, tensors, mask, training=True))


@MASKS
def test_flex_is_the_formula(padding: str) -> None:
    """Values only, for flex has no backward pass on a CPU; uncompiled."""
    tensors, mask = [tensor.detach().float() for tensor in inputs()], key_mask(padding)
    with torch.compiler.set_stance("force_eager"):
        found = run("flex_attention", tensors, mask)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(found[real], twin(*tensors, mask)[real], atol=1e-5, rtol=1e-5)


def test_long_sequences_have_no_dense_bias() -> None:
    """Not in the forward pass, not kept for the backward pass, and not in it."""
    length = 4 * subject.MAX_DENSE_TOKENS // 3
    tensors = [torch.randn(1, HEADS, length, SIZE, requires_grad=True) for _ in range(3)]
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    states = torch.zeros(1, length, 1)
    caller = Caller("sdpa")
    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        context = AlibiContext.of(caller.config, states, None, output_attentions=False)
        out = alibi_attention(caller.function, caller, *tensors, context, SIZE**-0.5)[0]
        out.sum().backward()
    assert largest.elements <= HEADS * subject.QUERY_CHUNK * length
    assert max(kept) < subject.QUERY_CHUNK * length
    assert AlibiContext.of(caller.config, states, None, output_attentions=True).dense is not None


def test_the_dense_bias_is_made_once_for_a_batch_without_padding() -> None:
    caller = Caller("sdpa")
    context = AlibiContext.of(caller.config, torch.zeros(5, LENGTH, 1), None, output_attentions=False)
    assert context.dense.shape == (1, HEADS, LENGTH, LENGTH)


def test_a_long_context_repeats_its_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass computes a chunk again with the weights that the forward pass had dropped."""
    monkeypatch.setattr(subject, "MAX_DENSE_TOKENS", 4)
    monkeypatch.setattr(subject, "QUERY_CHUNK", 5)
    caller, tensors = Caller("eager").train(), inputs()
    context = AlibiContext.of(caller.config, torch.zeros(2, LENGTH, 1, dtype=torch.float64), None, False)
    torch.manual_seed(3)
    out = alibi_attention(caller.function, caller, *tensors, context, SIZE**-0.5, dropout=0.5)[0]
    (gradient,) = torch.autograd.grad(out.sum(), tensors[2])
    # The output is linear in the values, so that its product with their gradient is the output itself.
    torch.testing.assert_close((gradient * tensors[2]).sum(), out.sum())


def test_what_cannot_be_is_refused() -> None:
    tensors = [tensor.detach().float() for tensor in inputs()]
    for name in ("flash_attention_2", "kernels-community/flash-attn"):
        with pytest.raises(ValueError, match=r"flash.*ALiBi"):
            run(name, tensors, None)
    caller = Caller("flex_attention").train()
    context = AlibiContext("flex_attention", alibi_slopes(HEADS), None)
    with pytest.raises(ValueError, match="dropout"):
        alibi_attention(caller.function, caller, *tensors, context, SIZE**-0.5, dropout=0.1)
