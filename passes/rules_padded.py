"""Rules for bins padded to a block: rows put at padded slots, and read back from there."""

from __future__ import annotations

from moecompile.passes.interpret import Rule

RULES: dict[str, Rule] = {}
