"""The `mutagenesis` pipeline equals the function it wraps, for one sequence and for lists."""

import numpy as np
import pytest
from interpretation.toy_sequence_models import single_base_tokenizer, tiny_bert
from transformers import pipeline

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.interpretation.mutagenesis import in_silico_mutagenesis
from genesplice_hf.interpretation.pipelines import MutagenesisPipeline, register_pipelines


@pytest.fixture
def pipe() -> MutagenesisPipeline:
    register_pipelines()
    return pipeline("mutagenesis", model=tiny_bert(), tokenizer=single_base_tokenizer(), device="cpu")


def test_pipeline_equals_the_function(pipe):
    expected = in_silico_mutagenesis(pipe.model, pipe.tokenizer, "ACGTA", target=0, strands="both")
    found = pipe("ACGTA", target=0, strands="both", mutants_per_batch=4)
    assert isinstance(pipe, MutagenesisPipeline)
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-6)
    np.testing.assert_allclose(found["position_importance"], expected.position_importance, atol=1e-6)
    assert found["reference_score"] == pytest.approx(expected.reference_score, abs=1e-6)
    assert (found["sequence"], found["target_label"], found["score_name"]) == ("ACGTA", "LABEL_0", "logit")


def test_lists_keep_their_order(pipe):
    found = pipe(["ACGTA", "GG"])
    assert [one["sequence"] for one in found] == ["ACGTA", "GG"]
    np.testing.assert_allclose(found[1]["scores"], pipe("GG")["scores"], atol=1e-6)


def test_options_given_at_construction_hold(pipe):
    fixed = MutagenesisPipeline(model=pipe.model, tokenizer=pipe.tokenizer, device="cpu", target=0, end=2)
    assert fixed("ACGTA")["target_label"] == "LABEL_0"
    assert np.isnan(fixed("ACGTA")["scores"][2:]).all()


def test_mistakes_are_refused(pipe):
    with pytest.raises(GeneSpliceError, match="`tarjet` is no option"):
        pipe("ACGT", tarjet=0)
    with pytest.raises(GeneSpliceError, match="mutants_per_batch"):
        pipe(["ACGT", "ACGT"], batch_size=2)
    with pytest.raises(SequenceError, match="'X' at position 1"):
        pipe("XA")


# transformers runs code found in a folder only when it is allowed to, or is handed the class.
@pytest.mark.parametrize("door", [{"pipeline_class": MutagenesisPipeline}, {"trust_remote_code": True}])
def test_a_saved_pipeline_loads_back(pipe, tmp_path, door):
    pipe.save_pretrained(tmp_path)
    info = pipe.model.config.custom_pipelines["mutagenesis"]
    assert info["impl"].endswith("MutagenesisPipeline")
    assert tuple(info["pt"]) == ("AutoModelForSequenceClassification",)
    again = pipeline("mutagenesis", model=str(tmp_path), device="cpu", **door)
    np.testing.assert_allclose(again("ACGTA")["scores"], pipe("ACGTA")["scores"], atol=1e-6)


def test_registering_twice_is_silent_and_imports_no_files_or_plots(run_python):
    out = run_python(
        "import logging, sys\n"
        "from transformers.utils.logging import get_logger\n"
        "from genesplice_hf.interpretation.pipelines import register_pipelines\n"
        "get_logger('transformers').addHandler(logging.StreamHandler(sys.stdout))\n"
        "register_pipelines(); register_pipelines()\n"
        "print({'pysam', 'matplotlib', 'logomaker', 'genesplice_hf.data'} & set(sys.modules))\n"
    )
    assert out.strip() == "set()"
