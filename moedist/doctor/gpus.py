"""The GPUs of this machine: what torch sees of them, what the driver says, and how they are joined."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence

from moedist.doctor.finding import Finding, ok, problem, warning

SMI_S = 20.0
"""Seconds that the driver's tool gets: with a sick GPU it may hang."""
FIELDS = ("index", "name", "driver_version", "memory.total", "memory.used", "compute_mode", "ecc.mode.current")
IDLE_MIB = 1024
"""Memory in use on a GPU that nobody computes on."""
NEAR = ("NV", "PIX", "PXB")
"""Kinds of links that keep off the host's bridge."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU as the driver has it.

    Attributes:
        index, name, driver: which.
        total_mib, used_mib: memory.
        mode: ``Default``, or who may use it (``Exclusive_Process``, ``Prohibited``).
        ecc: whether it corrects errors of memory: ``Enabled``, ``Disabled`` or ``[N/A]``.
    """

    index: int
    name: str
    driver: str
    total_mib: int
    used_mib: int
    mode: str
    ecc: str


def examine_gpus(device: str, nproc: int) -> list[Finding]:
    """All checks of GPUs; one finding where ranks compute on the CPU.

    Args:
        device: ``mesh.device``.
        nproc: ranks on this machine.
    """
    import torch

    if device == "cpu":
        return [ok("devices", "the CPU, as mesh.device says; ranks talk over gloo")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return [check_no_gpu(device, torch.version.cuda, ask_driver(["-L"]))]
    said = ask_driver([f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"])
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    findings = [
        check_devices([] if said is None else read_gpus(said), count, device, nproc, torch.version.cuda or "none")
    ]
    if not torch.distributed.is_nccl_available():
        remedy = "Install a build of torch with NCCL, or set mesh.device=cpu."
        return [*findings, problem("nccl", "this torch was built without it", remedy)]
    findings.append(ok("nccl", nccl))
    if count > 1 and (topology := ask_driver(["topo", "-m"])) is not None:
        findings.append(check_topology(read_topology(topology)))
    return findings


def ask_driver(arguments: Sequence[str]) -> str | None:
    """What nvidia-smi prints; None where it is not there, fails or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        asked = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout


def check_no_gpu(device: str, cuda: str | None, listed: str | None) -> Finding:
    """No GPU for torch: because there is none, because it cannot use it, or because it is hidden.

    Args:
        device: ``mesh.device``.
        cuda: that torch was built with; None for a CPU build.
        listed: the driver's list of GPUs.
    """
    if listed and listed.strip():
        num_gpus = len(listed.strip().splitlines())
        text = f"the driver lists {num_gpus} GPU{'s' * (num_gpus > 1)}, torch sees none"
        if cuda is None:
            judge = problem if device == "cuda" else warning
            return judge("devices", f"{text}: it is a CPU build", "Install a build of torch with CUDA.")
        remedy = "See CUDA_VISIBLE_DEVICES, and whether the driver is as new as torch's CUDA."
        return problem("devices", f"{text} (CUDA {cuda})", remedy)
    if device == "cuda":
        return problem("devices", "no GPU here, and mesh.device = cuda", "Set mesh.device=cpu, or find the driver.")
    return ok("devices", "no GPU: ranks compute on the CPU and talk over gloo")


def read_gpus(said: str) -> list[Gpu]:
    """The lines of ``nvidia-smi --query-gpu`` for `FIELDS`, without header and units."""
    gpus = []
    for line in said.strip().splitlines():
        index, name, driver, total, used, mode, ecc = (word.strip() for word in line.split(","))
        gpus.append(Gpu(int(index), name, driver, int(total), int(used), mode, ecc))
    return gpus


def check_devices(gpus: Sequence[Gpu], visible: int, device: str, nproc: int, cuda: str) -> Finding:
    """GPUs against ranks, and whether somebody else is on them.

    Args:
        gpus: all that the driver lists; none where its tool is not there.
        visible: those that torch may use.
        device: ``mesh.device``, ``auto`` or ``cuda``.
        nproc: ranks on this machine.
        cuda: that torch was built with.
    """
    names = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in gpus).items())
    drivers = sorted({gpu.driver for gpu in gpus})
    text = f"{visible} visible; {names or 'nvidia-smi is not here'}"
    text += f"; driver {', '.join(drivers)}" * bool(drivers) + f", CUDA {cuda}"
    if nproc > visible:
        judge = problem if device == "cuda" else warning
        what = "and mesh.device = cuda" if device == "cuda" else "so they compute on the CPU"
        return judge("devices", f"{text}; {nproc} ranks, {what}", f"Set launch.nproc={visible}, or mesh.device=cpu.")
    if closed := [gpu.index for gpu in gpus if gpu.mode == "Prohibited"]:
        return problem("devices", f"{text}; GPU {closed} may not be used", "Set its compute mode: nvidia-smi -c 0.")
    if busy := [f"GPU {gpu.index} holds {gpu.used_mib} MiB" for gpu in gpus if gpu.used_mib > IDLE_MIB]:
        return warning("devices", f"{text}; {', '.join(busy)}", "See nvidia-smi for who computes there.")
    if len({(gpu.name, gpu.total_mib) for gpu in gpus}) > 1:
        return warning("devices", text, "The slowest and smallest sets the pace: give ranks GPUs of one kind.")
    if unsafe := [gpu.index for gpu in gpus if gpu.ecc == "Disabled"]:
        return warning("devices", f"{text}; no ECC on GPU {unsafe}", "Switch it on (nvidia-smi -e 1) for long runs.")
    return ok("devices", text)


def read_topology(said: str) -> dict[tuple[int, int], str]:
    """The kind of link of each pair of GPUs (``NV18``, ``PIX``, ``SYS``) in the table of ``nvidia-smi topo -m``."""
    links = {}
    columns: list[str] = []
    for line in said.splitlines():
        words = line.replace("\x1b[4m", "").replace("\x1b[0m", "").split()
        gpu_words = [word for word in words if word.startswith("GPU") and word[3:].isdigit()]
        if not columns:
            columns = gpu_words
        elif gpu_words and words[0] == gpu_words[0]:
            first = int(words[0][3:])
            for column, kind in zip(columns, words[1:], strict=False):
                if (second := int(column[3:])) > first:
                    links[first, second] = kind
    return links


def check_topology(links: dict[tuple[int, int], str]) -> Finding:
    """Whether some pairs are joined worse than others: expert-parallel neighbours should not be among those."""
    if not links:
        return warning("topology", "nvidia-smi topo -m lists no links", "See it by hand.")
    kinds = Counter(links.values())
    text = ", ".join(f"{count} pairs by {kind}" for kind, count in kinds.most_common())
    far = [pair for pair, kind in links.items() if not kind.startswith(NEAR)]
    if far and len(far) < len(links):
        pairs = ", ".join(f"{first}-{second}" for first, second in far[:8])
        return warning("topology", f"{text}; not direct: {pairs}", "Keep expert-parallel groups on joined GPUs.")
    return ok("topology", text)
