"""What is drawn, read back from the figure that is saved."""

import sys

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dynmoe_hf.analysis.plots import (
    plot_experts_over_training,
    plot_experts_per_layer,
    plot_quality_over_experts,
    plot_time_over_experts,
)

HISTORY = [
    {"step": 10, "loss": 3.0, "experts_per_token": 3.5},
    {"step": 10, "eval_loss": 3.1, "eval_experts_per_token": 3.0},
    {"step": 20, "loss": 2.5, "experts_per_token": 2.5},
    {"step": 20, "train_runtime": 1.0},
]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved, each after it was written."""
    figures = []
    save = Figure.savefig

    def savefig(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def lines(figure):
    (axes,) = figure.axes
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.lines}


def check_readable(figure, names):
    (axes,) = figure.axes
    assert axes.get_xlabel() and axes.get_title()
    assert "experts per token" in axes.get_ylabel().lower()
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 1.05 * max(max(line.get_ydata()) for line in axes.lines)  # markers are whole
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    looks = {(to_hex(line.get_color()), line.get_marker()) for line in axes.lines}
    assert len(looks) == len(names)
    figure.canvas.draw()
    frame = figure.bbox
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *figure.legends[0].get_texts()):
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def test_experts_over_training(saved, tmp_path):
    plot_experts_over_training({"top_p": HISTORY, "top_k": [{"step": 5, "experts_per_token": 2.0}]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert lines(saved[0]) == {"top_p": [(10, 3.5), (20, 2.5)], "top_k": [(5, 2.0)]}
    check_readable(saved[0], ["top_p", "top_k"])


def test_experts_over_evaluations(saved, tmp_path):
    plot_experts_over_training({"top_p": HISTORY}, tmp_path / "a.png", key="eval_experts_per_token")
    assert lines(saved[0]) == {"top_p": [(10, 3.0)]}


def test_experts_per_layer(saved, tmp_path):
    runs = {f"run {number}": [4.0, 2.5, 1.0 + number] for number in range(9)}
    plot_experts_per_layer(runs, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(PNG)
    assert lines(saved[0])["run 3"] == [(0, 4.0), (1, 2.5), (2, 4.0)]
    assert all(tick == int(tick) for tick in saved[0].axes[0].get_xticks())
    check_readable(saved[0], list(runs))


def test_time_over_experts(saved, tmp_path):
    times = {"ragged": {4.0: 0.004, 1.0: 0.001}, "grouped_mm_padded": {1.0: 0.008, 4.0: 0.008}}
    plot_time_over_experts(times, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)
    assert lines(saved[0]) == {"ragged": [(1, 1.0), (4, 4.0)], "grouped_mm_padded": [(1, 8.0), (4, 8.0)]}
    (axes,) = saved[0].axes
    assert "Milliseconds" in axes.get_ylabel() and axes.get_ylim()[0] == 0
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == list(times)


def test_quality_over_experts(saved, tmp_path):
    points = {"piqa": [(2.0, 0.6, 0.05), (1.0, 0.5, 0.04)], "boolq": [(1.5, 0.7, 0.0)]}
    plot_quality_over_experts(points, tmp_path / "d.png", "acc")
    assert (tmp_path / "d.png").read_bytes().startswith(PNG)
    (axes,) = saved[0].axes
    drawn = {bars.get_label(): list(zip(*bars.lines[0].get_data(), strict=True)) for bars in axes.containers}
    assert drawn == {"piqa": [(1.0, 0.5), (2.0, 0.6)], "boolq": [(1.5, 0.7)]}
    ((low, high),) = [segment[:, 1] for segment in axes.containers[1].lines[2][0].get_segments()]
    assert low == high == 0.7
    assert axes.get_ylabel() == "acc" and axes.get_xlim()[0] == 0


@pytest.mark.parametrize(
    ("plot", "runs", "message"),
    [
        (plot_time_over_experts, {}, "no run"),
        (plot_experts_over_training, {}, "no run"),
        (plot_experts_per_layer, {}, "no run"),
        (plot_experts_over_training, {"a": [{"step": 1, "loss": 2.0}]}, "'a' has no entry with 'experts_per_token'"),
        (plot_experts_per_layer, {"a": [1.0], "b": []}, "'b' has no MoE layer"),
    ],
)
def test_nothing_to_draw_is_refused(plot, runs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot(runs, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_experts_per_layer({"a": [1.0]}, tmp_path / "a.png")
