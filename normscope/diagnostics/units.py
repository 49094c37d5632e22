"""Units: what to say of units that are zero for every input, and of what follows from them further on."""

from __future__ import annotations

import pandas as pd

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count
from normscope.metrics import propagation as metrics
from normscope.metrics import tables

NEARLY_ALL = 0.95  # fraction from which hardly anything passes a layer
DEAD_UNITS = "propagation.dead-units"
_ALL = 0.9995  # fraction that rounds to all


def cut(rule: Rule, record: Record, sites: list[str]) -> list[Finding]:
    """Conclude that no gradient passes a site.

    Args:
        rule: the finding's fixed part.
        record: record of one run.
        sites: those without gradient, nearest to the loss first.

    Returns:
        One failure, at the layer before the first dead ReLU where there is one: all after it see a constant.
    """
    first = _first_dead(record, sites)
    if first:
        sites = [first, *(site for site in sites if site != first)]
    site, module = sites[0], tables.module_of(sites[0])
    before = f"at {count(len(sites) - 1, 'site')} before" if len(sites) > 1 else "nowhere else"
    passing = f"no gradient passes it: at every late sampled step it is exactly zero there and {before}"
    if first:
        passing = f"at every late sampled step the gradient is exactly zero at {count(len(sites), 'site')}"
    certain = True if first else _negative(record, site)
    message = f"{site}: {passing}."
    if certain is not None:
        surely = "" if certain else "most likely "
        message = (
            f"{site}: {surely}every unit after {module} is zero: its output is always negative at the ReLU that "
            f"follows; {passing}."
        )
    evidence: dict[str, float | int | str | list[float]] = {"sites_without_gradient": len(sites), "dead_fraction": 1.0}
    remedy = _remedy(record, site)
    return rule.found(Verdict.FAILURE, message, sites=sites, evidence=evidence, remedy=remedy)


def dead(rule: Rule, record: Record, frame: pd.DataFrame) -> list[Finding]:
    """Conclude that layers have lost more than the threshold of their units.

    Args:
        rule: the finding's fixed part, with a threshold.
        record: record of one run.
        frame: estimates of the sites beyond it, the worst first, with the `role` they were judged by.

    Returns:
        One finding.
    """
    top, limit = frame.iloc[0], rule.threshold or 0.0
    site, role, value = str(top["site"]), str(top["role"]), float(top["value"])
    ahead = _ahead(record, site) if role == "value" else site
    module, whole = tables.module_of(ahead or site), value > _ALL
    units = "every unit" if whole else f"{value:.0%} of the units"
    are, their, get = ("is", "its", "gets") if whole else ("are", "their", "get")
    late = f"at every late sampled step (threshold {limit:.0%})"
    if role == "gradient":
        said = (
            f"{units} of {module} {get} no gradient {late}: most likely {their} output is always negative at the ReLU"
        )
        said = f"{said} that follows"
    elif ahead:
        said = f"{units} after {module} {are} zero {late}: {their} output is always negative at the ReLU that follows"
    else:
        said = f"{units} {are} zero {late}: {their} input is always negative"
    fraction = tables.table(record, "dead", role=role)
    return rule.found(
        Verdict.FAILURE if value > NEARLY_ALL else Verdict.WARNING,
        f"{site}: {said}; {count(len(frame), 'site')} beyond the threshold.",
        sites=frame["site"].tolist(),
        step=tables.onset(fraction[site].dropna() > limit) if site in fraction else None,
        evidence={"dead_fraction": value, "sites_beyond": len(frame), "seen": int(top["n"]), "role": role},
        remedy=_remedy(record, ahead),
    )


def origin(record: Record, found: list[Finding], site: str) -> str:
    """Return the site with dead units that most likely explains something at a later layer.

    Args:
        record: record of one run.
        found: findings of propagation.dead-units.
        site: a site of the later layer.

    Returns:
        The last such site before that layer; "" where there is none.
    """
    severe = [f for f in found if f.verdict in (Verdict.FAILURE, Verdict.WARNING)]
    order, orders = tables.attributes(record)["order"], tables.layers(record)["order"]
    here = float(orders.get(tables.module_of(site), float("nan")))
    # what lies before a cut lacks a gradient, but its units are not dead
    sites = [s for f in severe for s in (f.sites[:1] if "sites_without_gradient" in f.evidence else f.sites)]
    earlier = [s for s in sites if float(order.get(s, float("nan"))) < here]
    return max(earlier, key=lambda s: float(order[s]), default="")


def _first_dead(record: Record, sites: list[str]) -> str:
    """Return the site that feeds the first ReLU that is all zero, of those at or right behind some sites; else ""."""
    known, fractions = tables.attributes(record), tables.table(record, "dead")
    relus = known.index[(known["activation"] == "relu") & known["predecessor"].isin(sites)]
    whole = [site for site in relus if site in fractions and tables.late(fractions[site]).min() > _ALL]
    return _ahead(record, whole[0]) if whole else ""


def _ahead(record: Record, relu: str) -> str:
    """Return the site that feeds a ReLU, "" where it is unknown, as behind a sum written as an expression."""
    return str(tables.attributes(record)["predecessor"].get(relu, ""))


def _negative(record: Record, site: str) -> bool | None:
    """Tell whether a ReLU after a site is known to be all zero (True), may be so (False), or is not (None)."""
    known = tables.attributes(record)
    affine = known["norm"].notna()[site] or metrics.weighted(str(known.loc[site, "class"]))
    followers = known.index[(known["predecessor"] == site) & (known["activation"] == "relu")]
    if not affine or (not len(followers) and (known["predecessor"] == site).any()):
        return None
    fractions = tables.table(record, "dead")
    late = [tables.late(fractions[f]).min() for f in followers if f in fractions]
    if late:
        return True if min(late) > _ALL else None
    means = tables.table(record, "mean.max")
    return False if site in means and tables.late(means[site]).max() < 0 else None


def _remedy(record: Record, ahead: str) -> str | None:
    """Return a remedy that proposes no normalization layer to a model that has them; None for the rule's own."""
    known = tables.attributes(record)
    if not known["norm"].notna().any():
        return None
    steps = "Lower the learning rate or warm it up, or use LeakyReLU or GELU"
    if ahead not in known.index or known["norm"].isna()[ahead]:
        return f"{steps}; re-initialize the layer before the ReLU if most of it is gone."
    module = tables.module_of(ahead)
    return f"Re-initialize {module}.bias (0) and {module}.weight (1). {steps}, so that it does not come back."
