"""A private SLURM of two nodes on this machine: no system services, no munge, no cgroups.

A job of the partition `urgent` takes the nodes of other jobs, which have some seconds before.
"""

from __future__ import annotations

import getpass
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

NODES = ("one", "two")
USER = getpass.getuser()
CONFIG = """\
ClusterName=qtorch
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=600
"""


class Cluster:
    """Starts in a second, stops with the block. `environment` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        host, ports = socket.gethostname().split(".")[0], free_ports(1 + len(NODES))
        lines = CONFIG.format(host=host, port=ports[0], folder=self.folder, user=USER)
        for node, port in zip(NODES, ports[1:], strict=True):
            lines += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            lines += "CPUs=2 RealMemory=8000 State=UNKNOWN\n"
            (self.folder / f"spool-{node}").mkdir()
        for partition in ("all Default=YES PriorityTier=1 GraceTime=20", "urgent PriorityTier=2"):
            lines += (
                f"PartitionName={partition} Nodes={','.join(NODES)} MaxTime=INFINITE State=UP\n"
            )
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(lines)
        self.run("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        return self

    def __exit__(self, *error: object) -> None:
        self.run("scancel", "--state=RUNNING", "--state=PENDING", "-u", USER, check=False)
        for node in NODES:  # else what a job does not end in time would stay behind
            self.kill_node(node)
        self.run("scontrol", "shutdown", check=False)
        time.sleep(1.0)
        for path in self.folder.glob("*.pid"):
            end_process(int(path.read_text()))

    def run(self, *command: str, check: bool = True) -> str:
        """A command of SLURM's; what it says."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def start_node(self, node: str) -> None:
        """A node joins; returns when it can take jobs."""
        self.run("slurmd", "-N", node)
        end = time.monotonic() + 30
        while self.run("sinfo", "-h", "-n", node, "-o", "%T").strip() not in ("idle", "mixed"):
            if time.monotonic() > end:
                raise RuntimeError(f"node {node} does not come up; see {self.folder}")
            time.sleep(0.2)

    def kill_node(self, node: str) -> int:
        """A node dies: its daemon and every process of its jobs, by kill -9. How many they were."""
        pids = [int((self.folder / f"slurmd-{node}.pid").read_text())]
        jobs = self.jobs("%A", "-w", node)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace")
            except OSError:
                continue
            # First those that would tell the controller how the others ended.
            if words.startswith("slurmstepd") and any(f"[{job}." in words for job in jobs):
                pids.append(int(path.parent.name))
        own = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.environment['SLURM_CONF']}"}
        pids += [pid for pid, told in processes() if own <= told]
        for pid in pids:
            end_process(pid)
        return len(pids)

    def told(self, job: str) -> dict[str, str]:
        """What SLURM says of a job, or of one task of an array."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job)))

    def state(self, job: str) -> set[str]:
        """The states of a job; an array may be in several."""
        return set(re.findall(r"JobState=(\S+)", self.run("scontrol", "show", "job", "-o", job)))

    def jobs(self, form: str = "%i", *options: str) -> list[str]:
        """The running jobs (`-t` says other states), a line each as `squeue -o` says."""
        return self.run("squeue", "-h", "-t", "RUNNING", "-o", form, *options).split()


def free_ports(count: int) -> list[int]:
    """So many ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def end_process(pid: int) -> None:
    """kill -9, if it is there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def processes() -> list[tuple[int, set[str]]]:
    """Every process whose environment can be read, with that."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            told = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found.append((int(path.parent.name), set(told)))
    return found
