"""What becomes of a candidate: the gate's verdict, and the search for whose fault it was."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from coldmerge.rounds import isolation, learning
from coldmerge.rounds.gate import Verdict, decide
from coldmerge.rounds.isolation import Rules, Trial
from coldmerge.rounds.view import (
    Notify,
    Outcome,
    RoundView,
    back_to_sealed,
    published,
    rejected,
)


def judge(view: RoundView, now: datetime) -> Outcome:
    """Ask the gate about the candidate at hand, which may be that of a trial; measure a probe."""
    if view.probing:
        return learning.measure(view, now)
    gate = view.policy.gate
    if gate is None or view.evaluation_closes_at is None:
        return view, ()
    decision = decide(view.evaluations, gate, now, view.evaluation_closes_at, view.evaluators)
    why = "; ".join(decision.reasons)
    if decision.verdict is Verdict.PUBLISH:
        return tried(view, passed=True, why=why) if view.left_out else published(view, (), why)
    if decision.verdict is Verdict.PUBLISH_FLAGGED:
        return published(view, ("unchecked",), why)
    if decision.verdict is Verdict.REJECT:
        return _refused(view, why)
    if decision.verdict is Verdict.HOLD and not view.held:
        return replace(view, held=True, reason=why), (Notify("round.stuck", f"held: {why}"),)
    return view, ()


def _refused(view: RoundView, why: str) -> Outcome:
    """Search on, unless nobody asked for it or too few judged the candidate to know."""
    gate = view.policy.gate
    if gate is None or gate.on_reject != "isolate":
        return rejected(view, why)
    if len({item.contributor for item in view.evaluations}) < gate.min_evaluators:
        return _ended(_noted(view, passed=False, why=why), why)
    return tried(view, passed=False, why=why)


def tried(view: RoundView, *, passed: bool, why: str) -> Outcome:
    """Note how the trial at hand went, and go on to the next one, if there is one."""
    noted = _noted(view, passed=passed, why=why)
    group = isolation.next_group(_rules(noted), noted.trials)
    if group is None:
        return _ended(noted, why)
    number = view.trial + 1
    text = f"trial {number} leaves {len(group)} of {len(view.contributors)} out; before it: {why}"
    again = replace(back_to_sealed(noted, text), trial=number, left_out=group)
    return again, (Notify("round.isolating", text),)


def _noted(view: RoundView, *, passed: bool, why: str) -> RoundView:
    trial = Trial(
        number=view.trial,
        left_out=view.left_out,
        passed=passed,
        reason=why,
        digest=view.candidate_digest,
        master=view.candidate_master,
        state=view.candidate_state,
    )
    return replace(view, trials=(*view.trials, trial))


def _rules(view: RoundView) -> Rules:
    gate = view.policy.gate
    alone = view.consenting if gate and gate.isolate_singles else ()
    least = gate.isolate_least if gate else isolation.SMALLEST_GROUP
    return Rules(view.contributors, view.probe_seed, least, frozenset(alone))


def _ended(view: RoundView, why: str) -> Outcome:
    """The candidate that passed with the fewest left out is published; without one, none."""
    count, found = len(view.contributors), isolation.best(view.trials)
    if found is not None:
        kept = replace(
            view,
            trial=found.number,
            left_out=found.left_out,
            candidate_digest=found.digest,
            candidate_master=found.master,
            candidate_state=found.state,
        )
        return published(kept, (), f"without {len(found.left_out)} of {count}: {found.reason}")
    if view.left_out:
        why = f"no group that may be left out is enough, in {view.trial} trials; the last: {why}"
    return rejected(view, why)
