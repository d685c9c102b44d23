"""Batch norm over several processes."""
