"""A rank on another host dies, hangs, or cannot be reached: streams end UNAVAILABLE, health says NOT_SERVING, the
job ends non-zero naming the rank, nothing stays, and the supervisor brings it back without a person.

Times are printed. A run fails only past LIMIT_S, far over the aim (2 s to notice)."""

import os
import re
import signal
import threading
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hosts import Hosts
from job import Job, skip_without_hosts
from support import OPTIONS, Client, Code, answer_bits, chat, example, main, unittest

LIMIT_S = 20.0
REMOTE_LIMIT_S = 30.0  # for ranks behind a dead link to end by themselves


class Streams:
    """n streams that run until something ends them, and a health watch."""

    def __init__(self, address, n=3):
        self.client = Client(address)
        self.outcomes, self.health = [], []
        running = threading.Barrier(n + 1)
        self.threads = [threading.Thread(target=self._read, args=(running,)) for _ in range(n)]
        self.threads.append(threading.Thread(target=self._watch, args=(address,)))
        for t in self.threads:
            t.start()
        running.wait(60)

    def _read(self, running):
        first = True
        try:
            for event in self.client.start(chat(example("scene-two.png"), "Describe the image."), max_tokens=3500,
                                           ignore_eos=True):
                if first and event.WhichOneof("event") == "delta":
                    first = False
                    running.wait(60)
            self.outcomes.append((time.monotonic(), "finished", ""))
        except grpc.RpcError as error:
            self.outcomes.append((time.monotonic(), error.code(), error.details()))

    def _watch(self, address):
        channel = grpc.insecure_channel(address, options=OPTIONS)
        try:
            for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                self.health.append(answer.status)
        except grpc.RpcError:
            pass
        channel.close()

    def join(self):
        for t in self.threads:
            t.join(60)
        self.client.close()


class Faults(unittest.TestCase):
    def wait_gone(self, job, limit_s):
        start = time.monotonic()
        while (left := job.processes()) and time.monotonic() - start < limit_s:
            time.sleep(0.1)
        if left:
            job.kill()
        self.assertEqual(left, {}, job.log())
        return time.monotonic() - start

    def check(self, job, streams, start, rank, status, what):
        ended = time.monotonic() - start
        streams.join()
        last = max(when for when, _, _ in streams.outcomes) - start
        print(f"  {what}: streams over after {last:.2f} s, job after {ended:.2f} s, status {status}; "
              f"{streams.outcomes[0][2]}", flush=True)
        self.assertEqual([code for _, code, _ in streams.outcomes], [Code.UNAVAILABLE] * 3, job.log())
        self.assertIn(f"rank {rank}", streams.outcomes[0][2])
        self.assertEqual(streams.health[-1], health_pb2.HealthCheckResponse.NOT_SERVING)
        self.assertNotEqual(status, 0, job.log())
        self.assertRegex(job.log(), rf"\brank {rank}\b")
        self.assertLess(max(last, ended), LIMIT_S, job.log())

    def lose(self, how):
        with Hosts(2) as hosts:
            job = Job(hosts, [3, 1], pipeline=2)
            streams = Streams(job.address)
            start = time.monotonic()
            os.kill(job.ranks()[3], how)
            status = job.wait(60)
            self.check(job, streams, start, 3, status, f"rank 3 on the second host, {how.name}")
            self.wait_gone(job, 5)

    def test_killed(self):
        self.lose(signal.SIGKILL)

    def test_stopped(self):
        self.lose(signal.SIGSTOP)

    def test_link_cut(self):
        """Nothing breaks, nothing arrives. mpirun alone would wait for the lost host for ever."""
        with Hosts(2) as hosts:
            job = Job(hosts, [3, 1], pipeline=2)
            remote = job.ranks()[3]
            streams = Streams(job.address)
            start = time.monotonic()
            hosts.cut(1)
            status = job.wait(60)
            self.check(job, streams, start, 3, status, "link cut")
            while remote in job.processes() and time.monotonic() - start < REMOTE_LIMIT_S:
                time.sleep(0.1)
            print(f"  the rank behind the dead link ended after {time.monotonic() - start:.2f} s", flush=True)
            self.assertNotIn(remote, job.processes())
            hosts.join(1)
            took = self.wait_gone(job, REMOTE_LIMIT_S)
            print(f"  nothing left {took:.2f} s after the link was back", flush=True)

    def test_back_to_ready(self):
        """The supervisor starts the job again, also while the host cannot be reached for a while."""
        with Hosts(2) as hosts:
            job = Job(hosts, [3, 1], pipeline=2, supervised=("--start-limit", "15"))
            before = answer_bits(job.address)
            streams = Streams(job.address)
            start = time.monotonic()
            hosts.cut(1)
            streams.join()
            time.sleep(4)
            hosts.join(1)
            while job.port_file.exists() and time.monotonic() - start < 60:
                time.sleep(0.05)
            address = job.wait_again()
            print(f"  link cut for 4 s and more: serving again {time.monotonic() - start:.2f} s after it was cut",
                  flush=True)
            self.assertEqual(answer_bits(address), before)
            streams = Streams(address)
            start = time.monotonic()
            os.kill(job.ranks()[0], signal.SIGKILL)
            streams.join()
            while job.port_file.exists() and job.port_file.read_text().strip() == address and \
                    time.monotonic() - start < 60:
                time.sleep(0.05)
            address = job.wait_again()
            print(f"  gateway killed: serving again after {time.monotonic() - start:.2f} s", flush=True)
            self.assertEqual(answer_bits(address), before)
            self.assertEqual(job.stop(), 0, job.log())
            self.assertTrue(re.search("starting it again", job.log()))
            self.wait_gone(job, 5)


if __name__ == "__main__":
    skip_without_hosts()
    main()
