"""Effects of two outcomes on each other, from how their variances move with covariates."""
