"""GeneSplice HF: genomic models for Hugging Face Transformers.

Importing this package registers every model, tokenizer, pipeline and adapter target with transformers and peft, so
that `AutoModel.from_pretrained(...)` and its siblings just work.
"""

from genesplice_hf.adaptation.peft_targets import register_peft_targets
from genesplice_hf.interpretation.pipelines import register_pipelines
from genesplice_hf.models.registry import REGISTRY
from genesplice_hf.tokenization.registration import register_tokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer
from genesplice_hf.version import __version__ as __version__

register_tokenizer(NucleotideTokenizer)
for _entry in REGISTRY.values():
    register_peft_targets(_entry.config_class)
register_pipelines()
