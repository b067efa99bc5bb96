"""A real slurmctld and two real slurmd on this machine, as root, without systemd and without touching the system's
own Slurm: everything lives in a temporary folder, daemons have ports and a munge key of their own.

    with Cluster() as slurm:
        slurm.run("sbatch", "-N2", script)      the output; raises with stderr
        slurm.state(job)                        "PENDING", "RUNNING", "COMPLETED", … or ""
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "mpirun")
NODES = 2
CONFIGURATION = """\
ClusterName=internvld
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
KillWait=20
MessageTimeout=30
TmpFS={root}/tmp/%n
TaskProlog={root}/prolog
SlurmdTimeout=60
InactiveLimit=0
MinJobAge=600
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=1,sched_min_interval=0
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def why_not():
    for name in PROGRAMS:
        if not shutil.which(name):
            return f"no program {name} (Debian: slurmctld slurmd slurm-client munge openmpi-bin)"
    if os.geteuid() != 0:
        return "not root: slurmd starts jobs as other users"
    return None


def _free_ports(n):
    """n neighbouring ports that nobody listens on now."""
    for first in range(21000 + os.getpid() % 5000 * 2, 32000, n):
        try:
            for port in range(first, first + n):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")


class Cluster:
    def __enter__(self):
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="internvld-slurm-"))
        self.root.chmod(0o755)
        for folder in ("state", "munge", *(f"{a}/n{i + 1}" for a in ("spool", "tmp") for i in range(NODES))):
            (self.root / folder).mkdir(parents=True)
        self.root.joinpath("munge").chmod(0o711)
        key = self.root / "munge/key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        # Open MPI names shared memory by host: two nodes on one machine would use each other's.
        prolog = self.root / "prolog"
        prolog.write_text(f'#!/bin/sh\necho "export OMPI_MCA_btl_vader_backing_directory={self.root}/tmp/$SLURMD_NODENAME"\n')
        prolog.chmod(0o755)
        host, port = socket.gethostname().split(".")[0], _free_ports(NODES + 1)
        configuration = self.root / "slurm.conf"
        configuration.write_text(CONFIGURATION.format(host=host, port=port, root=self.root, nodes=NODES,
                                                      first=port + 1, last=port + NODES))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment["SLURM_CONF"] = str(configuration)
        try:
            munge = self.root / "munge"
            self.run("munged", "--force", f"--key-file={key}", f"--socket={munge}/socket", f"--pid-file={munge}/pid",
                     f"--log-file={munge}/log", f"--seed-file={munge}/seed")
            self.run("slurmctld", "-f", configuration)
            for i in range(NODES):
                self.run("slurmd", "-f", configuration, "-N", f"n{i + 1}")
            self._wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").split() == [str(NODES)], 30, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for job in self.run("squeue", "-h", "-o", "%A", check=False).split():
            self.run("scancel", "--signal=KILL", "--full", job, check=False)
            self.run("scancel", job, check=False)
        end = time.monotonic() + 30
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < end:
            time.sleep(0.2)
        for file in [*self.root.glob("slurmd-*.pid"), self.root / "slurmctld.pid", self.root / "munge/pid"]:
            try:
                os.kill(int(file.read_text()), signal.SIGTERM)
            except (OSError, ValueError):
                pass
        time.sleep(0.5)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, *words, check=True):
        done = subprocess.run([str(w) for w in words], env=self.environment, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, cwd=self.root)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, *words, environment=None):
        """The job's number."""
        exports = ",".join(["ALL", *(f"{k}={v}" for k, v in (environment or {}).items())])
        return self.run("sbatch", "--parsable", f"--export={exports}", *words).split(";")[0].strip()

    def state(self, job):
        """Of a job, or of all tasks of an array: one word when they agree."""
        out = self.run("scontrol", "show", "job", job, check=False)
        return " ".join(sorted({w.split("=", 1)[1] for w in out.split() if w.startswith("JobState=")}))

    def wait_state(self, job, state, limit_s=120):
        self._wait(lambda: self.state(job) == state, limit_s, f"job {job} to be {state}", lambda: self.state(job))

    @staticmethod
    def _wait(condition, limit_s, what, now=lambda: ""):
        end = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"waited {limit_s} s for {what}; it is {now()}")
            time.sleep(0.1)
