"""Plots of results: speed-up per case, time against size, distance to the exact law against time. They need matplotlib."""

from __future__ import annotations

import textwrap
from pathlib import Path

from bench.lines import PEERS, comparisons, machine, name_of, newest, of_last_machine

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
COLORS = {"ebmfast": "#000000", "eager": "#999999", "torch.compile": "#cc79a7", "torchebm": "#d55e00", "jax": "#e69f00",
          "blackjax": "#0072b2"}
MARKERS = {"ebmfast": "o", "eager": "s", "torch.compile": "D", "torchebm": "^", "jax": "v", "blackjax": "P"}


def scaling(results, folder: Path) -> str:
    """Four plots: time of a call against chains, leaves, steps and dimension."""
    lines = newest(results.get("scaling", ()), "axis", "value")
    if not lines or (plt := _pyplot()) is None:
        return ""
    lines = of_last_machine(lines)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained", sharey=True)
    for axis, of in zip(axes, ("chains", "leaves", "steps", "dim")):
        points = sorted((e for e in lines if e["axis"] == of), key=lambda e: e["value"])
        for name in ("ebmfast", *PEERS):
            curve = [(e["value"], 1e3 * e["seconds"][name]["median"]) for e in points if name in e["seconds"]]
            if curve:
                axis.loglog(*zip(*curve), "-", marker=MARKERS[name], label=name_of(name), color=COLORS[name], markersize=5,
                            linewidth=2.2 if name == "ebmfast" else 1.2)
        values = [e["value"] for e in points]
        axis.set_xticks(values, [str(v) for v in values])
        axis.minorticks_off()
        axis.set(xlabel={"dim": "dimension", "leaves": "networks"}.get(of, of))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="ms per call")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.suptitle("Time of a call, AND of 4 networks 2-64-64-1, 1024 chains, 20 steps, one number varied (lower is faster)\n"
                    + machine(lines[-1]), fontsize=10)
    figure.savefig(folder / "scaling.png", dpi=90)
    plt.close(figure)
    return ("## Time against chains, leaves, steps and dimension\n\nFrom an AND of 4 networks 2-64-64-1, 1024 chains, 20 steps, one"
            f" number at a time. `python -m bench.scaling`, {machine(lines[-1])}.\n\n![Time of a call](performance/scaling.png)")


def quality(results, folder: Path) -> str:
    """Distance to the exact law against wall time: a row of plots for each target, a column for each sampler."""
    lines = newest(results.get("quality", ()), "case")
    if not lines or (plt := _pyplot()) is None:
        return ""
    lines, ways = of_last_machine(lines), ("Langevin", "MALA", "HMC")
    size = 12, 3.2 * len(lines) + 0.6
    figure, axes = plt.subplots(len(lines), 3, figsize=size, layout="constrained", squeeze=False, sharey="row")
    drawn = {}
    for row, line in zip(axes, lines):
        for axis, way in zip(row, ways):
            for name, curve in line["curves"].items():
                who, _, kind = name.rpartition(" ")
                if kind != way:
                    continue
                (drawn[who],) = axis.loglog([1e3 * p[1] for p in curve], [p[2] for p in curve], "-", marker=MARKERS[who],
                                            color=COLORS[who], markersize=5, linewidth=2.2 if who == "ebmfast" else 1.2)
            drawn["exact draws"] = axis.axhline(line["floor"], color="black", linewidth=1, linestyle="--")
            axis.set(title=f"{way}, {line['case']}", xlabel="ms")
            axis.title.set_fontsize(9)
            axis.yaxis.set_major_formatter(plt.FuncFormatter(lambda v, _: f"{v:g}"))
            axis.yaxis.set_minor_formatter(plt.FuncFormatter(lambda v, _: f"{v:g}" if f"{v:g}"[-1] in "1235" else ""))
            axis.grid(alpha=0.3)
        row[0].set(ylabel="total variation")
    order = [who for who in ("ebmfast", *PEERS, "exact draws") if who in drawn]
    figure.legend([drawn[who] for who in order], map(name_of, order), loc="outside lower center", ncols=len(order), fontsize=9,
                  frameon=False)
    figure.suptitle(f"Distance to the exact law after so much time, {lines[-1]['chains']} chains; lower and further left is"
                    f" better\n{machine(lines[-1])}", fontsize=10)
    figure.savefig(folder / "quality.png", dpi=90)
    plt.close(figure)
    return ("## Quality against time\n\nHow far chains are from the exact law, known by quadrature, after that much time; each"
            " point doubles the steps. Everybody has the same target, the same start N(0, 2²) and the same step size (of HMC also"
            " the same leapfrog steps); nobody is tuned beyond that. The dashed line is what exact draws of that number show."
            " Unadjusted Langevin levels off at its step-size bias, the same for everybody. `python -m bench.quality`,"
            f" {machine(lines[-1])}.\n\n![Distance to the exact law](performance/quality.png)")


def headline(results) -> list[tuple[str, dict, dict[str, float]]]:
    """What the README's picture shows: one line for each kind of work, of the machine measured last."""
    found = [c for c in comparisons(results) if c[1]["bench"] in ("chain", "overhead", "metropolis")]
    if not found:
        return []
    kept = of_last_machine([line for _, line, _ in found])
    shown = [c for c in found if any(c[1] is line for line in kept)]
    return [c for c in shown if c[1]["bench"] != "metropolis" or "32-64-64-1" in c[1]["case"]]


def picture(results, path: Path) -> bool:
    """The README's picture: bars of the peers' times over ours, on a logarithmic axis."""
    found = headline(results)
    if not found or (plt := _pyplot()) is None:
        return False
    last = max((line for _, line, _ in found), key=lambda e: e.get("time", ""))
    shown = [peer for peer in PEERS if any(peer in r for _, _, r in found)]
    counts = [len(r) for _, _, r in found]
    tops = [sum(counts[:i]) + 0.9 * i for i in range(len(counts))]  # a gap between cases
    figure, axis = plt.subplots(figsize=(8.5, 0.19 * (tops[-1] + counts[-1]) + 1.6), layout="constrained")
    for peer in shown:
        bars = [(top + [p for p in PEERS if p in r].index(peer), r[peer]) for top, (_, _, r) in zip(tops, found) if peer in r]
        drawn = axis.barh([y for y, _ in bars], [v - 1 for _, v in bars], 0.9, left=1, label=name_of(peer), color=COLORS[peer])
        for bar, (_, value) in zip(drawn, bars):
            side = {"x": 1.03 * value, "ha": "left"} if value >= 1 else {"x": value / 1.03, "ha": "right"}
            axis.text(**side, y=bar.get_y() + 0.45, s=f"{value:.1f}" if value >= 1 else f"{value:.2f}", fontsize=7.5, va="center")
    axis.axvline(1, color="black", linewidth=1.5, label="ebmfast")
    axis.set_yticks([top + (n - 1) / 2 for top, n in zip(tops, counts)], [_wrapped(name) for name, _, _ in found], fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(tops[-1] + counts[-1], -1)
    values = [v for _, _, r in found for v in r.values()]
    axis.set_xscale("log")
    axis.set_xlim(min(0.8, 0.7 * min(values)), 1.4 * max(values))
    marks = [v for v in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if axis.get_xlim()[0] <= v <= axis.get_xlim()[1]]
    axis.set_xticks(marks, [f"{v:g}x" for v in marks])
    axis.minorticks_off()
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_xlabel("time of the others over ebmfast's: right of the line, ebmfast is faster", fontsize=9)
    figure.suptitle(f"How many times as long the same chains take elsewhere\n{machine(last)}, {last['time'][:10]};"
                    " again with: make bench report", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(shown) + 1, fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(name, 34))


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot
