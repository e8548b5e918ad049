"""What the tests of graphs rely on: true of a GPU, and so of its stand-in (stand_in_gpu/)."""

from __future__ import annotations

import pytest
import torch

from coopflow_ext._recording import CaptureError, Recording

pytestmark = pytest.mark.gpu


def test_gpu_a_capture_changes_nothing_and_a_replay_does():
    x, graph = torch.zeros(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        x.add_(2)
        y.mul_(x)
    assert x.tolist() == [0, 0, 0]
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([2] * 3, [2] * 3)
    x.fill_(5)
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([7] * 3, [42] * 3)


def test_gpu_a_replay_reads_what_lies_in_memory_now():
    """Also where a tensor has gone and another one has its place."""
    gone = torch.ones(1000, device="cuda")
    address, graph = gone.data_ptr(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 2 * gone
    del gone
    after = torch.full((1000,), 7.0, device="cuda")
    assert after.data_ptr() == address
    graph.replay()
    assert y.unique().tolist() == [14]


def test_gpu_pinned_memory_is_read_at_each_replay_and_numbers_are_not():
    number = torch.tensor(3.0)
    pinned, x = torch.ones(4).pin_memory(), torch.zeros(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(pinned, non_blocking=True)
        x.mul_(number)
    pinned.fill_(2)
    number.fill_(100)
    graph.replay()
    assert x.tolist() == [6] * 4


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.cuda.current_stream().synchronize(),
    ],
    ids=["item", "mask", "to the host", "nonzero", "from the host", "synchronize"],
)  # fmt: skip
def test_gpu_what_waits_for_the_device_is_found(wait):
    x = torch.ones(3, device="cuda")
    recording = Recording(x.device)  # which mends what a failed capture leaves behind
    with pytest.raises(CaptureError, match="captur"):
        recording.add("wait", lambda: wait(x), warm_up=lambda: None)
    torch.cuda.synchronize()
    assert x.sum().item() == 3


def test_gpu_the_debug_mode_finds_it_outside_of_a_capture():
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        (x + 1).mul_(2)
        for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.cpu()):
            with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
                wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gpu_tensors_of_two_places_do_not_meet():
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]


def test_gpu_the_generator_of_the_device_decides_what_is_drawn():
    draws = []
    for seed in (1, 1, 2):
        torch.cuda.manual_seed(seed)
        draws.append([torch.rand(3, device="cuda"), torch.randn(3, device="cuda")])
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert not torch.equal(draws[0][0], draws[2][0])
    assert not torch.equal(draws[0][0], draws[0][1])
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(3, device="cuda")
    with torch.cuda.graph(graph):
        x.copy_(torch.rand(3, device="cuda"))
    torch.cuda.manual_seed(1)
    for _ in range(2):
        graph.replay()
        draws.append(x.clone())
    assert torch.equal(draws[3], draws[0][0])
    assert not torch.equal(draws[3], draws[4])
