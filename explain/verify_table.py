"""The table of `pairstream explain verify` for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = (
    ("target>\ndistractor", "target_over_distractor"),
    ("two-text\nSpearman", "two_text_spearman"),
    ("pointing\n", "pointing"),
    ("energy\nin box", "energy_in_box"),
    ("ins-del\n(cosine)", "insertion_minus_deletion"),
    ("over\nrandom", "gain_over_random"),
    ("of\nspan", "gain_of_span"),
    ("random\nweights", "random_weights_spearman"),
    ("flip\n", "flip_spearman"),
)


def print_table(result: dict[str, Any]) -> None:
    """Print methods, gates and verdict."""
    title = (
        f"{result['model']}: {result['trials']} texts of {result['trials'] // 2} pictures of {result['data']}; "
        f"{result['unknown']} of {result['tried']} pictures left out, for the model does not know what they show"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading, _ in COLUMNS:
        heading = heading.replace("(cosine)", f"({result.get('score', 'cosine')})")
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("gates", no_wrap=True)
    for name, numbers in result["methods"].items():
        cells = ["-" if numbers[key] is None else f"{numbers[key]:.3f}" for _, key in COLUMNS]
        verdict = "-" if name == "random" else "pass" if numbers["passed"] else "fail"
        table.add_row(name, *cells, verdict, style="bold" if name == result["method"] else "")
    Console(width=max(120, Console().width)).print(table)
    stages = result["methods"][result["method"]]["cascade"]
    print(
        (
            ""
            if result["box_area"] is None
            else f"box area {result['box_area']:.3f} (energy in box by chance); "
        )
        + f"cascading randomisation of {result['method']}: "
        + ", ".join(f"{value:.2f}" for value in stages)
        + f"; integrated gradients miss the score's difference by {result['completeness']['error']:.1%}"
    )
    for gate in result["gates"]:
        mark = "pass" if gate["holds"] else "FAIL"
        print(f"{mark}  {result['method']} {gate['gate']} {gate['value']:.3f}, expected {gate['limit']}")
    if "rollout_fails" in result:
        mark = "pass" if result["rollout_fails"] else "FAIL"
        print(f"{mark}  rollout, which ignores the text, fails the gates")
