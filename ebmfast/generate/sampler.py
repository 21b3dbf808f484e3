"""The sampler that a plan's [sampler] table describes."""

from __future__ import annotations

import dataclasses

from .. import zoo
from ..samplers import BAOAB, HMC, MALA, Annealed, DualAveraging, Langevin
from . import spec as tables
from .spec import PlanError, Spec

KINDS = {"langevin": Langevin, "mala": MALA, "hmc": HMC, "baoab": BAOAB}


def prepare(spec: Spec, number: int, expression, cards: dict):
    """The expression to sample, with priors counted as the plan says, the sampler, and `steps` (None: the sampler's own)."""
    composition, table = spec.compositions[number], spec.sampler
    counted, base, steps = expression, None, None
    if cards:
        counted, base = zoo.recommended(expression, cards)
        steps = zoo.chain_length(expression, cards)
    if composition.prior == "none":
        counted = expression
    try:
        if isinstance(table, tables.Recommended):
            if base is None:
                raise PlanError(f"sampler: is missing, and no model of compositions[{number}] has a card that names one")
            return counted, _changed(base, table), steps
        if isinstance(table, tables.AnnealedTable):
            return counted, _annealed(table), None
        return counted, _plain(table), table.steps
    except PlanError:
        raise
    except (ValueError, TypeError) as error:
        raise PlanError(f"sampler: {error}") from None


def _changed(base: Annealed | Langevin, table: tables.Recommended) -> Annealed | Langevin:
    if isinstance(base, Langevin):
        if table.levels or table.steps_per_level or table.drift:
            raise PlanError("sampler: levels, steps_per_level and drift are for models with noise levels; these have none")
        return base
    return Annealed.geometric(
        base.sigmas[0], base.sigmas[-1], table.levels or len(base.sigmas), denoise=base.denoise,
        steps_per_level=table.steps_per_level or base.steps_per_level, drift=table.drift or base.drift)


def _plain(table):
    """Langevin, MALA, HMC or BAOAB from its table."""
    options = {}
    for name in type(table).model_fields:
        value = getattr(table, name)
        if name in ("kind", "steps") or value is None:
            continue
        if isinstance(value, tables.Ramp):
            value = value.values(table.steps)
        elif name in ("clamp", "bounds"):
            value = tuple(value)
        elif name == "warmup":
            value = DualAveraging(value.steps, value.target)
        options[name] = value
    sampler = KINDS[table.kind](**options)
    sampler.coefficients(None, table.steps)  # a schedule of another length is an error of the plan
    return sampler


def _annealed(table: tables.AnnealedTable) -> Annealed:
    kind = KINDS[table.inner.kind]
    options = {k: v for k, v in table.inner.model_dump(exclude={"kind"}).items() if v is not None}
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(options) - known):
        raise PlanError(f"sampler.inner.{unknown[0]}: {table.inner.kind} takes no such key")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    how = {"steps_per_level": table.steps_per_level, "drift": table.drift, "denoise": table.denoise, "inner": kind(**options)}
    if table.sigmas is not None:
        return Annealed(table.sigmas, **how)
    return Annealed.geometric(table.sigma_max, table.sigma_min, table.levels, **how)
