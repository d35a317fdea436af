"""The facts about a DNA language model that loading and scoring need, read off its config and tokenizer.

Reads attributes only: no model and no tokenizer class is imported, so any model of ours or of the library fits.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from genesplice_hf.errors import SequenceError

_NO_LIMIT = 10**20  # the library writes "no limit" as 1e30
_TARGETS = ("lora_targets", "ia3_targets", "ia3_feedforward")
_RECORD = ("source_keys", "ignored_keys", "generated_keys")
_BERT_SIZES = {69, 261, 1029, 4101}


class LengthPlan(NamedTuple):
    """What a sequence of a given length costs.

    Attributes:
        tokens: of N-free sequence with its special tokens; None for BPE, where content decides.
        padding: tokens to add before the model can take it; 0 where the model takes any number.
        nearest_bp: the nearest length in bp that the model takes, the length itself where it fits.
    """

    tokens: int | None
    padding: int
    nearest_bp: int


@dataclass(frozen=True)
class DnaLMSpec:
    """What one needs to know to run and to score a DNA language model.

    Attributes:
        family: a source name of `from_original` ("nt_v1", "dnabert1", ...) or the config's `model_type`.
        objective: "mlm" or "clm".
        tokenization: "kmer_nonoverlap", "kmer_overlap", "char", "bpe" or "msa".
        k: bases per full token, 1 for single bases, None for BPE.
        n_prefix, n_suffix: special tokens before and after a sequence.
        mask_token_id: id of the mask, None for causal models without one.
        nucleotide_token_ids: ids of the single-base tokens A, C, G, T, in this order; None where there are none.
        max_tokens, max_bp: hard limits in tokens and in bp of N-free sequence, None if unlimited.
        soft_max_bp: length seen in pre-training, in bp, None if not recorded.
        rc: "none", "post_hoc" (average both strands) or "equivariant".
        lora_targets, ia3_targets, ia3_feedforward: module names for PEFT.
        source_keys, ignored_keys, generated_keys: audit record of the import of foreign weights.
        fixes: what loading changed of the published config and tokenizer, in words.
    """

    family: str
    objective: str
    tokenization: str
    k: int | None
    n_prefix: int
    n_suffix: int
    mask_token_id: int | None
    nucleotide_token_ids: tuple[int, ...] | None
    max_tokens: int | None = None
    max_bp: int | None = None
    soft_max_bp: int | None = None
    rc: str = "none"
    lora_targets: tuple[str, ...] = ()
    ia3_targets: tuple[str, ...] = ()
    ia3_feedforward: tuple[str, ...] = ()
    source_keys: tuple[str, ...] = field(default=(), repr=False)
    ignored_keys: tuple[str, ...] = field(default=(), repr=False)
    generated_keys: tuple[str, ...] = field(default=(), repr=False)
    fixes: tuple[str, ...] = field(default=(), repr=False)

    def plan_length(self, n_bp: int) -> LengthPlan:
        """Tokens that `n_bp` bases without N need, and the nearest length that the model takes.

        Raises:
            SequenceError: `n_bp` is negative.
        """
        if n_bp < 0:
            raise SequenceError(f"`n_bp` must be 0 or more, it was {n_bp}.")
        nearest = n_bp if self.max_bp is None else min(n_bp, self.max_bp)
        if self.k is None:
            return LengthPlan(None, 0, nearest)
        body = (
            max(n_bp - self.k + 1, min(n_bp, 1)) if self.tokenization == "kmer_overlap" else sum(divmod(n_bp, self.k))
        )
        return LengthPlan(self.n_prefix + body + self.n_suffix, 0, nearest)


def dna_lm_spec(config: Any, tokenizer: Any) -> DnaLMSpec:
    """Computes the `DnaLMSpec` of a model and its tokenizer.

    Args:
        config: the model's config; `config.conversion` (a dict), where present, is the record of the import.
        tokenizer: a tokenizer of ours, or any with the library's interface (taken for BPE).

    Raises:
        SequenceError: the tokenizer can emit ids that the model does not embed.
    """
    record = getattr(config, "conversion", None) or {}
    scheme, k = _tokenization(tokenizer)
    prefix, suffix = _frame(tokenizer)
    max_tokens = _max_tokens(config, tokenizer)
    nucleotides = _nucleotides(tokenizer, scheme)
    _check_embedded(config, nucleotides, tokenizer.mask_token_id)
    return DnaLMSpec(
        family=record.get("source") or _family(config, tokenizer),
        objective=_objective(config),
        tokenization=scheme,
        k=k,
        n_prefix=prefix,
        n_suffix=suffix,
        mask_token_id=tokenizer.mask_token_id,
        nucleotide_token_ids=nucleotides,
        max_tokens=max_tokens,
        max_bp=_max_bp(max_tokens, scheme, k, prefix + suffix),
        soft_max_bp=getattr(config, "soft_max_bp", None),
        rc=_strands(config),
        **{name: tuple(getattr(config, name, None) or ()) for name in _TARGETS},
        **{name: tuple(record.get(name, ())) for name in _RECORD},
    )


def _tokenization(tokenizer: Any) -> tuple[str, int | None]:
    k, stride = getattr(tokenizer, "k", None), getattr(tokenizer, "stride", None)
    if k is None:
        return "bpe", None
    if k > 1:
        return ("kmer_overlap" if stride < k else "kmer_nonoverlap"), k
    return ("msa" if "-" in getattr(tokenizer, "symbols", "") else "char"), 1


def _frame(tokenizer: Any) -> tuple[int, int]:
    if hasattr(tokenizer, "add_prefix"):
        return len(tokenizer.add_prefix), len(tokenizer.add_suffix)
    empty = list(tokenizer("")["input_ids"])
    sep = tokenizer.sep_token_id
    suffix = int(bool(empty) and sep is not None and empty[-1] == sep)
    return len(empty) - suffix, suffix


def _nucleotides(tokenizer: Any, scheme: str) -> tuple[int, ...] | None:
    if hasattr(tokenizer, "nucleotide_token_ids"):
        found = tokenizer.nucleotide_token_ids
        return None if found is None else tuple(found)
    found = [tokenizer.get_vocab().get(base) for base in "ACGT"]
    return None if None in found else tuple(found)


def _check_embedded(config: Any, nucleotides: tuple[int, ...] | None, mask: int | None) -> None:
    size = getattr(config, "vocab_size", None)
    highest = max([*(nucleotides or ()), -1 if mask is None else mask])
    if size is not None and highest >= size:
        raise SequenceError(
            f"`tokenizer` emits id {highest} but the model embeds {size} tokens; load the tokenizer of this model."
        )


def _family(config: Any, tokenizer: Any) -> str:
    model_type = getattr(config, "model_type", "") or ""
    if model_type == "esm":
        return "nt_v1"
    if model_type == "bert" and getattr(config, "vocab_size", None) in _BERT_SIZES:
        return "dnabert1"
    return model_type


def _objective(config: Any) -> str:
    named = getattr(config, "objective", None)
    if named in ("mlm", "clm"):
        return named
    architectures = getattr(config, "architectures", None) or ()
    causal = getattr(config, "is_decoder", False) or getattr(config, "is_causal", False)
    return "clm" if causal or any(name.endswith("ForCausalLM") for name in architectures) else "mlm"


def _strands(config: Any) -> str:
    named = getattr(config, "rc", None)
    if named in ("none", "post_hoc", "equivariant"):
        return named
    return "equivariant" if getattr(config, "rc_equivariant", False) or getattr(config, "rcps", False) else "none"


def _max_tokens(config: Any, tokenizer: Any) -> int | None:
    limits = [getattr(config, "max_tokens", None), _positions(config), getattr(tokenizer, "model_max_length", None)]
    known = [int(limit) for limit in limits if limit is not None and limit < _NO_LIMIT]
    return min(known) if known else None


def _positions(config: Any) -> int | None:
    """Learned positions of the two library models that we load as they are; ESM numbers them after the pad id."""
    positions = getattr(config, "max_position_embeddings", None)
    kind = getattr(config, "position_embedding_type", "absolute")
    model_type = getattr(config, "model_type", "")
    if positions is None or kind != "absolute" or model_type not in ("esm", "bert"):
        return None
    return positions - config.pad_token_id - 1 if model_type == "esm" else positions


def _max_bp(max_tokens: int | None, scheme: str, k: int | None, n_special: int) -> int | None:
    if max_tokens is None or k is None:
        return None
    tokens = max_tokens - n_special
    return tokens + k - 1 if scheme == "kmer_overlap" else tokens * k
