from __future__ import annotations

import dataclasses

import pytest

from moedist.doctor.gpus import (
    check_devices,
    check_no_gpu,
    check_topology,
    examine_gpus,
    read_gpus,
    read_topology,
)

SMI = """\
0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, Default, Enabled
1, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, Default, Enabled
"""
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPXB\t0-55\t0\tN/A
GPU1\tNV18\t X \tSYS\tNODE\t0-55\t0\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t56-111\t1\tN/A
NIC0\tPXB\tNODE\tSYS\t X

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def test_gpus_against_ranks():
    gpus = read_gpus(SMI)
    assert (gpus[1].index, gpus[1].driver, gpus[1].total_mib) == (1, "570.86.15", 81559)
    found = check_devices(gpus, 2, "cuda", 2, "12.8")
    assert found.level == "ok" and found.text == "2 visible; 2 x NVIDIA H100 80GB HBM3; driver 570.86.15, CUDA 12.8"
    few = check_devices(gpus, 2, "cuda", 4, "12.8")
    assert few.level == "problem" and few.remedy == "Set launch.nproc=2, or mesh.device=cpu."
    idle = check_devices(gpus, 2, "auto", 4, "12.8")
    assert idle.level == "warning" and idle.text.endswith("4 ranks, so they compute on the CPU")
    for change, level, words in (
        ({"used_mib": 9000}, "warning", "GPU 0 holds 9000 MiB"),
        ({"mode": "Prohibited"}, "problem", "GPU [0] may not be used"),
        ({"name": "NVIDIA A100"}, "warning", "1 x NVIDIA A100"),
        ({"ecc": "Disabled"}, "warning", "no ECC on GPU [0]"),
    ):
        found = check_devices([dataclasses.replace(gpus[0], **change), gpus[1]], 2, "auto", 2, "12.8")
        assert found.level == level and words in found.text, change
    assert "nvidia-smi is not here" in check_devices([], 1, "auto", 1, "12.8").text


def test_how_they_are_joined():
    links = read_topology(TOPOLOGY)
    assert links == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "SYS"}
    found = check_topology(links)
    assert found.level == "warning" and "not direct: 0-2, 1-2" in found.text
    assert check_topology({(0, 1): "NV18"}).level == check_topology({(0, 1): "SYS"}).level == "ok"
    assert check_topology({}).level == "warning"


def test_why_there_is_none():
    assert check_no_gpu("auto", None, None).level == "ok"
    assert check_no_gpu("cuda", "12.8", None).level == "problem"
    for device, level in (("auto", "warning"), ("cuda", "problem")):
        found = check_no_gpu(device, None, "GPU 0: NVIDIA H100\n")
        assert found.level == level and "it is a CPU build" in found.text
    assert check_no_gpu("auto", "12.8", "GPU 0: a\n").level == "problem", "they were meant to be used, and are gone"
    assert "CUDA_VISIBLE_DEVICES" in check_no_gpu("auto", "12.8", "GPU 0: a\nGPU 1: b\n").remedy
    assert [finding.check for finding in examine_gpus("cpu", 4)] == ["devices"]


@pytest.mark.gpu
def test_those_of_this_machine():
    found = examine_gpus("cuda", 1)
    assert {"devices", "nccl"} <= {finding.check for finding in found}
    assert all(finding.level != "problem" for finding in found)
