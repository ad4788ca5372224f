"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

from tinygpt.checkpoint import LOSS_PLOT, read_metrics
from tinygpt.files import replacing


def plot_loss(folder: Path) -> Path | None:
    """Draws loss.png, the train and val loss of the run in `folder` over its iterations.

    Returns:
        The picture's path, or None where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = read_metrics(folder)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [row["iteration"] for row in rows],
        [row["train_loss"] for row in rows],
        color="#9ecae1",
        label="train, one batch",
    )
    evaluated = [row for row in rows if row["val_loss"] is not None]
    axes.plot(
        [row["iteration"] for row in evaluated],
        [row["val_loss"] for row in evaluated],
        color="#d95f0e",
        marker="o",
        markersize=4,
        label="val",
    )
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(folder / LOSS_PLOT) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return folder / LOSS_PLOT
