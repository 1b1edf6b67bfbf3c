"""Error against cost: what the stop rules and protocols of a bundle are worth, in one picture."""

import io
from collections.abc import Sequence

from resnet_ensemble.server.scores import Score

_MARKERS = {"full": "o", "exact": "s", "calibrated": "*"}


def draw(scores: Sequence[Score], title: str) -> bytes:
    """A PNG with a point for each protocol and stop rule. Every score must have multiply-adds. Needs matplotlib."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # an extra: who draws nothing does not need it

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    colours = {protocol: f"C{i}" for i, protocol in enumerate(dict.fromkeys(score.protocol for score in scores))}
    for protocol, colour in colours.items():
        of_protocol = [score for score in scores if score.protocol == protocol]
        costs = []
        for score in of_protocol:
            assert score.multiply_adds is not None
            costs.append(score.multiply_adds)
            axes.plot(
                score.multiply_adds,
                score.ensemble,
                marker=_MARKERS[score.stop],
                markersize=12 if score.stop == "calibrated" else 7,
                color=colour,
                linestyle="none",
                label=f"{protocol}, {score.stop}",
            )
        axes.plot(costs, [score.ensemble for score in of_protocol], color=colour, linewidth=0.7)
    axes.set(xscale="log", xlabel="multiply-adds of an image", ylabel="top-1 error (%)", title=title)
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(fontsize="small")
    content = io.BytesIO()
    # Without the software's version in the file, the same scores give the same bytes.
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()
