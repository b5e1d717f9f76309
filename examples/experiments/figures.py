"""Draw the experiments from their CSVs alone: PNGs, the tables as CSV and Markdown, and one HTML page with all of it.

    python examples/experiments/figures.py                                    # of runs/experiments
    python examples/experiments/figures.py --output docs/experiments          # into that folder, with the CSVs
    python examples/experiments/figures.py --input docs/experiments           # again, from the CSVs there

Points are means over seeds; bars and bands span minimum to maximum, and are missing for a single seed. Seconds are the
number of training steps times the time of one in timing.csv; without that file, what needs seconds is left out.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from csv_rows import read, with_seconds, write_csv
from pages import markdown, page
from tables import TABLES

CSVS = ("results.csv", "curves.csv", "timing.csv")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--input", type=Path, default=Path("runs/experiments"), help="folder with the CSVs")
    parser.add_argument("--output", type=Path, help="folder to write into; by default the input folder")
    args = parser.parse_args(argv)
    import matplotlib.pyplot as plt
    from drawings import FIGURES

    output = args.output or args.input
    output.mkdir(parents=True, exist_ok=True)
    for name in (*CSVS, "run.json"):
        if output != args.input and (args.input / name).exists():
            shutil.copyfile(args.input / name, output / name)
    rows, curves, timing = (read(args.input / name) for name in CSVS)
    if not rows:
        raise SystemExit(f"{args.input}/results.csv holds no results: run.py writes it")
    rows, curves = with_seconds(rows, timing), with_seconds(curves, timing)
    drawn = []
    for name, title, draw in FIGURES:
        figure = draw(rows, curves)
        if figure is not None:
            figure.suptitle(title, fontsize=11)
            figure.tight_layout()
            figure.savefig(output / f"{name}.png", dpi=85, pil_kwargs={"compress_level": 9})
            plt.close(figure)
            drawn.append((name, title))
    written = [(name, title, of_rows(rows)) for name, title, of_rows in TABLES]
    for name, _, body in written:
        if body:
            write_csv(output / "tables" / f"{name}.csv", body)
    (output / "tables.md").write_text(markdown(written))
    (output / "index.html").write_text(page(drawn, written, rows))
    print(f"{len(drawn)} pictures, {sum(bool(body) for *_, body in written)} tables and index.html in {output}")


if __name__ == "__main__":
    main()
