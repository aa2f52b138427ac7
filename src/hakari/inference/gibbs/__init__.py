"""Gibbs posteriors of losses, and learning rates at which their credible sets cover."""
