"""Streams that run until something ends them, and what health says meanwhile."""

import threading
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support import OPTIONS, Client, Code, chat, example

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Streams:
    """n streams, each past its first token once this is made, and a health watch."""

    def __init__(self, address, n=3):
        self.client = Client(address)
        self.outcomes, self.health = [], []  # (when, code or "finished", sentence); what Watch said
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

    def check_lost(self, test, job, rank, struck_at, what, limit_s):
        """The job has ended, after a rank was lost that is not the gateway: every stream ended UNAVAILABLE naming the
        rank, health was NOT_SERVING, the job left non-zero and names the rank too. Prints the times."""
        ended = time.monotonic() - struck_at
        self.join()
        last = max(when for when, _, _ in self.outcomes) - struck_at
        print(f"  {what}: streams over after {last:.2f} s, job after {ended:.2f} s, status {job.status}; "
              f"{self.outcomes[0][2]}", flush=True)
        test.assertEqual([code for _, code, _ in self.outcomes], [Code.UNAVAILABLE] * len(self.outcomes), job.log())
        test.assertIn(f"rank {rank} ", self.outcomes[0][2])
        test.assertEqual(self.health[-1], NOT_SERVING)
        test.assertNotEqual(job.status, 0, job.log())
        test.assertRegex(job.log(), rf"\brank {rank}\b")
        test.assertLess(max(last, ended), limit_s, job.log())
