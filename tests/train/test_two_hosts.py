"""A run on two hosts: it is the run of one machine, and it survives the loss of one."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.child_environment import REPOSITORY, cpu_environment
from tests.launching import losses_of, run_ranks
from tests.train.hosts import CABLE, Host, two_hosts, why_not
from tests.train.test_launch import SHORT, caches
from tests.train.test_launchers import wait_until

FLAGS = ["--ds_config", "ds_configs/zero3.json", *SHORT]


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that see each other, and the same disk."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with two_hosts() as both:
        yield both


@contextmanager
def part(
    host: Host, flags: list[str], *, nodes: str, log: Path, meet_at: str = "node-1"
) -> Iterator[subprocess.Popen[str]]:
    """Have a host do its part of a run, one rank, as ``launch/torchrun_node.sh`` does it."""
    on_the_net = {"GLOO_SOCKET_IFNAME": CABLE, "TP_SOCKET_IFNAME": CABLE}
    environment = cpu_environment(FIRST_NODE=meet_at, NODES=nodes, RANKS="1", PYTHON=sys.executable, **on_the_net)
    command = host.command(str(REPOSITORY / "launch" / "torchrun_node.sh"), *flags)
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT, text=True
        ) as launcher,
    ):
        try:
            yield launcher
        finally:
            # Its rank ends with the host.
            launcher.kill()


def train_alone(flags: list[str]) -> None:
    """Make a run of two ranks on this machine, without launcher and network."""
    run_ranks(["launch/train.py", *flags], world_size=2)


def same_but(flags: list[str], tmp_path: Path, name: str) -> list[str]:
    return [*FLAGS, *caches(tmp_path), *flags, "--output_dir", str(tmp_path / name)]


@pytest.mark.slow
def test_two_hosts_train_as_one_machine_with_as_many_ranks(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    train_alone(same_but([], tmp_path, "one"))
    logs = [tmp_path / f"{host.name}.log" for host in hosts]
    flags = same_but([], tmp_path, "two")
    with ExitStack() as stack:
        both = [stack.enter_context(part(h, flags, nodes="2", log=log)) for h, log in zip(hosts, logs, strict=True)]
        codes = [launcher.wait(timeout=300) for launcher in both]
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-6)


LONG = ["--max_steps", "150", "--save_steps", "10", "--learning_rate", "1e-4", "--timeout_minutes", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts; return its folder."""
    root = tmp_path_factory.mktemp("whole")
    train_alone(same_but(LONG, root, "run"))
    return root / "run"


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0], ids=["the second", "the first rank's"])
def test_a_run_goes_on_from_its_checkpoint_where_one_host_is_lost(
    lost: int, hosts: tuple[Host, Host], whole: Path, tmp_path: Path
) -> None:
    run, flags, survivor = tmp_path / "run", same_but(LONG, tmp_path, "run"), hosts[1 - lost]
    logs = [tmp_path / f"{host.name}.log" for host in hosts]
    with ExitStack() as stack:
        both = [
            stack.enter_context(part(host, flags, nodes="1:2", log=log, meet_at=survivor.name))
            for host, log in zip(hosts, logs, strict=True)
        ]
        wait_until(lambda: (run / "checkpoint-20").exists(), both[1 - lost])
        hosts[lost].unplug()
        assert not (run / "checkpoint-150").exists()
        assert both[1 - lost].wait(timeout=400) == 0, logs[1 - lost].read_text()
    assert "a step keeps its 2 packs: grad_accum_steps is 2 on 1 ranks" in logs[1 - lost].read_text()
    final = [load_adapter(folder) for folder in (run, whole)]
    assert final[0].keys() == final[1].keys()
    for name, tensor in final[0].items():
        torch.testing.assert_close(tensor, final[1][name], rtol=1e-4, atol=1e-5)


def load_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint-150" / "adapter" / "adapter_model.safetensors")
