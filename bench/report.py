"""`python -m bench.report`: renders bench/results/*.jsonl into docs/performance.md and docs/performance/*.png.

Of every case the newest line of each processor counts. What stands outside of the markers in docs/performance.md stays. Plots
need matplotlib; without it tables are written alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by `make report`: begin -->", "<!-- made by `make report`: end -->"
PEERS = ("eager", "torch.compile", "torchebm", "jax", "blackjax")
VARYING = ("seconds", "time", "commit")
COLORS = {"ebmfast": "#1b6e8a", "eager": "#999999", "torchebm": "#d1495b", "jax": "#edae49", "blackjax": "#66a182",
          "torch.compile": "#6b4e71"}


def load(folder: Path) -> dict[str, list[dict]]:
    """All lines by bench, oldest first."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            if line.strip():
                entry = json.loads(line)
                found.setdefault(entry["bench"], []).append(entry)
    return {bench: sorted(lines, key=lambda e: e.get("time", "")) for bench, lines in found.items()}


def newest(lines: Iterable[dict], *keys: str) -> list[dict]:
    """The last line of each case: what agrees in `keys`, processor and instruction set."""
    found = {}
    for line in lines:
        found[tuple(str(line.get(k)) for k in (*keys, "device", "isa"))] = line
    return list(found.values())


def machine(line: dict) -> str:
    """The machine of a line, in words."""
    used = line.get("threads_used", line.get("threads"))
    return f"{line['device']} ({line['isa']}), {used} thread{'s' if used != 1 else ''}, torch {line['torch']}"


def ratios(line: dict) -> dict[str, float]:
    """Each peer's time over ours; of JAX the faster form."""
    unit = line.get("seconds") or line.get("us") or {}
    times = {name: t["median"] for name, t in unit.items() if isinstance(t, dict)}
    if "ebmfast" not in times:
        return {}
    forms = [t for name, t in times.items() if name.startswith("jax")]
    times |= {"jax": min(forms)} if forms else {}
    return {peer: times[peer] / times["ebmfast"] for peer in PEERS if peer in times}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def comparisons(results: dict[str, list[dict]]) -> list[tuple[str, dict, dict[str, float]]]:
    """(case, line, ratios) of all benches that have peers."""
    lines = [*results.get("chain", ()), *results.get("quick", ()), *results.get("gpu chain", ())]
    found = [(f"{e['case']}{_size(e)}", e, ratios(e)) for e in newest(lines, "bench", "case", "chains", "dim")]
    found += [("a step of a quadratic, 64 chains of 8", e, ratios(e)) for e in newest(results.get("overhead", ()), "chains")]
    return [(name, line, r) for name, line, r in found if r]


def _size(line: dict) -> str:
    net = f" {line['dim']}-{line['width']}-{line['width']}-1" if "width" in line else ""
    return f"{net}, {line['chains']} chains"


def speedups(results) -> str:
    """The table of ratios, the lines of one machine together."""
    by_machine: dict[str, list[list[str]]] = {}
    found = comparisons(results)
    shown = [peer for peer in PEERS if any(peer in r for _, _, r in found)]
    for name, line, r in found:
        cells = [f"{r[peer]:.2f}" if peer in r else "" for peer in shown]
        by_machine.setdefault(machine(line), []).append([name, *cells])
    parts = [f"{about}:\n\n{table(['case', *shown], rows)}" for about, rows in by_machine.items()]
    return "\n\n".join(["## Times of the peers over ebmfast's\n\nMore than 1: ebmfast is faster. Same work on the same machine, in"
                        " turns, each variant checked before it is timed.", *parts]) if parts else ""


def rooflines(results) -> str:
    """Shares of what the machine can do, measured in the same run."""
    rows = [[f"chain engine, {e['case']}{_size(e)}", f"{e['gflops']:.1f} of {e['fma_peak_gflops']:.1f} GFLOP/s",
             f"{100 * e['share_of_fma_peak']:.0f} %", machine(e)]
            for e in newest(results.get("chain", ()), "case", "chains", "dim") if "share_of_fma_peak" in e]
    rows += [[f"fused step, K = {e['K']}, {'x'.join(map(str, e['shape']))}, {e['gradients'].removeprefix('torch.')}"
              f"{', noise' if e['noise'] else ''}", f"{e['step_GB_per_s']:.1f} of {e['copy_GB_per_s']:.1f} GB/s",
              f"{100 * e['share_of_copy']:.0f} %", machine(e)]
             for e in newest(results.get("step", ()), "K", "shape", "gradients", "noise") if "share_of_copy" in e]
    if not rows:
        return ""
    return ("## Share of the roofline\n\nMultiply-adds and copies are measured in the same run.\n\n"
            + table(["kernel", "rate", "share", "machine"], rows))


def sampling(results) -> str:
    """Effective samples per second of MALA."""
    rows = []
    for e in newest(results.get("mala", ()), "case", "chains"):
        share = e.get("share_of_multiply_add_peak", {}).get("ebmfast")
        rows.append([e["case"], str(e["chains"]), *(f"{e['ess_of_energy_per_second'][k]:,.0f}" for k in ("ebmfast", "blackjax")),
                     f"{e['times_blackjax']:.2f}", "" if share is None else f"{100 * share:.0f} %", machine(e)])
    head = ["case", "chains", "ebmfast, ESS/s", "blackjax, ESS/s", "ratio", "ebmfast's share of the multiply-add peak", "machine"]
    return "## MALA against blackjax\n\n" + table(head, rows) if rows else ""


def scaling(results, folder: Path) -> str:
    """Four plots: time of a call against chains, leaves, steps and dimension."""
    lines = newest(results.get("scaling", ()), "axis", "value")
    if not lines or (plt := _pyplot()) is None:
        return ""
    last = lines[-1]["device"], lines[-1]["isa"]
    lines = [e for e in lines if (e["device"], e["isa"]) == last]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained", sharey=True)
    for axis, of in zip(axes, ("chains", "leaves", "steps", "dim")):
        points = sorted((e for e in lines if e["axis"] == of), key=lambda e: e["value"])
        for name in ("ebmfast", *PEERS):
            curve = [(e["value"], 1e3 * e["seconds"][name]["median"]) for e in points if name in e["seconds"]]
            if curve:
                axis.loglog(*zip(*curve), "o-", label=name, color=COLORS[name], markersize=3)
        axis.set(xlabel={"dim": "dimension"}.get(of, of))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="ms per call")
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "scaling.png", dpi=90)
    plt.close(figure)
    return ("## Time against chains, leaves, steps and dimension\n\nFrom an AND of 4 networks 2-64-64-1, 1024 chains, 20 steps, one"
            f" number at a time. {machine(lines[-1])}.\n\n![Time of a call](performance/scaling.png)")


def quality(results, folder: Path) -> str:
    """Distance to the exact law against wall time."""
    lines = newest(results.get("quality", ()), "case")
    if not lines or (plt := _pyplot()) is None:
        return ""
    last = lines[-1]["device"], lines[-1]["isa"]
    lines = [e for e in lines if (e["device"], e["isa"]) == last]
    figure, axes = plt.subplots(1, len(lines), figsize=(5.5 * len(lines), 3.6), layout="constrained", squeeze=False)
    for axis, line in zip(axes[0], lines):
        for name, curve in line["curves"].items():
            who, _, way = name.partition(" ")
            style = {"Langevin": "o-", "MALA": "s--", "HMC": "^:"}[way]
            axis.loglog([1e3 * p[1] for p in curve], [p[2] for p in curve], style, label=name, color=COLORS[who], markersize=4)
        axis.axhline(line["floor"], color="black", linewidth=0.8)
        axis.set(title=f"{line['case']}, {line['chains']} chains", xlabel="ms", ylabel="total variation to the exact law")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(folder / "quality.png", dpi=90)
    plt.close(figure)
    return ("## Quality against time\n\nHow far chains are from the exact law, known by quadrature, after that much time; each"
            " point doubles the steps. The black line is what exact draws of that number show. Unadjusted Langevin levels off at"
            f" its step-size bias, the same for everybody. {machine(lines[-1])}.\n\n"
            "![Distance to the exact law](performance/quality.png)")


def picture(results, path: Path) -> bool:
    """The README's picture: bars of the peers' times over ours, of the machine measured last."""
    found = [c for c in comparisons(results) if c[1]["bench"] in ("chain", "overhead") and "2 threads" not in c[0]]
    if not found or (plt := _pyplot()) is None:
        return False
    last = max(found, key=lambda c: c[1].get("time", ""))[1]
    found = [c for c in found if c[1]["device"] == last["device"] and c[1]["isa"] == last["isa"]]
    shown = [peer for peer in PEERS if any(peer in r for _, _, r in found)]
    height, figure_height = 0.8 / len(shown), 0.55 * len(found) + 1.2
    figure, axis = plt.subplots(figsize=(8.5, figure_height), layout="constrained")
    for k, peer in enumerate(shown):
        bars = [(i + k * height, r[peer]) for i, (_, _, r) in enumerate(found) if peer in r]
        drawn = axis.barh([y for y, _ in bars], [v for _, v in bars], height, label=peer, color=COLORS[peer])
        axis.bar_label(drawn, fmt="%.1f", fontsize=8, padding=2)
    axis.axvline(1, color=COLORS["ebmfast"], linewidth=1.5, label="ebmfast")
    axis.set_yticks([i + 0.4 - height / 2 for i in range(len(found))], [name for name, _, _ in found], fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="time, ebmfast = 1 (longer is slower)",
             title=f"{machine(last)}, {last['time'][:10]}\npython -m bench.chain && python -m bench.overhead && make report")
    axis.title.set_fontsize(9)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def page(results, folder: Path) -> str:
    """What stands between the markers."""
    head = "What follows is rendered from `bench/results/*.jsonl` by `make report`; `make bench` measures again (and appends)."
    parts = [head, speedups(results), rooflines(results), sampling(results), scaling(results, folder), quality(results, folder)]
    return "\n\n".join(p for p in parts if p)


def replace(text: str, inside: str) -> str:
    """`text` with what is between the markers replaced, or the markers added at its end."""
    block = f"{BEGIN}\n{inside}\n{END}"
    if BEGIN in text and END in text:
        return text[:text.index(BEGIN)] + block + text[text.index(END) + len(END):]
    return f"{text.rstrip()}\n\n{block}\n"


def main(argv: list[str] | None = None) -> None:
    """Render everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of JSON lines")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder that has performance.md, or gets it")
    options = parser.parse_args(argv)
    results, target = load(options.results), options.docs / "performance.md"
    pictures = options.docs / "performance"
    pictures.mkdir(parents=True, exist_ok=True)
    before = target.read_text() if target.exists() else "# Performance\n"
    target.write_text(replace(before, page(results, pictures)))
    picture(results, pictures / "speedups.png")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
