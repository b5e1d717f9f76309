"""Make text of any origin safe to show: names and messages may hold characters that a terminal obeys."""

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

# Control characters except newline and tab, among them those that begin escape sequences; line separators; characters
# that change the direction of the text after them; lone surrogates, which no file accepts.
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """``str(text)`` with every harmful character escaped, as ``\\x1b``."""
    return _HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(text: object, *, error: bool = False, end: str = "\n") -> None:
    """Print to stdout or stderr; a closed terminal or a full disk behind it ends no run."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding), end=end, file=stream, flush=True)
    except OSError as failure:
        if failure.errno not in (errno.EIO, errno.EPIPE):
            return
        # Nobody reads the stream any more; what is left in its buffer must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Logger(logging.LoggerAdapter):
    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        return printable(msg), kwargs


_saelens = logging.getLogger("sae_lens")  # sae_lens.logger, without importing SAELens
logger = _Logger(_saelens, {})


@contextmanager
def printable_logs() -> Iterator[None]:
    """Within the block, SAELens's log messages are made printable too."""

    def clean(record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), None
        return True

    _saelens.addFilter(clean)
    try:
        yield
    finally:
        _saelens.removeFilter(clean)
