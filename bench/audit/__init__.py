"""The audits that need no GPU: bytes moved, and machine code. ``python -m bench audit``."""

from __future__ import annotations
