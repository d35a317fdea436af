"""The chunked gradient is the whole gradient, whatever the chunk, and its memory does not grow with the sequence.

The network here is a toy; its slow twin writes attention as a dense (L, L) matrix and leaves the gradient to autograd.

Shapes: B batch, L tokens, C chunk, E hidden size, H heads, D head size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.layers.linear_attention import LinearState
from genesplice_hf.layers.sublinear_memory import sublinear_loss
from genesplice_hf.layers.sublinear_walks import plus_exactly

VOCABULARY, HIDDEN, HEADS = 8, 12, 2
LENGTH = 70
EPS = 1e-6
# Name -> is_causal, states, strategy.
MODES = {
    "causal-store": (True, "store", "auto"),
    "causal-reverse": (True, "reverse", "auto"),
    "bidirectional-sublinear": (False, "store", "sublinear"),
    "bidirectional-checkpoint": (False, "store", "checkpoint"),
    "bidirectional-auto": (False, "store", "auto"),
}
EVERY_MODE = pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "bidirectional-auto"])


def phi(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.elu(x) + 1


class ToyLayer(nn.Module):
    """Pre-norm linear attention and feed-forward; `dense` is the slow twin of `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.q_map, self.k_map, self.v_map = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 20), nn.GELU(), nn.Linear(20, HIDDEN)
        )

    def _project(self, x_BCE: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
        normed = self.norm(x_BCE)
        q, k, v = (
            linear(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear in (self.q_map, self.k_map, self.v_map)
        )
        real = 1.0 if mask is None else mask[:, None, :, None]
        states = torch.float64 if x_BCE.dtype == torch.float64 else torch.float32
        return [(phi(q)).to(states), (phi(k) * real).to(states), (v * real).to(states)]

    def _finish(self, x_BCE: torch.Tensor, attended_BHCD: torch.Tensor) -> torch.Tensor:
        x_BCE = x_BCE + attended_BHCD.transpose(1, 2).flatten(2).to(x_BCE.dtype)
        return x_BCE + self.feed_forward(x_BCE)

    def sums(self, x_BCE: torch.Tensor, mask: torch.Tensor | None) -> LinearState:
        _, k, v = self._project(x_BCE, mask)
        with torch.autocast(x_BCE.device.type, enabled=False):
            return LinearState(k.transpose(2, 3) @ v, k.sum(2))

    def forward(
        self, x_BCE: torch.Tensor, mask: torch.Tensor | None, state: LinearState | None, is_causal: bool
    ) -> tuple[torch.Tensor, LinearState]:
        q, k, v = self._project(x_BCE, mask)
        with torch.autocast(x_BCE.device.type, enabled=False):
            if is_causal:
                numerator, denominator = (k[:, :, :, :, None] * v[:, :, :, None]).cumsum(2), k.cumsum(2)
                if state is not None:
                    numerator, denominator = (
                        numerator + state.numerator[:, :, None],
                        denominator + state.denominator[:, :, None],
                    )
                out = (q[..., None, :] @ numerator).squeeze(-2) / ((q * denominator).sum(-1, keepdim=True) + EPS)
                state = LinearState(numerator[:, :, -1], denominator[:, :, -1])
            else:
                out = q @ state.numerator / ((q @ state.denominator[..., None]) + EPS)
        return self._finish(x_BCE, out), state

    def dense(self, x_BLE: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        q, k, v = self._project(x_BLE, mask)
        weights = q @ k.transpose(2, 3)
        weights = weights.tril() if is_causal else weights
        return self._finish(x_BLE, weights @ v / (weights.sum(-1, keepdim=True) + EPS))


class Toy(nn.Module):
    """Embedding, layers and a language-model loss, in one piece (`whole`) or chunk by chunk."""

    def __init__(self, num_layers: int = 2, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(ToyLayer() for _ in range(num_layers))
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.unused = nn.Parameter(torch.ones(3))
        self.to(dtype)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids)

    def loss(self, x_BCE: torch.Tensor, labels: torch.Tensor, number: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(x_BCE).transpose(1, 2), labels, reduction="sum") / number

    def whole(self, ids: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        labels = labels_of(ids, mask)
        x_BLE = self.embed(ids)
        for layer in self.layers:
            x_BLE = layer.dense(x_BLE, mask, is_causal)
        return self.loss(x_BLE, labels, int((labels >= 0).sum()))

    def chunked(self, ids: torch.Tensor, mask: torch.Tensor | None, mode: str, chunk_size: int) -> torch.Tensor:
        labels = labels_of(ids, mask)
        number = int((labels >= 0).sum())
        is_causal, states, strategy = MODES[mode]
        return sublinear_loss(
            embed=lambda start, stop: self.embed(ids[:, start:stop]),
            layers=self.layers,
            head_loss=lambda x_BCE, start, stop: self.loss(x_BCE, labels[:, start:stop], number),
            length=ids.shape[1],
            chunk_size=chunk_size,
            mask=mask,
            is_causal=is_causal,
            states=states,
            strategy=strategy,
            parameters=[parameter for parameter in self.parameters() if parameter.requires_grad],
        )


def labels_of(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, L): another letter for each position, -100 in the padding and at every fifth position."""
    labels = ((ids + 3) * 5) % VOCABULARY
    labels[:, ::5] = -100
    return labels if mask is None else labels.masked_fill(~mask, -100)


def batch(length: int = LENGTH, padded: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Three rows; padded means one row to the right by more than a chunk, one to the left, one not."""
    ids = torch.randint(VOCABULARY, (3, length))
    if not padded:
        return ids, None
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[0, length - 20 :] = False
    mask[1, :20] = False
    return ids, mask


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    module.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same(found: dict[str, Any], expected: dict[str, Any], relative: float = 1e-12) -> None:
    """Every gradient differs by at most `relative` of its largest entry; missing ones are missing in both."""
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert value.abs().max() > 0, f"{name}: a gradient of zero shows nothing"
            assert (found[name] - value).abs().max() <= relative * value.abs().max(), name


@EVERY_MODE
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, LENGTH, LENGTH + 30])
def test_gradient_of_chunks_is_the_gradient_of_the_whole(mode: str, padded: bool, chunk_size: int) -> None:
    toy, (ids, mask) = Toy(), batch(padded=padded)
    expected = gradients(toy, toy.whole(ids, mask, MODES[mode][0]))
    assert expected["unused"] is None
    assert_same(gradients(toy, toy.chunked(ids, mask, mode, chunk_size)), expected)


@pytest.mark.parametrize(("num_layers", "evaluations"), [(5, 5 * 4 // 2 + 5), (6, 6)])
def test_six_layers_are_checkpointed_by_default(num_layers: int, evaluations: int) -> None:
    """Counted per chunk of the forward pass: layer r's input anew costs r layers, kept inputs cost one layer each."""
    toy, (ids, _) = Toy(num_layers), batch()
    calls: list[int] = []
    for layer in toy.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    toy.chunked(ids, None, "bidirectional-auto", LENGTH // 2)
    assert len(calls) == 2 * evaluations


class SavedBytes:
    """Bytes that autograd saves: `kept` between the passes; in the backward pass the `largest` tensor, and the
    largest sum between two calls of the embedding (`per_chunk`)."""

    def __init__(self, toy: Toy, loss: Callable[[], torch.Tensor]) -> None:
        self.sizes: list[list[int]] = [[]]
        toy.embedding.register_forward_hook(lambda *_: self.sizes.append([]))
        with torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor):
            value = loss()
            self.kept = sum(map(sum, self.sizes))
            self.sizes = [[]]
            value.backward()
        self.largest = max(map(max, filter(None, self.sizes)), default=0)
        self.per_chunk = max(map(sum, self.sizes))

    def _saved(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sizes[-1].append(tensor.numel() * tensor.element_size())
        return tensor


@cache
def saved_bytes(mode: str, chunks: int) -> SavedBytes:
    toy, (ids, _) = Toy(), batch(chunks * 8)
    return SavedBytes(toy, lambda: toy.chunked(ids, None, mode, 8))


@pytest.mark.parametrize("mode", ["causal-store", "causal-reverse", "bidirectional-sublinear"])
def test_saved_tensors_do_not_grow_with_the_sequence(mode: str) -> None:
    short, long = saved_bytes(mode, 4), saved_bytes(mode, 32)
    assert (long.largest, long.per_chunk) == (short.largest, short.per_chunk)
    assert short.largest > 0


def test_what_is_kept_between_the_passes() -> None:
    """One set of sums for the sequence (with what rounding cut off), one per chunk but the first, or all inputs."""
    head_size = HIDDEN // HEADS
    sums = 2 * 3 * HEADS * (head_size * head_size + head_size) * 8
    assert {saved_bytes("causal-reverse", chunks).kept for chunks in (4, 32)} == {2 * sums}
    assert {saved_bytes("bidirectional-sublinear", chunks).kept for chunks in (4, 32)} == {sums}
    inputs = 3 * 3 * 8 * HIDDEN * 8
    for chunks in (4, 32):
        assert saved_bytes("causal-store", chunks).kept == (chunks - 1) * sums
        assert saved_bytes("bidirectional-checkpoint", chunks).kept == sums + chunks * inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_come_back_as_they_were(dtype: torch.dtype) -> None:
    """Chunks of very different size, added and subtracted again; plain differences are not what was there before."""
    sizes = 10.0 ** torch.linspace(-2, 3, 50, dtype=dtype)
    chunks = [LinearState(size * torch.rand(3, 4, dtype=dtype), size * torch.rand(3, dtype=dtype)) for size in sizes]
    before, state, plain = [], None, torch.zeros(3, dtype=dtype)
    for chunk in chunks:
        before.append(None if state is None else state.rounded)
        state = plus_exactly(state, chunk)
        plain = plain + chunk.denominator
    for chunk, expected in zip(reversed(chunks[1:]), reversed(before[1:]), strict=True):
        state = plus_exactly(state, LinearState(-chunk.numerator, -chunk.denominator))
        plain = plain - chunk.denominator
        assert torch.equal(state.rounded.numerator, expected.numerator)
        assert torch.equal(state.rounded.denominator, expected.denominator)
    assert not torch.equal(plain, chunks[0].denominator)


def test_a_checkpointed_layer_is_differentiated_chunk_by_chunk() -> None:
    assert saved_bytes("bidirectional-checkpoint", 32).largest == saved_bytes("bidirectional-checkpoint", 4).largest


def test_ordinary_backpropagation_keeps_everything() -> None:
    """The counter counts: the twin in one piece grows with the sequence."""
    kept = []
    for chunks in (4, 32):
        toy, (ids, _) = Toy(), batch(chunks * 8)
        kept.append(SavedBytes(toy, lambda toy=toy, ids=ids: toy.whole(ids, None, False)).kept)
    assert kept[1] >= 8 * kept[0] > 8 * saved_bytes("causal-reverse", 4).per_chunk


@EVERY_MODE
def test_differentiating_twice_raises(mode: str) -> None:
    toy, (ids, _) = Toy(), batch()
    loss = toy.chunked(ids, None, mode, 16)
    (gradient,) = torch.autograd.grad(loss, [toy.head.bias], create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(toy.whole(ids, None, MODES[mode][0]), [toy.head.bias])[0])
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (toy.head.bias.sum() + gradient.square().sum()).backward()


def test_going_back_twice_raises_as_it_does_everywhere() -> None:
    toy, (ids, _) = Toy(), batch()
    loss = toy.chunked(ids, None, "causal-store", 16)
    loss.backward(retain_graph=True)
    once = toy.head.bias.grad.clone()
    loss.backward()
    torch.testing.assert_close(toy.head.bias.grad, 2 * once, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@EVERY_MODE
def test_micro_batches_and_loss_scales_add_up(mode: str) -> None:
    toy, (ids, mask) = Toy(), batch(padded=True)

    def accumulated(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        total = sum(scale * loss(ids[row], mask[row]) for row, scale in ((slice(0, 1), 3.0), (slice(1, 3), 0.25)))
        return gradients(toy, total)

    expected = accumulated(lambda ids, mask: toy.whole(ids, mask, MODES[mode][0]))
    assert_same(accumulated(lambda ids, mask: toy.chunked(ids, mask, mode, 16)), expected)


def relative_error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """|found - expected| / |expected| over all gradients together."""
    names = [name for name, value in expected.items() if value is not None and name != "loss"]
    difference = sum((found[name] - expected[name]).square().sum() for name in names)
    return float((difference / sum(expected[name].square().sum() for name in names)).sqrt())


@EVERY_MODE
def test_autocast_of_the_forward_pass_holds_in_the_backward_pass(mode: str) -> None:
    """Backward runs outside the context; the gradient is near that of float32, and nearer to bf16 in one piece."""
    toy, (ids, mask) = Toy(dtype=torch.float32), batch(padded=True)
    dtypes: list[torch.dtype] = []
    toy.head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    expected = gradients(toy, toy.whole(ids, mask, MODES[mode][0]))
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = toy.chunked(ids, mask, mode, 16)
    seen = len(dtypes)
    found = gradients(toy, loss)
    assert len(dtypes) == 2 * seen
    assert set(dtypes) == {torch.bfloat16}
    assert all(found[name] is not None for name, value in expected.items() if value is not None)
    assert relative_error(found, expected) < 2e-2


@EVERY_MODE
def test_weights_cast_without_gradient_are_not_used_again(mode: str) -> None:
    """Autocast keeps cast weights until its context ends; both passes and an ordinary loss share one context here."""
    toy, (ids, mask) = Toy(dtype=torch.float32), batch(padded=True)
    alone = gradients(toy, toy.whole(ids, mask, MODES[mode][0]))
    with torch.autocast("cpu", torch.bfloat16):
        both = gradients(toy, toy.chunked(ids, mask, mode, 16) + toy.whole(ids, mask, MODES[mode][0]))
    expected = {name: None if value is None else 2 * value for name, value in alone.items()}
    assert relative_error(both, expected) < 2e-2


def test_gradients_of_bf16_parameters_are_added_in_float32() -> None:
    """1000 chunks with a gradient of 1 each: in bf16 the sum would stop at 256."""
    weight = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
    loss = sublinear_loss(
        embed=lambda start, stop: torch.ones(1, stop - start, 1),
        layers=[],
        head_loss=lambda x_BCE, start, stop: x_BCE.sum() * weight,
        length=1000,
        chunk_size=1,
        mask=None,
        is_causal=True,
        states="store",
        strategy="auto",
        parameters=[weight],
    )
    loss.backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.item() == 1000


@EVERY_MODE
@pytest.mark.parametrize("trainable", ["embedding", "layers.0", "layers.1.k_map", "layers.1", "head"])
def test_only_trainable_parameters_get_gradients(mode: str, trainable: str) -> None:
    toy, (ids, mask) = Toy(), batch(padded=True)
    for name, parameter in toy.named_parameters():
        parameter.requires_grad_(name.startswith(trainable))
    expected = gradients(toy, toy.whole(ids, mask, MODES[mode][0]))
    expected = {name: value for name, value in expected.items() if not name.endswith("k_map.bias")}
    assert sum(value is not None for value in expected.values()) > 1
    assert_same(gradients(toy, toy.chunked(ids, mask, mode, 16)), expected)


@EVERY_MODE
def test_lora(mode: str) -> None:
    """PEFT swaps the linear maps in place; only the adapters train."""
    toy, (ids, mask) = Toy(), batch(padded=True)
    get_peft_model(toy, LoraConfig(target_modules=["q_map", "k_map", "v_map"], init_lora_weights=False))
    toy.double()
    expected = gradients(toy, toy.whole(ids, mask, MODES[mode][0]))
    assert {"lora" in name for name, value in expected.items() if value is not None and name != "loss"} == {True}
    assert_same(gradients(toy, toy.chunked(ids, mask, mode, 16)), expected)


def test_a_parameter_that_one_chunk_uses() -> None:
    """Gradients of None in some chunks; a parameter given twice counts once."""
    first = nn.Parameter(torch.ones(2, dtype=torch.float64))
    toy, (ids, _) = Toy(), batch()

    def embed(start: int, stop: int) -> torch.Tensor:
        x_BCE = toy.embed(ids[:, start:stop])
        return x_BCE * first.prod() if start == 0 else x_BCE

    def loss(chunk_size: int) -> torch.Tensor:
        parameters = [first, first, *toy.parameters()]
        head_loss = lambda x_BCE, start, stop: x_BCE.square().sum()  # noqa: E731
        return sublinear_loss(
            embed, toy.layers, head_loss, LENGTH, chunk_size, None, True, "store", "auto", parameters
        )

    x_BLE = torch.cat([embed(0, 16), embed(16, LENGTH)], dim=1)
    for layer in toy.layers:
        x_BLE = layer.dense(x_BLE, None, True)
    (expected,) = torch.autograd.grad(x_BLE.square().sum(), [first])
    loss(16).backward()
    assert_same({"first": first.grad}, {"first": expected})


@pytest.mark.parametrize("name", ["head.bias", "layers.0.k_map.weight", "layers.1.features"])
def test_what_changes_between_the_passes_is_noticed(name: str) -> None:
    """A step of the optimiser, of a frozen weight too, and random features drawn anew."""
    toy, (ids, _) = Toy(), batch()
    toy.layers.requires_grad_(False)
    toy.layers[1].register_buffer("features", torch.zeros(2))
    loss = toy.chunked(ids, None, "causal-store", 16)
    if name.endswith("features"):
        toy.layers[1].features = torch.ones(2)
    else:
        with torch.no_grad():
            toy.get_parameter(name).add_(1)
    with pytest.raises(GeneSpliceError, match="was changed between"):
        loss.backward()


def test_without_gradient_the_loss_is_the_same() -> None:
    toy, (ids, mask) = Toy(), batch(padded=True)
    with torch.no_grad():
        found = toy.chunked(ids, mask, "causal-store", 16)
        torch.testing.assert_close(found, toy.whole(ids, mask, True), rtol=1e-12, atol=0)
    assert not found.requires_grad


@pytest.mark.parametrize("mark", ["ds_id", "_is_flat_param", "_fsdp_flattened"])
def test_sharded_parameters_are_refused(mark: str) -> None:
    """The marks that DeepSpeed and FSDP leave; `tests/models/test_training_performer.py` shards in earnest."""
    toy, (ids, _) = Toy(), batch()
    setattr(toy.head.bias, mark, True)
    with pytest.raises(GeneSpliceError, match="ZeRO-3"):
        toy.chunked(ids, None, "causal-store", 16)


def test_gradient_hooks_are_refused() -> None:
    """Those on the accumulated gradient run once, and may stay."""

    def double(parameter: torch.Tensor) -> None:
        parameter.grad.mul_(2)

    toy, (ids, _) = Toy(), batch()
    handle = toy.head.bias.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(GeneSpliceError, match="once per chunk"):
        toy.chunked(ids, None, "causal-store", 16)
    handle.remove()
    toy.head.bias.register_post_accumulate_grad_hook(double)
    expected = gradients(toy, toy.whole(ids, None, True))
    assert_same(gradients(toy, toy.chunked(ids, None, "causal-store", 16)), expected)


@pytest.mark.parametrize(
    ("argument", "value", "advice"),
    [
        ("chunk_size", 0, "at least 1 token"),
        ("length", 0, "drop empty sequences"),
        ("mask", torch.ones(3, LENGTH + 1, dtype=torch.bool), f"batch, {LENGTH}"),
        ("mask", torch.ones(LENGTH, dtype=torch.bool), f"batch, {LENGTH}"),
        ("states", "forward", "store, reverse"),
        ("strategy", "fast", "auto, sublinear, checkpoint"),
    ],
)
def test_bad_arguments_are_named(argument: str, value: Any, advice: str) -> None:
    toy = Toy()
    good = {
        "embed": lambda start, stop: torch.zeros(3, stop - start, HIDDEN),
        "layers": toy.layers,
        "head_loss": lambda x_BCE, start, stop: x_BCE.sum(),
        "length": LENGTH,
        "chunk_size": 16,
        "mask": None,
        "is_causal": True,
        "states": "store",
        "strategy": "auto",
        "parameters": list(toy.parameters()),
    }
    with pytest.raises(GeneSpliceError, match=f"`{argument}`.*{advice}"):
        sublinear_loss(**(good | {argument: value}))
