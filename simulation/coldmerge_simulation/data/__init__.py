"""What simulated contributors train on: sources of tasks, and how each is dealt out."""

from coldmerge_simulation.data.config import DataConfig
from coldmerge_simulation.data.making import Share, Shares, make, names
from coldmerge_simulation.data.partition import GROUP, Partitioner, Parts, Pool, deal_again, serves
from coldmerge_simulation.data.partitioners import PARTITIONERS
from coldmerge_simulation.data.registry import partitioner, partitioner_names

__all__ = [
    "GROUP",
    "PARTITIONERS",
    "DataConfig",
    "Partitioner",
    "Parts",
    "Pool",
    "Share",
    "Shares",
    "deal_again",
    "make",
    "names",
    "partitioner",
    "partitioner_names",
    "serves",
]
