"""The ranks that decide together: their process group, weights and collectives.

At the end of a window every rank gathers the same rows (:meth:`Ranks.agree`). Nothing on one rank
alone may return or raise between the end of a window and the gather: the others would wait for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import Agreement, Facts, Row, agree, check_facts, digest
from .sharding import LocalShard

PIPELINE_DIMENSION = "pp"
"""Name of the mesh dimension that is taken for pipeline stages."""


@dataclass(frozen=True)
class PipelineStages:
    """Declares, as ``process_group=``, that this rank holds one stage of a pipeline.

    Not needed if the parameters are DTensors of a mesh that was cut out of one with a dimension
    named "pp", or if such a mesh is given as ``process_group=``.

    Args:
        stage: of this rank, counted from 0. A rank with several stages (an interleaved schedule)
            gives its position in the pipeline.
        num_stages: into how many ranks the pipeline cuts one copy of the model.
        group: all ranks that train the model, a process group or mesh; None: all there are.
    """

    stage: int
    num_stages: int
    group: Any = None

    def __post_init__(self) -> None:
        for name, value in (("stage", self.stage), ("num_stages", self.num_stages)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {value!r}")
        if not 0 <= self.stage < self.num_stages:
            raise ValueError(
                f"stage: expected at least 0 and less than num_stages={self.num_stages}, "
                f"got {self.stage}"
            )


class Layout(NamedTuple):
    """What this rank holds, in the few numbers that ranks compare.

    Attributes:
        layout: digest of names, shapes, dtypes, placements and param groups.
        held: digest of which elements are here; equal on replicas.
        elements: weighted number of the elements here.
        model_elements: elements of the whole model, or of this stage; NaN if an engine does not
            say.
        sharded: True if no rank alone holds everything.
    """

    layout: float
    held: float
    elements: float
    model_elements: float
    sharded: bool


@dataclass(frozen=True)
class Ranks:
    """The ranks whose tables are added up, this one among them.

    A process that trains by itself is one rank without a process group, and has no collectives.

    Attributes:
        group: their process group; None for a process alone.
        size: how many there are.
        rank: this one, counted within the group.
        stage: stage of the pipeline that this rank holds; 0 without a pipeline.
        num_stages: stages of the pipeline; 1 without one.
        owner: class that the user made, for messages.
    """

    group: Any = None
    size: int = 1
    rank: int = 0
    stage: int = 0
    num_stages: int = 1
    owner: str = "AngularVelocity"

    def weight(self, shard: LocalShard) -> float:
        """Return the weight of sums over a local part: every element counts once in total."""
        ranks_per_copy = self.size / self.num_stages
        return shard.parts / ranks_per_copy

    def weighs_like(self, other: Ranks) -> bool:
        """Return True if every shard has the same weight, and the same place in the pipeline."""
        mine, theirs = ((r.size, r.stage, r.num_stages) for r in (self, other))
        return mine == theirs

    def layout(self, shards: Sequence[LocalShard]) -> Layout:
        """Return what this rank holds."""
        return Layout(
            digest(f"{s.name}|{s.layout}|{s.group}" for s in shards),
            digest(f"{s.name}|{s.layout}|{s.part}" for s in shards),
            sum(s.tensor.numel() * s.parts for s in shards) * self.num_stages / self.size,
            float(sum(math.nan if s.total is None else s.total for s in shards)),
            any(s.split for s in shards) or self.num_stages > 1,
        )

    def agree(self, row: Row, facts: Facts) -> Agreement:
        """Return the verdict on a window; one collective if the ranks agree.

        Args:
            row: of this rank.
            facts: what its ``settings`` and ``rates`` are the digests of.

        Raises:
            DisagreementError: ranks did not measure the same, or decide by other settings, state or
                learning rates; raised on all of them alike.
            RuntimeError: a rank is dead or late.
        """
        rows = self.gather(row)
        return agree(rows, lambda: self.compare(facts))

    def compare(self, facts: Facts) -> None:
        """Compare facts by name.

        Raises:
            DisagreementError: a value differs; raised on all ranks alike.
            RuntimeError: a rank is dead or late.
        """
        gathered = self.gather_objects(
            (self.stage, dict(facts)), "its settings could not be compared"
        )
        check_facts([values for _, values in gathered], [stage for stage, _ in gathered])

    def gather(self, row: Row) -> list[Row]:
        """Return the rows of all ranks, in rank order; one collective.

        Raises:
            RuntimeError: a rank is dead or late.
        """
        if self.group is None:
            return [row]
        device = _device(self.group)
        mine = torch.tensor([row], dtype=torch.float64, device=device)
        rows = torch.empty(self.size, len(row), dtype=torch.float64, device=device)
        with self._waiting(
            f"window {row.windows:.0f} ended after {row.steps:.0f} optimizer steps, but its sums "
            "could not be exchanged"
        ):
            if hasattr(dist, "all_gather_single"):
                dist.all_gather_single(rows, mine, group=self.group)
            else:  # torch before 2.13
                dist.all_gather_into_tensor(rows, mine, group=self.group)
            return [Row(*values) for values in rows.tolist()]

    def gather_objects(self, here: Any, problem: str = "its objects could not be exchanged") -> Any:
        """Return an object from each rank, in rank order; two collectives.

        Args:
            here: what this rank sends; it is pickled.
            problem: what an error says has failed.

        Raises:
            RuntimeError: a rank is dead or late.
        """
        if self.group is None:
            return [here]
        gathered: list[Any] = [None] * self.size
        with self._waiting(problem):
            dist.all_gather_object(gathered, here, group=self.group)
        return gathered

    def add_up(self, table: Tensor) -> None:
        """Add up the tables of all ranks in place; one collective.

        gloo gives all ranks the same bits (tried with 2, 3 and 5 ranks). Rings and trees of NCCL
        reduce every element in one place and send the result around.

        Args:
            table: float64, equally many on every rank, on any device.

        Raises:
            RuntimeError: a rank is dead or late.
        """
        if self.group is None:
            return
        served = {device.type for device in self.group._device_types}
        here = table.device.type in served
        sent = table if here and table.is_contiguous() else None
        if sent is None:
            sent = table.to(table.device if here else _device(self.group), copy=True).contiguous()
        with self._waiting("its sums could not be added up"):
            dist.all_reduce(sent, group=self.group)
            if sent is not table:
                table.copy_(sent)

    def add_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all ranks, equal on all of them; one collective.

        Raises:
            RuntimeError: a rank is dead or late.
        """
        if self.group is None:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=_device(self.group))
        self.add_up(sums)
        added: list[float] = sums.tolist()
        return added

    @contextlib.contextmanager
    def _waiting(self, problem: str) -> Iterator[None]:
        """Add to the error of a failed collective what it means."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.owner} on rank {self.rank}: {problem} with the other {self.size - 1} "
                "ranks: one of them is dead, late, or counts fewer steps; no learning rate was "
                "changed"
            ) from error


def check_group(process_group: Any) -> None:
    """Raises TypeError unless :func:`find_group` can take it."""
    if isinstance(process_group, PipelineStages):
        process_group = process_group.group
    if process_group is None or isinstance(process_group, _ProcessGroup) or _is_mesh(process_group):
        return
    raise TypeError(
        "process_group: expected None, a torch.distributed process group, a DeviceMesh or "
        f"PipelineStages, got {process_group!r}"
    )


def find_group(
    process_group: Any, shards: Sequence[LocalShard], owner: str = "AngularVelocity"
) -> Ranks:
    """Find the ranks that decide together, as they are now.

    Call it at the beginning of every window and do not keep the result longer: a process group may
    have been destroyed and made again, of another size as well.

    Args:
        process_group: None for all ranks there are; or a process group, a mesh, PipelineStages.
        shards: what this rank holds; the pipeline's stages follow from meshes of DTensors.
        owner: class that the user made, for messages.

    Raises:
        ValueError: a mesh has several dimensions and is not the whole world; or the ranks cannot be
            divided among the stages.
    """
    declared = process_group if isinstance(process_group, PipelineStages) else None
    given = process_group if declared is None else declared.group
    if is_alone(given):
        return Ranks(owner=owner)
    group = _group_of(given)
    size = group.size()
    if declared is not None:
        stage, num_stages = declared.stage, declared.num_stages
    else:
        stage, num_stages = _stages_of(given, shards)
    if size % num_stages:
        raise ValueError(
            f"process_group: expected as many ranks in each of {num_stages} pipeline stages, got "
            f"{size} ranks"
        )
    return Ranks(group, size, group.rank(), stage, num_stages, owner)


def is_alone(process_group: Any) -> bool:
    """Return True if there is one process, so that :func:`find_group` needs no shards."""
    return process_group is None and not (dist.is_available() and dist.is_initialized())


def _group_of(given: Any) -> Any:
    if given is None:
        return dist.group.WORLD
    if not _is_mesh(given):
        return given
    if given.ndim == 1:
        return given.get_group()
    if dist.is_initialized() and given.size() == dist.get_world_size():
        return dist.group.WORLD
    raise ValueError(
        "process_group: expected a mesh of one dimension or of all ranks, got one of shape "
        f"{tuple(given.shape)} among {dist.get_world_size()} ranks; give a process group of its "
        "ranks instead (torch.distributed.new_group)"
    )


def _stages_of(given: Any, shards: Sequence[LocalShard]) -> tuple[int, int]:
    meshes = [given] if _is_mesh(given) else []
    meshes += [s.sharding.mesh for s in shards if s.sharding is not None]
    for mesh in {id(m): m for m in meshes}.values():
        root = _root(mesh)
        if PIPELINE_DIMENSION in (root.mesh_dim_names or ()):
            dimension = root.mesh_dim_names.index(PIPELINE_DIMENSION)
            return root.get_coordinate()[dimension], root.size(dimension)
    return 0, 1


def _root(mesh: Any) -> Any:
    """Return the mesh that a mesh was cut out of."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # torch before 2.9

    return _mesh_resources.get_root_mesh(mesh)


def _is_mesh(given: Any) -> bool:
    return hasattr(given, "mesh_dim_names") and hasattr(given, "get_group")


def _device(group: Any) -> torch.device:
    """Return the device of small tensors in the group's collectives: the CPU if that works."""
    types = {device.type for device in group._device_types}
    if "cpu" in types or not types:
        return torch.device("cpu")
    (kind, *_) = sorted(types)
    return torch.device(kind, torch.accelerator.current_device_index())


_ProcessGroup: type = dist.ProcessGroup if dist.is_available() else type(None)
