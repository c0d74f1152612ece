"""What all verbs of `python -m moecompile` that read their own arguments share."""

from __future__ import annotations

import argparse


def parser_of(verb: str, documentation: str) -> argparse.ArgumentParser:
    """An empty parser; its help is a module's documentation, from the second paragraph on.

    Args:
        verb: what comes after `python -m moecompile`.
        documentation: the module's.
    """
    return argparse.ArgumentParser(
        prog=f"python -m moecompile {verb}",
        description=documentation.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def whole_number(text: str, expected: str = "a whole number, 1 or more") -> int:
    """An argument that counts things, from 1 on; argparse says what was `expected` of others."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return int(text)
