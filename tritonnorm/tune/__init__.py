"""Tuning: offline compile reports, search over launch parameters, and the store of results."""
