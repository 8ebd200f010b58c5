"""Every target by its name."""

from __future__ import annotations

from tests.fuzz import headers, messages, papers, settings
from tests.fuzz.engine import Target

_H, _P, _Y, _M = headers.TOKENS, papers.TOKENS, settings.TOKENS, messages.TOKENS
_ALL = (
    Target("checkpoint", headers.checkpoint, _H, headers.repair),
    Target("shards", headers.shards, _H),
    Target("task-vector", headers.task_vector, _H, headers.repair),
    Target("adapter", headers.adapter, _H, headers.repair_adapter),
    Target("signed", papers.signed_document, _P),
    Target("document", papers.document, _P, papers.repair_document),
    Target("manifest", papers.admission, _P, papers.repair_document),
    Target("payload", papers.payload, (), papers.repair_payload),
    Target("round-policy", settings.round_policy, _Y),
    Target("merge-plan", settings.merge_plan, _Y),
    Target("train-config", settings.train_config, _Y),
    Target("send-policy", settings.send_policy, _Y),
    Target("coordinator-config", settings.coordinator_config, _Y),
    Target("invitation", messages.invitation, _M),
    Target("csr", messages.csr, _M),
    Target("peer", messages.peer, _M),
    Target("begin", messages.begin, _M),
    Target("write", messages.write, _M),
    Target("release", messages.release, _M),
    Target("failure", messages.failure, _M),
    Target("renewal", messages.renewal, _M),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}
