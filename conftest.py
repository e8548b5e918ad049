"""Options and fixtures shared by tests/ and benchmarks/."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from hypothesis import settings

# Random examples that are the same in every run, and no verdict that depends on a machine's speed.
settings.register_profile("coopflow", derandomize=True, deadline=None)
settings.load_profile("coopflow")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="device of the tests that take the `device` fixture (default: cpu); with cuda, only "
        "those and the tests marked gpu run",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell without job control starts what runs in its background with an ignored Ctrl-C, which
    # the tests send to themselves and to their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The processes share the cores, and so do their children: threads that wait for one another
        # spin, and where there are more than cores these take many times as long.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark's module lists its cases, which `coopflow bench` reads too, without pytest."""
    if "case" in metafunc.fixturenames and hasattr(metafunc.module, "SUITE_CASES"):
        metafunc.parametrize("case", metafunc.module.SUITE_CASES, ids=lambda c: c.name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="torch sees no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    elif config.getoption("--device") == "cuda":
        on_device = [
            "gpu" in item.keywords or "device" in getattr(item, "fixturenames", ())
            for item in items
        ]
        config.hook.pytest_deselected(
            items=[item for item, keep in zip(items, on_device, strict=True) if not keep]
        )
        items[:] = [item for item, keep in zip(items, on_device, strict=True) if keep]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test: the CPU, or the current CUDA device with `--device cuda`."""
    name = request.config.getoption("--device")
    return (
        torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
    )
