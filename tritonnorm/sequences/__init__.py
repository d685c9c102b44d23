"""Batch norm for padded sequences and recurrent networks."""
