"""The admin's calls, over the socket and over mTLS."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from coldmerge.core.errors import ConfigError, ConflictError, NotFoundError
from coldmerge.wire.calls import call
from coldmerge.wire.invitation import Invitation
from coldmerge.wire.v1 import admin_pb2, common_pb2, models_pb2
from tests.harness import MODEL, Keys, Live, MachineClient, deltas


def _invite(
    live: Live, contributor: str = "a", role: str = "contributor", ttl: float = 3600
) -> admin_pb2.InviteResponse:
    request = admin_pb2.InviteRequest(
        contributor=contributor, role=role, ttl=timedelta(seconds=ttl)
    )
    answer: admin_pb2.InviteResponse = call(live.local_admin.Invite, request)
    return answer


def test_an_invitation_is_all_a_new_machine_needs(live: Live) -> None:
    made = _invite(live)
    invitation = Invitation.parse(made.invitation)
    invitation.check_fingerprint(made.fingerprint)
    assert invitation.address == live.servers.addresses.api
    assert invitation.enrol == live.servers.addresses.enrol
    keys = Keys.make()
    answer = call(live.enrolment.Enrol, keys.enrol_request(invitation.token))
    assert (answer.federation, answer.contributor, answer.role) == ("test", "a", "contributor")
    assert answer.signing_public_key == live.store.signer.key.public_key().public_bytes_raw()
    org = MachineClient(live, "a", "box", keys, answer.certificate_chain_pem)
    call(org.models.ListModels, models_pb2.ListModelsRequest())


@pytest.mark.parametrize(
    ("contributor", "role", "ttl"),
    [
        ("", "contributor", 60),
        ("a/b", "contributor", 60),
        ("x" * 65, "contributor", 60),
        ("a", "root", 60),
        ("a", "", 60),
        ("a", "contributor", 0),
        ("a", "contributor", -1),
        ("a", "contributor", 31 * 86400),
    ],
)
def test_invitations_that_cannot_be(live: Live, contributor: str, role: str, ttl: float) -> None:
    with pytest.raises(ConfigError):
        _invite(live, contributor, role, ttl)


def test_a_contributor_keeps_its_role(live: Live) -> None:
    _invite(live)
    _invite(live)
    with pytest.raises(ConflictError) as caught:
        _invite(live, role="admin")
    assert caught.value.code == "invite.other_role"


def test_contributors_with_their_machines(live: Live) -> None:
    org = live.machine("a")
    live.machine("a", name="laptop")
    org.contribute(live.open_round(), deltas())
    request = admin_pb2.RevokeRequest(contributor="a", machine="laptop", reason="lost")
    call(live.local_admin.Revoke, request)
    found = call(live.local_admin.ListContributors, admin_pb2.ListContributorsRequest())
    (a,) = found.contributors
    assert (a.name, a.role, a.revoked, a.contributions) == ("a", "contributor", False, 1)
    assert [(m.name, m.revoked) for m in a.machines] == [("box", False), ("laptop", True)]
    assert a.machines[0].HasField("last_seen_at")
    assert not a.machines[1].HasField("last_seen_at")


def test_revoking_what_is_not_there(live: Live) -> None:
    live.machine("a")
    for contributor, machine in (("ghost", ""), ("a", "ghost"), ("ghost", "box")):
        request = admin_pb2.RevokeRequest(contributor=contributor, machine=machine)
        with pytest.raises(NotFoundError):
            call(live.local_admin.Revoke, request)
    request = admin_pb2.RevokeRequest(contributor="a", reason="left")
    assert call(live.local_admin.Revoke, request).revoked
    assert call(live.local_admin.Revoke, request).revoked


def _open(live: Live, policy: str = "", model: str = MODEL) -> common_pb2.Round:
    request = admin_pb2.OpenRoundRequest(model=model, policy_json=policy)
    answer: common_pb2.Round = call(live.local_admin.OpenRound, request)
    return answer


def test_a_round_opens_by_the_template_or_by_a_policy(live: Live) -> None:
    first = _open(live)
    assert first.min_contributions == 3
    with pytest.raises(ConflictError) as caught:
        _open(live)
    assert caught.value.code == "round.already_active"
    call(live.local_admin.AbandonRound, admin_pb2.RoundAction(round=first.id))
    second = _open(live, json.dumps({"min_contributions": 2, "schedule": {"cron": "0 2 * * *"}}))
    assert second.min_contributions == 2
    assert "schedule" not in json.loads(second.policy_json)


@pytest.mark.parametrize(
    "policy", ["{", "[]", '{"min_contributions": 0}', '{"min": 2}', "[" * 9999]
)
def test_policies_that_are_wrong(live: Live, policy: str) -> None:
    with pytest.raises(ConfigError):
        _open(live, policy)


def test_rounds_of_models_that_are_not_there(live: Live) -> None:
    with pytest.raises(NotFoundError):
        _open(live, model="ghost")
    with pytest.raises(NotFoundError):
        _open(live, '{"min_contributions": 2}', model="ghost")


def test_seal_abandon_extend_resolve(live: Live) -> None:
    org, admin = live.machine("a"), live.machine("root", "admin").admin
    empty = _open(live, '{"min_contributions": 2}')
    action = admin_pb2.RoundAction(round=empty.id)
    with pytest.raises(ConflictError) as caught:
        call(admin.SealRound, action)
    assert caught.value.code == "round.empty"
    with pytest.raises(ConflictError):
        call(admin.ResolveRound, admin_pb2.ResolveRoundRequest(round=empty.id, publish=True))
    with pytest.raises(ConflictError) as caught:
        _extend(admin, empty.id, 60)
    assert caught.value.code == "round.no_deadline"
    call(admin.AbandonRound, admin_pb2.RoundAction(round=empty.id, reason="no data"))
    timed = live.open_round(min_contributions=2, duration="1h")
    assert timed.closes_at is not None
    later = _extend(admin, timed.id, 3600)
    assert later.closes_at.seconds == int(timed.closes_at.timestamp()) + 3600
    with pytest.raises(ConfigError):
        _extend(admin, timed.id, -5)
    org.contribute(timed, deltas())
    sealed = call(admin.SealRound, admin_pb2.RoundAction(round=timed.id))
    assert sealed.state == common_pb2.Round.SEALED
    listed = call(admin.ListRoundContributions, admin_pb2.RoundAction(round=timed.id))
    (row,) = listed.contributions
    assert (row.contributor, row.state, row.examples) == ("a", "ADMITTED", 100)
    assert row.norm > 0


def _extend(admin: object, round_id: str, seconds: float) -> common_pb2.Round:
    request = admin_pb2.ExtendRoundRequest(round=round_id, by=timedelta(seconds=seconds))
    answer: common_pb2.Round = call(admin.ExtendRound, request)  # type: ignore[attr-defined]
    return answer


def test_rollback_says_what_cannot_be(live: Live) -> None:
    for model, number in ((MODEL, 5), ("ghost", 0)):
        request = admin_pb2.RollbackRequest(model=model, number=number)
        with pytest.raises(NotFoundError):
            call(live.local_admin.Rollback, request)
    with pytest.raises(ConfigError):
        call(live.local_admin.Rollback, admin_pb2.RollbackRequest(model=MODEL, number=-1))
    with pytest.raises(ConflictError):
        call(live.local_admin.Rollback, admin_pb2.RollbackRequest(model=MODEL, number=0))
