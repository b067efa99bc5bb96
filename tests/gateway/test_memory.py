"""Memory that a prompt's length times the vocabulary must not decide: the vocabulary projection goes in chunks of rows.

A model of one small layer and the real vocabulary, with random weights. Logits of 4000 positions at once would be
2.3 GiB; the peak of no process may grow by more than 64 MiB from a prompt of 64 tokens to one of 4000, each with a
label on every row.
"""

import json
import pathlib
import shutil
import tempfile

import daemon
from support import SANITIZED, Client, main, pb, unittest

CHECKPOINT = daemon.ROOT / "tests/data/reference/checkpoints/ln-1b-style"
VOCAB, N_SHORT, N_LONG = 151674, 64, 4000
LIMIT_BYTES = 64 << 20
TEXT = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
            vocab_size=VOCAB)


def make_checkpoint(folder):
    """The reference's tokenizer and processor files, and a config of other sizes; no weights."""
    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config["text_config"].update(TEXT)
    (folder / "config.json").write_text(json.dumps(config))


def peaks(d):
    """{rank: bytes}: the most memory that each has held so far."""
    out = {}
    for rank, pid in d.ranks().items():
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
        out[rank] = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:"))
    return out


@unittest.skipIf(SANITIZED, "a sanitizer's own memory hides the program's")
class Memory(unittest.TestCase):
    def test_labels_of_a_long_prompt(self):
        with tempfile.TemporaryDirectory(prefix="internvld-vocabulary-") as folder:
            make_checkpoint(pathlib.Path(folder))
            with daemon.Daemon(model=folder, dtype="float32", extra=(
                    "--load-format", "dummy", "--max-model-len", 2 * N_LONG, "--max-num-batched-tokens", N_LONG)) as d:
                client, before = Client(d.address), None
                for n in (N_SHORT, N_LONG):
                    ids = [1 + i * 37 % (VOCAB - 1) for i in range(n)]
                    _, done = client.forward(pb.Prompt(tokens=pb.TokenPrompt(token_ids=ids)), [], labels=ids)
                    self.assertEqual(len(done.token_logprobs), n)
                    self.assertTrue(all(x < 0 for x in done.token_logprobs[:n - 1]))
                    before = before or peaks(d)
                after = peaks(d)
                client.close()
        self.assertEqual(sorted(after), sorted(before))
        for rank, n_bytes in after.items():
            print(f"rank {rank}: {before[rank] >> 20} MiB with {N_SHORT} tokens, {n_bytes >> 20} MiB with {N_LONG}")
            self.assertLess(n_bytes - before[rank], LIMIT_BYTES, f"rank {rank}")


if __name__ == "__main__":
    main()
