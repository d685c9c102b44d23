"""Whole models: a training step with and without this library, and inference before and after
`fold`."""
