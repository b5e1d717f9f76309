"""Text of any origin, made harmless where it is shown: names and messages may hold what a terminal obeys."""

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import sae_lens

# Control characters but newline and tab, among them those that begin escape sequences; separators of lines; characters
# that turn the direction of what follows; halves of characters, which no file takes.
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """``str(text)`` with every character that does more than being shown written out, as ``\\x1b``."""
    return _HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(text: object, *, error: bool = False, end: str = "\n") -> None:
    """Print to stdout, or stderr. A terminal that is gone, or a full disk behind it, ends no run."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding), end=end, file=stream, flush=True)
    except OSError as failure:
        if failure.errno not in (errno.EIO, errno.EPIPE):
            return
        # Nobody will read it any more; what is left in the buffer must not fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Logger(logging.LoggerAdapter):
    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        return printable(msg), kwargs


logger = _Logger(sae_lens.logger, {})  # SAELens's own, for our messages


@contextmanager
def printable_logs() -> Iterator[None]:
    """SAELens's messages too, while one of our commands runs."""

    def clean(record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), None
        return True

    sae_lens.logger.addFilter(clean)
    try:
        yield
    finally:
        sae_lens.logger.removeFilter(clean)
