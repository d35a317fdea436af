"""The tokenizer that a published DNA language model needs, whatever its tokenizer_config.json says.

Several of those files lead astray: DNABERT's folds case and turns every token into `[UNK]`, HyenaDNA's adds a `[CLS]`
that pre-training did not have, Nucleotide Transformer's lists two tokens that the model does not embed. Ids come from
vocab.txt or tokenizer.json where the checkpoint has one, and must stand in the order that its family is known to have.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from genesplice_hf.errors import CheckpointError
from genesplice_hf.tokenization.export import read_vocabulary
from genesplice_hf.tokenization.tokenization_bpe import BPEDnaTokenizer
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import MSATokenizer, NucleotideTokenizer
from genesplice_hf.tokenization.vocabularies import MAX_K, Vocabulary

_NT_V1 = (("<unk>", "<pad>", "<mask>", "<cls>"), (*"ATCGN", "<eos>", "<bos>"))
_NT_V2 = (("<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>"), tuple("ATCGN"))
_DNABERT = (("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), ())
# <eos> and <bos> stand behind the last embedded token in the first generation.
_UNEMBEDDED = 2


class TokenizerFiles(NamedTuple):
    """Paths of a checkpoint's vocab.txt and tokenizer.json, None where it has none."""

    vocab: str | None
    tokenizer: str | None


def nt_v1(files: TokenizerFiles, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Non-overlapping k-mers, cut to the tokens that the model embeds, so that no id can lie beyond its table."""
    head, tail = _NT_V1
    listed = len(head) + len(tail)
    k = _k_of(config.vocab_size, listed - _UNEMBEDDED) or _k_of(config.vocab_size, listed)
    limit = config.max_position_embeddings - config.pad_token_id - 1
    return _kmers(files, config, Vocabulary(head, tail, _demand(k, config), "ATCG"), None, limit)


def nt_v2(files: TokenizerFiles, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Non-overlapping k-mers; `<eos>` and `<bos>` are embedded here."""
    head, tail = _NT_V2
    k = _demand(_k_of(config.vocab_size, len(head) + len(tail)), config)
    # Two rows of the published table never were positions of tokens.
    limit = config.max_position_embeddings - 2
    return _kmers(files, config, Vocabulary(head, tail, k, "ATCG"), None, limit)


def dnabert1(files: TokenizerFiles, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Overlapping k-mers; the published `do_lower_case` is not read."""
    head, tail = _DNABERT
    k = _demand(_k_of(config.vocab_size, len(head)), config)
    return _kmers(files, config, Vocabulary(head, tail, k, "ATCG"), 1, config.max_position_embeddings)


def dnabert2(files: TokenizerFiles, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The byte-pair merges of the checkpoint's tokenizer.json; ALiBi sets no limit of length."""
    if files.tokenizer is None:
        raise CheckpointError("DNABERT-2 needs the tokenizer.json of its checkpoint, for its merges are nowhere else.")
    return BPEDnaTokenizer(tokenizer_file=files.tokenizer)


def hyenadna(files: TokenizerFiles, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Single bases and a final `[SEP]`, as in pre-training; two positions are kept for special tokens."""
    return NucleotideTokenizer("hyenadna", **_given(files), model_max_length=config.max_seq_len - 1)


def caduceus(files: TokenizerFiles, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Single bases; PlantCaduceus (7 tokens, padded to 8) has the order of GPN."""
    return NucleotideTokenizer("plantcaduceus" if config.vocab_size <= 8 else "caduceus", **_given(files))


def gpn(files: TokenizerFiles, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Single bases without special tokens; only the RoFormer encoder has a limit of length."""
    limited = getattr(config, "encoder", None) == "roformer"
    limit = config.max_position_embeddings if limited else None
    return NucleotideTokenizer("gpn", **_given(files), model_max_length=limit)


def gpn_msa(files: TokenizerFiles, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Single bases and gaps, for the reference row and for the rows beside it."""
    return MSATokenizer(**_given(files), model_max_length=config.max_position_embeddings)


MAKERS: dict[str, Callable[[TokenizerFiles, PreTrainedConfig], PreTrainedTokenizerBase]] = {
    "nt_v1": nt_v1,
    "nt_v2": nt_v2,
    "dnabert1": dnabert1,
    "dnabert2": dnabert2,
    "hyenadna": hyenadna,
    "caduceus": caduceus,
    "gpn_convnet": gpn,
    "gpn": gpn,
    "gpn_msa": gpn_msa,
}


def make_tokenizer(source: str, files: TokenizerFiles, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model of `source` with our `config`.

    Raises:
        CheckpointError: nobody knows the source's vocabulary, or the checkpoint's is larger than the model's table.
        SequenceError: the checkpoint lists its tokens in another order than its family is known to have.
    """
    if source not in MAKERS:
        raise CheckpointError(
            f"nobody knows which ids {source!r} gives to bases; load the weights alone with `from_original`."
        )
    tokenizer = MAKERS[source](files, config)
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of the checkpoint has {len(tokenizer)} tokens, the model embeds {config.vocab_size}; they "
            "do not belong together."
        )
    return tokenizer


def _given(files: TokenizerFiles) -> dict[str, Any]:
    return {"vocab_file": files.vocab, "tokenizer_file": None if files.vocab else files.tokenizer}


def _k_of(size: int, others: int) -> int | None:
    return next((k for k in range(2, MAX_K + 1) if 4**k + others == size), None)


def _demand(k: int | None, config: PreTrainedConfig) -> int:
    if k is None:
        raise CheckpointError(
            f"`vocab_size` {config.vocab_size} is not that of a k-mer vocabulary of this family; the checkpoint is "
            "another model (a protein language model has the same tensor names)."
        )
    return k


def _kmers(
    files: TokenizerFiles, config: PreTrainedConfig, known: Vocabulary, stride: int | None, limit: int
) -> KmerTokenizer:
    """A tokenizer of the first `vocab_size` tokens of the checkpoint, which must be those of `known`."""
    origin, listed = read_vocabulary(files.vocab, files.tokenizer)
    tokens = list((known if listed is None else listed).tokens())
    _check_order(tokens, known, config.vocab_size, origin)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_text("".join(f"{token}\n" for token in tokens[: config.vocab_size]), encoding="utf-8")
        tokenizer = KmerTokenizer(vocab_file=str(path), stride=stride, model_max_length=limit)
    tokenizer.vocab_source = origin
    return tokenizer


def _check_order(tokens: list[str], known: Vocabulary, size: int, origin: str) -> None:
    for index, (theirs, ours) in enumerate(zip(tokens, _first(known, size), strict=False)):
        if theirs != ours:
            raise CheckpointError(
                f"{origin} has {theirs!r} as id {index} where this family has {ours!r}; in another order the ids "
                "would mean other sequences than in training. Get the vocabulary that belongs to the weights."
            )
    if len(tokens) < size:
        raise CheckpointError(
            f"{origin} lists {len(tokens)} tokens, the model embeds {size}; get the vocabulary of these weights."
        )


def _first(vocabulary: Vocabulary, size: int) -> Iterator[str]:
    return (token for token, _ in zip(vocabulary.tokens(), range(size), strict=False))
