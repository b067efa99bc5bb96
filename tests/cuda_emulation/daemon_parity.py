"""The daemon on the CUDA back end, emulated or real, against Transformers' recorded numbers, through RPC.

    daemon_parity.py CHECKPOINT LAYOUT... [--OPTION of internvld]...    2x2x1, T x P x V, is four ranks over NCCL

The tensors of tests/parity/daemon/reference.py with its tolerances, and the first greedy generations one after the
other (emulated threads are slow). Between layouts not a bit may differ.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "parity/daemon"))

import daemon
import reference
from support import Client

N_GENERATIONS = 3
TIMEOUT_S = 300
EMULATED = "emulated" in daemon.program("INTERNVLD_DAEMON")


def main():
    name, layouts = sys.argv[1], [x for x in sys.argv[2:] if not x.startswith("--")]
    options = [x for x in sys.argv[2:] if x.startswith("--")]
    folder = reference.reference_folder(name)
    if folder is None:
        print("skipped: no reference data (INTERNVLD_REFERENCE, tests/data/reference, ../shared/reference)")
        sys.exit(reference.SKIPPED)
    at = folder / "goldens" / name
    config = json.loads((folder / "checkpoints" / name / "config.json").read_text())
    generation = json.loads((folder / "checkpoints" / name / "generation_config.json").read_text())
    end = generation["eos_token_id"]
    end_ids = set(end if isinstance(end, list) else [end])
    goldens = {x: reference.read_safetensors(at / f"{x}.safetensors") for x in ("vision", "projector", "lm")}
    goldens |= {x: json.loads((at / f"{x}.json").read_text()) for x in ("scalars", "generate")}
    report = reference.Report()
    alone = reference.rows_alone(folder / "checkpoints" / name)
    cases = list(reference.generations(goldens, [], folder, config, report, alone))[:N_GENERATIONS]
    for text in layouts:
        with daemon.Daemon(model=folder / "checkpoints" / name, dtype="float32", **daemon.layout_of(text),
                           extra=("--device", "cuda", "--deterministic", "--max-num-seqs", "4",
                                  "--max-model-len", "2048", *options)) as d:
            client = Client(d.address)
            reference.check_vision(client, text, goldens, report, config)
            reference.check_language(client, text, goldens, report, config)
            for case, prompt, record in cases:
                reply = client.generate(prompt, timeout=TIMEOUT_S, temperature=0, max_tokens=len(record["ids"]))
                report.generation(text, case, reply.ids, record, end_ids)
            client.close()
            if EMULATED:  # a machine's GPUs need not reach each other
                assert ("up to 512 KiB over CUDA IPC" in d.log()) == text.startswith("2"), d.log()
        print(f"  {name} at T x P x V = {text}: done, {len(report.failures)} failures so far", flush=True)
    report.print()
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
