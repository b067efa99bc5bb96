"""Runs one test script with the packages that it needs, or says what is missing and skips (status 77).

    run.py SCRIPT [ARGUMENT]...

ctest calls it; INTERNVLD_DAEMON and INTERNVLD_COMMAND name the two programs. Scripts import daemon and
support from this folder, whichever folder they are in themselves.
"""

import importlib.util
import os
import pathlib
import runpy
import sys

SKIPPED = 77
NEEDED = {"grpc": "grpcio", "grpc_tools": "grpcio-tools", "grpc_health": "grpcio-health-checking",
          "grpc_reflection": "grpcio-reflection", "numpy": "numpy"}


def main():
    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            print(f"skipped: python package {package} is not installed")
            return SKIPPED
    # grpcio would wake its poller in the child of a fork, whose descriptors close before exec: now and then the child
    # aborts (grpc/grpc issue 43055).
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    script = pathlib.Path(sys.argv[1])
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    sys.path.insert(0, str(script.parent))
    sys.argv = sys.argv[1:]
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
