"""How near the output is to stock's, over compression."""

from collections.abc import Iterator

from ..records import Group
from .style import (
    Palette,
    Picture,
    kept_axis,
    legend,
    lines_of,
    panels,
    percent,
    plain_symlog,
    variants,
)


def fidelity(group: Group, look: Palette) -> Iterator[Picture]:
    """Agreement and KL divergence, a line per method."""
    lines = lines_of(arm for arm in group.arms if arm.metrics.fidelity)
    if not lines:
        return
    number = variants((arms[0].method, name) for name, arms in lines.items())
    titles = {"agreement": "agreement with stock", "kl": "KL divergence (at least)"}
    figure, axes = panels(list(titles.values()))
    for axis, key in zip(axes, titles, strict=True):
        for name, arms in lines.items():
            shares = [arm.kept_share or 0.0 for arm in arms]
            values = [getattr(arm.metrics.fidelity, key) for arm in arms]
            style = look.look(arms[0].method, number[name])
            axis.plot(shares, values, label=name, **style)
        kept_axis(axis, [a.kept_share or 1 for arms in lines.values() for a in arms])
    percent(axes[0].yaxis)
    axes[0].set_ylim(-0.03, 1.05)
    axes[1].set_ylabel("nats per token")
    plain_symlog(axes[1], axes[1].dataLim.y1)
    legend(figure)
    yield Picture(
        "fidelity",
        "Fidelity over compression",
        "Left, the share of stock's tokens that the arm would choose too; right, how "
        "far its probabilities are from stock's (0 is the same). Over the kept share.",
        figure,
    )
