"""GeneSplice HF: genomic models for Hugging Face Transformers.

Importing this package registers every model, tokenizer and pipeline with transformers, so that
`AutoModel.from_pretrained(...)` and its siblings just work; peft learns the adapter targets with the first model.
"""

from functools import partial

from genesplice_hf.adaptation.peft_targets import register_peft_targets
from genesplice_hf.hub.originals import load_dna_lm as load_dna_lm
from genesplice_hf.interpretation.pipelines import register_pipelines
from genesplice_hf.layers.strict_loading import BEFORE_FIRST_MODEL
from genesplice_hf.models.original import from_original as from_original
from genesplice_hf.models.original import to_original as to_original
from genesplice_hf.models.registry import REGISTRY
from genesplice_hf.tokenization.registration import register_tokenizer
from genesplice_hf.tokenization.tokenization_bpe import BPEDnaTokenizer
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import MSATokenizer, NucleotideTokenizer
from genesplice_hf.version import __version__ as __version__

for _tokenizer in (NucleotideTokenizer, KmerTokenizer, MSATokenizer, BPEDnaTokenizer, GeneTokenizer):
    register_tokenizer(_tokenizer)
BEFORE_FIRST_MODEL.extend(partial(register_peft_targets, _entry.config_class) for _entry in REGISTRY.values())
register_pipelines()
