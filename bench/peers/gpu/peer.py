"""What a peer is to the comparison."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import torch

from scenarios import Scenario
from workload import Workload


@dataclasses.dataclass
class Call:
    """One attention over a workload: `run` queues it on the current stream and fills `output`."""

    run: Callable[[], object]
    output: torch.Tensor
    fp8_query: bool = False  # it was given the workload's fp8_query


class Peer(abc.ABC):
    """A kernel to compare with. The constructor imports what it needs and raises ImportError or
    OSError where it is not there."""

    name: str
    # What it is and in which version, for the heading of its results.
    description: str
    # Whether it reads larger pages faster, so that its best page size is worth a column.
    pages_matter = False

    @abc.abstractmethod
    def cannot(self, scenario: Scenario) -> str:
        """Why it has no kernel for the scenario, "" if it has. It is not asked about a scenario that
        is beyond all peers."""

    @abc.abstractmethod
    def prepare(self, work: Workload) -> Call:
        """Plans and allocates, which is not timed: a step does it once for all its layers."""


def version_of(package: str) -> str:
    """The installed version of a Python package, or a word that it does not say."""
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
