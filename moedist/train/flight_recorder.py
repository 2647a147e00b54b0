"""What each rank asked of the others last: torch's flight recorder, left in the run folder when a collective fails.

A time-out says how long a collective waited; the recorders of all ranks side by side say which collective, of which
group, and which ranks never came. torch's own `torchfrtrace` lays them side by side (`how_to_read`). NCCL writes its
record itself when it gives up (``TORCH_NCCL_DUMP_ON_TIMEOUT``); for gloo, which does not, `dump` does.
"""

from __future__ import annotations

import contextlib
import pickle
import shlex
from pathlib import Path


def dump_prefix(run_dir: Path) -> Path:
    """Where dumps lie: this path, followed by the rank's number."""
    return run_dir / "logs" / "flight_recorder" / "rank_"


def how_to_read(run_dir: Path) -> str:
    """The command that compares the ranks' dumps, as a sentence; empty where there is none."""
    prefix = dump_prefix(run_dir)
    if not prefix.parent.is_dir():
        return ""
    command = shlex.join(["torchfrtrace", "--allow-incomplete-ranks", "--prefix", prefix.name, str(prefix.parent)])
    return f"`{command}` says which collective waited and for which ranks."


def forget(run_dir: Path, rank: int, num_ranks: int) -> None:
    """Takes the dump of an earlier start away, so that it is not compared with this one's, and makes the folder. Rank 0
    does so too for ranks that an earlier start had and this one, of ``num_ranks``, has not.

    A disk that refuses is left for the run itself to meet, which knows what to say.
    """
    with contextlib.suppress(OSError):
        prefix = dump_prefix(run_dir)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        _path(run_dir, rank).unlink(missing_ok=True)
        for path in prefix.parent.glob(f"{prefix.name}*") if rank == 0 else ():
            number = path.name.removeprefix(prefix.name)
            if number.isdigit() and int(number) >= num_ranks:
                path.unlink(missing_ok=True)


def dump(run_dir: Path, rank: int) -> Path | None:
    """Writes what this rank's recorder holds; None where it is off, or NCCL's to write.

    torch leaves the table of groups empty for gloo, and without it the dumps cannot be compared: it is filled in here.

    Raises:
        OSError: the folder cannot be written.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_backend() == "nccl":
        return None
    # torch gives bytes for a file; these come from this very process
    record = pickle.loads(torch._C._distributed_c10d._dump_fr_trace(True, True, False))  # type: ignore[attr-defined]
    if not record.get("entries"):
        return None
    record["pg_config"] = {
        group.group_name: {"name": group.group_name, "desc": group.group_desc, "ranks": str(list(ranks))}
        for group, ranks in dist.distributed_c10d._world.pg_group_ranks.items()
        if isinstance(group, dist.ProcessGroup)  # else one of other ranks
    }
    path = _path(run_dir, rank)
    path.write_bytes(pickle.dumps(record))
    return path


def _path(run_dir: Path, rank: int) -> Path:
    prefix = dump_prefix(run_dir)
    return prefix.with_name(f"{prefix.name}{rank}")
