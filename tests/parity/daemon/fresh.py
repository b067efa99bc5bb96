"""Goldens made now by the reference's own generator, with another seed and other shapes, and the model held against them.

    fresh.py [SEED] [PATTERNS]       default: seed 7, a few variants; "7 *" makes all of them (five minutes)

Nothing of the model is tuned to the recorded set. Skipped (status 77) where PyTorch, Transformers or the generator
is missing. INTERNVLD_PARITY_TEST and INTERNVLD_LAYOUT_TEST name the two test programs; both look at
INTERNVLD_REFERENCE first and then at the recorded sets, so a variant that was not made is tested against those.
Then every variant made goes through a daemon (reference.py), where gRPC's Python packages are at hand too.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[3]
SKIPPED = 77
LAYOUTS = ("1x1x1", "2x2x1")  # of the daemon
NEEDED = ("torch", "torchvision", "transformers", "tokenizers", "safetensors", "PIL", "av")
FEW = "rms-78b-style,t-qwen3,v-nonsquare"


def skip_reason(generator):
    if not generator.is_file():
        return f"no {generator}"
    missing = [x for x in NEEDED if importlib.util.find_spec(x) is None]
    if missing:
        return f"python module {missing[0]} is not installed"
    if os.environ.get("INTERNVLD_SANITIZED"):
        return "PyTorch's part is the same under a sanitizer; the release build runs it"
    return None


def through_the_daemon(environment):
    """All variants of INTERNVLD_REFERENCE; 0, or the status of a failure. A missing package is said, and no failure."""
    status = subprocess.run([sys.executable, ROOT / "tests/gateway/run.py", ROOT / "tests/parity/daemon/reference.py",
                             "*", *LAYOUTS], env=environment).returncode
    return 0 if status == SKIPPED else status


def main():
    seed, variants = (sys.argv[1:] + ["7", FEW][len(sys.argv) - 1:])[:2]
    generator = pathlib.Path(os.environ.get("INTERNVLD_GENERATOR", ROOT.parent / "shared/reference/generate.py"))
    reason = skip_reason(generator)
    if reason:
        print(f"skipped: {reason}")
        return SKIPPED
    with tempfile.TemporaryDirectory(prefix="internvld-fresh-") as folder:
        subprocess.run([sys.executable, generator, "--seed", seed, "--shapes", "b", "--out", folder, "--variants",
                        variants, "--sections", "checkpoints,goldens"], check=True, stdout=subprocess.DEVNULL)
        environment = {**os.environ, "INTERNVLD_REFERENCE": folder}
        for test in ("INTERNVLD_PARITY_TEST", "INTERNVLD_LAYOUT_TEST"):
            status = subprocess.run([os.environ[test]], env=environment).returncode
            if status != 0:
                return status
        return through_the_daemon(environment)


sys.exit(main())
