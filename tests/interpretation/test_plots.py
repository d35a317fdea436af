"""Pictures are written, wrap as promised and carry their labels; what they show is read back from the axes."""

import numpy as np
import pytest
from matplotlib.image import imread

from genesplice_hf.errors import GeneSpliceError
from genesplice_hf.interpretation.mutagenesis import MutagenesisResult, reference_letters
from genesplice_hf.interpretation.plots import plot_contact_maps, plot_logo, plot_mutagenesis_map


def values(length: int = 100) -> np.ndarray:
    rng = np.random.default_rng(0)
    table = np.zeros((length, 4))
    table[np.arange(length), rng.integers(0, 4, length)] = rng.normal(size=length)
    return table


def result(length: int = 100) -> MutagenesisResult:
    scores = np.random.default_rng(1).normal(size=(length, 4)).astype(np.float32)
    scores[:, 0] = 0
    scores[3] = np.nan
    sequence = "AAAN" + "A" * (length - 4)
    return MutagenesisResult(sequence, scores, 0.0, 0, length, "on", "logit")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_logo_is_written(tmp_path, suffix):
    path = tmp_path / f"logo{suffix}"
    plot_logo(values(20), path, "a title")
    assert path.stat().st_size > 1000


def test_logo_wraps_and_rows_share_scale():
    figure = plot_logo(values(160), title="a title", ylabel="logit", highlights=[(70, 80, "site")])
    rows = figure.axes
    assert [axes.get_xlim() for axes in rows] == [(-0.5, 74.5), (74.5, 149.5), (149.5, 224.5)]
    assert len({axes.get_ylim() for axes in rows}) == 1
    assert figure.get_suptitle() == "a title"
    assert {axes.get_ylabel() for axes in rows} == {"logit"}
    # The label stands once, where the span begins.
    assert ["site" in [text.get_text() for text in axes.texts] for axes in rows] == [True, False, False]


def test_logo_of_single_letters_spells_the_sequence_and_others_do_not():
    table = reference_letters("GATNC", np.array([1, -1, 0.5, 1, 0.01]))
    assert [text.get_text() for text in plot_logo(table).axes[0].texts] == ["G", "A", "T", "C"]
    assert not plot_logo(np.ones((5, 4))).axes[0].texts


def test_labels_do_not_run_into_each_other_or_out_of_the_picture():
    spans = [(2, 5, "a long label"), (6, 9, "another label"), (70, 74, "at the right end")]
    figure = plot_logo(np.ones((75, 4)), highlights=spans)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not boxes[0].overlaps(boxes[1])
    assert boxes[2].x1 <= figure.bbox.x1


def test_positions_count_from_the_given_one():
    figure = plot_logo(values(30), first_position=101)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["101", "110", "120", "130"]


def test_logo_shows_gaps_and_flat_values(tmp_path):
    table = np.zeros((10, 4))
    table[4] = np.nan
    plot_logo(table, tmp_path / "flat.png")
    assert imread(tmp_path / "flat.png").ndim == 3


def test_map_shows_the_scores_with_zero_in_the_middle(tmp_path):
    scanned = result()
    figure = plot_mutagenesis_map(scanned, tmp_path / "map.png", "a title", [(5, 9, "site")])
    first, second, bar = figure.axes
    np.testing.assert_allclose(first.images[0].get_array().filled(np.nan), scanned.scores[:75].T)
    assert second.images[0].get_array().shape == (4, 25)
    low, high = first.images[0].get_clim()
    assert low == -high == -np.nanmax(np.abs(scanned.scores))
    assert bar.get_ylabel() == "change of logit (on)"
    # A dot per reference base: 75 in the first row less the N.
    assert len(first.lines) == 74
    assert (tmp_path / "map.png").exists()


def test_bad_input_is_refused():
    with pytest.raises(GeneSpliceError, match=r"shape \(L, 4\)"):
        plot_logo(np.zeros((4, 10)))
    with pytest.raises(GeneSpliceError, match="outside the sequence of 10"):
        plot_logo(values(10), highlights=[(8, 11, "site")])
    with pytest.raises(GeneSpliceError, match="outside the sequence"):
        plot_mutagenesis_map(result(10), highlights=[(-1, 3, "site")])
    with pytest.raises(GeneSpliceError, match="`row_bp`"):
        plot_logo(values(10), row_bp=0)


def test_contact_maps_share_one_scale(tmp_path):
    one, other = np.zeros((6, 6)), np.full((6, 6), -1.5)
    one[0, 1] = np.nan
    figure = plot_contact_maps({"seen": one, "predicted": other}, tmp_path / "maps.png", "a title", bin_bp=2048)
    first, second, bar = figure.axes
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-1.5, 1.5)
    assert first.images[0].get_array().mask.sum() == 1
    assert first.get_title() == "seen" and first.get_xlabel() == "position (kb)"
    assert first.get_xlim()[1] == 6 * 2.048
    assert "observed" in bar.get_ylabel() and (tmp_path / "maps.png").exists()
    alone = plot_contact_maps({"seen": np.full((3, 3), np.nan)})
    assert alone.axes[0].get_xlabel() == "bin"


def test_bad_contact_maps_are_refused():
    for maps in ({}, {"seen": np.zeros((2, 3))}, {"seen": np.zeros(4)}):
        with pytest.raises(GeneSpliceError, match="`maps`"):
            plot_contact_maps(maps)
