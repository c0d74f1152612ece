"""Rows travel between ranks in FP8 if they are multiplied so: what 2 ranks check (tests/quantized_travel_checks.py)."""

from __future__ import annotations

import quantized_travel_checks
from together import together

results, test_together = together(quantized_travel_checks.__name__)
