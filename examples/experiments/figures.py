"""Draw the experiments from their CSVs alone: PNGs, the tables as CSV and Markdown, and one HTML page with all of it.

    python examples/experiments/figures.py                                    # of runs/experiments
    python examples/experiments/figures.py --output docs/experiments/long     # into that folder, with the CSVs
    python examples/experiments/figures.py --input docs/experiments           # again, from the CSVs there

Points are means over seeds; bars and bands span minimum to maximum, and are missing for a single seed. The CSVs of the
short runs in docs/experiments, which have other columns, are read as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from csv_rows import Row, read, with_seconds, write_csv
from pages import markdown, page

CSVS = ("results.csv", "curves.csv", "timing.csv")
Table = tuple[str, str, list[Row]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--input", type=Path, default=Path("runs/experiments"), help="folder with the CSVs")
    parser.add_argument("--output", type=Path, help="folder to write into; by default the input folder")
    args = parser.parse_args(argv)
    import matplotlib.pyplot as plt

    output = args.output or args.input
    output.mkdir(parents=True, exist_ok=True)
    for name in (*CSVS, "run.json"):
        if output != args.input and (args.input / name).exists():
            shutil.copyfile(args.input / name, output / name)
    rows = read(args.input / "results.csv")
    if not rows:
        raise SystemExit(f"{args.input}/results.csv holds no results: run.py writes it")
    figures, written = (short if "passes" in rows[0] else long)(rows, args.input)
    drawn = []
    for name, title, draw in figures:
        figure = draw()
        if figure is not None:
            figure.suptitle(title, fontsize=11)
            figure.tight_layout()
            figure.savefig(output / f"{name}.png", dpi=85, pil_kwargs={"compress_level": 9})
            plt.close(figure)
            drawn.append((name, title))
    for name, _, body in written:
        if body:
            write_csv(output / "tables" / f"{name}.csv", body)
    (output / "tables.md").write_text(markdown(written))
    (output / "index.html").write_text(page(drawn, written, rows))
    print(f"{len(drawn)} pictures, {sum(bool(body) for *_, body in written)} tables and index.html in {output}")


Drawn = list[tuple[str, str, Callable[[], Any]]]


def long(rows: list[Row], folder: Path) -> tuple[Drawn, list[Table]]:
    from drawings import FIGURES
    from tables import TABLES, texts

    curves, facts = read(folder / "curves.csv"), json.loads((folder / "run.json").read_text())
    figures: Drawn = [(name, title, lambda draw=draw: draw(rows, curves)) for name, title, draw in FIGURES]
    written = [(name, title, of_rows(rows, curves)) for name, title, of_rows in TABLES]
    return figures, [*written, ("texts", f"Text; that of kind {facts['kept_out']!r} is only tested on", texts(facts))]


def short(rows: list[Row], folder: Path) -> tuple[Drawn, list[Table]]:
    """As of the short runs: seconds are the number of training steps times the time of one in timing.csv."""
    from short_runs.drawings import FIGURES
    from short_runs.tables import TABLES

    timing = read(folder / "timing.csv")
    curves = with_seconds(read(folder / "curves.csv"), timing)
    rows[:] = with_seconds(rows, timing)
    figures: Drawn = [(name, title, lambda draw=draw: draw(rows, curves)) for name, title, draw in FIGURES]
    return figures, [(name, title, of_rows(rows)) for name, title, of_rows in TABLES]


if __name__ == "__main__":
    main()
