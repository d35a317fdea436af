"""Linear attention: out_i = phi(q_i).S_i / (phi(q_i).z_i + eps) with running sums S and z instead of a matrix L x L.

    causal         S_i = sum over j <= i of phi(k_j) v_j^T,  z_i = sum over j <= i of phi(k_j)
    bidirectional  the sums over all j

(Katharopoulos et al., arXiv 2006.16236, eq. 4-11; Likhosherstov et al., Sub-linear memory, arXiv 2012.11346, eq. 3-5.)
Where the denominator is exactly 0 (relu features without a common one) the output is 0 and passes no gradient.

Shapes: B batch, L tokens, H heads, D head size, M features. `query`, `key` below are features, not projections.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache


class LinearState(NamedTuple):
    """Running sums of one layer, always float32 or float64.

    Attributes:
        numerator: (B, H, M, D), S = sum phi(k) v^T.
        denominator: (B, H, M), z = sum phi(k).
    """

    numerator: torch.Tensor
    denominator: torch.Tensor


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of sums: float64 stays, everything else is float32, for sums over a genome drown in bfloat16."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def zero_state(key_BHLM: torch.Tensor, value_BHLD: torch.Tensor) -> LinearState:
    """The sums before the first token."""
    batch, heads, _, features = key_BHLM.shape
    numerator = key_BHLM.new_zeros(batch, heads, features, value_BHLD.shape[-1])
    return LinearState(numerator, key_BHLM.new_zeros(batch, heads, features))


def add_states(one: LinearState, other: LinearState) -> LinearState:
    return LinearState(one.numerator + other.numerator, one.denominator + other.denominator)


def chunk_sums(key_BHLM: torch.Tensor, value_BHLD: torch.Tensor) -> LinearState:
    """The sums over the given tokens alone."""
    return LinearState(key_BHLM.transpose(-1, -2) @ value_BHLD, key_BHLM.sum(2))


def causal_attention(
    query_BHLM: torch.Tensor,
    key_BHLM: torch.Tensor,
    value_BHLD: torch.Tensor,
    state: LinearState | None = None,
    block_size: int = 256,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, LinearState]:
    """Reads each token's past, block by block.

    Within a block of l tokens the products are taken as a lower triangle (l x l), older tokens come in through the
    sums, so that time and memory grow with L `block_size`.

    Args:
        state: sums over the tokens before the first one; None = there are none.
        block_size: tokens per block; the result does not depend on it.
        eps: added to every denominator.

    Returns:
        (B, H, L, D), and the sums up to the last token.
    """
    state = zero_state(key_BHLM, value_BHLD) if state is None else state
    sums_BHMD1 = torch.cat([state.numerator, state.denominator[..., None]], dim=-1)
    outputs = []
    # `split` and not slices: the gradient of a slice is a tensor of full length, which makes L blocks cost L^2.
    for query, key, value in zip(
        query_BHLM.split(block_size, 2), key_BHLM.split(block_size, 2), _with_ones(value_BHLD).split(block_size, 2),
        strict=True,
    ):  # fmt: skip
        products_BHll = (query @ key.transpose(-1, -2)).tril()
        outputs.append(_divide(query @ sums_BHMD1 + products_BHll @ value, eps))
        sums_BHMD1 = sums_BHMD1 + key.transpose(-1, -2) @ value
    end = LinearState(sums_BHMD1[..., :-1], sums_BHMD1[..., -1])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), end


def bidirectional_attention(query_BHLM: torch.Tensor, state: LinearState, eps: float = 1e-6) -> torch.Tensor:
    """Reads the sums over the whole sequence, (B, H, L, D)."""
    sums_BHMD1 = torch.cat([state.numerator, state.denominator[..., None]], dim=-1)
    return _divide(query_BHLM @ sums_BHMD1, eps)


def attention_weights(
    query_BHLM: torch.Tensor, key_BHLM: torch.Tensor, is_causal: bool, eps: float = 1e-6
) -> torch.Tensor:
    """The matrix (B, H, L, L) that the running sums avoid; for looking at short sequences."""
    products = query_BHLM @ key_BHLM.transpose(-1, -2)
    products = products.tril() if is_causal else products
    return _divide(torch.cat([products, products.sum(-1, keepdim=True)], dim=-1), eps)


def _with_ones(value_BHLD: torch.Tensor) -> torch.Tensor:
    """One more column, whose sum of products is the denominator: one matrix product serves both."""
    return nn.functional.pad(value_BHLD, (0, 1), value=1.0)


def _divide(both_BHLD1: torch.Tensor, eps: float) -> torch.Tensor:
    numerator, denominator = both_BHLD1[..., :-1], both_BHLD1[..., -1:]
    # Where the denominator is 0 the numerator is too. Dividing by eps there would send a gradient of 1 / eps back.
    return numerator / torch.where(denominator == 0, torch.inf, denominator + eps)


class LinearCache(Cache):
    """What generation needs of the past: the sums of every layer and the number of real tokens.

    Its size, and with it the time of a step, does not depend on the length of the past.

    Attributes:
        states: one `LinearState` per layer; None before the first call.
        seen_B: real tokens of each row so far, which is the position of the next one.
        stem_inputs: (B, kernel size - 1, E) last token embeddings, for models with a convolution before the layers.
    """

    states: list[LinearState] | None
    seen_B: torch.Tensor | None
    stem_inputs: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def advance(
        self, states: list[LinearState], seen_B: torch.Tensor, num_tokens: int, stem_inputs: torch.Tensor | None = None
    ) -> None:
        """Takes over the sums after `num_tokens` more tokens, padding included."""
        self.states, self.seen_B, self.stem_inputs = states, seen_B, stem_inputs
        self._length += num_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        """Forgets everything."""
        self.states = self.seen_B = self.stem_inputs = None
        self._length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("sums cannot be cropped, for what was added is not kept; run the prefix again.")

    def _change_rows(self, change: Any) -> None:
        if self.states is not None and self.seen_B is not None:
            self.states = [LinearState(*map(change, state)) for state in self.states]
            self.seen_B = change(self.seen_B)
        if self.stem_inputs is not None:
            self.stem_inputs = change(self.stem_inputs)
