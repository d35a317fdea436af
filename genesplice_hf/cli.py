"""The `genesplice` command: reads arguments, calls the rooms, prints where the result lies."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from genesplice_hf.data.cell_matrix import open_cells
from genesplice_hf.data.h5ad import GeneExpressionProcessor
from genesplice_hf.data.tables import read_table
from genesplice_hf.data.uniprot import download_proteins
from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.hub.originals import convert as convert_original
from genesplice_hf.hub.publish import push_folder
from genesplice_hf.interpretation.mutagenesis import in_silico_mutagenesis, reference_letters, write_variant_table
from genesplice_hf.interpretation.plots import plot_logo
from genesplice_hf.models.auto import AutoModelForMaskedExpression
from genesplice_hf.models.registry import REGISTRY
from genesplice_hf.objectives.expression import DataCollatorForExpression
from genesplice_hf.scoring.cell_embeddings import embed_cells
from genesplice_hf.scoring.embeddings import EmbeddingExtractor
from genesplice_hf.version import __version__

app = typer.Typer(help="Genomic models with Hugging Face Transformers.", no_args_is_help=True)
console = Console()

ModelArgument = Annotated[str, typer.Argument(help="Folder or Hub id of a model.")]


@app.command()
def version() -> None:
    """Print the version and the models that the package carries."""
    console.print(f"genesplice-hf {__version__}: {', '.join(REGISTRY)}")


@app.command()
def embed(
    model: ModelArgument,
    table: Annotated[Path, typer.Argument(help="csv, tsv or parquet table with sequences, or cells as .h5ad.")],
    out: Annotated[Path, typer.Argument(help="npz file to write (an array per layer), or .h5ad for cells.")],
    sequence_column: Annotated[str, typer.Option(help="Column that holds the DNA.")] = "sequence",
    pooling: Annotated[str, typer.Option(help="mean, max or cls.")] = "mean",
    layer: Annotated[str | None, typer.Option(help="Matrix of the .h5ad: X, raw or a layer.")] = None,
    gene_column: Annotated[str | None, typer.Option(help="Column of var with gene names, for .h5ad.")] = None,
    obsm_key: Annotated[str, typer.Option(help="Where the cells' vectors go in the .h5ad.")] = "X_genesplice",
) -> None:
    """Write one embedding per row and layer; for an .h5ad one per cell, into `obsm`."""
    if table.suffix == ".h5ad":
        _embed_cells(model, table, out, layer, gene_column, obsm_key)
        return
    rows = read_table(table, sequence_column=sequence_column, label_column=None)
    network, tokenizer = AutoModel.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    embeddings = EmbeddingExtractor(network, tokenizer, pooling=pooling)(rows["sequence"])  # type: ignore[arg-type]
    np.savez(out, **{f"layer_{layer}": array for layer, array in embeddings.items()})  # type: ignore[arg-type]
    console.print(f"wrote {out}: {len(embeddings)} layers, {len(rows)} rows")


def _embed_cells(
    model: str, cells: Path, out: Path, layer: str | None, gene_column: str | None, obsm_key: str
) -> None:
    processor = GeneExpressionProcessor.from_pretrained(model)
    # Labels and filters of training have no say here: every cell gets a vector.
    given = {"layer": layer, "gene_column": gene_column}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changes |= {"label_key": None, "obs_columns": (), "min_cell_genes": 0}
    processor.settings = replace(processor.settings, **changes)
    network = AutoModelForMaskedExpression.from_pretrained(model)
    longest = getattr(network.config, "max_seq_len", None)
    pad_value = processor.settings.pad_value
    collate = DataCollatorForExpression(processor.tokenizer, longest, "top_expressed", pad_value=pad_value, seed=0)
    vectors = embed_cells(network, processor(cells), collate)
    with open_cells(cells, processor.settings.layer) as matrix:
        matrix.adata.obsm[obsm_key] = vectors
        matrix.adata.write_h5ad(out)
    console.print(f"wrote {out}: obsm[{obsm_key!r}], {len(vectors)} cells")


@app.command()
def mutagenesis(
    model: ModelArgument,
    sequence: Annotated[str, typer.Argument(help="The sequence to mutate, base by base.")],
    out: Annotated[Path, typer.Option(help="Variant table to write.")] = Path("variants.tsv"),
    logo: Annotated[Path | None, typer.Option(help="PNG of the sequence logo.")] = None,
    target: Annotated[str | None, typer.Option(help="Label to score; by default the second of two.")] = None,
) -> None:
    """Score every single-base substitution with a sequence classifier."""
    network = AutoModelForSequenceClassification.from_pretrained(model).eval()
    result = in_silico_mutagenesis(network, AutoTokenizer.from_pretrained(model), sequence, target=target)
    write_variant_table(result, out)
    console.print(f"wrote {out}")
    if logo is not None:
        plot_logo(reference_letters(result.sequence, result.position_importance), logo, ylabel="mean loss (logit)")
        console.print(f"wrote {logo}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a published DNA language model.")],
    out: Annotated[Path, typer.Argument(help="New or empty folder to write our layout into.")],
    task: Annotated[str, typer.Option(help="base, masked_lm, causal_lm, ...; auto = the head it holds.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Rewrite a published DNA language model as config, safetensors and tokenizer of this package."""
    loaded = convert_original(source, out, task, revision)
    console.print(f"wrote {out}: {type(loaded.model).__name__} from {loaded.spec.family}")


@app.command()
def proteins(
    genes: Annotated[list[str], typer.Argument(help="Gene names, such as CTCF SPI1.")],
    out: Annotated[Path, typer.Option(help="FASTA file to write.")] = Path("proteins.fasta"),
    organism: Annotated[int, typer.Option(help="NCBI taxon: 9606 human, 10090 mouse.")] = 9606,
    unreviewed: Annotated[bool, typer.Option(help="Also take entries that nobody has reviewed.")] = False,
) -> None:
    """Download the protein sequences of genes from UniProt into one FASTA file."""
    count = download_proteins(genes, out, organism, reviewed=not unreviewed)
    console.print(f"wrote {out}: {count} sequences")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder that `publish` wrote and verified.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    private: Annotated[bool, typer.Option(help="Create the repository as a private one.")] = False,
    tag: Annotated[str | None, typer.Option(help="Tag for the commit.")] = None,
) -> None:
    """Send a published folder to the Hub in one commit."""
    result = push_folder(folder, repo_id, private=private, tag=tag)
    console.print(f"pushed {result.folder} to {result.url}")


def main() -> None:
    """The entry point: our own errors are messages, everything else is a traceback."""
    try:
        app()
    except GeneSpliceError as error:
        Console(stderr=True).print(f"error: {error}")
        raise SystemExit(2) from error
