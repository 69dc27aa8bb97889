"""The ranks that decide together: their process group, weights and collectives.

At the end of a window every rank gathers the same rows (:meth:`Ranks.agree`). Nothing on one rank
alone may return or raise between the end of a window and the gather: the others would wait for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .agreement import Agreement, Facts, Row, agree, check_facts, digest
from .sharding import LocalShard, is_dtensor

PIPELINE_DIMENSION = "pp"
"""Name of the mesh dimension that is taken for pipeline stages."""


@dataclass(frozen=True)
class PipelineStages:
    """Declares, as ``process_group=``, that this rank holds one stage of a pipeline.

    Not needed if the parameters are DTensors of a mesh that was cut out of one with a dimension
    named "pp", or if such a mesh is given as ``process_group=``.

    Args:
        stage: position of this rank in the pipeline, counted from 0.
        num_stages: into how many ranks the pipeline cuts one copy of the model.
        group: all ranks that train the model, a process group or mesh; None: all there are.

    Raises:
        TypeError, ValueError: an argument is no int or out of range.
    """

    stage: int
    num_stages: int
    group: Any = None

    def __post_init__(self) -> None:
        checks.count("num_stages", self.num_stages, 1)
        if checks.count("stage", self.stage, 0) >= self.num_stages:
            raise ValueError(
                f"stage: expected less than num_stages={self.num_stages}, got {self.stage}"
            )


@dataclass(frozen=True)
class Ranks:
    """The ranks whose tables are added up, this one among them.

    A process that trains by itself is one rank without a process group, and has no collectives.
    """

    group: Any = None  # their process group; None for a process alone
    size: int = 1
    rank: int = 0  # this one, counted within the group
    stage: int = 0  # of the pipeline
    num_stages: int = 1  # 1 without a pipeline
    owner: str = "AngularVelocity"  # class that the user made, for messages

    def weight(self, shard: LocalShard) -> float:
        """Return the weight of sums over a local part: every element counts once in total."""
        ranks_per_copy = self.size / self.num_stages
        return shard.parts / ranks_per_copy

    def weighs_like(self, other: Ranks) -> bool:
        """Return True if every shard has the same weight, and the same place in the pipeline."""
        mine, theirs = ((r.size, r.stage, r.num_stages) for r in (self, other))
        return mine == theirs

    def layout(self, shards: Sequence[LocalShard]) -> dict[str, float]:
        """Return the entries of a :class:`Row` that say what this rank holds."""
        return {
            "layout": digest(f"{s.name}|{s.layout}|{s.group}" for s in shards),
            "held": digest(f"{s.name}|{s.layout}|{s.part}" for s in shards),
            "stage": self.stage,
            "num_stages": self.num_stages,
            "elements": sum(s.tensor.numel() * self.weight(s) for s in shards),
            "model_elements": sum(math.nan if s.total is None else s.total for s in shards),
        }

    def agree(self, row: Row, facts: Facts) -> Agreement:
        """Return the verdict on a window; one collective if the ranks agree.

        Args:
            row: of this rank; its ``settings`` and ``rates`` are the digests of ``facts``.
            facts: what decisions depend on.

        Raises:
            DisagreementError: ranks did not measure the same, or decide by other settings, state or
                learning rates; raised on all of them alike.
            RuntimeError: a rank is dead or late, as in every method with a collective.
        """
        rows = self.gather(row)
        return agree(rows, lambda: self.compare(facts))

    def compare(self, facts: Facts) -> None:
        """Compare facts by name; raises DisagreementError on all ranks alike if a value differs."""
        gathered = self.gather_objects((self.stage, dict(facts)))
        check_facts([values for _, values in gathered], [stage for stage, _ in gathered])

    def gather(self, row: Row) -> list[Row]:
        """Return the rows of all ranks, in rank order; one collective."""
        if self.group is None:
            return [row]
        mine = torch.tensor([row], dtype=torch.float64, device=_device(self.group))
        rows = mine.new_empty(self.size, len(row))  # a list of tensors would be copied one by one
        with self._waiting(
            f"window {row.windows:.0f} ended after {row.steps:.0f} optimizer steps, but its sums "
            "could not be exchanged"
        ):
            if hasattr(dist, "all_gather_single"):
                dist.all_gather_single(rows, mine, group=self.group)
            else:  # torch before 2.13
                dist.all_gather_into_tensor(rows, mine, group=self.group)
            return [Row(*values) for values in rows.tolist()]

    def gather_objects(self, here: Any) -> list[Any]:
        """Return an object from each rank, in rank order; two collectives."""
        if self.group is None:
            return [here]
        gathered: list[Any] = [None] * self.size
        with self._waiting("its settings could not be compared"):
            dist.all_gather_object(gathered, here, group=self.group)
        return gathered

    def add_up(self, table: Tensor) -> None:
        """Add up the tables of all ranks in place; one collective.

        gloo gives all ranks the same bits (tried with 2, 3 and 5 ranks). Rings and trees of NCCL
        reduce every element in one place and send the result around.

        Args:
            table: float64, contiguous, equally large on every rank, on any device.
        """
        if self.group is None:
            return
        served = {device.type for device in self.group._device_types}
        sent = table if table.device.type in served else table.to(_device(self.group))
        with self._waiting("its sums could not be added up"):
            dist.all_reduce(sent, group=self.group)
            if sent is not table:
                table.copy_(sent)

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

    Call it at the beginning of every window: a process group may have been destroyed and made
    again, of another size as well.

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
    origins: list[Any] = [shard.origin for shard in shards]
    meshes = [given] if _is_mesh(given) else []
    meshes += [origin.device_mesh for origin in origins if is_dtensor(origin)]
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
