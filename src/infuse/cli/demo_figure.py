"""The picture of the demo's two loss curves."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from infuse.cli.demo_training import MAX_LOSS_DIFFERENCE, Training


def draw(result: Training, path: Path, caption: str) -> None:
    """Both losses over the steps, and below them how far they are apart. Writes a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    eager, infuse = result.runs["eager"], result.runs["infuse"]
    steps = range(1, len(eager.losses) + 1)
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(9, 6.5), height_ratios=(3, 1), layout="constrained"
    )
    above.plot(steps, eager.losses, color="0.6", linewidth=3.5, label="eager, training batch")
    above.plot(steps, infuse.losses, color="tab:blue", linewidth=1, label='backend="infuse", training batch')
    above.plot(*zip(*eager.validation.items()), "o", color="0.6", markersize=10, label="eager, held-out files")
    above.plot(*zip(*infuse.validation.items()), "x", color="tab:red", label='backend="infuse", held-out files')
    above.set_ylabel("loss (nats per byte)")
    above.set_title("One Llama trained twice, with and without Infuse")
    above.legend()
    above.grid(alpha=0.3)
    differences = [abs(a - b) for a, b in zip(eager.losses, infuse.losses)]
    # A logarithmic axis has no zero: two equal losses are drawn at the resolution of fp32.
    below.semilogy(steps, [max(value, 1e-7) for value in differences], color="tab:blue", linewidth=1)
    below.axhline(MAX_LOSS_DIFFERENCE, color="tab:red", linestyle="--", linewidth=1)
    below.text(1, MAX_LOSS_DIFFERENCE, "bound", color="tab:red", va="bottom")
    below.set_ylim(top=10 * MAX_LOSS_DIFFERENCE)
    below.set_ylabel("difference of\nthe training losses")
    below.set_xlabel(f"step\n\n{caption}")
    below.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
