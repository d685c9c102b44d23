"""Fusing a batch norm with the addition and activation behind it, inside the code of a model."""
