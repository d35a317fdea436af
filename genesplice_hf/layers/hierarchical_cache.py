"""What causal generation remembers: a few states per level instead of the whole past.

A window layer needs its last w keys, the stem its last k - 1 embeddings, a pool the sum of the tokens that do not
fill a bin yet, and a decoder the last finished coarse state. Only full layers keep every key, and in the hierarchical
form these stand at bins: O(w + L / bin size) per sequence.

Rows may hold different numbers of tokens (prompts of different lengths). Past tokens are stored right-aligned and new
ones come left-aligned, so that [past | new] has the tokens of every row side by side at the seam: distances between
neighbours there are the true ones, and one band serves all rows.

Shapes: B batch, L new tokens, P stored tokens, K key/value heads, D head size, E hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.rotary import rotary_table


def last_tokens(x: torch.Tensor, ends_B: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` tokens of each row that end at `ends_B`, copied where a view would hold on to much more.

    Args:
        x: (B, ..., N, D), tokens in the dimension before the last.
        ends_B: (B,) on the CPU; where a row has fewer than `keep` tokens, the first results have no meaning.
    """
    first = int(ends_B[0])
    if bool((ends_B == first).all()):
        kept = x[..., first - keep : first, :]
        return kept.clone() if x.shape[-2] - keep > 1 else kept
    index = (ends_B[:, None] - keep + torch.arange(keep)).clamp(min=0).to(x.device)
    index = index.view(len(index), *[1] * (x.dim() - 3), keep, 1)
    return x.gather(-2, index.expand(*x.shape[:-2], keep, x.shape[-1]))


class RecentLayer(DynamicLayer):
    """Keys and values (B, K, P, D) of one attention layer, right-aligned."""

    keys: torch.Tensor
    values: torch.Tensor

    def append(
        self, key: torch.Tensor, value: torch.Tensor, stored: int, new_B: torch.Tensor, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the last `stored` keys and values before the new ones, and stores the last `keep` of each row."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        if stored:
            key = torch.cat([self.keys[..., -stored:, :], key], dim=-2)
            value = torch.cat([self.values[..., -stored:, :], value], dim=-2)
        self.keys = last_tokens(key, stored + new_B, keep)
        self.values = last_tokens(value, stored + new_B, keep)
        return key, value


class GeneSpliceCache(Cache):
    """State of every layer, stem and pool of a causal GeneSplice; empty when made, filled by the model.

    Attributes:
        layers: keys and values, by the block's index.
        lengths_B: (B,) tokens that each row has read, on the CPU.
        stem_inputs: (B, k - 1, E) last embeddings, zeros before the first base.
        pooled_sums: per level (B, E), sum of the tokens that do not fill a bin yet.
        carried: per level (B, E), what the last finished coarse token adds to the finer ones.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.layers: list[RecentLayer] = []
        self.num_columns = 0
        self.lengths_B: torch.Tensor | None = None
        self.stem_inputs: torch.Tensor | None = None
        self.pooled_sums: dict[int, torch.Tensor] = {}
        self.carried: dict[int, torch.Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` read so far, padding included; the same for every layer."""
        return self.num_columns

    def arrive(self, new_B: torch.Tensor, num_columns: int, pool_sizes: Sequence[int]) -> list["LevelCache"]:
        """Counts the tokens that a call brings; gives each level, bases first, its view for that call.

        Args:
            new_B: (B,) new tokens of each row, on the CPU.
            num_columns: columns that the call's `input_ids` have.

        Raises:
            SequenceError: another number of rows than before.
        """
        past_B = torch.zeros_like(new_B) if self.lengths_B is None else self.lengths_B
        if len(past_B) != len(new_B):
            raise SequenceError(
                f"`past_key_values` holds {len(past_B)} sequences, the call has {len(new_B)}; use the same rows, or "
                "`batch_select_indices` or `batch_repeat_interleave` first."
            )
        self.lengths_B = past_B + new_B
        self.num_columns += num_columns
        levels = [LevelCache(self, 0, past_B, new_B)]
        for pool_size in pool_sizes:
            levels.append(levels[-1].coarser(pool_size))
        return levels

    def layer(self, layer_idx: int) -> RecentLayer:
        while len(self.layers) <= layer_idx:
            self.layers.append(RecentLayer())
        return self.layers[layer_idx]

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in ("lengths_B", "stem_inputs"):
            state = getattr(self, name)
            setattr(self, name, None if state is None else change(state))
        self.pooled_sums = {level: change(state) for level, state in self.pooled_sums.items()}
        self.carried = {level: change(state) for level, state in self.carried.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._change_rows(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_rows(lambda state: state[indices.to(state.device)])

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int, *args: Any, **kwargs: Any) -> None:
        """Removes nothing (0) or everything; the states between are gone.

        Args:
            tokens_to_remove: columns to remove, negative as in transformers; positive: columns that shall stay.

        Raises:
            NotImplementedError: only a part is to be removed.
        """
        keep = tokens_to_remove if tokens_to_remove > 0 else self.num_columns + tokens_to_remove
        if keep >= self.num_columns:
            return
        if keep > 0:
            raise NotImplementedError(
                f"this cache of {self.num_columns} columns cannot be cropped to {keep}, for it keeps only the last "
                "states; copy it (`copy.deepcopy`) before the tokens to be undone, or run the prefix again."
            )
        self.reset()


@dataclass(frozen=True)
class LevelCache:
    """The cache as the blocks of one level see it during one call.

    Attributes:
        cache: where the states are stored.
        level: 0 = bases.
        past_B, new_B: (B,) finished tokens of this level that each row had before the call, and gets by it. A chunk
            may be wider than `new_B`: what follows (padding, a bin that is not full) is not stored.
    """

    cache: GeneSpliceCache
    level: int
    past_B: torch.Tensor
    new_B: torch.Tensor

    def coarser(self, pool_size: int) -> "LevelCache":
        """The next level, where only full bins count."""
        past_B = self.past_B // pool_size
        return LevelCache(self.cache, self.level + 1, past_B, (self.past_B + self.new_B) // pool_size - past_B)

    def get_seq_length(self) -> int:
        """Past tokens of the longest row."""
        return int(self.past_B.max())

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, K, P + L, D) keys and values, stored ones first; P is at most `window`, the radius of the layer."""
        # The longest row may have left the batch since, so what is stored can be more than is needed.
        longest = self.get_seq_length(), int((self.past_B + self.new_B).max())
        stored, keep = (num if window is None else min(window, num) for num in longest)
        return self.cache.layer(layer_idx).append(key, value, stored, self.new_B, keep)

    def key_mask(self, num_new: int, windows: Sequence[int | None], device: torch.device) -> torch.Tensor | None:
        """(B, P + L) bool, False where a row has no past token yet; None when every row has all.

        P is that of the widest of `windows`. New tokens count as real: those after a row's end are seen by none of
        its tokens.
        """
        longest = self.get_seq_length()
        widths = [longest if window is None else min(window, longest) for window in windows]
        stored = max(widths, default=0)
        if bool((self.past_B >= stored).all()):
            return None
        is_real = torch.arange(stored) >= stored - self.past_B[:, None]
        return torch.nn.functional.pad(is_real, (0, num_new), value=True).to(device)

    def rotary_table(
        self, num_tokens: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the new tokens' positions, (L, D), or (B, 1, L, D) where rows stand apart."""
        start = int(self.past_B.min())
        spread = self.get_seq_length() - start
        cos, sin = rotary_table(spread + num_tokens, head_dim, theta, start, device, dtype)
        if spread == 0:
            return cos, sin
        index = ((self.past_B - start)[:, None] + torch.arange(num_tokens)).to(device)
        return cos[index][:, None], sin[index][:, None]

    def extend_stem(self, x_BLE: torch.Tensor, keep: int) -> torch.Tensor:
        """Puts the previous `keep` embeddings (zeros at first) before x and stores the last ones."""
        past = self.cache.stem_inputs
        if past is None:
            past = x_BLE.new_zeros(x_BLE.shape[0], keep, x_BLE.shape[2])
        joined = torch.cat([past, x_BLE], dim=1)
        self.cache.stem_inputs = last_tokens(joined, keep + self.new_B, keep)
        return joined
