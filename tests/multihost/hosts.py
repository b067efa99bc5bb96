"""Hosts made of network namespaces: each has its own network stack and host name, and a link to one bridge.

    with Hosts(2) as hosts:
        hosts.names             ["iv1234a", "iv1234b"]
        hosts.address(0)        "10.77.3.1"
        hosts.agent             a program that Open MPI takes for rsh: AGENT HOST COMMAND...
        hosts.cut(1)            the link of the second host is down
        hosts.join(1)

This process stays outside: its address on the bridge lets it reach every host. Needs root and iproute2; why_not()
says what is missing. Everything made is removed at the end, also what a killed run has left (Hosts.sweep)."""

import os
import pathlib
import re
import shutil
import stat
import subprocess
import tempfile

NETNS = pathlib.Path("/run/netns")
AGENT = """#!/bin/sh
# rsh agent: options are ignored, then HOST and a command for its shell. The host name goes with the namespace.
while [ "${1#-}" != "$1" ]; do shift; done
host=$1
shift
exec ip netns exec "$host" unshare --uts -- sh -c 'hostname "$0"; exec sh -c "$1"' "$host" "$*"
"""


def _run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


def why_not():
    """What keeps this machine from having such hosts, or None."""
    for name in ("ip", "unshare", "mpirun"):
        if not shutil.which(name):
            return f"no program {name}"
    if os.geteuid() != 0:
        return "not root: network namespaces cannot be made"
    probe = f"iv{os.getpid()}p"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "netns", "del", probe)
        _run("ip", "link", "add", probe, "type", "bridge")
        _run("ip", "link", "del", probe)
    except RuntimeError as error:
        return f"network namespaces cannot be made: {error}"
    return None


class Hosts:
    def __init__(self, n):
        self.sweep()
        base = f"iv{os.getpid()}"
        self.names = [base + chr(ord("a") + i) for i in range(n)]
        self._bridge = base + "br"
        self._net = f"10.77.{os.getpid() % 250}"
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="internvld-hosts-"))
        self.agent = self._folder / "agent"
        self.agent.write_text(AGENT)
        self.agent.chmod(self.agent.stat().st_mode | stat.S_IXUSR)

    def address(self, i):
        return f"{self._net}.{i + 1}"

    def command(self, i, *words):
        """`words` run on host i."""
        return ["ip", "netns", "exec", self.names[i], "unshare", "--uts", "--", "sh", "-c",
                'hostname "$0"; exec "$@"', self.names[i], *map(str, words)]

    def hostfile(self, slots):
        path = self._folder / "hosts"
        path.write_text("".join(f"{name} slots={n}\n" for name, n in zip(self.names, slots)))
        return path

    def cut(self, i):
        _run("ip", "-n", self.names[i], "link", "set", "eth0", "down")

    def join(self, i):
        _run("ip", "-n", self.names[i], "link", "set", "eth0", "up")

    def __enter__(self):
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *_):
        self._down()

    def _up(self):
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self._net}.254/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        for i, name in enumerate(self.names):
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", name + "h", "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", name + "h", "master", self._bridge, "up")
            _run("ip", "-n", name, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            folder = pathlib.Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            lines = ["127.0.0.1 localhost"] + [f"{self.address(j)} {other}" for j, other in enumerate(self.names)]
            (folder / "hosts").write_text("\n".join(lines) + "\n")

    def _down(self):
        _remove(self.names, self._bridge)
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def sweep():
        """Removes the hosts of runs whose process has gone."""
        left = {}
        for entry in NETNS.iterdir() if NETNS.exists() else ():
            match = re.fullmatch(r"iv(\d+)[a-z]", entry.name)
            if match and not pathlib.Path(f"/proc/{match[1]}").exists():
                left.setdefault(match[1], []).append(entry.name)
        for pid, names in left.items():
            _remove(names, f"iv{pid}br")


def _remove(names, bridge):
    for name in names:
        for words in (("ip", "netns", "del", name), ("ip", "link", "del", name + "h")):
            subprocess.run(words, capture_output=True)
        shutil.rmtree(pathlib.Path("/etc/netns") / name, ignore_errors=True)
    subprocess.run(["ip", "link", "del", bridge], capture_output=True)
