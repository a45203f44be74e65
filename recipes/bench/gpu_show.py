"""What `smol bench gpu` prints: two tables, and how far its goals are."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recipes.show import bytes_of

ROUNDING = 2.0**-8
"""Relative, of bf16: half of the distance between neighbours."""
GOAL_MFU, GOAL_GAIN = 0.5, 1.25
LEGEND = (
    "MFU: of 989 TFLOP/s. Products: of the matrix products' rate here. Gain: over Nanotron as shipped.\n"
    "Losses: largest relative difference from those with nothing fused. Memory: the peak."
)
Result = dict[str, Any]


def show(part: str, result: Result, console: Console) -> None:
    """Prints one part's table and where it was measured."""
    rows = result[part]
    if part == "correctness":
        title = "Is training right here?" + (" A dry run" if result["tiny"] else "")
        table = Table("", "found", "allowed", "", "", title=title, box=SIMPLE_HEAD)
        for row in rows:
            found = "nothing" if row["found"] is None else f"{row['found']:.2g}"
            met = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]open[/]"}[row["met"]]
            table.add_row(row["what"], found, f"{row['allowed']:.2g}", met, row["note"])
    else:
        names = ("ms a step", "tokens/s", "MFU", "products", "gain", "losses", "memory")
        title = "A dry run: its speeds mean nothing" if result["tiny"] else f"{result['recipe']}, one GPU"
        table = Table("", *names, title=title, box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(row["name"], *cells(row))
    console.print(table)
    for row in rows:
        if "failed" in row:
            console.print(f"{row['name']}: {row['failed']}", highlight=False, markup=False)
    if part == "speed":
        console.print(f"{LEGEND}\n{verdict(rows)}", highlight=False)
    console.print(place(result), highlight=False)


def cells(row: Result) -> list[str]:
    """A row of the table of speed."""
    if "failed" in row:
        return ["none", *["–"] * 6]

    def of(key: str, form: str) -> str:
        return "–" if row[key] is None else format(row[key], form)

    shares = [of("mfu", ".1%"), of("of_products", ".1%"), of("gain", ".2f"), of("loss_difference", ".1e")]
    speeds = [f"{1000 * row['step_seconds']:.1f}", f"{row['tokens_per_second']:,.0f}"]
    return [*speeds, *shares, bytes_of(row["memory"])]


def verdict(rows: list[Result]) -> str:
    """The best rows, whose losses are PLAIN's, against the goals."""
    ours = [row for row in rows if "failed" not in row and row["kind"] == "repository"]
    if not ours or ours[0]["mfu"] is None:
        return "There is no GPU here." if ours else "Nothing of this repository was measured."
    best = max(ours, key=lambda row: row["tokens_per_second"])
    said = [f"{best['mfu']:.1%} MFU with “{best['name']}”; the goal is {GOAL_MFU:.0%}."]
    same = [row for row in ours if row["loss_difference"] is not None and row["loss_difference"] <= ROUNDING]
    if same and same[0]["gain"] is not None:
        best = max(same, key=lambda row: row["tokens_per_second"])
        stand_ins = " (with stand-ins for flash-attn)" if "flash_attn" in best["replaced"] else ""
        said += [
            f"At the recipe's micro-batch {best['gain']:.2f} times Nanotron's own model{stand_ins},",
            f"with “{best['name']}”; the goal is {GOAL_GAIN}. Its losses are within {best['loss_difference']:.1e}",
            f"of those with nothing fused over {best['losses_compared']} steps; {ROUNDING:.1e} are allowed.",
        ]
    return " ".join(said)


def place(result: Result) -> str:
    """Machine, versions, code."""
    machine, code, found = result["products"], result["code"], result["versions"]
    changed = ", with changes" if code["changed"] else ""
    rate = f"{machine.get('flops_per_second', 0) / 1e12:.3g} TFLOP/s in bf16 matrix products"
    said = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())
    return f"{machine.get('device')}, {rate}; {said}; code {code['revision'] or 'outside git'}{changed}."
