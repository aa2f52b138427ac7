"""Calibrated inference without a likelihood: quasi-posteriors of moment conditions."""

from hakari.inference.covariance import Covariance, parse_covariance
from hakari.inference.diagnostics import convergence_notes, multivariate_ess, summary
from hakari.inference.identification import tail
from hakari.inference.moments import LinearMoments
from hakari.inference.posterior import QuasiPosterior
from hakari.inference.prior import Flat, Normal, StudentT
from hakari.inference.result import load, save
from hakari.inference.risks import expectile_moments, ridge_moments
from hakari.inference.sampling import sample

__all__ = [
    "Covariance",
    "Flat",
    "LinearMoments",
    "Normal",
    "QuasiPosterior",
    "StudentT",
    "convergence_notes",
    "expectile_moments",
    "load",
    "multivariate_ess",
    "parse_covariance",
    "ridge_moments",
    "sample",
    "save",
    "summary",
    "tail",
]
