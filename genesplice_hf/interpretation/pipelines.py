"""The transformers pipeline `mutagenesis`: sequence in, effect of every substitution out; never files."""

from typing import Any

from transformers import AutoModelForSequenceClassification, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.interpretation.mutagenesis import MutagenesisResult, in_silico_mutagenesis

TASK = "mutagenesis"

# Options of in_silico_mutagenesis by the name that the pipeline gives them: transformers keeps `batch_size`
# for the number of input sequences, which says nothing here.
OPTIONS = {
    "target": "target",
    "score": "score",
    "strands": "strands",
    "start": "start",
    "end": "end",
    "progress": "progress",
    "mutants_per_batch": "batch_size",
}


class MutagenesisPipeline(Pipeline):
    """In-silico mutagenesis of one sequence or of a list of them.

    ``pipeline("mutagenesis", model=..., tokenizer=...)("ACGT...", strands="both")`` returns a dict with
    `sequence`, `target_label`, `score_name`, `reference_score`, `scores` (L, 4) in A, C, G, T order and
    `position_importance` (L,): the fields of `MutagenesisResult`, where units and signs are said. A list of
    sequences returns a list of dicts. Options: `target`, `score`, `strands`, `start`, `end`, `progress` (off
    unless asked for) and `mutants_per_batch`.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise GeneSpliceError(
                f"`{unknown[0]}` is no option of the mutagenesis pipeline; use one of {list(OPTIONS)}"
            )
        return {}, {OPTIONS[name]: value for name, value in options.items()}, {}

    def preprocess(self, input_: str, **_: Any) -> dict[str, str]:
        """Wraps one sequence; it is checked where it is used."""
        return {"sequence": input_}

    def _forward(self, input_tensors: dict[str, Any], **options: Any) -> MutagenesisResult:
        sequence = input_tensors["sequence"]
        if isinstance(sequence, list):
            raise GeneSpliceError(
                "`batch_size` batches sequences, which mutagenesis does not; pass `mutants_per_batch` instead"
            )
        return in_silico_mutagenesis(self.model, self.tokenizer, sequence, **{"progress": False, **options})

    def postprocess(self, model_outputs: MutagenesisResult, **_: Any) -> dict[str, Any]:
        """Spreads the result into a plain dict."""
        return {
            "sequence": model_outputs.sequence,
            "target_label": model_outputs.target_label,
            "score_name": model_outputs.score_name,
            "reference_score": model_outputs.reference_score,
            "scores": model_outputs.scores,
            "position_importance": model_outputs.position_importance,
        }


def register_pipelines() -> None:
    """Makes `pipeline("mutagenesis", ...)` known to transformers; calling it again changes nothing."""
    # transformers warns when a task is registered twice.
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=MutagenesisPipeline,
            pt_model=AutoModelForSequenceClassification,
            type="text",
        )
