"""Calibrated inference without a likelihood: quasi-posteriors, losses, effects that feed back."""

from hakari.inference.anderson_rubin import anderson_rubin
from hakari.inference.bidirectional.features import Polynomial, RandomFourier
from hakari.inference.bidirectional.model import BidirectionalEffects
from hakari.inference.bidirectional.online_steps import OnlineSettings
from hakari.inference.covariance import Covariance, parse_covariance
from hakari.inference.diagnostics import convergence_notes, multivariate_ess, summary
from hakari.inference.gibbs import losses
from hakari.inference.gibbs.adjustment import sandwich_adjusted
from hakari.inference.gibbs.calibration import Calibration, calibrate
from hakari.inference.gibbs.losses import Loss
from hakari.inference.gibbs.posterior import GibbsPosterior
from hakari.inference.gmm import estimate
from hakari.inference.horseshoe import Horseshoe
from hakari.inference.identification import tail
from hakari.inference.impulse_response import ImpulseResponse
from hakari.inference.instruments import first_stage
from hakari.inference.local_projections import LocalProjection
from hakari.inference.moments import LinearMoments
from hakari.inference.path_prior import GaussianProcess, RoughnessPenalty
from hakari.inference.posterior import QuasiPosterior
from hakari.inference.prior import Flat, Normal, StudentT
from hakari.inference.projection_posterior import ProjectionPosterior
from hakari.inference.result import load, save
from hakari.inference.risks import expectile_moments, ridge_moments
from hakari.inference.sampling import sample
from hakari.inference.weak_prior import weak_prior

__all__ = [
    "BidirectionalEffects",
    "Calibration",
    "Covariance",
    "Flat",
    "GaussianProcess",
    "GibbsPosterior",
    "Horseshoe",
    "ImpulseResponse",
    "LinearMoments",
    "LocalProjection",
    "Loss",
    "Normal",
    "OnlineSettings",
    "Polynomial",
    "ProjectionPosterior",
    "QuasiPosterior",
    "RandomFourier",
    "RoughnessPenalty",
    "StudentT",
    "anderson_rubin",
    "calibrate",
    "convergence_notes",
    "estimate",
    "expectile_moments",
    "first_stage",
    "load",
    "losses",
    "multivariate_ess",
    "parse_covariance",
    "ridge_moments",
    "sample",
    "sandwich_adjusted",
    "save",
    "summary",
    "tail",
    "weak_prior",
]
