"""``python -m bench demo``: the library's main job, each number computed in that run."""

from __future__ import annotations
