"""`python -m tests.fuzz.seeds`: write the corpus. `ok-…` must be accepted, `bad-…` refused."""

from __future__ import annotations

import base64
import json
import shutil
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from google.protobuf.timestamp_pb2 import Timestamp

from coldmerge.core.digests import Content
from coldmerge.core.documents import FileEntry
from coldmerge.core.errors import NotFoundError
from coldmerge.wire.convert import put_content, signed_to_proto
from coldmerge.wire.errors import to_status
from coldmerge.wire.invitation import PREFIX, Invitation
from coldmerge.wire.v1 import common_pb2, contributions_pb2, enrolment_pb2, models_pb2
from coldmerge_coordinator.identity import Authority, make_intermediate, make_root
from tests.fuzz.engine import CORPUS
from tests.fuzz.papers import DIGEST, GENUINE_PAYLOAD, ROUND, genuine
from tests.fuzz.seed_tensors import Files, adapter, checkpoint, shards, task_vector

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)


def signed() -> Files:
    found = {f"ok-{name}": s.signature + s.document for name, s in genuine().items()}
    one = found["ok-receipt"]
    other = genuine()["manifest-full"].document
    return {
        **found,
        "bad-flipped": bytes([one[0] ^ 1]) + one[1:],
        "bad-swapped": one[:64] + other,
        "bad-longer": one + b" ",
        "bad-nothing": b"",
    }


def document() -> Files:
    found = {f"ok-{name}": signed.document for name, signed in genuine().items()}
    one = found["ok-receipt"]
    return {
        **found,
        "bad-spaces": one.replace(b":", b": "),
        "bad-twice": b'{"accepted_at":1,' + one[1:],
        "bad-nan": found["ok-evaluation"].replace(b"0.25", b"NaN"),
        "bad-bom": b"\xef\xbb\xbf" + one,
        "bad-utf16": one.decode().encode("utf-16"),
        "bad-huge": one.replace(b":12,", b":" + b"9" * 5000 + b","),
        "bad-deep": b"[" * 5000,
        "bad-escape": one.replace(b"hub", b"h\\u0075b"),
        "bad-path": one.replace(b'"hub"', b'"../hub"'),
        "bad-surrogate": one.replace(b"hub", b"\\ud800"),
        "bad-extra": one[:-1] + b',"zz":"a private sentence"}',
    }


def manifest() -> Files:
    full, lora = (genuine()[f"manifest-{kind}"].document for kind in ("full", "lora"))
    return {
        "ok-full": full,
        "ok-lora": lora,
        "bad-contributor": full.replace(b"org-a", b"org-b"),
        "bad-base": full.replace(DIGEST.encode(), b"0" * 64),
        "bad-private": full.replace(b'"bias"', b'"head.weight"'),
        "bad-shape": full.replace(b"[4,3]", b"[3,4]"),
        "bad-huge": full.replace(b"[4,3]", b"[1099511627776,1099511627776]"),
        "bad-length": full.replace(b'"nbytes":48', b'"nbytes":47'),
        "bad-dtype": full.replace(b'"F32"', b'"F64"'),
        "bad-scaling": full.replace(b'"scaling":{}', b'"scaling":{"bias":1.0}'),
        "bad-statistics": full.replace(b'"tensors"', b'"statistics":{"fisher":1.0},"tensors"'),
        "bad-rank": lora.replace(b"[2,3]", b"[9,3]"),
        "bad-kind": lora.replace(b'"lora"', b'"full"'),
        "bad-norm": full.replace(b'"norm":1.5', b'"norm":1e999'),
    }


def payload() -> Files:
    whole, cuts = GENUINE_PAYLOAD, bytes((0, 1, 2, 3, 5, 8, 13, 21))
    own = bytes((1, 1, 2, 3, 5, 8, 13, 21))

    def put(at: int, value: float) -> bytes:
        return whole[: 4 * at] + struct.pack("<f", value) + whole[4 * at + 4 :]

    return {
        "ok-pieces": cuts + whole,
        "ok-whole": bytes(8) + whole,
        "ok-own": own + put(2, 9.75),
        "bad-flipped": cuts + bytes([whole[0] ^ 1]) + whole[1:],
        "bad-order": cuts + whole[12:60] + whole[:12] + whole[60:],
        "bad-short": cuts + whole[:-1],
        "bad-long": cuts + whole + b"\x00",
        "bad-nan": own + put(5, float("nan")),
        "bad-infinity": own + put(14, float("-inf")),
        "bad-negative": own + put(20, -0.5),
        "bad-nothing": b"",
    }


_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


def _yaml(**good: str) -> Files:
    one = next(iter(good.values()))
    return {
        **{f"ok-{name.replace('_', '-')}": text.encode() for name, text in good.items()},
        "bad-bomb": (one + "options:\n" + _BOMB.replace("\n", "\n  ")).encode(),
        "bad-cycle": (one + "zz: &a [*a]\n").encode(),
        "bad-deep": (one + "zz: " + "[" * 2000).encode(),
        "bad-twice": (one + one).encode(),
        "bad-python": (one + "zz: !!python/object/apply:os.system [id]\n").encode(),
        "bad-timestamp": (one + "zz: !!timestamp x\n").encode(),
        "bad-date": (one + "zz: 2026-13-45\n").encode(),
        "bad-int": (one + 'zz: !!int ""\n').encode(),
        "bad-bool": (one + "zz: !!bool x\n").encode(),
        "bad-hex": (one + f"zz: 0x{'f' * 5000}\n").encode(),
        "bad-decimal": (one + f"zz: {'9' * 5000}\n").encode(),
        "bad-key": (one + "? [a]\n: b\n").encode(),
        "bad-binary": one.encode() + b"zz: \xff\xfe\n",
        "bad-control": one.encode() + b"zz: \x00\n",
        "bad-two": (one + "---\n" + one).encode(),
        "bad-unknown": (one + "zz: 1\n").encode(),
        "bad-list": b"- a\n",
    }


def round_policy() -> Files:
    full = "duration: 1h30m\nmerge: {method: ties, parameters: {density: 0.2}}\n"
    full += "gate:\n  max_loss: 2.5\n  window: 24h\nwebhook: https://example.org/x\n"
    full += "schedule: {cron: 0 2 * * 1-5, timezone: Europe/Paris}\n"
    return {
        **_yaml(small="min_contributions: 3\n", full=full),
        "ok-anchor": b"merge: {parameters: &p {a: 1}, outer: {method: none}}\n",
        "bad-cron": b"schedule: {cron: a}\n",
        "bad-zone": b"schedule: {cron: 0 2 * * *, timezone: ../../etc/passwd}\n",
        "bad-nan": b"gate: {max_loss: .nan}\n",
        "bad-duration": b"duration: 999999999d\n",
        "bad-sum": b"duration: 999999999d999999999d\n",
    }


def merge_plan() -> Files:
    small = "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 0.5}\n"
    small += "- {model: b, parameters: {weight: [0, 1]}}\ndtype: float32\n"
    ties = "merge_method: ties\nbase_model: base\nslices:\n- sources:\n"
    ties += "  - {model: a, layer_range: [0, 2], parameters: {weight: 1, density: 0.5}}\n"
    ties += "  - {model: b, layer_range: [0, 2]}\nparameters:\n  weight:\n"
    ties += "  - {filter: mlp, value: [0, 0.5]}\n  - value: 1\n  density: 1\n"
    found = _yaml(small=small, ties=ties)
    return {
        **found,
        "bad-range": ties.replace("[0, 2]", f"[0, {2**70}]").encode(),
        "bad-slice": b"merge_method: ties\nslices:\n- [a]\n",
    }


def train_config() -> Files:
    full = "trainer: token-classification\ndata: {train: x/, columns: {text: s}, labels: [a, b]}\n"
    full += "method: lora\nlora: {r: 8, alpha: 16, rslora: true}\nepochs: 2\nlr: 2.0e-5\n"
    full += "freeze: ['embeddings.*']\nbf16: auto\noptions: {any: [1, {x: y}]}\n"
    return {
        **_yaml(small="data: folder\n", full=full),
        "bad-nan": b"data: x\nlr: .nan\n",
        "bad-home": b"data: ~nobody-of-that-name/x\nlr: 0\n",
        "bad-options-bomb": ("data: x\noptions:\n  " + _BOMB.replace("\n", "\n  ")).encode(),
    }


def send_policy() -> Files:
    full = "require_approval: true\nprivate: ['a.*']\nencoding: bf16\nmax_bytes: 500000000\n"
    return {
        **_yaml(full=full + "metrics: false\nmay_send: [fisher]\n"),
        "ok-nothing": b"",
        "bad-may-send": b"may_send: [examples]\n",
    }


def coordinator_config() -> Files:
    full = "federation: hub\nlisten: '[::1]:7443'\nenrol_listen: 0.0.0.0:0\nhosts: [a.example]\n"
    full += "database_url: postgresql+psycopg://u:p@h/name\nlimits: {max_open_uploads: 2}\n"
    return {
        **_yaml(small="federation: hub\n", full=full),
        "bad-port": b"federation: hub\nlisten: a:99999\n",
        "bad-url": b"federation: hub\ndatabase_url: nonsense\n",
        "bad-url-port": b"federation: hub\ndatabase_url: 'postgresql://h:x/n'\n",
        "bad-name": b"federation: ../hub\n",
    }


def _certificates() -> tuple[bytes, bytes, bytes, bytes]:
    """A root in PEM, another one, a client's certificate in PEM, and a request in DER."""
    root_key, root = make_root("hub", NOW)
    key, middle = make_intermediate(root_key, root, "hub", NOW)
    own = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "laptop")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(own, hashes.SHA256())
    issued = Authority("hub", key, middle, root).issue_client(
        request,
        contributor="org-a",
        machine="laptop",
        identity_public_key=bytes(32),
        now=NOW,
        lifetime=timedelta(hours=1),
    )
    other = make_root("evil", NOW)[1].public_bytes(Encoding.PEM)
    der = request.public_bytes(Encoding.DER)
    return root.public_bytes(Encoding.PEM), other, issued.chain_pem, der


def invitation(root: bytes, other: bytes) -> Files:
    good = Invitation(
        federation="hub",
        address="localhost:7443",
        enrol="[::1]:7444",
        token="A" * 43,
        root=root.decode(),
    )

    def packed(**changes: object) -> bytes:
        body = {**good.model_dump(), **changes}
        raw = json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode()
        return PREFIX.encode() + base64.urlsafe_b64encode(raw).rstrip(b"=")

    text = good.render().encode()
    return {
        "ok-plain": text,
        "ok-wrapped": b"\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
        "ok-line-separator": text[:90] + "\u2028".encode() + text[90:],
        "bad-cut": text[:-40],
        "bad-second-root": packed(root=(root + other).decode()),
        "bad-text-in-root": packed(root="# hello\n" + root.decode()),
        "bad-port": packed(address="localhost:99999"),
        "bad-arabic-port": packed(address="localhost:٧٤٤٣"),
        "bad-address": packed(address="http://x/y:1"),
        "bad-surrogate": packed(federation="\ud800"),
        "bad-extra": packed(text="a private sentence"),
        "bad-root": packed(root="-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        "bad-prefix": text.removeprefix(PREFIX.encode()),
        "bad-nothing": b"",
    }


def peer(leaf: bytes, chain: bytes, root: bytes) -> Files:
    text, bits = b"U\x04\x05\x13", b"U\x04\x05\x03"
    return {
        "ok-der": leaf,
        "ok-chain": chain,
        "bad-root": root,
        "bad-cut": leaf[:-9],
        "bad-bits": leaf.replace(text, bits).replace(text.replace(b"\x13", b"\x0c"), bits),
    }


def wire(request: bytes) -> dict[str, Files]:
    found = genuine()
    manifest_message = signed_to_proto(found["manifest-full"])
    chunk = common_pb2.Chunk(offset=7, data=b"abc")
    listing = Content(
        tuple(ROUND.tensors[name] for name in sorted(ROUND.tensors)),
        (FileEntry(path="config.json", size=2, sha256=DIGEST),),
    )
    release, code = models_pb2.Release(model="m", number=1), models_pb2.Release()
    put_content(listing, release)
    put_content(Content((), (FileEntry(path="evil.py", size=2, sha256=DIGEST),)), code)
    error = NotFoundError("a.b", "Not there.", hint="Look.", expected="x", got="y", model="m")
    renewal = enrolment_pb2.RenewRequest(
        contributor="org-a", machine="laptop", csr_der=request, at=Timestamp(seconds=1772452800)
    )
    late = enrolment_pb2.RenewRequest(csr_der=request, at=Timestamp(seconds=2**62))
    write, begin = contributions_pb2.WriteRequest, contributions_pb2.BeginRequest
    return {
        "begin": {
            "ok-manifest": begin(manifest=manifest_message).SerializeToString(),
            "bad-receipt": begin(manifest=signed_to_proto(found["receipt"])).SerializeToString(),
            "bad-empty": b"",
        },
        "write": {
            "ok-first": write(upload_id="upload-1", chunk=chunk).SerializeToString(),
            "ok-next": write(chunk=chunk).SerializeToString(),
            "bad-other": write(upload_id="upload-2", chunk=chunk).SerializeToString(),
            "bad-cut": write(upload_id="upload-1", chunk=chunk).SerializeToString()[:-1],
        },
        "release": {
            "ok-listing": release.SerializeToString(),
            "bad-digest": models_pb2.Release(tensors=release.tensors).SerializeToString(),
            "bad-code": code.SerializeToString(),
        },
        "failure": {
            "ok-error": to_status(error)[2][0][1],
            "bad-kind": common_pb2.ErrorDetail(kind="SystemExit").SerializeToString(),
            "bad-bytes": b"\xff",
        },
        "renewal": {
            "ok-request": renewal.SerializeToString(),
            "bad-time": late.SerializeToString(),
            "bad-csr": enrolment_pb2.RenewRequest(csr_der=b"\x30\x00").SerializeToString(),
        },
    }


def _requests(der: bytes) -> Files:
    name = x509.Name([])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    other = builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256())
    return {
        "ok-request": der,
        "bad-curve": other.public_bytes(Encoding.DER),
        "bad-signature": der[:-1] + bytes([der[-1] ^ 1]),
        "bad-cut": der[:-9],
        "bad-nothing": b"",
    }


def everything() -> dict[str, Files]:
    """All files, by target and name."""
    root, other, chain, request = _certificates()
    makers: dict[str, Callable[[], Files]] = {
        "checkpoint": checkpoint,
        "shards": shards,
        "task-vector": task_vector,
        "adapter": adapter,
        "signed": signed,
        "document": document,
        "manifest": manifest,
        "payload": payload,
        "round-policy": round_policy,
        "merge-plan": merge_plan,
        "train-config": train_config,
        "send-policy": send_policy,
        "coordinator-config": coordinator_config,
    }
    leaf = x509.load_pem_x509_certificate(chain).public_bytes(Encoding.DER)
    return {
        **{name: make() for name, make in makers.items()},
        "invitation": invitation(root, other),
        "csr": _requests(request),
        "peer": peer(leaf, chain, root),
        **wire(request),
    }


if __name__ == "__main__":
    shutil.rmtree(CORPUS, ignore_errors=True)
    for folder, files in everything().items():
        (CORPUS / folder).mkdir(parents=True)
        for file, content in files.items():
            (CORPUS / folder / file).write_bytes(content)
