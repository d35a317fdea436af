"""Masked-token objectives: hide tokens (or bases), and ask for them back.

`DnaMLMCollator` serves tokens that share no bases (single bases, non-overlapping k-mers, BPE);
`KmerSpanCollator` serves overlapping k-mers, where hiding single tokens hides nothing.

Shapes: B examples, L tokens, N tokens of the whole batch laid end to end, M tokens chosen for prediction.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.objectives.collation import IGNORED, DnaCollator, TokenBatch, check_share
from genesplice_hf.objectives.sampling import bits, happens, to_below, to_uniform
from genesplice_hf.objectives.spans import KmerCode, KmerStream, MaskedRuns
from genesplice_hf.objectives.vocabulary import DnaVocabulary

_STREAM_SELECT, _STREAM_HOLD, _STREAM_ACTION, _STREAM_TOKEN = 1, 2, 3, 4
_MASK, _RANDOM, _KEEP = 0, 1, 2
# Intermediate arrays of this many tokens stay in the cache and below malloc's threshold for fresh pages, which
# made large batches twice as slow.
_TOKENS_AT_A_TIME = 32_768


class _MaskingCollator(DnaCollator):
    """What both masking collators share: shares of mask, random and keep, and the order of the steps."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float,
        shares: tuple[float, float, float],
        soft_mask_weight: float,
        rc_probability: float,
        pad_to_multiple_of: int | None,
        seed: int | None,
    ):
        if tokenizer.mask_token_id is None:
            raise GeneSpliceError(
                f"`tokenizer` ({type(tokenizer).__name__}) has no mask token; use `CLMCollator`, or a "
                "tokenizer with a mask token"
            )
        super().__init__(tokenizer, pad_to_multiple_of, soft_mask_weight, rc_probability, seed)
        self.mlm_probability = check_share("mlm_probability", mlm_probability, low_open=True)
        names = ("mask_share", "random_share", "keep_share")
        self.shares = tuple(check_share(name, share) for name, share in zip(names, shares, strict=True))
        if abs(sum(shares) - 1) > 1e-9:
            raise GeneSpliceError(f"`{'`, `'.join(names)}` must sum to 1, they are {shares}")
        self.vocabulary = DnaVocabulary(tokenizer)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids` (corrupted), `attention_mask`, `labels` (the true id of every chosen token, -100
        elsewhere) and, when `soft_mask_weight` is below 1, `loss_weight`; all (B,L)."""
        batch = self.read(features)
        self.vocabulary.check(batch.input_ids)
        labels = np.full_like(batch.input_ids, IGNORED)
        input_ids = batch.input_ids.copy()
        for tokens, part in batch.parts(_TOKENS_AT_A_TIME):
            chosen, stand_ins = self.corrupt(part, self._is_maskable(part))
            labels[tokens][chosen] = part.input_ids[chosen]
            input_ids[tokens][chosen] = stand_ins
        return self.emit(batch, input_ids, labels)

    def _is_maskable(self, batch: TokenBatch) -> np.ndarray:
        is_maskable = self.vocabulary.is_dna[batch.input_ids] & (batch.attention_mask != 0)
        if "special_tokens_mask" in batch.extras:
            is_maskable &= ~batch.extras["special_tokens_mask"]
        return is_maskable

    def corrupt(self, batch: TokenBatch, is_maskable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the indices (M,) of the chosen tokens and the ids (M,) that take their place."""
        raise NotImplementedError

    def actions(self, words: np.ndarray) -> np.ndarray:
        """Draws mask, random or keep (int64) for each word of random bits."""
        return np.searchsorted(np.cumsum(self.shares)[:_KEEP], to_uniform(words), side="right")


class DnaMLMCollator(_MaskingCollator):
    """Masks tokens that share no bases: single bases, non-overlapping k-mers, BPE.

    Each DNA token is chosen with `mlm_probability`; a chosen token becomes the mask token, a random DNA token
    (of as many bases where the vocabulary holds all of those) or stays, in the given shares (Devlin et al.,
    BERT, 2019, section 3.1). Special tokens, pads, N and unknown tokens are never chosen nor drawn.

    A feature holds `input_ids` (with optional `attention_mask`, `token_type_ids`, `special_tokens_mask` and,
    for `soft_mask_weight` below 1, `soft_mask`: the lower-case share of each token), or a raw `sequence`,
    which is tokenized here. `example_id` (a number or a string) names it; without one its content does.
    Further columns, old `labels` among them, are left aside.

    Args:
        tokenizer: any DNA tokenizer with a mask token and a pad token, but not one of overlapping k-mers.
        mlm_probability: expected share of labelled tokens among the DNA tokens, in (0, 1].
        mask_share, random_share, keep_share: what happens to a labelled token; they sum to 1.
        span_length: None chooses tokens independently. A number chooses runs of tokens whose length is
            geometric with this mean; single-base tokenizers only. It must be at least
            1 / (1 - mlm_probability), the mean run of independent choices.
        soft_mask_weight: loss weight of lower-case bases, in [0, 1] (GPN: 0.1 in training, 0 in evaluation).
        rc_probability: probability that a raw `sequence` is read from the opposite strand.
        pad_to_multiple_of: pads L up to a multiple of this many tokens.
        seed: all draws depend on (seed, epoch, example) alone; None draws a seed once and logs it.

    Raises:
        GeneSpliceError: arguments out of range, an empty batch, or features without the needed columns.
        SequenceError: an example without tokens, or a letter that the tokenizer refuses.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        keep_share: float = 0.1,
        span_length: float | None = None,
        soft_mask_weight: float = 1.0,
        rc_probability: float = 0.0,
        pad_to_multiple_of: int | None = None,
        seed: int | None = None,
    ):
        shares = (mask_share, random_share, keep_share)
        super().__init__(
            tokenizer, mlm_probability, shares, soft_mask_weight, rc_probability, pad_to_multiple_of, seed
        )
        if getattr(tokenizer, "k", 1) > 1 and getattr(tokenizer, "stride", None) == 1:
            raise GeneSpliceError(
                "`tokenizer` cuts overlapping k-mers: a masked token can be read off its neighbours; use "
                "`KmerSpanCollator`"
            )
        self.span_length = span_length
        if span_length is not None:
            self._check_span_length(span_length)

    def _check_span_length(self, span_length: float) -> None:
        if (self.vocabulary.num_bases > 1).any():
            raise GeneSpliceError("`span_length` is for single-base tokenizers; pass None for k-mers and BPE")
        is_number = isinstance(span_length, (int, float))
        if not is_number or self.mlm_probability == 1 or not span_length >= 1 / (1 - self.mlm_probability):
            raise GeneSpliceError(
                f"`span_length` ({span_length}) must be at least 1 / (1 - `mlm_probability`), the mean run "
                f"of independent choices at {self.mlm_probability}; raise it or pass None"
            )

    def corrupt(self, batch: TokenBatch, is_maskable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = batch.rows
        positions = batch.positions(batch.attention_mask != 0)
        is_chosen = happens(bits(batch.keys, rows, positions, _STREAM_SELECT), self.mlm_probability)
        if self.span_length is not None:
            is_chosen = self._runs(self.span_length, batch, rows, positions, is_chosen)
        chosen = np.flatnonzero(is_chosen & is_maskable)
        rows, positions, stand_ins = rows[chosen], positions[chosen], batch.input_ids[chosen]
        action = self.actions(bits(batch.keys, rows, positions, _STREAM_ACTION))
        words = bits(batch.keys, rows, positions, _STREAM_TOKEN)
        stand_ins = np.where(action == _RANDOM, self.vocabulary.replace(stand_ins, words), stand_ins)
        return chosen, np.where(action == _MASK, self.tokenizer.mask_token_id, stand_ins)

    def _runs(
        self,
        span_length: float,
        batch: TokenBatch,
        rows: np.ndarray,
        positions: np.ndarray,
        is_chosen_alone: np.ndarray,
    ) -> np.ndarray:
        """Chooses runs: a stationary two-state chain, enters with `enter`, leaves with 1 / span_length.

        One uniform number moves both states: below `enter` both become chosen, from `stay` on both become
        free, and in between both stay as they are. So the state is that of the last number outside the gap,
        which needs no loop. The first token of an example draws from the stationary share.
        """
        stay = 1 - 1 / span_length
        enter = self.mlm_probability / (1 - self.mlm_probability) / span_length
        draw = to_uniform(bits(batch.keys, rows, positions, _STREAM_HOLD))
        is_first = np.zeros(len(rows), bool)
        is_first[batch.starts] = True
        state = np.where(is_first, is_chosen_alone, draw < enter)
        is_set = is_first | (draw < enter) | (draw >= stay)
        last_set = np.maximum.accumulate(np.where(is_set, np.arange(len(rows)), 0))
        return state[last_set]


class KmerSpanCollator(_MaskingCollator):
    """Masks bases, not tokens: every overlapping k-mer (stride 1) that touches a hidden base is masked.

    In overlapping k-mers a masked token can be read off its neighbours unless a base that it holds is hidden
    in all of them. Mask, random or keep is therefore drawn once per maximal run of masked tokens; drawn per
    token, as in DNABERT (Ji et al., Bioinformatics 37:2112, 2021), 45 % of the 6-mer labels stay readable.

    Features as for `DnaMLMCollator`. Windows with N (`[UNK]`), special tokens and pads are never chosen.

    Args:
        tokenizer: a tokenizer of overlapping k-mers that holds all 4**k of them.
        mlm_probability: expected share of labelled tokens among the k-mers, in (0, 1] (`"hide_bases"`).
        span_bases: m, bases hidden together; m + k - 1 tokens touch them. `"hide_bases"` only.
        scheme: `"hide_bases"`, or `"dnabert"`: centres with probability `mlm_probability` / k, each with the
            k tokens from (k-1)//2 before to k//2 after it, so that exactly one base is hidden; merging spans
            bring the labelled share to 1 - (1 - mlm_probability / k)**k (14.1 % for k = 6 and 0.15).
        mask_share, random_share, keep_share: what happens to a run; they sum to 1.
        random_kind: `"consistent"` replaces the hidden bases by random ones and cuts the k-mers anew, so that
            the lie agrees with itself; `"independent"` draws each token alone, as the reference does.
        soft_mask_weight, rc_probability, pad_to_multiple_of, seed: as for `DnaMLMCollator`.

    Raises:
        GeneSpliceError: arguments out of range, an empty batch, missing columns, tokens that do not overlap.
        SequenceError: an example without tokens, or a letter that the tokenizer refuses.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = 0.15,
        span_bases: int = 6,
        scheme: Literal["hide_bases", "dnabert"] = "hide_bases",
        mask_share: float = 0.8,
        random_share: float = 0.1,
        keep_share: float = 0.1,
        random_kind: Literal["consistent", "independent"] = "consistent",
        soft_mask_weight: float = 1.0,
        rc_probability: float = 0.0,
        pad_to_multiple_of: int | None = None,
        seed: int | None = None,
    ):
        shares = (mask_share, random_share, keep_share)
        super().__init__(
            tokenizer, mlm_probability, shares, soft_mask_weight, rc_probability, pad_to_multiple_of, seed
        )
        if scheme not in ("hide_bases", "dnabert"):
            raise GeneSpliceError(f"`scheme` must be 'hide_bases' or 'dnabert', it is {scheme!r}")
        if random_kind not in ("consistent", "independent"):
            raise GeneSpliceError(f"`random_kind` must be 'consistent' or 'independent', not {random_kind!r}")
        if isinstance(span_bases, bool) or not isinstance(span_bases, int) or span_bases < 1:
            raise GeneSpliceError(f"`span_bases` must be a whole number, 1 or more, it is {span_bases!r}")
        self.code = KmerCode(tokenizer)
        self.span_bases = span_bases
        self.scheme = scheme
        self.random_kind = random_kind

    @property
    def span_tokens(self) -> int:
        """Tokens that one span masks, away from the ends."""
        return self.code.k if self.scheme == "dnabert" else self.span_bases + self.code.k - 1

    def corrupt(self, batch: TokenBatch, is_maskable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stream = KmerStream(batch, is_maskable, self.code, self.tokenizer.unk_token_id)
        is_masked = stream.covered(self._starts(batch, stream), self.span_tokens)
        runs = stream.runs(is_masked)
        words = bits(batch.keys, stream.rows[runs.first], stream.counters[runs.first], _STREAM_ACTION)
        action = self.actions(words)
        masked, random = runs.tokens(action == _MASK), runs.tokens(action == _RANDOM)
        input_ids = batch.input_ids.copy()
        input_ids[stream.tokens[masked]] = self.tokenizer.mask_token_id
        input_ids[stream.tokens[random]] = self._random_ids(batch, stream, runs, action == _RANDOM)
        chosen = stream.tokens[is_masked]
        return chosen, input_ids[chosen]

    def _starts(self, batch: TokenBatch, stream: KmerStream) -> np.ndarray:
        """Draws where spans start; spans may start before a stretch, so that its ends are masked as often."""
        windows = stream.windows(self.span_tokens)
        words = bits(batch.keys, windows.rows, windows.counters, _STREAM_SELECT)
        if self.scheme == "hide_bases":
            return happens(words, 1 - (1 - self.mlm_probability) ** (1 / self.span_tokens))
        return happens(words, self.mlm_probability / self.code.k) & windows.is_center(self.code.k // 2)

    def _random_ids(
        self, batch: TokenBatch, stream: KmerStream, runs: MaskedRuns, is_random: np.ndarray
    ) -> np.ndarray:
        tokens = runs.tokens(is_random)
        if self.random_kind == "independent":
            words = bits(batch.keys, stream.rows[tokens], stream.counters[tokens], _STREAM_TOKEN)
            return self.code.ids[to_below(words, len(self.code.ids))]
        hidden = stream.hidden_bases(runs, is_random)
        rows, counters = stream.windows(self.code.k).locate(hidden)
        return stream.with_bases(tokens, hidden, to_below(bits(batch.keys, rows, counters, _STREAM_TOKEN), 4))
