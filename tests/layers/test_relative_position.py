"""The positional basis against stored tables and TensorFlow's own numbers, and the shift against its definition.

The golden tables were computed in float64 with numpy from the formulas; `tf_gammas` are rows of the table that the
original TensorFlow model dumped.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genesplice_hf.layers.relative_position import relative_basis, relative_shift

GOLDEN = Path(__file__).parents[1] / "golden" / "enformer_positional"
INPUTS, OUTPUTS = (load_file(GOLDEN / f"{part}.safetensors") for part in ("inputs", "outputs"))
TABLES = [name.removesuffix(".rows") for name in INPUTS if name.startswith("n")]
# float64 agrees with the stored float32 numbers; float32 rounds exp(lgamma), more for longer sequences.
TOLERANCES = {torch.float64: {"n1536": 1e-6, "": 1e-6}, torch.float32: {"n1536": 2.5e-3, "n96": 2e-3, "": 5e-6}}


def sizes(table: str) -> tuple[int, int]:
    bins, features = table.removeprefix("n").split("_f")
    return int(bins), int(features)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_stored_tables(table: str, dtype: torch.dtype) -> None:
    atol = next(value for start, value in TOLERANCES[dtype].items() if table.startswith(start))
    basis = relative_basis(*sizes(table), dtype=dtype)
    num_bins, num_features = sizes(table)
    assert basis.shape == (2 * num_bins - 1, num_features) and basis.dtype == dtype
    rows = INPUTS[f"{table}.rows"]
    torch.testing.assert_close(basis[rows].float(), OUTPUTS[f"{table}.basis"], rtol=0, atol=atol)
    torch.testing.assert_close(basis.amax(0).float(), OUTPUTS[f"{table}.column_max"], rtol=0, atol=atol)
    total = basis.double().sum(0).float()
    torch.testing.assert_close(total, OUTPUTS[f"{table}.column_sum"], rtol=1e-5, atol=atol * num_bins)


@pytest.mark.parametrize("table", TABLES)
def test_the_basis_of_enformer_pytorch(table: str) -> None:
    num_functions = sizes(table)[1] // 6
    legacy = relative_basis(*sizes(table), "feature", torch.float64)
    found = legacy[INPUTS[f"{table}.rows"], 2 * num_functions : 3 * num_functions]
    torch.testing.assert_close(found.float(), OUTPUTS[f"{table}.gamma_feature_normalised"], rtol=0, atol=1e-6)
    plain = relative_basis(*sizes(table), dtype=torch.float64)
    assert torch.equal(legacy[:, : 2 * num_functions], plain[:, : 2 * num_functions])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_table_that_tensorflow_dumped(dtype: torch.dtype) -> None:
    gamma = relative_basis(1536, 192, dtype=dtype)[:, 64:96]
    found = gamma[INPUTS["tf_gammas.rows"]].float()
    torch.testing.assert_close(found, OUTPUTS["tf_gammas.values"], rtol=0, atol=5e-3)
    wrong = relative_basis(1536, 192, "feature", dtype)[INPUTS["tf_gammas.rows"], 64:96].float()
    assert (wrong - OUTPUTS["tf_gammas.values"]).abs().max() > 0.5


@pytest.mark.parametrize("num_bins", [1, 2, 7, 47, 768, 1536, 3072])
def test_any_length(num_bins: int) -> None:
    basis = relative_basis(num_bins, 48)
    assert basis.isfinite().all()
    even, odd = basis.chunk(2, dim=1)
    assert torch.equal(even[:, 16:24].amax(0), torch.ones(8))
    assert torch.equal(even, even.flip(0)) and torch.equal(odd, -odd.flip(0))
    assert not odd[num_bins - 1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_cast_last(dtype: torch.dtype) -> None:
    assert torch.equal(relative_basis(768, 24, dtype=dtype), relative_basis(768, 24).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = relative_basis(769, 24)
    torch.testing.assert_close(found, relative_basis(769, 24, dtype=torch.float64).float(), rtol=0, atol=2e-3)


def test_a_table_is_made_once_and_serves_training_after_inference() -> None:
    with torch.inference_mode():
        table = relative_basis(53, 12)
    assert relative_basis(53, 12) is table
    assert not table.is_inference() and not table.requires_grad
    weight = torch.ones(3, 12, requires_grad=True)
    torch.nn.functional.linear(table, weight).sum().backward()
    torch.testing.assert_close(weight.grad, table.sum(0).expand(3, -1))


def test_features_come_in_sixes() -> None:
    with pytest.raises(ValueError, match="multiple of 6, got 16"):
        relative_basis(8, 16)


@pytest.mark.parametrize("num_bins", [1, 2, 3, 8])
@pytest.mark.parametrize("offset", [0, 5])
def test_the_shift_is_its_definition(num_bins: int, offset: int) -> None:
    """Also for values that start somewhere in their storage, as a view, and for ones that are not contiguous."""
    shape = (2, 3, num_bins, 2 * num_bins - 1)
    storage = torch.randn(offset + 2 * 3 * num_bins * (2 * num_bins - 1))
    values = storage[offset:].view(shape)
    expected = torch.stack(
        [torch.stack([values[..., i, num_bins - 1 - i + j] for j in range(num_bins)], -1) for i in range(num_bins)], -2
    )
    found = relative_shift(values)
    assert torch.equal(found, expected)
    assert found.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
    strided = values.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(relative_shift(strided), expected)


def test_the_gradient_of_the_shift() -> None:
    values = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relative_shift, values)
    with pytest.raises(ValueError, match="2n - 1"):
        relative_shift(torch.ones(4, 8))
