"""Shuffles a sequence and keeps how often each pair of neighbours occurs.

Altschul & Erickson, Mol Biol Evol 2:526 (1985): a sequence is a walk along the edges of a multigraph of letters,
and every walk with the same edges and ends is a shuffle of it. Here the last edges out of each letter come from a
random walk (Wilson 1996), which makes all shuffles equally likely.
"""

import itertools
from collections import defaultdict

import numpy as np

from genesplice_hf.errors import DataError


def dinucleotide_shuffle(sequence: str, rng: np.random.Generator) -> str:
    """Returns a random sequence with the same pairs of neighbours, and so the same letters, first and last letter.

    Every such sequence is equally likely. Letters are taken as they stand: lower case and N are letters of their
    own; give upper case to have case ignored.

    Raises:
        DataError: the sequence is empty.
    """
    if not sequence:
        raise DataError("`sequence` must hold at least one letter, it is empty.")
    following: dict[str, list[str]] = defaultdict(list)
    for letter, after in itertools.pairwise(sequence):
        following[letter].append(after)
    last_edges = _last_edges(following, sequence[-1], rng)
    for letter, edges in following.items():
        if letter in last_edges:
            edges.remove(last_edges[letter])
        order = rng.permutation(len(edges))
        # Taken from the end, so the edge that must come last stands first.
        following[letter] = [*([last_edges[letter]] if letter in last_edges else []), *(edges[at] for at in order)]
    walk = [sequence[0]]
    while following[walk[-1]]:
        walk.append(following[walk[-1]].pop())
    return "".join(walk)


def _last_edges(following: dict[str, list[str]], end: str, rng: np.random.Generator) -> dict[str, str]:
    """For each letter but `end` the edge by which it is left for the last time: a random tree that leads to `end`."""
    edges: dict[str, str] = {}
    reached = {end}
    for start in list(following):
        letter = start
        while letter not in reached:
            choices = following[letter]
            edges[letter] = choices[int(rng.integers(len(choices)))]
            letter = edges[letter]
        letter = start
        while letter not in reached:
            reached.add(letter)
            letter = edges[letter]
    return {letter: edge for letter, edge in edges.items() if letter != end}
