"""The `genesplice` command: reads arguments, calls the rooms, prints where the result lies."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from genesplice_hf.data.tables import read_table
from genesplice_hf.data.uniprot import download_proteins
from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.hub.originals import convert as convert_original
from genesplice_hf.hub.publish import push_folder
from genesplice_hf.interpretation.mutagenesis import in_silico_mutagenesis, reference_letters, write_variant_table
from genesplice_hf.interpretation.plots import plot_logo
from genesplice_hf.models.registry import REGISTRY
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
    table: Annotated[Path, typer.Argument(help="csv, tsv or parquet table with a column of sequences.")],
    out: Annotated[Path, typer.Argument(help="npz file to write: one array (rows, hidden size) per layer.")],
    sequence_column: Annotated[str, typer.Option(help="Column that holds the DNA.")] = "sequence",
    pooling: Annotated[str, typer.Option(help="mean, max or cls.")] = "mean",
) -> None:
    """Write one embedding per row and layer."""
    rows = read_table(table, sequence_column=sequence_column, label_column=None)
    network, tokenizer = AutoModel.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    embeddings = EmbeddingExtractor(network, tokenizer, pooling=pooling)(rows["sequence"])  # type: ignore[arg-type]
    np.savez(out, **{f"layer_{layer}": array for layer, array in embeddings.items()})  # type: ignore[arg-type]
    console.print(f"wrote {out}: {len(embeddings)} layers, {len(rows)} rows")


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
