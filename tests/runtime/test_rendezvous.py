"""Launchers of two machines that meet: they start and leave at different times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters

from megavit.runtime import rendezvous
from megavit.runtime.rendezvous import create_handler
from tests.cluster.test_started_ranks import wait_for
from tests.ports import free_port

RANK = """
import os, time
time.sleep(float(os.environ["LATE_S"]))
os._exit(75)
"""


def start_machine(script: Path, endpoint: str, *, is_host: bool, late_s: float) -> subprocess.Popen:
    """A machine's launcher, whose rank saves and leaves with 75 after some seconds."""
    words = ["-m", "megavit.runtime.torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    words += [f"--rdzv-endpoint={endpoint}", f"--rdzv-conf=is_host={int(is_host)}", "--rdzv-id=job", str(script)]
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "LATE_S": str(late_s)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_machine_whose_rank_leaves_later_than_the_host_of_the_store_has_its_ranks_code(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    endpoint = f"localhost:{free_port()}"
    machines = [
        start_machine(tmp_path / "rank.py", endpoint, is_host=is_host, late_s=late_s)
        for is_host, late_s in ((True, 0), (False, 2))
    ]
    said = wait_for(machines)
    assert [machine.returncode for machine in machines] == [75, 75], said
    assert "Traceback" not in said


def test_a_host_that_comes_late_is_waited_for_and_answers_are_not(monkeypatch):
    def parameters(**more: bool) -> RendezvousParameters:
        endpoint = f"localhost:{free_port()}"
        return RendezvousParameters(rendezvous.BACKEND, endpoint, "job", min_nodes=1, max_nodes=2, **more)

    timeouts = []
    monkeypatch.setattr(rendezvous, "create_backend", record(rendezvous.create_backend, timeouts))
    handler = create_handler(parameters(is_host=True))
    assert handler.shutdown()
    assert timeouts == [300]
    assert handler._store.timeout.total_seconds() == 60
    monkeypatch.setattr(rendezvous, "_START_S", 1)
    with pytest.raises(RendezvousConnectionError):
        create_handler(parameters(is_host=False))
    assert timeouts == [300, 1]


def record(create, timeouts):
    def recorded(params):
        timeouts.append(params.get_as_int("read_timeout"))
        return create(params)

    return recorded
