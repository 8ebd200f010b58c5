"""What becomes of a probe: it is measured, and the round goes back to merge the next candidate."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from coldmerge.rounds import coefficients, slopes
from coldmerge.rounds.coefficients import Search
from coldmerge.rounds.policy import CoefficientsPolicy
from coldmerge.rounds.view import Notify, Outcome, RoundView, abandoned, back_to_sealed


def measure(view: RoundView, now: datetime) -> Outcome:
    """Take the probe's value once everybody has reported, or when its window has closed."""
    rules, search = view.policy.merge.coefficients, view.search
    if rules is None or search is None or view.evaluation_closes_at is None:
        return view, ()
    said = {item.contributor: coefficients.asked(rules, item) for item in view.evaluations}
    reports = {name: value for name, value in said.items() if value is not None}
    enough = len(reports) >= rules.min_evaluators
    missing = set(view.evaluators) - reports.keys()
    if now < view.evaluation_closes_at and not (enough and not missing):
        return view, ()
    if enough:
        return _advanced(view, rules, search, reports)
    why = (
        f"only {len(reports)} of at least {rules.min_evaluators} evaluators measured probe "
        f"{view.trial + 1} in time"
    )
    moved, _ = _next(view, coefficients.stopped(search, rules, why))
    return moved, (Notify("round.stuck", moved.reason or why),)


def _advanced(
    view: RoundView, rules: CoefficientsPolicy, search: Search, reports: dict[str, float]
) -> Outcome:
    found = {item.contributor: slopes.reported(search, item) for item in view.evaluations}
    told = {name: each for name, each in found.items() if each is not None and name in reports}
    wanted = slopes.asked(search, rules)
    after = coefficients.advance(
        search,
        rules,
        view.trial,
        reports,
        view.probe_seed,
        candidate=view.candidate_digest or "",
        slopes=slopes.combined(search, rules, told) if wanted else None,
    )
    if not (wanted and after.done and len(told) < rules.min_evaluators):
        return _next(view, after)
    why = (
        f"{after.why}: only {len(told)} of at least {rules.min_evaluators} evaluators reported "
        f"slopes of probe {view.trial + 1}"
    )
    moved, _ = _next(view, replace(after, why=why))
    return moved, (Notify("round.stuck", moved.reason or why),)


def give_up(view: RoundView, why: str) -> Outcome:
    """A probe cannot be merged: the best that was measured is, if there is any."""
    rules, search = view.policy.merge.coefficients, view.search
    if rules is None or search is None or not search.probes:
        return abandoned(view, why)
    moved, _ = _next(view, coefficients.stopped(search, rules, why))
    return moved, (Notify("round.stuck", moved.reason or why),)


def _next(view: RoundView, after: Search) -> Outcome:
    """Back to the worker, for the next probe or for what the gate judges."""
    text = f"coefficients: {after.why}" if after.done else f"coefficients: {_count(after)} measured"
    return replace(back_to_sealed(view, text), trial=view.trial + 1, search=after), ()


def _count(search: Search) -> str:
    count = len(search.probes)
    return f"{count} probe{'s' if count > 1 else ''}"
