"""The option `microbatches` between ranks (tests/splitting_checks.py)."""

from __future__ import annotations

import splitting_checks
from together import together

results, test_together = together(splitting_checks.__name__)
