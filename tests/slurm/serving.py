"""What tests of deploy/slurm/ share: a cluster, and daemons that serve.sbatch starts on it."""

import time

import daemon
from cluster import Cluster
from support import unittest


class Serving(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.slurm = Cluster().__enter__()
        cls.addClassCleanup(cls.slurm.__exit__)
        cls.environment = {"INTERNVLD_HOME": daemon.ROOT, "INTERNVLD": daemon.program("INTERNVLD_DAEMON"),
                           "INTERNVL": daemon.program("INTERNVLD_COMMAND"), daemon.MARK: "slurm",
                           "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                           "OMPI_MCA_mpi_yield_when_idle": "1",
                           # Both nodes are this machine; its other addresses may come and go (tests/multihost).
                           "OMPI_MCA_btl_tcp_if_include": "lo"}

    def log(self, job, task=None):
        name = f"internvld-{job}.log" if task is None else f"evaluate-{job}-{task}.log"
        path = self.slurm.root / name
        return path.read_text(errors="replace") if path.exists() else f"no {name}"

    def serve(self, name, *extra, sbatch=()):
        endpoint = self.slurm.root / name
        job = self.slurm.submit("-N2", *sbatch, daemon.ROOT / "deploy/slurm/serve.sbatch", "two-by-two",
                                daemon.DEMO_MODEL, endpoint, *extra, environment=self.environment)
        self.wait_endpoint(job, endpoint)
        self.assertEqual(endpoint.stat().st_mode & 0o777, 0o600)
        return job, endpoint

    def wait_endpoint(self, job, endpoint, limit_s=90):
        end = time.monotonic() + limit_s
        while not endpoint.exists():
            if time.monotonic() > end:
                self.fail(f"no endpoint after {limit_s} s, job {self.slurm.state(job)}\n{self.log(job)}")
            time.sleep(0.05)
