"""Equal blocks of genomes, and a held-out loss that asks the same bases in the same way whatever the context.

Training windows of every length tile the same blocks, so that all lengths see the same bases equally often. Held-out
blocks are corrupted once, whole, and only then cut: a model with a short context is asked for the same bases, hidden
by the same masks, as one with a long context; it merely sees less around them.

Shapes: L bases of a block, C bases of context, N asked positions.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.windows import iter_windows
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval
from genesplice_hf.objectives.masked import DnaMLMCollator
from training.corpus import region_of
from training.markov import MarkovChain, base_codes, count, predictions

MASK_SEED = 1_000_003  # of the held-out masks; training seeds are small numbers
MARKOV_ORDERS = (0, 3, 5, 8)


class Block(NamedTuple):
    """L bases of a genome: its name, where they stand, and the bases."""

    genome: str
    name: str
    sequence: str


class Question(NamedTuple):
    """One held-out block as a model reads it: ids (L,), the N positions asked, and their bases (A0 C1 G2 T3)."""

    block: Block
    ids: torch.Tensor
    position: np.ndarray
    base: np.ndarray


def cut_blocks(
    data_dir: str, genomes: Sequence[str], held_out: Sequence[str], block_bp: int
) -> tuple[list[Block], list[Block]]:
    """Blocks to train on, and held-out ones: whole, without N, not overlapping, what is left over unused.

    Raises:
        DataError: a held-out region that no genome has, or no block on one of the two sides.
    """
    train, kept, missing = [], [], set(held_out)
    for file in genomes:
        genome, label = Genome(Path(data_dir) / file), file.split(".")[0]
        regions = {text: region for text in held_out if (region := region_of(genome, text)) is not None}
        missing -= set(regions)
        kept += _blocks(genome, label, list(regions.values()), [], block_bp)
        train += _blocks(genome, label, None, list(regions.values()), block_bp)
    if missing:
        raise DataError(f"`held_out` names {sorted(missing)}, which no genome in `genomes` has; correct the names.")
    for side, blocks in (("to train on", train), ("held out", kept)):
        if not blocks:
            raise DataError(f"no block of {block_bp} bp {side}: give longer regions, or shorter `contexts`.")
    return train, kept


def _blocks(
    genome: Genome, label: str, regions: list[Interval] | None, exclude: list[Interval], block_bp: int
) -> list[Block]:
    """Blocks of the regions (None: every contig) outside `exclude`; none where none fits."""
    contigs = [Interval(chrom, 0, length) for chrom, length in genome.contigs.items()]
    long_enough = [region for region in (contigs if regions is None else regions) if region.length_bp >= block_bp]
    if not long_enough or not _fits(long_enough, exclude, block_bp):
        return []
    rows = iter_windows(
        genome, block_bp, regions=long_enough, exclude=exclude, max_n_fraction=0.0, last="drop", name=label
    )
    return [Block(label, row["example_id"], row["sequence"]) for row in rows]


def _fits(regions: list[Interval], exclude: list[Interval], block_bp: int) -> bool:
    """Whether a block fits between the excluded stretches of some region; `iter_windows` raises where none does."""
    for region in regions:
        holes = sorted((hole.start, hole.end) for hole in exclude if region.overlaps(hole))
        start = region.start
        for first, end in [*holes, (region.end, region.end)]:
            if first - start >= block_bp:
                return True
            start = max(start, end)
    return False


def write_blocks(path: Path, blocks: Sequence[Block]) -> None:
    """A FASTA file with one record per block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f">{block.name}\n{block.sequence}\n" for block in blocks), encoding="ascii")


def ask(
    blocks: Sequence[Block],
    tokenizer: PreTrainedTokenizerBase,
    mlm_probability: float | None,
    shortest_bp: int,
) -> list[Question]:
    """What every model is asked about the held-out blocks.

    Args:
        blocks: held-out bases.
        tokenizer: of single bases.
        mlm_probability: share of hidden bases; None asks a causal model for every base.
        shortest_bp: the shortest context; the first base of such a window has nothing before it, so that causal
            models of any context are not asked for it.
    """
    return [_question(block, tokenizer, mlm_probability, shortest_bp) for block in blocks]


def _question(
    block: Block, tokenizer: PreTrainedTokenizerBase, mlm_probability: float | None, shortest_bp: int
) -> Question:
    truth = base_codes(block.sequence)
    if mlm_probability is None:
        ids = tokenizer([block.sequence], return_tensors="pt")["input_ids"][0]
        position = np.flatnonzero((truth >= 0) & (np.arange(len(truth)) % shortest_bp > 0))
        return Question(block, ids, position, truth[position])
    collator = DnaMLMCollator(tokenizer, mlm_probability=mlm_probability, seed=MASK_SEED)
    batch = collator([{"sequence": block.sequence, "example_id": block.name}])
    position = np.flatnonzero((batch["labels"][0].numpy() != -100) & (truth >= 0))
    return Question(block, batch["input_ids"][0], position, truth[position])


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    context_bp: int,
    is_causal: bool,
) -> dict[str, dict[str, float]]:
    """Loss (nats per base) and accuracy by genome, and `all` together, of windows of `context_bp` bases.

    Probabilities are renormalised over A, C, G, T.
    """
    columns = tokenizer.convert_tokens_to_ids(list("ACGT"))
    tally = _Tally()
    for question in questions:
        logits = block_logits(model, question.ids, context_bp)
        asked = logits[torch.from_numpy(question.position) - int(is_causal)][:, columns]
        tally.add(question, asked.double().log_softmax(-1).numpy())
    return tally.result()


@torch.inference_mode()
def block_logits(model: PreTrainedModel, ids: torch.Tensor, context_bp: int) -> torch.Tensor:
    """(L, V) logits of one block, cut into L / C windows that do not see each other."""
    model.eval()
    return model(input_ids=ids.view(-1, context_bp)).logits.float().flatten(0, 1)


def markov_losses(train: Sequence[Block], questions: Sequence[Question]) -> dict[str, dict[str, dict[str, float]]]:
    """The same measurement of Markov chains that were counted on the training blocks, both strands.

    They see the true bases before a position, and the whole block whatever the context.
    """
    chains = {order: MarkovChain(order) for order in range(max(MARKOV_ORDERS) + 1)}
    count(chains, (block.sequence for block in train))
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    for question in questions:
        for order, table in predictions(chains, MARKOV_ORDERS, base_codes(question.block.sequence)):
            tallies[f"markov-{order}"].add(question, table[question.position])
    return {name: tally.result() for name, tally in tallies.items()}


class _Tally:
    """Sums of log probability and hits, by genome."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))

    def add(self, question: Question, log_probabilities: np.ndarray) -> None:
        """Log probabilities (N, 4) of a block's asked positions."""
        picked = log_probabilities[np.arange(len(question.base)), question.base]
        hits = log_probabilities.argmax(1) == question.base
        self.sums[question.block.genome] += (-picked.sum(), hits.sum(), len(question.base))

    def result(self) -> dict[str, dict[str, float]]:
        return {genome: _means(sums) for genome, sums in self._with_all()}

    def _with_all(self) -> Iterator[tuple[str, Any]]:
        yield "all", sum(self.sums.values())
        yield from self.sums.items()


def _means(sums: np.ndarray) -> dict[str, float]:
    loss, hits, bases = (float(value) for value in sums)
    return {"loss": loss / bases, "accuracy": hits / bases, "bases": bases}
