"""Chains in other processes: forked, spawned, and in the workers of a DataLoader."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import coopflow_ext as cf

X0 = torch.zeros(64, 3)


def chain(key: cf.Key) -> Tensor:
    sampler = cf.LangevinSampler(
        lambda x: 0.5 * (x * x).sum(1), n_steps=5, step_size=0.3, kernel=False
    )
    x = sampler(X0, key=key).x
    assert isinstance(x, Tensor)
    mixture = cf.energies.DoubleWellEnergy(1.0)
    y = cf.LangevinSampler(mixture, n_steps=5, step_size=0.1, kernel=True)(X0, key=key).x
    assert isinstance(y, Tensor)
    return torch.cat((x, y))


def send_chain(seed: int, out: Connection) -> None:
    torch.set_num_threads(1)  # after a fork the threads of the parent's pool are not there
    out.send(chain(cf.Key(seed)).numpy())
    out.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_chain_in_another_process(method: str) -> None:
    """The parent has run chains before, on the threads that it has."""
    expected = chain(cf.Key(7))
    context = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=send_chain, args=(7, send))
    process.start()
    send.close()
    assert receive.poll(120), "the process hangs"
    found = torch.from_numpy(receive.recv())
    process.join(60)
    assert process.exitcode == 0
    assert torch.equal(found, expected)


class Chains(Dataset[Tensor]):
    """Item i is the chain at key i."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        return chain(cf.Key(i))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_chains_in_the_workers_of_a_dataloader(method: str) -> None:
    expected = torch.stack([chain(cf.Key(i)) for i in range(len(Chains()))])
    loader = DataLoader(
        Chains(), batch_size=3, num_workers=2, multiprocessing_context=method, timeout=120
    )
    assert torch.equal(torch.cat(list(loader)), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_other_threads_make_steps() -> None:
    """Whoever holds a lock of the library at that moment: the child's first chain ends."""
    torch.set_num_threads(1)
    stop = threading.Event()

    def steps(seed: int) -> None:
        x, grad = X0[:2].clone(), torch.zeros(2, 3)
        rng = cf.Key(seed).tensor("cpu")
        move = cf.ops.BoundStep(drift=0.1, noise=0.1).in_place(x, rng)
        for step in range(50):
            move(grad, step)

    def work() -> None:
        while not stop.is_set():
            steps(0)

    threads = [threading.Thread(target=work) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    try:
        for seed in range(600):
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(20)  # ends it
                try:
                    steps(seed)
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        for thread in threads:
            thread.join()
