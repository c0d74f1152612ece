"""The option `overlap` between ranks (tests/overlap_checks.py)."""

from __future__ import annotations

import overlap_checks
from together import together

results, test_together = together(overlap_checks.__name__)
