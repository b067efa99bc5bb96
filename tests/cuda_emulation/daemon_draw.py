"""The tokens that the CUDA device draws, emulated or real, are those that the host draws from whole rows, alone, in
company and in every layout.

    daemon_draw.py LAYOUT... [--OPTION of internvld]...    T x P x V

Each request is sent as it is and, in the first layout, with a bias of 0, which changes nothing but that the host needs
the whole row; the other layouts are held to the bits of the first. The emulation counts what was downloaded: of a token
drawn on the device, that token.
"""

import os
import sys
import tempfile

import daemon
from support import Client, at_once, chat, pb
from usage import count_in, usage

OPTIONS = [x for x in sys.argv[1:] if x.startswith("--")]
LAYOUTS = [x for x in sys.argv[1:] if x not in OPTIONS]
EMULATED = "emulated" in daemon.program("INTERNVLD_DAEMON")
N_TOKENS = 8
DRAWN_BYTES, TOP_K_BYTES = 12, 16 + 64 * 8 + 8  # struct drawn, struct top_k
ROW_BYTES = 4 * 1000  # of the demo model's vocabulary, at least
ON_DEVICE = [dict(temperature=0), dict(temperature=0, logprobs=0), dict(temperature=0.7, seed=1),
             dict(temperature=0.7, top_p=0.6, seed=2, logprobs=0), dict(temperature=1.3, top_k=7, seed=3),
             dict(temperature=1.5, min_p=0.3, top_k=40, seed=4)]
WITH_BEST = [dict(temperature=0, logprobs=3), dict(temperature=0.8, top_p=0.9, seed=5, logprobs=20)]
ON_HOST = [dict(temperature=1, top_k=90, seed=6, logprobs=0), dict(temperature=5, top_p=0.999, seed=7),
           dict(temperature=1, seed=8, repetition_penalty=1.2)]
SEVERAL = [dict(temperature=1.2, seed=9, n=3, logprobs=1)]
PROMPTS = [chat("Say one word."), chat("What is the opposite of old?")]
NO_BIAS = [pb.LogitBias(token_id=5, bias=0)]


def logprobs(candidate):
    return [x for p in candidate.logprobs for x in (p.chosen.logprob, *(t.logprob for t in p.top))]


def is_same(a, b):
    """The same tokens; log-probabilities but for a sum that was added in another order."""
    return all(x.ids == y.ids and len(logprobs(x)) == len(logprobs(y)) and
               all(abs(v - w) < 1e-6 for v, w in zip(logprobs(x), logprobs(y), strict=True))
               for x, y in ((a.candidates[i], b.candidates[i]) for i in a.candidates | b.candidates))


class Asker:
    """Counts what each request has downloaded from the GPUs."""

    def __init__(self, d, folder):
        self.client, self.ranks, self.folder = Client(d.address), d.ranks(), folder

    def downloaded(self):
        return sum(u.downloaded for u in usage(self.folder, self.ranks).values()) if EMULATED else 0

    def ask(self, prompt, sampling, **more):
        before = self.downloaded()
        answer = self.client.generate(prompt, timeout=300, max_tokens=N_TOKENS, ignore_eos=True, **sampling, **more)
        return answer, self.downloaded() - before


def check(layout, extra, on_host):
    """(failures, the bits of every answer)"""
    failures, bits = [], []
    with tempfile.TemporaryDirectory(prefix="internvld-draw-") as folder:
        count_in(folder)
        with daemon.Daemon(dtype="bfloat16", **daemon.layout_of(layout), extra=(
                "--device", "cuda", "--deterministic", "--max-num-seqs", 8, "--max-model-len", 256, *OPTIONS,
                *extra)) as d:
            asker = Asker(d, folder)
            for sampling in ON_DEVICE + WITH_BEST + ON_HOST + SEVERAL:
                for prompt in PROMPTS:
                    answer, n_bytes = asker.ask(prompt, sampling)
                    bits.append(answer.bits())
                    most = N_TOKENS * (DRAWN_BYTES + TOP_K_BYTES * (sampling in WITH_BEST))
                    if EMULATED and sampling in ON_DEVICE + WITH_BEST and n_bytes != most:
                        failures.append(f"{layout} {extra}: {sampling}: {n_bytes} bytes downloaded, not {most}")
                    if not on_host:
                        continue
                    whole, n_whole = asker.ask(prompt, sampling, logit_bias=NO_BIAS)
                    if not is_same(answer, whole):
                        failures.append(f"{layout} {extra}: {sampling}: the device drew {answer.candidates}, the host "
                                        f"{whole.candidates}")
                    if EMULATED and n_whole < N_TOKENS * ROW_BYTES:
                        failures.append(f"{layout} {extra}: {sampling}: the host had {n_whole} bytes, no whole rows")
            together = at_once([lambda s=s, p=p: asker.ask(p, s)[0].bits()
                                for s in ON_DEVICE + WITH_BEST + ON_HOST + SEVERAL for p in PROMPTS])
            if together != bits:
                failures.append(f"{layout} {extra}: not the bits of the requests alone")
            asker.client.close()
    del os.environ["INTERNVLD_EMULATION_MEMORY"]
    print(f"  {layout} {' '.join(extra)}: {len(bits)} requests, alone, {'with whole rows, ' if on_host else ''}together",
          flush=True)
    return failures, bits


def main():
    cases = [(LAYOUTS[0], ("--enforce-eager",)), *((x, ()) for x in LAYOUTS)]
    results = [check(*case, on_host=i == 0) for i, case in enumerate(cases)]
    failures = [x for fails, _ in results for x in fails]
    failures += [f"{case}: not the bits of {cases[0]}" for case, (_, bits) in zip(cases, results, strict=True)
                 if bits != results[0][1]]
    for failure in failures:
        print("FAILED", failure)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
