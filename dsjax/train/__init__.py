"""Training: the step, the loop, the optimizer; one file for each recipe."""
