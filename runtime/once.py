"""Warnings that are logged once, however often their cause comes back."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("moecompile")


@functools.lru_cache(maxsize=256)
def warn_once(text: str) -> None:
    """Log a text that says all there is to say; nothing, if it is among the last 256 such texts."""
    log.warning("%s", text)
