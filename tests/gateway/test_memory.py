"""Memory, on models of random weights with the real vocabulary: what the plan says, and what a prompt must not decide.

The plan: a few layers of InternVL3-1B's shapes, every KV page taken, every row of logits, a full batch of tiles. The
peak of each rank that holds weights lies within 2 % below its plan, and never above.

The vocabulary projection goes in chunks of rows: logits of 4000 positions at once would be 2.3 GiB; the peak of no
process may grow by more than 64 MiB from a prompt of 64 tokens to one of 4000, each with a label on every row.
"""

import json
import pathlib
import random
import tempfile

import daemon
from made_files import write_model
from support import SANITIZED, Client, chat, main, pb, png, unittest

CHECKPOINT = daemon.ROOT / "tests/data/reference/checkpoints/ln-1b-style"
VOCAB, N_SHORT, N_LONG = 151674, 64, 4000
LIMIT_BYTES = 64 << 20
TEXT = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
            vocab_size=VOCAB)
TEXT_1B = dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2,
               num_hidden_layers=2, vocab_size=VOCAB)
VISION_1B = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=6,
                 image_size=[448, 448])
KV_BYTES, N_CONTEXT, N_TILES = 4 << 20, 2048, 2  # two sequences of N_CONTEXT tokens
INT8_TOKEN_BYTES = 2 * 2 * (64 + 4)  # key and value, layers, codes and a scale of a shard's one kv head
N_LOGIT_ROWS = 128  # twice what the vocabulary projection takes at once
PLAN_SHARE = 0.02
PLAN_SHARE_CODES = 0.04  # half of the weights, and what is multiplied with them is planned as if in bfloat16


def make_checkpoint(folder, text, vision=None):
    """The reference's files around a config of other sizes."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config["text_config"].update(text)
    if vision:
        config["vision_config"].update(vision)
        n_a_side = vision["image_size"][0] // config["vision_config"]["patch_size"][0]
        config["image_seq_length"] = int((n_a_side * config["downsample_ratio"]) ** 2)
    write_model(folder, CHECKPOINT, config, side=vision and vision["image_size"][0])


def peaks(d):
    """{rank: bytes}: the most memory that each has held so far."""
    out = {}
    for rank, pid in d.ranks().items():
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
        out[rank] = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:"))
    return out


@unittest.skipIf(SANITIZED, "a sanitizer's own memory hides the program's")
class Memory(unittest.TestCase):
    def fill(self, d):
        """Everything that the plan counts: pages, rows of logits, tiles."""
        client, numbers = Client(d.address), random.Random(1)
        for _ in range(2):
            ids = [numbers.randrange(1, 1000) for _ in range(N_CONTEXT - 1)]
            labels = [-100] * (len(ids) - N_LOGIT_ROWS) + ids[-N_LOGIT_ROWS:]
            client.forward(pb.Prompt(tokens=pb.TokenPrompt(token_ids=ids)), [], labels=labels)
        side = 2 * VISION_1B["image_size"][0]  # no two tiles alike: each is encoded
        rows = b"".join(b"\0" + numbers.randbytes(3 * side) for _ in range(side))
        answer = client.generate(chat("What is it?", png(side, side, rows)), max_tokens=1)
        self.assertGreater(answer.done.usage.prompt_tokens, N_TILES * 256)
        client.close()

    def check_plan(self, *extra, share=PLAN_SHARE, **layout):
        with tempfile.TemporaryDirectory(prefix="internvld-plan-") as folder:
            make_checkpoint(pathlib.Path(folder), TEXT_1B, VISION_1B)
            with daemon.Daemon(model=folder, dtype="bfloat16", **layout, extra=(
                    "--load-format", "dummy", "--max-model-len", N_CONTEXT, "--kv-cache-memory-bytes", KV_BYTES,
                    "--max-vision-tiles", N_TILES, *extra)) as d:
                plan = daemon.planned(*d.command[1:])
                self.fill(d)
                peak = peaks(d)
                client = Client(d.address)
                held = [x.kv_bytes for x in client.model().ranks]
                client.close()
        for rank, planned in enumerate(plan):
            role, n_bytes = planned["role"], planned["total"]
            print(f"rank {rank} ({role}): {n_bytes / (1 << 20):.1f} MiB planned, {peak[rank] / (1 << 20):.1f} taken, "
                  f"{100 * (peak[rank] / n_bytes - 1):+.1f} %", flush=True)
            self.assertLessEqual(peak[rank], n_bytes, f"rank {rank}")
            self.assertAlmostEqual(held[rank] / (1 << 20), planned["KV"] / (1 << 20), delta=0.05, msg=f"rank {rank}")
            if role != "gateway":  # its caches are as full as requests make them
                self.assertGreaterEqual(peak[rank], n_bytes * (1 - share), f"rank {rank}")

    def test_the_plan(self):
        self.check_plan(tensor=2)

    def test_the_plan_of_int8_pages(self):
        self.check_plan("--kv-cache-dtype", "int8", "--kv-cache-memory-bytes", 2 * N_CONTEXT * INT8_TOKEN_BYTES, tensor=2)

    def test_the_plan_of_int8_weights(self):
        self.check_plan("--quantization", "int8", "--activation-quantization", "int8", tensor=2,
                        share=PLAN_SHARE_CODES)

    def test_labels_of_a_long_prompt(self):
        with tempfile.TemporaryDirectory(prefix="internvld-vocabulary-") as folder:
            make_checkpoint(pathlib.Path(folder), TEXT)
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
