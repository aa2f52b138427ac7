"""From a formula and a table, of any size, to blocks of y, X and Z.

The grammar is linearmodels': `y ~ 1 + exogenous + [endogenous ~ instruments]`, terms as in
formulaic, no intercept unless written; X holds exogenous then endogenous, Z exogenous
then instruments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from formulaic import Formula as Terms
from formulaic import ModelSpec
from formulaic.errors import FactorEvaluationError
from numpy import ndarray

from hakari.inference import tables
from hakari.inference.design import Block, Names, refuse_not_finite
from hakari.inference.tables import Missing, Wanted, as_frame


@dataclass(frozen=True)
class Formula:
    """The four parts of `dependent ~ exogenous + [endogenous ~ instruments]`."""

    text: str
    dependent: str
    exogenous: str
    endogenous: str
    instruments: str

    def wanted(self, *more: str) -> Wanted:
        """The columns that the terms use, and `more`."""
        names: set[str] = set(more)
        for part in (self.dependent, self.exogenous, self.endogenous, self.instruments):
            names |= {str(name) for name in Terms(part).required_variables}
        return Wanted(tuple(sorted(names)), frozenset(re.findall(r"\w+", self.text)))


def parse_formula(text: str) -> Formula:
    """Split a formula; raises ValueError that shows the form when it is not understood."""
    form = "write 'y ~ 1 + x1 + x2 + [endogenous ~ instrument1 + instrument2]'"
    bracket = re.fullmatch(r"([^~\[\]]+)~([^~\[\]]*)\[([^~\[\]]+)~([^~\[\]]+)\]([^~\[\]]*)", text)
    if bracket is None:
        plain = re.fullmatch(r"([^~\[\]]+)~([^~\[\]]+)", text)
        if plain is None:
            raise ValueError(f"formula {text!r} is not understood: {form}")
        return Formula(text, "0 + " + plain[1].strip(), plain[2].strip(), "0", "0")
    dependent, before, endogenous, instruments, after = (part.strip() for part in bracket.groups())
    if (before and not before.endswith("+")) or (after and not after.startswith("+")):
        raise ValueError(f"formula {text!r}: the bracket must be joined by +: {form}")
    for part in (endogenous, instruments):
        if part.startswith("+") or part.endswith("+"):
            raise ValueError(f"formula {text!r}: {part!r} must not start or end with +: {form}")
    exogenous = " + ".join(t for t in ("0", before.rstrip("+ "), after.lstrip("+ ")) if t)
    return Formula(text, "0 + " + dependent, exogenous, "0 + " + endogenous, "0 + " + instruments)


def read_blocks(
    formula: Formula,
    data: Any,
    weights: str | None = None,
    clusters: str | None = None,
    missing: Missing = "raise",
) -> Iterator[tuple[Names, Block]]:
    """Blocks of the design, read once, in order, each of at most `tables.BLOCK_ROWS` rows.

    data: a pandas or polars frame, anything narwhals or Arrow knows, a dict of arrays, the
    path of a CSV or Parquet file or folder, or an iterable of Arrow record batches or frames.
    missing: `raise` names the columns with missing values; `drop` leaves those rows out.
    """
    wanted = formula.wanted(*(name for name in (weights, clusters) if name))
    blocks, levels = tables.open_table(data, wanted)
    specs: list[ModelSpec] | None = None
    names: Names | None = None
    plain = False
    first_row, complete = 0, 0
    for raw in blocks:
        rows = len(raw)
        first_row += rows
        block = _plain_block(names, raw, weights) if names and plain else None
        if names is None or block is None:
            frame = as_frame(raw, levels)
            if missing == "raise":
                tables.refuse_missing(frame, first_row - rows, blocks)
            frame = frame[frame.notna().all(axis=1)]
            if not len(frame):
                continue
            if specs is not None:
                _refuse_stateful(specs)
            matrices = _materialise(formula, frame, specs)
            specs = [matrix.model_spec for matrix in matrices]
            block, found = _assemble(matrices, frame, weights, clusters)
            names = names or found
            plain = clusters is None and all(_is_plain(spec) for spec in specs)
            refuse_not_finite(names, block, first_row - rows)
        complete += len(block.y)
        yield names, block
    if names is None:
        raise ValueError(
            f"no complete rows: {first_row} rows read, {complete} without missing values"
        )


def _materialise(formula: Formula, frame: pd.DataFrame, specs: list[ModelSpec] | None) -> list[Any]:
    """Model matrices of the four parts; the first block's specs fix the encoding of the rest.

    Raises ValueError for a term that cannot be computed.
    """
    try:
        return _matrices(formula, frame, specs)
    except FactorEvaluationError as error:
        raise ValueError(f"a term of the formula cannot be computed: {error}") from None


def _refuse_stateful(specs: list[ModelSpec]) -> None:
    """A second block has come: what a term learned from the first is not true of the table."""
    learned = [str(term) for spec in specs for term in spec.transform_state]
    if learned:
        raise ValueError(
            f"{', '.join(learned)} learns from the data, which come in blocks of "
            f"{tables.BLOCK_ROWS:,} rows: compute it as a column of the whole table first"
        )


def _matrices(formula: Formula, frame: pd.DataFrame, specs: list[ModelSpec] | None) -> list[Any]:
    if specs is not None:
        return [spec.get_model_matrix(frame) for spec in specs]
    parts = [
        (formula.dependent, False),
        (formula.exogenous, True),
        (formula.endogenous, False),
        (formula.instruments, False),
    ]
    return [
        Terms(part).get_model_matrix(frame, ensure_full_rank=full, na_action="ignore")
        for part, full in parts
    ]


CONSTANT = "Intercept"  # formulaic's name of the term 1


def _is_plain(spec: ModelSpec) -> bool:
    """Whether every term is the constant or the bare name of one column."""
    names = [CONSTANT if str(term) == "1" else str(term) for term in spec.terms]
    return names == list(spec.column_names) and all(
        len(term.factors) == 1
        and (str(term) == "1" or factor.eval_method.value == "lookup")
        and str(term) != CONSTANT  # a column of the table that bears this name
        for term in spec.terms
        for factor in term.factors
    )


def _plain_block(
    names: Names, table: pd.DataFrame | pa.RecordBatch, weights: str | None
) -> Block | None:
    """The block of plain terms, without pandas or formulaic, which take as long as all the sums.

    None where a column is not of numbers, or one of them is missing or infinite: then
    the long way says what is wrong. X and Z are stored column by column.
    """
    wanted = dict.fromkeys([names.dependent, *names.parameters, *names.moments])
    arrays = {name: _numbers(table, name) for name in wanted if name != CONSTANT}
    weight = None if weights is None else _numbers(table, weights)
    if any(a is None for a in arrays.values()) or (weights is not None and weight is None):
        return None
    X, Z = (np.empty((len(part), len(table))) for part in (names.parameters, names.moments))
    for part, matrix in ((names.parameters, X), (names.moments, Z)):
        for name, row in zip(part, matrix, strict=True):
            row[:] = 1.0 if name == CONSTANT else arrays[name]
    y = np.asarray(arrays[names.dependent], dtype=float)
    return Block(y, X.T, Z.T, None if weight is None else np.asarray(weight, dtype=float), None)


def _numbers(table: pd.DataFrame | pa.RecordBatch, name: str) -> ndarray | None:
    """The column as an array, if it is of finite real numbers."""
    column = table.column(name) if isinstance(table, pa.RecordBatch) else table[name]
    if isinstance(column, pa.Array):
        if column.null_count or not (
            pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        ):
            return None
        values = column.to_numpy(zero_copy_only=False)
    elif isinstance(column.dtype, np.dtype) and column.dtype.kind in "iuf":
        values = column.to_numpy()
    else:
        return None
    return values if np.isfinite(values).all() else None


def _assemble(
    matrices: list[Any], frame: pd.DataFrame, weights: str | None, clusters: str | None
) -> tuple[Block, Names]:
    dependent, exogenous, endogenous, instruments = matrices
    if dependent.shape[1] != 1:
        raise ValueError(
            f"the left side of the formula has {dependent.shape[1]} columns "
            f"({', '.join(map(str, dependent.columns[:3]))}, ...): one column of numbers is needed"
        )
    y, exog, endog, instr = (np.asarray(m, dtype=float) for m in matrices)
    block = Block(
        y[:, 0],
        np.hstack([exog, endog]),
        np.hstack([exog, instr]),
        None if weights is None else frame[weights].to_numpy(dtype=float),
        None if clusters is None else frame[clusters].to_numpy(),
    )
    names = Names(
        (*map(str, exogenous.columns), *map(str, endogenous.columns)),
        (*map(str, exogenous.columns), *map(str, instruments.columns)),
        tuple(map(str, endogenous.columns)),
        str(dependent.columns[0]),
    )
    return block, names
