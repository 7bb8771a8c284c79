import os

import pytest

# Before anything imports Megatron-Core: the tests replay the layouts on CPU processes, also on a GPU machine.
os.environ.setdefault("MEGAVIT_DEVICE", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

_figures: list[str] = []


@pytest.fixture
def figure():
    """Keep a measured figure for the end of the run, where it is read without -s."""
    return _figures.append


def pytest_terminal_summary(terminalreporter):
    if _figures:
        terminalreporter.section("measured")
        for line in _figures:
            terminalreporter.write_line(line)
