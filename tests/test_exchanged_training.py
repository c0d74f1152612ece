"""Blocks and their exchange as one operator in training: what two ranks on gloo check together."""

from __future__ import annotations

import exchanged_training_checks
from together import together

results, test_together = together(exchanged_training_checks.__name__)
