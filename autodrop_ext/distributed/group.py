"""The ranks that decide together: one process alone, or the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .shards import LocalShard

PIPELINE_DIMENSION = "pp"
"""Name of the mesh dimension that is taken for pipeline stages."""


@dataclass(frozen=True)
class PipelineStages:
    """Declares, as ``process_group=``, that this rank holds one stage of a pipeline.

    Not needed where the parameters are DTensors of a mesh that was cut out of one with a dimension
    named "pp", or where such a mesh is given as ``process_group=``.

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


@dataclass(frozen=True)
class Alone:
    """One process that trains by itself: a group of one rank without any collective."""

    size: int = 1
    rank: int = 0
    stage: int = 0
    num_stages: int = 1

    def weight(self, shard: LocalShard) -> float:
        """Weight of sums over a local part: 1, because every part is here."""
        return 1.0

    def gather(self, row: Sequence[float]) -> list[list[float]]:
        """Return the row alone."""
        return [list(row)]

    def gather_text(self, text: str) -> list[str]:
        """Return the text alone."""
        return [text]


@dataclass(frozen=True)
class Ranks:
    """The ranks whose sums are added, this one among them.

    Attributes:
        group: their process group.
        size: how many there are.
        rank: this one, counted within the group.
        stage: stage of the pipeline that this rank holds; 0 without a pipeline.
        num_stages: stages of the pipeline; 1 without one.
    """

    group: Any
    size: int
    rank: int
    stage: int = 0
    num_stages: int = 1

    def weight(self, shard: LocalShard) -> float:
        """Weight of sums over a local part: all ranks together count every element once."""
        ranks_per_copy = self.size / self.num_stages
        return shard.parts / ranks_per_copy

    def gather(self, row: Sequence[float]) -> list[list[float]]:
        """The rows of all ranks, in rank order; one collective.

        Args:
            row: float64 values, as many on every rank.

        Raises:
            RuntimeError: as the process group raised it, where a rank is dead or late.
        """
        device = _device(self.group)
        mine = torch.tensor(row, dtype=torch.float64, device=device)
        rows = torch.empty(self.size, len(row), dtype=torch.float64, device=device)
        if hasattr(dist, "all_gather_single"):
            dist.all_gather_single(rows, mine.unsqueeze(0), group=self.group)
        else:  # torch before 2.13
            dist.all_gather_into_tensor(rows, mine.unsqueeze(0), group=self.group)
        gathered: list[list[float]] = rows.tolist()
        return gathered

    def gather_text(self, text: str) -> list[str]:
        """A text from each rank, in rank order; two collectives."""
        data = text.encode()
        longest = int(max(size for (size,) in self.gather([float(len(data))])))
        padded = list(data) + [0] * (longest - len(data))
        rows = self.gather([float(len(data)), *map(float, padded)])
        return [bytes(map(int, row[1 : 1 + int(row[0])])).decode() for row in rows]


Group = Alone | Ranks


def check_group(process_group: Any) -> None:
    """Raises TypeError or ValueError unless :func:`find_group` can take it."""
    if isinstance(process_group, PipelineStages):
        process_group = process_group.group
    if process_group is None or isinstance(process_group, _ProcessGroup) or _is_mesh(process_group):
        return
    raise TypeError(
        "process_group: expected None, a torch.distributed process group, a DeviceMesh or "
        f"PipelineStages, got {process_group!r}"
    )


def find_group(process_group: Any, shards: Sequence[LocalShard]) -> Group:
    """Find the ranks that decide together.

    Args:
        process_group: None for all ranks there are; or a process group, a mesh, PipelineStages.
        shards: what this rank holds; meshes of DTensors tell the pipeline's stages.

    Raises:
        ValueError: a mesh has several dimensions and is not the whole world.
    """
    declared = process_group if isinstance(process_group, PipelineStages) else None
    given = declared.group if declared is not None else process_group
    if given is None and not (dist.is_available() and dist.is_initialized()):
        return Alone()
    group = _group_of(given)
    ranks = Ranks(group, group.size(), group.rank())
    if declared is not None:
        stage, num_stages = declared.stage, declared.num_stages
    else:
        stage, num_stages = _stages_of(given, shards)
    if ranks.size % num_stages:
        raise ValueError(
            f"process_group: expected as many ranks in each of {num_stages} pipeline stages, got "
            f"{ranks.size} ranks"
        )
    return Ranks(group, ranks.size, ranks.rank, stage, num_stages)


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
            return root.get_local_rank(PIPELINE_DIMENSION), root.size(
                root.mesh_dim_names.index(PIPELINE_DIMENSION)
            )
    return 0, 1


def _root(mesh: Any) -> Any:
    """The mesh that a mesh was cut out of."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # torch before 2.9

    return _mesh_resources.get_root_mesh(mesh)


def _is_mesh(given: Any) -> bool:
    return hasattr(given, "mesh_dim_names") and hasattr(given, "get_group")


def _device(group: Any) -> torch.device:
    """Where tensors of the group's collectives are: the CPU wherever it can."""
    types = {device.type for device in group._device_types}
    if "cpu" in types or not types:
        return torch.device("cpu")
    (kind, *_) = sorted(types)
    return torch.device(kind, torch.accelerator.current_device_index())


_ProcessGroup: type = dist.ProcessGroup if dist.is_available() else type(None)
