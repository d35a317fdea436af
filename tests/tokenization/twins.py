"""Slow twins: the rules of the tokenizers written down one token at a time."""

import re

N_IUPAC = str.maketrans("RYSWKMBDHV", "NNNNNNNNNN")


def non_overlapping(sequence, k, phase=0):
    """Splits at N, cuts k-mers from the left, leaves single bases; the first run begins with `phase` single bases."""
    head = re.match(f"N*[ACGT]{{0,{phase}}}", sequence).group() if phase else ""
    return [*head, *re.findall(f"[ACGT]{{{k}}}|.", sequence[len(head) :])]


def overlapping(sequence, k):
    """All windows of k bases."""
    return [sequence[i : i + k] for i in range(len(sequence) - k + 1)]


def lookup(tokens, vocabulary, unknown):
    """Ids of tokens by dictionary."""
    return [vocabulary.get(token, unknown) for token in tokens]


def random_sequences(generator, n, longest=200):
    """Random strings: bases only, bases with 5 % N, and runs of N, of 0 to `longest` bases."""
    out = []
    for number in range(n):
        length = int(generator.integers(0, longest + 1))
        weights = [0.25] * 4 + [0.0] if number % 3 == 0 else [0.2375] * 4 + [0.05]
        letters = generator.choice(list("ACGTN"), size=length, p=weights)
        if number % 3 == 2 and length > 4:
            start = int(generator.integers(0, length - 2))
            letters[start : start + int(generator.integers(1, 30))] = "N"
        out.append("".join(letters))
    return out
