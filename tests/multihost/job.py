"""A job over several hosts: mpirun with a host file and an agent for rsh, under deploy/supervise.sh or bare."""

import atexit
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid

import daemon
import hosts

SKIPPED = 77
SUPERVISE = daemon.ROOT / "deploy/supervise.sh"


def skip_without_hosts():
    reason = hosts.why_not()
    if reason:
        print(f"skipped: {reason}")
        sys.exit(SKIPPED)


class Job(daemon.Daemon):
    """`slots` are the ranks on each host; those of the last may have another model or program (words). The gateway, on
    the first host, listens on its bridge address."""

    def __init__(self, hosts, slots, tensor=1, pipeline=1, vision=1, supervised=("--once",), wait=True, extra=(),
                 model=daemon.DEMO_MODEL, model_of_last=None, program_of_last=None):
        self.mark = uuid.uuid4().hex
        self.hosts = hosts
        folder = pathlib.Path(tempfile.mkdtemp(prefix="internvld-test-"))
        atexit.register(self._clean_up, folder)
        self.log_path, self.port_file = folder / "log", folder / "address"

        def program(n, words, model):
            return ["-n", n, *words, "--model", model,
                    "--listen", f"{hosts.address(0)}:0", "--insecure-listen", "--port-file", self.port_file,
                    "--tensor-parallel-size", tensor, "--pipeline-parallel-size", pipeline,
                    "--vision-ranks", vision, *extra]

        mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--quiet",
                  "--mca", "orte_launch_agent", f"sh {SUPERVISE} --once --end-limit 20 -- orted",
                  "--mca", "orte_leave_session_attached", "1", "--mca", "plm_rsh_agent", hosts.agent,
                  "--hostfile", hosts.hostfile(slots), "--map-by", "slot",
                  "--mca", "btl", "self,vader,tcp", "--mca", "btl_vader_single_copy_mechanism", "none",
                  "--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0",
                  "--mca", "mpi_yield_when_idle", "1", "-x", daemon.MARK]
        n_last, words = slots[-1] if model_of_last or program_of_last else 0, [daemon.program("INTERNVLD_DAEMON")]
        mpirun += program(sum(slots) - n_last, words, model)
        if n_last:
            mpirun += [":", *program(n_last, program_of_last or words, model_of_last or model)]
        if supervised is not None:
            mpirun = ["sh", SUPERVISE, "--port-file", self.port_file, *supervised, "--", *mpirun]
        self.command = hosts.command(0, *mpirun)
        self.status, self._is_supervised = None, supervised is not None
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env={**os.environ, daemon.MARK: self.mark}, start_new_session=True)
        if wait:
            self.address = self._wait_for_address(self.port_file)

    def _clean_up(self, folder):
        if self.status is None:
            self.kill()
        shutil.rmtree(folder, ignore_errors=True)

    def terminate(self):
        """Drains. mpirun would end its ranks on SIGTERM; the supervisor makes SIGUSR1 of it."""
        self.process.send_signal(signal.SIGTERM if self._is_supervised else signal.SIGUSR1)

    def wait_again(self):
        """After a restart: the new address."""
        self.address = self._wait_for_address(self.port_file)
        return self.address
