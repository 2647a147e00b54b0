from __future__ import annotations

from moedist.launch.sweep.machine import Machine, Share

GPUS = [f"GPU-{letter}" for letter in "abcdefgh"]


def test_jobs_on_gpus_get_disjoint_ones_and_their_part_of_the_cores():
    machine = Machine(range(16), GPUS)
    shares = [machine.take(3, on_gpus=True) for _ in range(3)]
    assert shares[0] == Share(tuple(range(8)), ("GPU-a", "GPU-b", "GPU-c"))
    assert shares[1] == Share(tuple(range(8, 16)), ("GPU-d", "GPU-e", "GPU-f"))
    assert shares[2] is None, "two GPUs are left"
    assert shares[1].environment == {"CUDA_VISIBLE_DEVICES": "GPU-d,GPU-e,GPU-f"}
    machine.give_back(shares[0])
    assert machine.take(3, on_gpus=True) == shares[0]


def test_jobs_on_the_cpu_get_disjoint_cores():
    machine = Machine([0, 1, 4, 5, 6], GPUS)
    shares = [machine.take(2, on_gpus=False) for _ in range(3)]
    assert shares == [Share((0, 1)), Share((4, 5)), None]
    assert shares[0].environment == {}
    assert Machine(range(4)).take(2, on_gpus=True) == Share((0, 1)), "no GPUs here"


def test_a_job_larger_than_the_machine_has_it_alone():
    machine = Machine(range(2))
    assert machine.take(4, on_gpus=False) == Share((0, 1)) and machine.take(4, on_gpus=False) is None


def test_without_a_size_one_job_has_all():
    machine = Machine(range(2), GPUS)
    share = machine.take_all()
    assert share == Share((0, 1), tuple(GPUS)) and machine.take_all() is None
    machine.give_back(share)
    assert machine.take_all() == share
