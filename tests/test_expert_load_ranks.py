"""Loads of experts that ranks share, on gloo (tests/expert_load_checks.py)."""

from __future__ import annotations

import expert_load_checks
from together import together

results, test_together = together(expert_load_checks.__name__)
