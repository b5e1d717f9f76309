"""For the API pages: what our docstrings write for a reader of the source, as Markdown."""

import re
import textwrap
from collections.abc import Iterable

import griffe

_ITEM = re.compile(r"(\w+(?:, \w+)*): +(?=\S)")
_LITERAL = re.compile(r"::\n\n((?: {4}.*(?:\n|$)|\n(?= {4}))+)")


class AsMarkdown(griffe.Extension):
    def on_function_instance(self, *, func: griffe.Function, **_: object) -> None:
        _convert(func, [p.name for p in func.parameters])

    def on_class_members(self, *, cls: griffe.Class, **_: object) -> None:
        _convert(cls, cls.members)


def _convert(obj: griffe.Object, names: Iterable[str]) -> None:
    if obj.docstring is not None:
        obj.docstring.value = as_markdown(obj.docstring.value, set(names))


def as_markdown(text: str, names: set[str]) -> str:
    """Aligned ``name:  text`` lines about these names become a list; ``::`` and what is indented below it, a block."""
    text = _LITERAL.sub(lambda m: f":\n\n```python\n{textwrap.dedent(m[1]).rstrip()}\n```\n", text)
    lines: list[str] = []
    in_item = False
    for line in text.splitlines():
        item = _ITEM.match(line)
        if item and names.issuperset(item[1].split(", ")):
            about = ", ".join(f"`{name}`" for name in item[1].split(", "))
            line = f"- {about}: {line[item.end() :]}"
            lines += [line] if in_item else ["", line]
            in_item = True
        elif in_item and line.startswith(" "):
            lines.append(f"    {line.strip()}")
        else:
            lines += ["", line] if in_item and line else [line]
            in_item = False
    return "\n".join(lines)
