"""Sums over shards in the daemon, by each of their ways: the bits of T=1 with short sums over CUDA IPC and with all over
NCCL (--disable-custom-all-reduce). Its log says which it was. Text alone: emulated threads are slow.

    daemon_sums.py [--OPTION of internvld]...
"""

import sys

import daemon
from support import Client, pb, position_bits

MODEL = daemon.ROOT / "tests/data/reference/checkpoints/ln-1b-style"
PROMPT = pb.Prompt(tokens=pb.TokenPrompt(token_ids=[5 + 31 * i % 900 for i in range(16)]))
EMULATED = "emulated" in daemon.program("INTERNVLD_DAEMON")


def ask(tensor, *flags):
    """A reply, and what the log says of sums over shards."""
    with daemon.Daemon(model=MODEL, tensor=tensor, extra=("--device", "cuda", "--deterministic", "--max-num-seqs", 2,
                                                          "--max-model-len", 64, *flags, *sys.argv[1:])) as d:
        client = Client(d.address)
        reply = client.generate(PROMPT, timeout=300, temperature=0, max_tokens=20, prompt_logprobs=1)
        client.close()
        said = [x.partition(" comm: ")[2] for x in d.log().splitlines() if " comm: " in x]
    return reply, said


def main():
    (alone, said_alone), (shards, said), (nccl, said_nccl) = ask(1), ask(2), ask(2, "--disable-custom-all-reduce")
    print("  T=2:", *said, flush=True)
    assert not said_alone and not said_nccl and len(said) == 1, (said_alone, said, said_nccl)
    if EMULATED:  # a machine's GPUs need not reach each other
        assert "up to 512 KiB over CUDA IPC" in said[0], said
    for reply in (shards, nccl):
        assert reply.ids == alone.ids, (reply.ids, alone.ids)
        assert position_bits(reply.prompt_logprobs) == position_bits(alone.prompt_logprobs)


if __name__ == "__main__":
    main()
