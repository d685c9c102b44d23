"""Running a model to look at it: example inputs, and a guard that puts back what a run changes."""
