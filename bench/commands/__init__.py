"""The commands of ``python -m bench``, one function each: they print, and return the exit code."""
