"""Token ids of a sequence and of its single substitutions, by index arithmetic where one token is one base.

Shapes: B mutants, L bases, T tokens. Bases count in A, C, G, T order.
"""

from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from genesplice_hf.genome.alphabet import BASES

Inputs = dict[str, torch.Tensor]


class SingleBaseLayout(NamedTuple):
    """One token per base: base i of the sequence is token `prefix` + i; `base_ids` has shape (4,)."""

    prefix: int
    base_ids: torch.Tensor


class MutantSource(Protocol):
    """Makes model inputs for one sequence and its substitutions."""

    reference: Inputs

    def mutants(self, positions_B: torch.Tensor, bases_B: torch.Tensor) -> Inputs:
        """Inputs of B sequences, each with base `bases_B` (index into ACGT) at 0-based `positions_B`."""


class IndexedMutants:
    """Writes the new base's id over a copy of the reference ids: the tokenizer is not called again."""

    def __init__(self, reference: Inputs, layout: SingleBaseLayout):
        self.reference = reference
        self._prefix = layout.prefix
        self._base_ids = layout.base_ids.to(reference["input_ids"].device)

    def mutants(self, positions_B: torch.Tensor, bases_B: torch.Tensor) -> Inputs:
        inputs = {name: tensor.repeat(len(positions_B), 1) for name, tensor in self.reference.items()}
        ids_BT = inputs["input_ids"]
        rows = torch.arange(len(positions_B), device=ids_BT.device)
        columns = positions_B.to(ids_BT.device) + self._prefix
        ids_BT[rows, columns] = self._base_ids[bases_B.to(ids_BT.device)]
        return inputs


class TokenizedMutants:
    """Spells every mutant and tokenises it: right for k-mers and BPE, where a substitution moves tokens."""

    def __init__(self, reference: Inputs, tokenizer: PreTrainedTokenizerBase, sequence: str):
        self.reference = reference
        self._tokenizer = tokenizer
        self._sequence = sequence

    def mutants(self, positions_B: torch.Tensor, bases_B: torch.Tensor) -> Inputs:
        pairs = zip(positions_B.tolist(), bases_B.tolist(), strict=True)
        texts = [self._sequence[:p] + BASES[base] + self._sequence[p + 1 :] for p, base in pairs]
        return encode(self._tokenizer, texts, self.reference["input_ids"].device)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], device: torch.device) -> Inputs:
    """Tokenises `texts` into one padded batch on `device`; nothing is truncated."""
    # A tokenizer without a padding token can still batch sequences of one length.
    padding = tokenizer.pad_token is not None
    encoding = tokenizer(texts, padding=padding, truncation=False, return_tensors="pt")
    return {name: tensor.to(device) for name, tensor in encoding.items()}


def mutant_source(tokenizer: PreTrainedTokenizerBase, sequence: str, device: torch.device) -> MutantSource:
    """Chooses index arithmetic where the tokenizer proves to be single-base, else tokenising."""
    reference = encode(tokenizer, [sequence], device)
    layout = single_base_layout(tokenizer, sequence, reference["input_ids"][0])
    if layout is None:
        return TokenizedMutants(reference, tokenizer, sequence)
    return IndexedMutants(reference, layout)


def single_base_layout(
    tokenizer: PreTrainedTokenizerBase, sequence: str, ids_T: torch.Tensor
) -> SingleBaseLayout | None:
    """Returns where the bases sit in `ids_T`, or None unless every token stands for one base.

    Two things are checked: no word of the vocabulary spells several bases (else a substitution could merge or
    split tokens), and the ids of `sequence` are those of its bases, in order, after some prefix.
    """
    # Asked of the tokenizer, not of its vocabulary: some write their bases in lower case.
    base_ids = tokenizer(BASES, add_special_tokens=False)["input_ids"]
    if _spells_several_bases(tokenizer) or len(base_ids) != 4 or len({*base_ids, tokenizer.unk_token_id}) < 5:
        return None
    bases_L = torch.tensor([BASES.find(letter) for letter in sequence])
    known_L = bases_L >= 0
    expected_L = torch.tensor(base_ids)[bases_L]
    for prefix in range(len(ids_T) - len(sequence) + 1):
        found_L = ids_T[prefix : prefix + len(sequence)].cpu()
        if torch.equal(found_L[known_L], expected_L[known_L]):
            return SingleBaseLayout(prefix, torch.tensor(base_ids))
    return None


def _spells_several_bases(tokenizer: PreTrainedTokenizerBase) -> bool:
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    spelled = ("".join(filter(str.isalpha, word)).upper() for word in words)
    return any(len(word) > 1 and set(word) <= {*BASES, "N"} for word in spelled)
