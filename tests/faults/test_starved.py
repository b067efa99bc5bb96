"""Nothing is wrong but the cores: daemons that answer, and one that idles, beside many times more busy processes than
there are cores. No rank is taken for lost, every answer comes and is the same, the drains end with 0.

    test_starved.py [SECONDS [BUSY]]     60 s beside 20 a core in ctest"""

import contextlib
import multiprocessing
import os
import re
import sys
import threading
import time

import daemon
from support import Client, answer_bits, chat, example

LAYOUTS = ({"tensor": 2}, {"pipeline": 2, "vision": 2})


def busy():
    os.setpgid(0, 0)
    while os.getppid() == PARENT:
        sum(i * i for i in range(100000))


PARENT = os.getpid()


@contextlib.contextmanager
def busy_machine(n):
    processes = [multiprocessing.Process(target=busy, daemon=True) for _ in range(n)]
    for p in processes:
        p.start()
    try:
        yield
    finally:
        for p in processes:
            p.kill()
            p.join()


class Load(threading.Thread):
    """One question after the other until `end`; `error` once joined."""

    def __init__(self, address, end):
        super().__init__()
        self.client, self.end, self.n_done, self.error = Client(address), end, 0, None
        self.start()

    def run(self):
        try:
            while time.monotonic() < self.end:
                self.client.generate(chat(example("scene-two.png"), "Describe the image."), max_tokens=60,
                                     ignore_eos=True)
                self.n_done += 1
        except Exception as error:  # any is a failure of the daemon, told by the main thread
            self.error = error
        self.client.close()


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    n_busy = int(sys.argv[2]) if len(sys.argv) > 2 else 20 * os.cpu_count()
    with contextlib.ExitStack() as stack:
        idle, *daemons = (stack.enter_context(daemon.Daemon(**layout)) for layout in (LAYOUTS[0], *LAYOUTS))
        expected = answer_bits(idle.address)
        with busy_machine(n_busy):
            end = time.monotonic() + seconds
            loads = [Load(d.address, end) for d in daemons for _ in range(2)]
            for load in loads:
                load.join()
            at_the_end = os.getloadavg()[0]
            answers = [answer_bits(d.address) for d in (idle, *daemons)]
    errors = [load.error for load in loads if load.error]
    logs = [d.log() for d in (idle, *daemons)]
    assert not errors, f"{errors}\n{logs}"
    assert answers == [expected] * len(answers), "answers differ"
    assert all(load.n_done for load in loads), "a client was never answered, so nothing was shown"
    waits = [int(ms) for log in logs for ms in re.findall(r"answered after (\d+) ms", log)]
    print(f"{seconds:.0f} s beside {n_busy} busy processes (load {at_the_end:.0f}): "
          f"{sum(load.n_done for load in loads)} answers, no rank lost, longest wait for a sign of life "
          f"{f'{max(waits)} ms' if waits else 'under half of what is allowed'}", flush=True)


if __name__ == "__main__":
    main()
