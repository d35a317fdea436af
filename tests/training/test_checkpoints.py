"""What a finished part of a run leaves behind, and what a restart reads."""

import math

from genesplice_hf.scoring.metrics import summarize
from training.checkpoints import defined, stored_result
from training.reports import write_json


def test_a_metric_that_is_not_defined_survives_the_file(tmp_path):
    """JSON has no NaN: the file says null, and a restart summarises what an uninterrupted run would."""
    runs = [{"test": {"mcc": 0.5, "auroc": math.nan}}, {"test": {"mcc": 0.25, "auroc": 0.75}}]
    write_json(tmp_path / "result.json", runs[0])
    stored = stored_result(tmp_path / "result.json", resume=True)
    assert stored == {"test": {"mcc": 0.5, "auroc": None}}
    found = summarize([defined(run["test"]) for run in (stored, runs[1])])
    assert found["auroc"]["n"] == 1 and found["auroc"]["mean"] == 0.75
    assert found["mcc"] == summarize([run["test"] for run in runs])["mcc"]


def test_only_a_restart_reads_it(tmp_path):
    assert stored_result(tmp_path / "result.json", resume=True) is None
    write_json(tmp_path / "result.json", {"steps": 3})
    assert stored_result(tmp_path / "result.json", resume=False) is None
    assert stored_result(tmp_path / "result.json", resume=True) == {"steps": 3}
