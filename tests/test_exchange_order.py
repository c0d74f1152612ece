"""Exchanges under Inductor: all of them, in one order on all ranks (tests/exchange_order_checks.py)."""

from __future__ import annotations

import exchange_order_checks
from together import together

results, test_together = together(exchange_order_checks.__name__)
