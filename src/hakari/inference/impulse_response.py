"""Draws of impulse responses, and what is asked of them: bands, shapes, multipliers, chances.

Each statement is made draw by draw, so that it carries the joint uncertainty over horizons.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from hakari.inference.bands import band

KEY = ["response", "shock", "horizon"]
DENOMINATOR = 0.99  # level of the interval in which a multiplier's denominator should not have 0


@dataclass(frozen=True, eq=False)
class ImpulseResponse:
    """Draws of impulse responses: (N draws, R responses, S shocks, H horizons), already scaled.

    estimate: a frequentist point estimate, to show beside. log_density: of each draw, by
    response, for bands of highest density. prior_draws: NaN where the prior is flat.
    narrowed: share by which the prior narrowed the deviation, 1 − sd / sd_flat. anderson_rubin:
    a row a response, shock and horizon, with `lower` and `upper`, which may be infinite.
    cumulated: responses of sums. coupled: whether draws of different responses depend on each
    other as they should; if not, statements across responses are refused.
    Raises ValueError where shapes or names do not fit.

    >>> found = ImpulseResponse(np.ones((100, 1, 1, 3)), ("y",), ("e",), (0, 1, 2))
    >>> found.cumulative().draws[0, 0, 0]
    array([1., 2., 3.])
    """

    draws: Float[ndarray, "N R S H"]
    responses: tuple[str, ...]
    shocks: tuple[str, ...]
    horizons: tuple[int, ...]
    estimate: Float[ndarray, "R S H"] | None = None
    log_density: Float[ndarray, "N R"] | None = None
    prior_draws: Float[ndarray, "M R S H"] | None = None
    narrowed: Float[ndarray, "R S H"] | None = None
    title: str = ""
    anderson_rubin: pd.DataFrame | None = None
    notes: tuple[str, ...] = ()
    cumulated: bool = False
    coupled: bool = True

    def __post_init__(self) -> None:
        _check(self)

    # --- other responses ------------------------------------------------------------------

    def select(
        self,
        response: str | Sequence[str] | None = None,
        shock: str | Sequence[str] | None = None,
    ) -> ImpulseResponse:
        """Some responses and shocks, in the order given; all where None."""
        r = _positions("response", response, self.responses)
        s = _positions("shock", shock, self.shocks)
        part = _each(self, _PATHS, lambda path: path[..., r, :, :][..., s, :])
        names = tuple(self.responses[i] for i in r), tuple(self.shocks[i] for i in s)
        sets, density = self.anderson_rubin, self.log_density
        if sets is not None:
            sets = sets[sets["response"].isin(names[0]) & sets["shock"].isin(names[1])]
        density = density[:, r] if density is not None and len(s) == len(self.shocks) else None
        part |= {"anderson_rubin": sets, "log_density": density}
        return replace(self, responses=names[0], shocks=names[1], **part)

    def cumulative(self) -> ImpulseResponse:
        """Responses summed over horizons, draw by draw.

        Anderson-Rubin sets and the share narrowed by the prior do not add up and are left out.
        Raises ValueError unless the horizons follow each other, and for responses of sums.
        """
        if self.cumulated:
            raise ValueError("the responses are of sums already (cumulative=True): nothing to add")
        first, last = self.horizons[0], self.horizons[-1]
        if len(self.horizons) != last - first + 1:
            raise ValueError(
                f"horizons {_listed(self.horizons)} have gaps: a sum over them is not the "
                "cumulated response; estimate all horizons between"
            )
        summed = _each(self, _PATHS[:3], lambda path: path.cumsum(axis=-1))
        notes = (*self.notes, f"cumulated from horizon {first} on") if first else self.notes
        title = f"{self.title}, cumulated" if self.title else "cumulated"
        summed |= {"narrowed": None, "anderson_rubin": None}
        return replace(self, title=title, notes=notes, cumulated=True, **summed)

    def multiplier(self, response: str, impulse: str) -> ImpulseResponse:
        """Cumulated response over cumulated response of `impulse`, draw by draw.

        Ramey and Zubairy (2018). A ratio has heavy tails, so read quantiles: bands of kind
        `quantile`, medians. Where the denominator is 0 it is NaN; `notes` says where 0 is within
        the denominator's pointwise 99% interval. Responses of sums are divided as they are.
        Raises ValueError for horizons with gaps, and draws that are not coupled.
        """
        self._refuse_uncoupled("a multiplier")
        above, below = (self.select([name]) for name in (response, impulse))
        if not self.cumulated:
            above, below = above.cumulative(), below.cumulative()
        part: dict[str, Any] = {
            name: _ratio(path, getattr(below, name))
            for name, path in _each(above, _PATHS[:3], np.asarray).items()
        }
        part |= {"log_density": None, "title": "cumulative multiplier"}
        notes = (*above.notes, *_weak_denominators(below))
        return replace(above, responses=(f"{response} / {impulse}",), notes=notes, **part)

    def difference(self, first: str, second: str) -> ImpulseResponse:
        """Responses to one shock less those to another, as between regimes, draw by draw.

        Names must be of `shocks`; the new shock is called `first less second`.
        """
        one, other = self.select(shock=first), self.select(shock=second)
        part: dict[str, Any] = {
            name: path - getattr(other, name)
            for name, path in _each(one, _PATHS[:3], np.asarray).items()
        }
        part |= {"log_density": None, "narrowed": None, "anderson_rubin": None}
        return replace(one, shocks=(f"{first} less {second}",), **part)

    def _refuse_uncoupled(self, what: str) -> None:
        if not self.coupled and len(self.responses) > 1:
            raise ValueError(
                f"{what} needs draws of all responses together, and these kernels or this "
                "weighting draw each by itself: sample with method='concentrated' and "
                "weighting='frozen'"
            )

    # --- tables -----------------------------------------------------------------------------

    def bands(
        self,
        level: float = 0.9,
        kind: str = "sup-t",
        over: Literal["response", "all"] = "response",
    ) -> pd.DataFrame:
        """Columns response, shock, horizon, lower, upper; `attrs` holds inside and critical.

        over: `response`, joint over the horizons of each response to each shock; `all`, joint
        over all responses and shocks too. kind: of `hakari.inference.bands.KINDS`;
        `highest-density` reads log_density where the statement is on all shocks of one response,
        and is Gaussian otherwise. Horizons
        where a draw is not finite have NaN and are left out of the joint statement.
        """
        if over not in ("response", "all"):
            raise ValueError(f"over {over!r}: 'response' (each by itself) or 'all' (all jointly)")
        if over == "all":
            self._refuse_uncoupled("a band over all responses")
        R, S, H = self.draws.shape[1:]
        groups = self.draws.reshape(len(self.draws), -1, R * S * H if over == "all" else H)
        ends, facts = np.full((2, *groups.shape[1:]), np.nan), []
        for g, density in enumerate(self._densities(groups.shape[1])):
            use = np.isfinite(groups[:, g]).all(axis=0)
            if not use.any():
                facts.append((np.nan, np.nan))
                continue
            found = band(groups[:, g][:, use], level, kind, density)
            ends[:, g, use] = found.lower, found.upper
            facts.append((found.inside, found.critical))
        table = self._index().assign(lower=ends[0].ravel(), upper=ends[1].ravel())
        table.attrs |= {"inside": [f[0] for f in facts], "critical": [f[1] for f in facts]}
        return table

    def to_dataframe(self, level: float = 0.9, kind: str = "sup-t") -> pd.DataFrame:
        """A row a response, shock and horizon: mean, sd, pointwise and joint ends.

        With estimate, narrowed, and lower_ar, upper_ar where there are such.
        """
        table = self._index()
        table["mean"] = self.draws.mean(axis=0).ravel()
        table["sd"] = self.draws.std(axis=0, ddof=1).ravel()
        for name, of in (("pointwise", "pointwise"), ("joint", kind)):
            ends = self.bands(level, of)
            table[f"lower_{name}"], table[f"upper_{name}"] = ends["lower"], ends["upper"]
        for name in ("estimate", "narrowed"):
            if (value := getattr(self, name)) is not None:
                table[name] = value.ravel()
        if self.anderson_rubin is not None:
            sets = self.anderson_rubin[[*KEY, "lower", "upper"]]
            sets = sets.rename(columns={"lower": "lower_ar", "upper": "upper_ar"})
            table = table.merge(sets, on=KEY, how="left")
        return table

    def shape(self, level: float = 0.9) -> pd.DataFrame:
        """A row a response and shock: peak, its horizon, one sign throughout, half-life.

        peak: largest |response|, with its sign; median and equal-tailed interval, as of
        peak_horizon. positive, negative: share of draws of that sign at all horizons.
        half_life: horizons after the peak until the response first is under half of it;
        half_life_beyond: share of draws where that is not within the horizons, which count as
        infinite in half_life's quantiles. Horizons where a draw is not finite are left out.
        """
        rows = []
        for (r, response), (s, shock) in product(enumerate(self.responses), enumerate(self.shocks)):
            use = np.isfinite(self.draws[:, r, s]).all(axis=0)
            paths = self.draws[:, r, s][:, use]
            row = {"response": response, "shock": shock}
            rows.append(row | _shape(paths, np.asarray(self.horizons)[use], level))
        return pd.DataFrame(rows)

    def probability(
        self,
        response: str,
        shock: str | None = None,
        sign: Literal["+", "-"] = "+",
        horizons: int | Iterable[int] | None = None,
        joint: bool = True,
    ) -> float | Float[ndarray, " h"]:
        """Share of the draws in which the response has the sign.

        joint: at all of these horizons at once; otherwise an array, a horizon each. horizons: all
        when None. Raises ValueError for unknown names or horizons, and for draws not finite.
        """
        if sign not in ("+", "-"):
            raise ValueError(f"sign {sign!r}: '+' or '-'")
        if shock is None and len(self.shocks) > 1:
            raise ValueError(f"which of {len(self.shocks)} shocks? ({', '.join(self.shocks)})")
        r = _positions("response", response, self.responses)[0]
        s = _positions("shock", shock, self.shocks)[0]
        chosen = self.horizons if horizons is None else horizons
        chosen = (chosen,) if isinstance(chosen, int | np.integer) else tuple(chosen)
        paths = self.draws[:, r, s][:, [self._horizon(h) for h in chosen]]
        bad = ~np.isfinite(paths).all(axis=0)
        if bad.any():
            gone = _listed(np.asarray(chosen)[bad].tolist())
            raise ValueError(f"{response} is not finite at horizons {gone}: choose others")
        has = paths > 0 if sign == "+" else paths < 0
        return float(has.all(axis=1).mean()) if joint else np.asarray(has.mean(axis=0))

    # --- figure -----------------------------------------------------------------------------

    def plot(
        self,
        level: float = 0.9,
        kind: str = "sup-t",
        responses: Sequence[str] | None = None,
        narrow: float | None = 0.68,
        prior: bool = False,
        columns: int | None = None,
        **options: Any,
    ) -> Any:
        """A matplotlib `Figure`; see `hakari.inference.response_plots.fan` for the options."""
        from hakari.inference.response_plots import fan

        chosen = self if responses is None else self.select(responses)
        return fan(chosen, level, kind, narrow, prior=prior, columns=columns, **options)

    def _densities(self, groups: int) -> list[ndarray | None]:
        """The draws' log density, a group each; None where it is that of something larger."""
        if self.log_density is None or groups != len(self.responses):
            return [None] * groups
        return list(self.log_density.T)

    def _index(self) -> pd.DataFrame:
        rows = list(product(self.responses, self.shocks, self.horizons))
        return pd.DataFrame(rows, columns=KEY)

    def _horizon(self, h: int) -> int:
        if h not in self.horizons:
            raise ValueError(f"no horizon {h} (horizons: {_listed(self.horizons)})")
        return self.horizons.index(h)


# --- parts --------------------------------------------------------------------------------

_PATHS = ("draws", "estimate", "prior_draws", "narrowed")  # the last is no path of the response


def _each(
    irf: ImpulseResponse, names: Sequence[str], change: Callable[[ndarray], ndarray]
) -> dict[str, Any]:
    """The named arrays that are there, changed."""
    there = {name: getattr(irf, name) for name in names}
    return {name: change(value) for name, value in there.items() if value is not None}


def _check(irf: ImpulseResponse) -> None:
    """Raise ValueError where names, shapes or horizons do not fit each other."""
    named = tuple(len(n) for n in (irf.responses, irf.shocks, irf.horizons))
    for name in _PATHS:
        value = getattr(irf, name)
        if value is not None and value.shape[-3:] != named:
            raise ValueError(
                f"{name} of shape {value.shape} for {named[0]} responses, {named[1]} shocks and "
                f"{named[2]} horizons: its last axes must be {named}"
            )
    for what, names in (("response", irf.responses), ("shock", irf.shocks)):
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{what} {twice[0]!r} appears twice: {', '.join(names)}")
    if list(irf.horizons) != sorted(set(irf.horizons)):
        raise ValueError(f"horizons {_listed(irf.horizons)}: need different ones, ascending")
    density = irf.log_density
    if density is not None and density.shape != irf.draws.shape[:2]:
        raise ValueError(
            f"log_density of shape {density.shape}: need {irf.draws.shape[:2]}, draws and responses"
        )
    if irf.anderson_rubin is not None:
        _check_sets(irf.anderson_rubin)


def _check_sets(sets: pd.DataFrame) -> None:
    missing = [c for c in (*KEY, "lower", "upper") if c not in sets.columns]
    if missing:
        raise ValueError(
            f"anderson_rubin lacks {', '.join(missing)} (columns: {', '.join(sets.columns)})"
        )
    if sets.duplicated(KEY).any():
        row = sets.loc[sets.duplicated(KEY), KEY].iloc[0]
        raise ValueError(f"anderson_rubin has two rows for {', '.join(map(str, row))}: give one")


def _positions(what: str, chosen: str | Sequence[str] | None, names: tuple[str, ...]) -> list[int]:
    """Where the names are; raises ValueError, with the nearest, for one that is not there."""
    if chosen is None:
        return list(range(len(names)))
    wanted = [chosen] if isinstance(chosen, str) else list(chosen)
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no {what} {name!r}{hint} ({what}s: {', '.join(names)})")
    return [names.index(name) for name in wanted]


def _listed(horizons: Iterable[int]) -> str:
    """Horizons as text, runs of them as `2 to 5`."""
    runs: list[list[int]] = []
    for h in horizons:
        if runs and h == runs[-1][-1] + 1:
            runs[-1].append(int(h))
        else:
            runs.append([int(h)])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)


def _ratio(above: ndarray, below: ndarray) -> ndarray:
    """Above over below, NaN where below is 0."""
    out: ndarray = np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)
    return out


def _weak_denominators(below: ImpulseResponse) -> list[str]:
    """One sentence a shock for which the multiplier's denominator may be 0."""
    notes = []
    tails = (1 - DENOMINATOR) / 2, (1 + DENOMINATOR) / 2
    for s, shock in enumerate(below.shocks):
        lower, upper = np.quantile(below.draws[:, 0, s], tails, axis=0)
        weak = (lower <= 0) & (upper >= 0)
        if weak.any():
            where = (
                "all horizons"
                if weak.all()
                else "horizons " + _listed(np.asarray(below.horizons)[weak].tolist())
            )
            notes.append(
                f"the {DENOMINATOR:.0%} interval of the cumulated response of "
                f"{below.responses[0]} to {shock} contains 0 at {where}: the multiplier is weakly "
                "identified there"
            )
    return notes


def _shape(paths: Float[ndarray, "N H"], horizons: ndarray, level: float) -> dict[str, float]:
    """What `ImpulseResponse.shape` says of one response to one shock."""
    quantiles = [0.5, (1 - level) / 2, (1 + level) / 2]
    names = [f"{what}{end}" for what in _SHAPES for end in ("", "_lower", "_upper")]
    if not len(horizons):
        return dict.fromkeys([*names, "positive", "negative", "half_life_beyond"], np.nan)
    at = np.abs(paths).argmax(axis=1)
    peak = np.take_along_axis(paths, at[:, None], axis=1)
    fell = (paths * np.sign(peak) < np.abs(peak) / 2) & (np.arange(len(horizons)) > at[:, None])
    life = np.where(fell.any(axis=1), horizons[fell.argmax(axis=1)] - horizons[at], np.inf)
    # horizons are whole and may be infinite, so their quantiles are draws, not between draws
    found = [
        *np.quantile(peak, quantiles),
        *np.quantile(horizons[at], quantiles, method="inverted_cdf"),
        *np.quantile(life, quantiles, method="inverted_cdf"),
    ]
    return dict(zip(names, map(float, found), strict=True)) | {
        "positive": float((paths > 0).all(axis=1).mean()),
        "negative": float((paths < 0).all(axis=1).mean()),
        "half_life_beyond": float(np.isinf(life).mean()),
    }


_SHAPES = ("peak", "peak_horizon", "half_life")
