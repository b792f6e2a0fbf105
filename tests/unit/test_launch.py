"""torchrun's ways to end as one line and one exit code, and signals that come when everything is done."""

import runpy
import signal
import socket

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from nemo_bard.base.errors import EXIT_USER_ERROR
from nemo_bard.launch.exits import EXIT_PREEMPTED
from nemo_bard.launch.torchrun import node_options, supervise
from nemo_bard.pipeline.world import StopSignal


def failure(code):
    one = ProcessFailure(local_rank=1, pid=99, exitcode=code, error_file="none")
    return ChildFailedError("python", {5: one})


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (failure(EXIT_USER_ERROR), EXIT_USER_ERROR, ""),
        (failure(EXIT_PREEMPTED), EXIT_PREEMPTED, ""),
        (failure(7), 1, "error: worker 1 of 4 on n2 ended with exit code 7\n"),
        (failure(-9), 1, "error: worker 1 of 4 on n2 ended with SIGKILL\n"),
        (SignalException("x", signal.SIGUSR1), EXIT_PREEMPTED, "error: stopped by SIGUSR1 on n2\n"),
        (SignalException("x", signal.SIGINT), 130, "error: stopped by SIGINT on n2\n"),
        (RendezvousConnectionError("no\nstore"), 1, "error: the other nodes are gone: no store\n"),
    ],
)
def test_how_torchrun_ends(monkeypatch, capsys, error, code, line):
    def torchrun(parsed):
        assert parsed.nproc_per_node == "4"
        if error is not None:
            raise error

    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    monkeypatch.setattr("torch.distributed.run.run", torchrun)
    assert supervise(["--nproc-per-node=4", "x.py"], resumable=True) == code
    assert capsys.readouterr().err == line


def test_a_worker_that_is_done_takes_no_notice_of_signals(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    stop = StopSignal()
    try:
        stop.install()
        stop.ignore()
        stop.release()
        assert {number: signal.getsignal(number) for number in before} == before, "alone it gives them back"
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        stop.install()
        stop.ignore()
        stop.release()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert not stop.received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_a_slurm_job_runs_is_a_module(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("torch.distributed.run.run", lambda parsed: asked.append(parsed.training_script_args))
    monkeypatch.setattr("sys.argv", ["launch", "--nnodes=1", "-m", "nemo_bard.cli", "finetune", "--config", "x"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("nemo_bard.launch", run_name="__main__")
    assert (ended.value.code, asked) == (0, [["finetune", "--config", "x"]])


def test_workers_meet_at_the_nodes_own_address_whatever_its_name(monkeypatch, tmp_path):
    """Machines whose own name is ``localhost`` would send the workers of other nodes to themselves."""
    worker = tmp_path / "worker.py"
    worker.write_text(f"import os\nopen({str(tmp_path / 'met')!r}, 'w').write(os.environ['MASTER_ADDR'])\n")
    monkeypatch.setattr("socket.getfqdn", lambda *_: "localhost")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = node_options({"NEMO_BARD_NODES": "n1=127.0.0.1", "SLURMD_NODENAME": "n1"})
    meeting = ["--nnodes=1", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    assert supervise([*own, *meeting, str(worker)], resumable=True) == 0
    assert (tmp_path / "met").read_text() == "127.0.0.1"
