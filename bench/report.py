"""`python -m bench.report`: renders bench/results/*.jsonl into docs/performance.md and docs/performance/*.png.

Of every case the newest line of each processor counts. What stands outside of the markers in docs/performance.md stays. Plots
need matplotlib; without it tables are written alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.lines import PEERS, case_size, comparisons, load, machine, name_of, newest, step_name
from bench.plots import picture, quality, scaling

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by `make report`: begin -->", "<!-- made by `make report`: end -->"
def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def speedups(results) -> str:
    """The table of ratios, the lines of one machine together."""
    by_machine: dict[str, list[list[str]]] = {}
    found = comparisons(results)
    shown = [peer for peer in PEERS if any(peer in r for _, _, r in found)]
    for name, line, r in found:
        cells = [f"{r[peer]:.2f}" if peer in r else "" for peer in shown]
        by_machine.setdefault(machine(line), []).append([name, *cells])
    parts = [f"{about}:\n\n{table(['case', *map(name_of, shown)], rows)}" for about, rows in by_machine.items()]
    return "\n\n".join(["## Times of the peers over ebmfast's\n\nMore than 1: ebmfast is faster. Same work on the same machine, in"
                        " turns, each variant checked before it is timed. torch.compile compiles a whole step, forward, backward"
                        " and noise, in one graph; JAX and blackjax run all steps under jit; nobody's compiling is timed. An empty"
                        " cell: the peer has no such thing, or was not measured.", *parts]) if parts else ""


def rooflines(results) -> str:
    """Shares of what the machine can do, measured in the same run."""
    rows = [[f"chain engine, {e['case']}{case_size(e)}", f"{e['gflops']:.1f} of {e['fma_peak_gflops']:.1f} GFLOP/s",
             f"{100 * e['share_of_fma_peak']:.0f} %", machine(e)]
            for e in newest(results.get("chain", ()), "case", "chains", "dim") if "share_of_fma_peak" in e]
    rows += [[step_name(e), f"{e['step_GB_per_s']:.1f} of {e['copy_GB_per_s']:.1f} GB/s",
              f"{100 * e['share_of_copy']:.0f} %", machine(e)]
             for e in newest(results.get("step", ()), "K", "shape", "gradients", "noise") if "share_of_copy" in e]
    if not rows:
        return ""
    return ("## Share of the roofline\n\nMultiply-adds and copies are measured in the same run.\n\n"
            + table(["kernel", "rate", "share", "machine"], rows))


def sampling(results) -> str:
    """Effective samples per second of MALA and HMC."""
    rows, lines = [], newest([*results.get("mala", ()), *results.get("metropolis", ())], "sampler", "case", "chains")
    known = {(e["case"].removeprefix("MALA, ").replace("networks", "MLPs"), e["chains"], e["device"], e["isa"])
             for e in lines if e["bench"] == "metropolis"}
    others = ("blackjax", "torchebm", "torch.compile", "eager")
    for e in lines:
        if e["bench"] == "mala" and (e["case"], e["chains"], e["device"], e["isa"]) in known:
            continue  # measured again since, under the newer name
        rates = e["ess_of_energy_per_second"]
        share = e.get("share_of_multiply_add_peak", {}).get("ebmfast")
        rows.append([e["case"] if "sampler" in e else f"MALA, {e['case']}", str(e["chains"]), f"{rates['ebmfast']:,.0f}",
                     *(f"{rates[peer]:,.0f}" if peer in rates else "" for peer in others),
                     "" if share is None else f"{100 * share:.0f} %", machine(e)])
    head = ["case", "chains", "ebmfast", *others, "ebmfast's share of the multiply-add peak", "machine"]
    text = ("## MALA and HMC\n\nEffective samples of the energy per second. Peers have our acceptance and mean energy within"
            " chance.\n\n")
    return text + table(head, rows) if rows else ""


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
