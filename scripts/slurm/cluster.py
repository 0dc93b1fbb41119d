"""A private SLURM cluster of two nodes on this machine, without system services, munge and cgroups.

Jobs of the partition `urgent` preempt other jobs, which get a few seconds of grace time.
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
    """A context manager that starts the cluster, within a second, and stops it.

    SLURM commands need the variables in `environment`.
    """

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
        for node in NODES:  # otherwise processes that ignore scancel would be left running
            self.kill_node(node)
        self.run("scontrol", "shutdown", check=False)
        time.sleep(1.0)
        for path in self.folder.glob("*.pid"):
            kill_process(int(path.read_text()))

    def run(self, *command: str, check: bool = True) -> str:
        """Run a SLURM command and return its output."""
        process = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if check and process.returncode:
            raise RuntimeError(
                f"{' '.join(command)}: {process.stderr.strip() or process.stdout.strip()}"
            )
        return process.stdout

    def start_node(self, node: str) -> None:
        """Start a node and wait until it accepts jobs."""
        self.run("slurmd", "-N", node)
        end = time.monotonic() + 30
        while self.run("sinfo", "-h", "-n", node, "-o", "%T").strip() not in ("idle", "mixed"):
            if time.monotonic() > end:
                raise RuntimeError(
                    f"node {node} did not start within 30 seconds; see {self.folder}"
                )
            time.sleep(0.2)

    def kill_node(self, node: str) -> int:
        """Kill a node's daemon and all processes of its jobs with SIGKILL; return their number."""
        pids = [int((self.folder / f"slurmd-{node}.pid").read_text())]
        jobs = self.list_jobs("%A", "-w", node)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments = path.read_bytes().decode(errors="replace")
            except OSError:
                continue
            # Kill the step daemons first: they would report the others' end to the controller.
            if arguments.startswith("slurmstepd") and any(f"[{job}." in arguments for job in jobs):
                pids.append(int(path.parent.name))
        node_entries = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.environment['SLURM_CONF']}"}
        pids += [pid for pid, entries in process_environments() if node_entries <= entries]
        for pid in pids:
            kill_process(pid)
        return len(pids)

    def job_record(self, job: str) -> dict[str, str]:
        """Return SLURM's record of a job, or of one task of a job array."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job)))

    def job_states(self, job: str) -> set[str]:
        """Return the states of a job; the tasks of a job array may have several."""
        return set(re.findall(r"JobState=(\S+)", self.run("scontrol", "show", "job", "-o", job)))

    def list_jobs(self, output_format: str = "%i", *options: str) -> list[str]:
        """List the running jobs in a format of `squeue -o`; option `-t` selects other states."""
        return self.run("squeue", "-h", "-t", "RUNNING", "-o", output_format, *options).split()


def free_ports(count: int) -> list[int]:
    """Return ports on which no process listens."""
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def kill_process(pid: int) -> None:
    """Send SIGKILL to a process, if it exists."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def process_environments() -> list[tuple[int, set[str]]]:
    """List all processes whose environment is readable, as (pid, environment entries)."""
    environments = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            entries = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        environments.append((int(path.parent.name), set(entries)))
    return environments
