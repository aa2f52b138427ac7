"""Mixture of experts: GRIN (arXiv 2409.12136) and the routers it is measured against."""
