"""Drains under load: SIGTERM or SIGUSR1 at a random moment while clients keep asking. No accepted request is lost (one
whose stream has started ends with Done), later ones are refused with UNAVAILABLE and nothing else, also at the
server's very last moment; the job exits 0, nothing stays.

    test_drain.py [DRAINS]      4 in ctest; 100: tests/gateway/run.py tests/faults/test_drain.py 100"""

import random
import signal
import sys
import threading
import time

import grpc

import daemon
from support import Client, Code, chat, example


class Load(threading.Thread):
    """Asks until it is refused."""

    def __init__(self, address, token=None):
        super().__init__()
        self.client, self.n_done, self.lost = Client(address, token), 0, []
        self.start()

    def run(self):
        while self.ask():
            self.n_done += 1
        self.client.close()

    def ask(self):
        started = done = False
        try:
            for event in self.client.start(chat(example("scene-two.png"), "Describe the image."), timeout=60,
                                           max_tokens=60, ignore_eos=True):
                started = True
                done = event.WhichOneof("event") == "done"
        except grpc.RpcError as error:
            if started or error.code() != Code.UNAVAILABLE:
                self.lost.append(f"{'accepted' if started else 'refused'} with {error.code()}: {error.details()}")
            return False
        if not done:
            self.lost.append("the stream ended well without Done")
        return done


def drain(draw, layout):
    d = daemon.Daemon(**layout)
    clients = [Load(d.address) for _ in range(6)]
    time.sleep(draw.uniform(0.05, 1.0))
    d.process.send_signal(draw.choice([signal.SIGTERM, signal.SIGUSR1]))
    status = d.wait(60)
    for c in clients:
        c.join(60)
    lost = [x for c in clients for x in c.lost]
    assert not lost, f"lost {lost}\n{d.log()}"
    assert status == 0, f"status {status}\n{d.log()}"
    assert not d.processes(), "processes of the job outlived it"
    return sum(c.n_done for c in clients)


def main():
    n_drains = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    draw, n_done, start = random.Random(1), 0, time.monotonic()
    for i in range(n_drains):
        n_done += drain(draw, [{"tensor": 2}, {"pipeline": 2}][i % 2])
    assert n_done > 0, "no request was answered, so nothing was shown"
    print(f"{n_drains} drains in {time.monotonic() - start:.0f} s, {n_done} requests, none lost", flush=True)


if __name__ == "__main__":
    main()
