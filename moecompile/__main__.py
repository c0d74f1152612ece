"""`python -m moecompile explain|doctor|demo|bench|simulate|cache`."""

from __future__ import annotations

import sys

from moecompile.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
