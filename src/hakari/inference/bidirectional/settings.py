"""Settings of a model that fit together, or an error that says which do not."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from hakari.inference.bidirectional.features import Polynomial, RandomFourier
from hakari.inference.bidirectional.nuisance import FEWEST
from hakari.inference.bidirectional.rows import Columns
from hakari.inference.bidirectional.stream import Forgetting

CHOICES: dict[str, tuple[Any, ...]] = {
    "method": ("moments", "online-qml", "single-equation"),
    "covariance": ("zero", "constant"),
    "restrict": (None, "a=0", "b=0"),
    "root": ("stable", "mirror"),
    "missing": ("raise", "drop"),
}
LEAST = {"warm_up": FEWEST, "bootstraps": 0, "seed": 0}
LEARNED = ("y1", "y2", "covariates", "features", "method", "regimes", "bootstraps")


def checked(settings: Mapping[str, Any]) -> tuple[Columns, Forgetting]:
    """Columns and forgetting of the settings of `BidirectionalEffects`, by name.

    Raises ValueError for settings that are unknown, too small, or do not go together.
    """
    for name, known in CHOICES.items():
        if settings[name] not in known:
            raise ValueError(f"{name} {settings[name]!r}: use one of {known}")
    for name, least in LEAST.items():
        value = settings[name]
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < least:
            raise ValueError(f"{name} {value!r}: a whole number of at least {least:,} is needed")
    features, covariates = settings["features"], settings["covariates"]
    if not isinstance(features, RandomFourier | Polynomial):
        raise ValueError(f"features {features!r}: give RandomFourier(...) or Polynomial(...)")
    if isinstance(covariates, str):
        raise ValueError(f"covariates {covariates!r}: give a list of names")
    regimes, restrict = settings["regimes"], settings["restrict"]
    if not len(covariates) and regimes is None:
        raise ValueError("no covariates and no regimes: variances need something to move with")
    if restrict and settings["root"] == "mirror":
        raise ValueError(f"root 'mirror' with restrict {restrict!r}: the mirror is infinite")
    if settings["method"] == "online-qml":
        _refuse_online(settings)
    columns = Columns(settings["y1"], settings["y2"], tuple(covariates), regimes)
    return columns, Forgetting(settings["half_life"], settings["window"])


def _refuse_online(settings: Mapping[str, Any]) -> None:
    """What the online likelihood is not made for."""
    for name in ("regimes", "restrict", "regressor", "half_life", "window"):
        if settings[name] is not None:
            raise ValueError(f"method 'online-qml' with {name}: use method 'moments'")
    if settings["covariance"] != "zero":
        raise ValueError("method 'online-qml' with covariance 'constant': use method 'moments'")


def learned_with(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that what was learned depends on, so that they may not change after it.

    Methods "moments" and "single-equation" answer from the same sums, and count as one.
    """
    kept = {name: settings[name] for name in LEARNED}
    method = "online-qml" if settings["method"] == "online-qml" else "moments"
    return kept | {"covariates": tuple(settings["covariates"]), "method": method}


def refuse_changed(before: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    """Raises ValueError where such a setting is another than before; None: nothing was learned."""
    for name, now in learned_with(settings).items():
        if before is not None and before[name] != now:
            raise ValueError(
                f"{name} was {before[name]!r} when this model learned and is {now!r} now: set it "
                "back, or fit again"
            )


def refuse_other(empty: Mapping[str, Any], learned: Mapping[str, Any]) -> None:
    """Raises ValueError where an empty model is made for other things than one learned."""
    theirs = learned_with(learned)
    for name, ours in learned_with(empty).items():
        if ours != theirs[name]:
            raise ValueError(
                f"an empty model with {name} {ours!r} does not take what one with {theirs[name]!r} "
                "has learned: make it with the same"
            )


class Parameters:
    """A class whose arguments are its attributes, read and set as scikit-learn does it."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Settings by name. deep: of no consequence; scikit-learn passes it."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names}

    def set_params(self, **settings: Any) -> Self:
        """Change settings. Raises ValueError for an unknown one."""
        known = self.get_params()
        for name, value in settings.items():
            if name not in known:
                raise ValueError(f"no setting {name!r}: known are {', '.join(known)}")
            setattr(self, name, value)
        return self
