"""The contributors' side of a simulation, as a Flower ClientApp.

It trains, extracts, signs and judges with what a real contributor's client uses. Which
contributor it is, it reads in the order; a node plays every contributor whose number,
modulo the number of nodes, is the node's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.documents import sign
from coldmerge.core.errors import ConfigError, DataError
from coldmerge.core.extraction import Extraction, extract
from coldmerge.rounds.policy import MergePolicy
from coldmerge.rounds.statistics import statistics_for
from coldmerge_client import papers, slopes
from coldmerge_client.papers import Addressed, Body
from coldmerge_client.prepare import wanted
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.trainer import Trained, TrainJob, load_trainer, measuring
from coldmerge_simulation import derive
from coldmerge_simulation.contributors import attacks
from coldmerge_simulation.contributors.attacks import flip_labels
from coldmerge_simulation.contributors.conduct import Attack
from coldmerge_simulation.flower.compat import ClientApp, Context, Message
from coldmerge_simulation.folder import replace_file
from coldmerge_simulation.orders import error_values, pack, signed_values, unpack

app = ClientApp()

PAYLOAD = "payload.safetensors"
Values = dict[str, Any]
Files = dict[str, bytes]


def hello(message: Message, context: Context) -> Message:
    """Say which part this node plays."""
    said = {key: context.node_config.get(key) for key in ("partition-id", "num-partitions")}
    return Message(pack(said, {}), reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Fine-tune, extract, sign."""
    return _answered(message, context, _train)


def evaluate(message: Message, context: Context) -> Message:
    """Judge a candidate on the own validation data."""
    return _answered(message, context, _evaluate)


def _answered(
    message: Message, context: Context, work: Callable[[Home, Values], tuple[Values, Files]]
) -> Message:
    """What `work` answers; an exception is an answer, too: the simulation goes on without it."""
    try:
        values, files = unpack(message.content)
        home = Home(values, context)
        for digest in values.get("drop", ()):
            home.drop(digest)
        for name, data in files.items():
            home.receive(name, data)
        with _one_thread():
            said, sent = work(home, values)
    except Exception as error:  # noqa: BLE001 - a contributor's trainer may raise anything
        said, sent = error_values(error), {}
    return Message(pack(said, sent), reply_to=message)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums have an order: more threads would give other digests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


class Home:
    """Where a contributor's things are: in the run's folder, or on the node's own disk.

    ```
    homes/<contributor>/heads/<round>  work/<round>  cache
    ```

    A node's own configuration says where: `home`, and where they are elsewhere `data` and `homes`.
    """

    def __init__(self, values: Values, context: Context) -> None:
        self.name, self.number = str(values["contributor"]), int(values["number"])
        self.last: int | None = values.get("head")
        said = values["run"]
        self.shared = said is not None
        own = {} if self.shared else context.node_config
        root = Path(said or str(own["home"]))
        self.data = Path(str(own.get("data") or root / "data")) / self.name
        self.folder = Path(str(own.get("homes") or root / "homes")) / self.name
        self.models, self.outbox = root / "models", root / "outbox" / str(values["round"])
        self.folder.mkdir(parents=True, exist_ok=True)

    def receive(self, name: str, data: bytes) -> None:
        """Keep a file of a model that came with an order: `<digest>/<path>`."""
        place = self._place(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, data)

    def drop(self, digest: str) -> None:
        """Remove a model that no later order speaks of."""
        shutil.rmtree(self._place(digest), ignore_errors=True)

    def _place(self, name: str) -> Path:
        place, models = self.models / name, self.models.resolve()
        if models not in place.resolve().parents:
            raise DataError(
                "simulation.bad_file_name",
                "An order holds a file with a name that leads elsewhere.",
                got=name[:80],
                hint="Run the same version of coldmerge on every node.",
            )
        return place

    def model(self, digest: str) -> Body:
        """A release or candidate on disk."""
        return Body(self.models / digest[:32], digest)

    def head(self) -> Path | None:
        """The private head to go on from: of the round that the order names.

        Raises:
            DataError: it is on another node: without it, the result would be another one.
        """
        if self.last is None:
            return None
        place = self.folder / "heads" / str(self.last)
        if not place.is_dir():
            raise DataError(
                "simulation.no_head",
                f"{self.name} does not find the head that it trained in round {self.last}.",
                expected=f"what was trained then in {self.folder / 'heads'}",
                hint="Resume the run with the nodes, and the homes, that it was started with.",
            )
        return place if any(place.iterdir()) else None

    def keep_head(self, head: Path | None) -> None:
        """Keep a trained head, and that there was none; it counts once its round has taken the
        contribution.
        """
        heads = self.folder / "heads"
        for path in heads.iterdir() if heads.is_dir() else ():
            if path.name != str(self.last):
                shutil.rmtree(path, ignore_errors=True)
        beside = self.folder / ".head"
        shutil.rmtree(beside, ignore_errors=True)
        if head is None:
            beside.mkdir()
        else:
            shutil.copytree(head, beside)
        heads.mkdir(exist_ok=True)
        beside.rename(heads / str(self.number))

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A folder for one fine-tune; what an interrupted one left is thrown away."""
        place = self.folder / "work" / str(self.number)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def config(self, values: Values, data: Path | None = None) -> TrainConfig:
        """The contributor's training configuration."""
        seed = derive.number(int(values["seed"]), "training", self.name)
        own = {"data": str(data or self.data), "threads": 1, "seed": seed}
        return TrainConfig.parse({**values["train"], **own}, self.folder)


def _addressed(home: Home, values: Values) -> Addressed:
    return Addressed(
        federation=str(values["federation"]),
        contributor=home.name,
        model=str(values["federation"]),
        round=str(values["round"]),
        base_digest=str(values["base_digest"]),
        base_number=int(values["base_number"]),
    )


def _train(home: Home, values: Values) -> tuple[Values, Files]:
    """Fine-tune the release, and leave the signed task vector where the order says."""
    addressed, seed = _addressed(home, values), int(values["seed"])
    payload = home.outbox / f"{home.name}.safetensors"
    trained, found = _extracted(home, values, home.model(addressed.base_digest), payload)
    manifest = papers.manifest(
        addressed,
        found,
        examples=trained.examples,
        metrics=trained.metrics,
        training=trained.training,
        nonce=derive.token(seed, "nonce", home.name, home.number),
        now=datetime.fromisoformat(values["now"]),
    )
    if values["consents"]:
        manifest = manifest.model_copy(update={"consents": tuple(values["consents"])})
    signed = sign(manifest, derive.identity(seed, home.name))
    said = {"signed": signed_values(signed), "metrics": dict(trained.metrics)}
    if home.shared:
        return said, {}
    sent = payload.read_bytes()
    payload.unlink()
    return said, {PAYLOAD: sent}


def _extracted(home: Home, values: Values, base: Body, payload: Path) -> tuple[Trained, Extraction]:
    """What was trained, and what is sent of it, as `payload`: an attacker's doing included."""
    merge = MergePolicy.model_validate(values["merge"])
    seed = int(values["seed"])
    attack = None if values["attack"] is None else Attack.model_validate(values["attack"])
    mischief = derive.number(seed, "attack", home.name, home.number)
    home.outbox.mkdir(parents=True, exist_ok=True)
    with home.workshop() as place:
        data = None
        if attack is not None and attack.on_data:
            data = flip_labels(attack, home.data, place / "data", mischief)
        config = home.config(values, data)
        job = TrainJob(
            release=base.folder,
            out=place / "run",
            head=home.head(),
            config=config,
            seed=derive.number(seed, "train", home.name, home.number),
            private=tuple(values["private"]),
            digest=base.digest,
            cache=home.folder / "cache",
        )
        trained = _trained(job, merge)
        found = extract(
            Checkpoint.open(base.folder),
            trained.folder,
            payload,
            base_digest=base.digest,
            private=job.private,
            statistics=wanted(trained.folder, merge),
        )
        if attack is not None:
            found = attacks.attack(attack, found, mischief)
        home.keep_head(trained.head)
    return trained, found


def _trained(job: TrainJob, merge: MergePolicy) -> Trained:
    trainer = load_trainer(job.config)
    trained = trainer.train(job)
    if not isinstance(trained, Trained):
        raise DataError(
            "simulation.nothing_trained",
            f"The trainer {job.config.trainer} returned nothing that was trained.",
            expected="a coldmerge_client.training.Trained",
            got=type(trained).__name__,
            hint="See coldmerge_client.training.Trainer for what `train` returns.",
        )
    asked = statistics_for(merge) - {"trim"}
    if asked:
        measuring(trainer, job.config).measure(job, trained, asked)
    return replace(trained, folder=Path(trained.folder))


def _evaluate(home: Home, values: Values) -> tuple[Values, Files]:
    """Compare candidate and base in pairs, and sign the result."""
    addressed, candidate = _addressed(home, values), home.model(str(values["candidate"]))
    scores = papers.compare(
        home.config(values),
        home.model(addressed.base_digest),
        candidate,
        int(values["probe_seed"]),
        home.folder / "cache",
        objective=values["objective"],
    )
    if values.get("slopes"):
        scores = replace(scores, slopes=_slopes(home, values, candidate))
    evaluation = papers.evaluation(
        addressed,
        candidate.digest,
        int(values["probe_seed"]),
        scores,
        datetime.fromisoformat(values["now"]),
    )
    signed = sign(evaluation, derive.identity(int(values["seed"]), home.name))
    return {"signed": signed_values(signed)}, {}


def _slopes(home: Home, values: Values, candidate: Body) -> dict[str, tuple[float, ...]]:
    """What a probe asks for besides; nothing, where the trainer has none."""
    start, *ends = [home.model(str(digest)).folder for digest in values["directions"]]
    try:
        return slopes.along(
            home.config(values),
            candidate,
            slopes.Directions(start, tuple(ends)),
            int(values["probe_seed"]),
            home.folder / "cache",
            objective=str(values["objective"]),
            by_layer=values["slopes"] == "layer",
        )
    except ConfigError:
        return {}


app.query()(hello)
app.train()(train)
app.evaluate()(evaluate)
