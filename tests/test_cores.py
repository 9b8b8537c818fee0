"""How many cores there are, in a container as well, and how a training shares them."""

import pytest

from lite_detr.cores import count_cores, divide_cores, limit_threads


@pytest.mark.parametrize(
    ("cores", "batch_size", "threads", "expected"),
    [
        (2, 4, None, (2, 1)),
        (2, 3, None, (1, 2)),
        (6, 4, None, (4, 1)),
        (64, 16, None, (16, 4)),
        (2, 4, "1", (2, 1)),
        (8, 16, "4", (2, 4)),
        (2, 4, "8,2", (1, 8)),
        (1, 4, None, (1, 1)),
    ],
)
def test_processes_of_a_training_on_a_cpu(cores, batch_size, threads, expected, monkeypatch):
    monkeypatch.setattr("lite_detr.cores.count_cores", lambda: cores)
    assert divide_cores(batch_size, threads) == expected


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("9900000 100000", 8), ("", 8)],
)
def test_a_container_has_fewer_cores(quota, cores, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("lite_detr.cores.CPU_QUOTA", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(quota)
    assert count_cores() == cores


@pytest.mark.parametrize(("variable", "expected"), [(None, [2]), ("64", [])])
def test_a_container_starts_no_more_threads_than_it_has_cores(variable, expected, monkeypatch):
    started = []
    monkeypatch.setattr("lite_detr.cores.count_cores", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    monkeypatch.setattr("torch.set_num_threads", started.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    limit_threads()
    assert started == expected
