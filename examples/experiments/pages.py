"""The tables of the experiments as Markdown, and the page with figures and tables."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from csv_rows import Row


def markdown(tables: Iterable[tuple[str, str, list[Row]]]) -> str:
    parts = ["# Tables of the experiments\n\nWritten by `figures.py` from the CSVs of this folder.\n"]
    for name, title, body in tables:
        if body:
            lines = [list(body[0]), ["---"] * len(body[0]), *(r.values() for r in body)]
            table = "\n".join("| " + " | ".join(str(v).replace("|", "/") for v in line) + " |" for line in lines)
            parts.append(f"\n## {title}\n\n[tables/{name}.csv](tables/{name}.csv)\n\n{table}\n")
    return "".join(parts)


def page(drawn: list[tuple[str, str]], tables: Iterable[tuple[str, str, list[Row]]], rows: list[Row]) -> str:
    pictures = "".join(f"<h2>{html.escape(title)}</h2><img alt='{name}' src='{name}.png'>" for name, title in drawn)
    written = "".join(
        f"<h2>{html.escape(title)}</h2>{table(list(body[0]), [list(r.values()) for r in body])}"
        for _, title, body in tables
        if body
    )
    everything = table(
        list(rows[0]),
        [[v if isinstance(v, str) else "" if math.isnan(v) else f"{v:.5g}" for v in r.values()] for r in rows],
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<title>Switch SAE experiments</title><style>body{font:15px sans-serif;max-width:1300px;margin:auto;"
        "padding:0 1em}img{max-width:100%}div{overflow-x:auto}table{border-collapse:collapse;font-size:12px}"
        "td,th{border:1px solid #ccc;padding:2px 6px;text-align:left}</style>"
        f"<h1>Switch SAE experiments</h1>{pictures}{written}<h2>Every SAE</h2>{everything}</html>\n"
    )


def table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    def cells(tag: str, values: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(v))}</{tag}>" for v in values) + "</tr>"

    return f"<div><table>{cells('th', head)}{''.join(cells('td', row) for row in body)}</table></div>"
