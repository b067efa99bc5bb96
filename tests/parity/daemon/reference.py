"""Reference checkpoints, served in float32, held against the recorded tensors and texts.

    reference.py CHECKPOINT [LAYOUT]...        a layout is T x P x V: 2x1x1; default: all of LAYOUTS
    reference.py PATTERN*  [LAYOUT]...         every checkpoint of that name; default: FEW_LAYOUTS

Forward gives the tensors, Generate the greedy continuations. Tolerances are those of the reference's README. Between
layouts not a bit may differ. The largest error of every tensor is printed.
"""

import fnmatch
import hashlib
import json
import os
import pathlib
import sys

import numpy

import daemon
from made_files import read_tensors
from support import Client, Picture, Video, at_once, part, pb

SKIPPED = 77
LAYOUTS = ["1x1x1", "2x1x1", "4x1x1", "1x2x1", "2x2x1", "4x2x1", "1x1x2", "2x2x2"]
SANITIZED_LAYOUTS = ["1x1x1", "2x2x2"]
FEW_LAYOUTS = ["1x1x1"]
CHUNKED = ("--max-num-batched-tokens", 32, "--max-num-seqs", 16)  # with P > 1: prompts are cut into parts
MAX_MODEL_LEN = 512  # past the original length of t-rope-dynamic-short, whose frequencies then grow
HIDDEN_ABS, HIDDEN_REL, LOGITS_ABS, LOSS_ABS, MARGIN = 1e-4, 1e-5, 5e-4, 1e-4, 2e-3


def checkpoints_of(folder, pattern):
    return sorted(x.name for x in (folder / "checkpoints").iterdir() if x.is_dir() and fnmatch.fnmatch(x.name, pattern))


def reference_folder(pattern):
    beside = daemon.ROOT.parent / "shared/reference"
    named = os.environ.get("INTERNVLD_REFERENCE")
    for folder in ([pathlib.Path(named)] if named else []) + [daemon.ROOT / "tests/data/reference", beside]:
        if (folder / "checkpoints").is_dir() and checkpoints_of(folder, pattern):
            return folder
    return None


def read_safetensors(path):
    """{name: array} of all but the tensors of bfloat16, which tests/parity/model and bfloat16.py take."""
    return {name: x for name, (kind, x) in read_tensors(path).items() if kind != "BF16"}


class Report:
    """Worst error of every tensor, and what went wrong."""

    def __init__(self):
        self.worst, self.bits, self.failures, self.skipped = {}, {}, [], {}
        self.n_checks = self.n_generations = 0

    def compare(self, layout, name, got, expected, kind):
        self.n_checks += 1
        if got is None:
            self.failures.append(f"{layout}: {name}: missing")
            return
        if got.size != expected.size:
            self.failures.append(f"{layout}: {name}: shape {got.shape}, expected {expected.shape}")
            return
        error = float(numpy.abs(got.reshape(expected.shape).astype(numpy.float64) - expected).max())
        scale = float(numpy.abs(expected).max())
        limit = LOGITS_ABS if kind == "logits" else HIDDEN_ABS
        good = error <= limit and (kind == "logits" or error <= HIDDEN_REL * scale)
        if error > self.worst.get(name, (-1.0,))[0]:
            self.worst[name] = (error, scale, layout)
        if self.bits.setdefault(name, (layout, got.tobytes()))[1] != got.tobytes():
            self.failures.append(f"{layout}: {name}: not the bits of layout {self.bits[name][0]}")
        if not good or not numpy.isfinite(got).all():
            self.failures.append(f"{layout}: {name}: largest error {error:.3g} (largest value {scale:.3g})")

    def generation(self, layout, name, got, record, end_ids):
        """Equal ids, unless the first difference is at a step that the reference itself decided by a hair."""
        self.n_generations += 1
        expected = list(record["ids"])
        got, expected = cut_at_end(got, end_ids), cut_at_end(expected, end_ids)
        if got == expected:
            return
        step = next((i for i, (a, b) in enumerate(zip(got, expected)) if a != b), min(len(got), len(expected)))
        margin = record["margins"][step] if step < len(record["margins"]) else float("inf")
        if margin < MARGIN:
            print(f"  {layout}: {name}: differs at step {step}, where the margin is {margin:.2g}")
            return
        self.failures.append(f"{layout}: {name}: differs at step {step} (margin {margin:.3g}): {got} instead of "
                             f"{expected}")

    def skip(self, what):
        self.skipped[what] = self.skipped.get(what, 0) + 1

    def print_worst(self, name):
        """One line: the largest error of hidden values and of logits."""
        logits = [x[0] for n, x in self.worst.items() if n.startswith(("logits", "loss", "token_nll"))]
        hidden = [x[0] for n, x in self.worst.items() if not n.startswith(("logits", "loss", "token_nll"))]
        print(f"  {name:24} {self.n_checks:3} tensors  hidden {max(hidden):.1e}  logits {max(logits):.1e}  "
              f"{self.n_generations} generations, {len(self.failures)} failures", flush=True)
        for what in self.skipped:
            print(f"    skipped: {what}")
        for failure in self.failures:
            print(f"FAILED {failure}")

    def print(self):
        for name, (error, scale, layout) in sorted(self.worst.items()):
            print(f"  {name:32} largest error {error:9.3g}   largest value {scale:9.3g}   first at {layout}")
        for what, n in sorted(self.skipped.items()):
            print(f"  skipped: {what} ({n} times)")
        print(f"  {self.n_checks} tensors and values, {self.n_generations} generations, {len(self.failures)} failures")
        for failure in self.failures:
            print(f"FAILED {failure}")


def cut_at_end(ids, end_ids):
    """Without the end token and what follows: the reference pads finished rows."""
    for i, x in enumerate(ids):
        if x in end_ids:
            return list(ids[:i])
    return list(ids)


def tensor(x):
    x = numpy.ascontiguousarray(x, "<f4")
    return pb.Tensor(shape=x.shape, dtype="float32", data=x.tobytes())


def token_prompt(ids, pixels=None):
    prompt = pb.TokenPrompt(token_ids=[int(x) for x in ids])
    if pixels is not None:
        prompt.pixel_values.CopyFrom(tensor(pixels))
    return pb.Prompt(tokens=prompt)


def check_vision(client, layout, goldens, report, config):
    """Hidden states of the tower and the projector's steps, for the three recorded tiles."""
    vision, projector = goldens["vision"], goldens["projector"]
    pixels = vision["pixel_values"]
    image, per_tile = config["image_token_id"], config["image_seq_length"]
    ids = [0] + [image] * (len(pixels) * per_tile) + [0]
    tensors, _ = client.forward(token_prompt(ids, pixels), ["vision.hidden_states", "vision.layer0", "projector",
                                                            "image_features", "vision.attentions"])
    for name, expected in vision.items():
        ours = "vision." + name
        if name.startswith(("hidden_states.", "layer0.")) or name in ("last_hidden_state", "embed.patches"):
            report.compare(layout, ours, tensors.get(ours), expected, "hidden")
        elif name.startswith("attentions."):  # recorded for the first tile alone
            got = tensors.get(ours)
            report.compare(layout, ours, None if got is None else got.reshape(-1)[:expected.size], expected, "hidden")
    for name, expected in projector.items():
        ours = name if name == "image_features" else f"projector.{name}"
        report.compare(layout, ours, tensors.get(ours), expected, "hidden")


def check_other_inputs(client, layout, goldens, report, config):
    """Tiles of other sizes (interp.*), masked patches (masked.*) and the poolings (derived.*) of the tower."""
    vision = goldens["vision"]
    image, settings = config["image_token_id"], config["vision_config"]
    per_tile, pixels = config["image_seq_length"], vision["pixel_values"]
    prompt = token_prompt([0] + [image] * (len(pixels) * per_tile) + [0], pixels)
    pooling = "derived.mean_of_patches" if settings.get("use_mean_pooling", True) else "derived.cls"
    if pooling in vision:
        tensors, _ = client.forward(prompt, ["vision.pooler_output", "vision.last_hidden_state"])
        report.compare(layout, "vision.pooler_output", tensors.get("vision.pooler_output"), vision[pooling], "hidden")
        report.compare(layout, "vision.last_hidden_state", tensors.get("vision.last_hidden_state"),
                       vision["last_hidden_state"], "hidden")
    if "bool_masked_pos" in vision:
        mask = vision["bool_masked_pos"].astype("u1").tobytes()
        tensors, _ = client.forward(prompt, ["vision.hidden_states"], bool_masked_pos=mask)
        for name, ours in (("embeddings", "vision.hidden_states.0"), ("last_hidden_state", "vision.last_hidden_state")):
            if f"masked.{name}" in vision:
                report.compare(layout, f"vision.masked.{name}", tensors.get(ours), vision[f"masked.{name}"], "hidden")
    for size in sorted({name.rsplit(".", 1)[0] for name in vision if name.startswith("interp.")}):
        other = vision[f"{size}.pixel_values"]
        ids = [0] + [image] * (len(other) * features_of(config, other.shape[2:])) + [0]
        tensors, _ = client.forward(token_prompt(ids, other), ["vision.hidden_states"])
        for name, ours in (("embeddings", "vision.hidden_states.0"), ("last_hidden_state", "vision.last_hidden_state")):
            if f"{size}.{name}" in vision:
                report.compare(layout, f"vision.{size}.{name}", tensors.get(ours), vision[f"{size}.{name}"], "hidden")


def features_of(config, size):
    """Tokens that a tile of another size becomes: 0 where its patches cannot be merged."""
    patch = config["vision_config"]["patch_size"]
    patch = patch if isinstance(patch, list) else [patch, patch]
    n = (size[0] // patch[0]) * (size[1] // patch[1]) + (config["vision_feature_select_strategy"] == "full")
    side, merged = int(n ** 0.5), round(1 / config["downsample_ratio"])
    return (side // merged) ** 2 if side * side == n and side % merged == 0 else 0


def check_prompt_logprobs(client, layout, prompt, ids, logits, report):
    """log_softmax of the golden logits: of the prompt's next token, and of the best five by their ids."""
    rows = logits.reshape(-1, logits.shape[-1]).astype(numpy.float64)
    rows = rows - rows.max(1, keepdims=True)
    rows = (rows - numpy.log(numpy.exp(rows).sum(1, keepdims=True)))[:-1]
    next_ids = ids[len(ids) - len(rows):]
    got = client.generate(prompt, prompt_logprobs=5, max_tokens=1).prompt_logprobs[-len(rows):]
    own = [p.chosen.logprob if p.chosen.token_id == i else numpy.nan for p, i in zip(got, next_ids)]
    report.compare(layout, "prompt_logprobs", numpy.array(own), rows[numpy.arange(len(rows)), next_ids], "logits")
    best = numpy.array([[x.logprob for x in p.top] for p in got])
    named = numpy.array([row[[x.token_id for x in p.top]] for p, row in zip(got, rows)])
    report.compare(layout, "prompt_logprobs.top", best, named, "logits")
    report.compare(layout, "prompt_logprobs.order", best, -numpy.sort(-rows, 1)[:, :5], "logits")


def check_language(client, layout, goldens, report, config):
    """Embeddings after the scatter, hidden states, cache, logits, logits_to_keep, the loss."""
    lm, scalars, pixels = goldens["lm"], goldens["scalars"], goldens["vision"]["pixel_values"]
    ids = lm["input_ids"].reshape(-1)
    n_tiles = int((ids == config["image_token_id"]).sum()) // config["image_seq_length"]
    prompt = token_prompt(ids, pixels[:n_tiles])
    tensors, done = client.forward(prompt, ["hidden_states", "inputs_embeds", "past_key_values", "logits",
                                            "last_hidden_state", "attentions"], labels=[int(x) for x in lm["labels"].reshape(-1)])
    report.compare(layout, "inputs_embeds", tensors.get("inputs_embeds"), lm["inputs_embeds"], "hidden")
    n_hidden = 0
    for name, expected in lm.items():
        if name.startswith("hidden_states."):
            report.compare(layout, name, tensors.get(name), expected, "hidden")
            n_hidden = max(n_hidden, int(name.split(".")[1]))
        elif name.startswith("cache."):  # [batch, kv heads, seq, head dim]: a row of ours is one position
            rows = numpy.ascontiguousarray(expected[0].transpose(1, 0, 2)).reshape(expected.shape[2], -1)
            got = tensors.get(name)  # a sliding window keeps the last rows alone
            report.compare(layout, name, None if got is None else got[-len(rows):], rows, "hidden")
    if n_hidden:
        report.compare(layout, "last_hidden_state", tensors.get("last_hidden_state"), lm[f"hidden_states.{n_hidden}"],
                       "hidden")
    for name in (x for x in lm if x.startswith("attentions.")):
        report.compare(layout, name, tensors.get(name), lm[name], "hidden")
    logits = tensors.get("logits")
    if "logits" in lm:
        report.compare(layout, "logits", logits, lm["logits"], "logits")
    else:
        n_tail = lm["logits_tail"].shape[1]
        report.compare(layout, "logits_tail", None if logits is None else logits[-n_tail:], lm["logits_tail"], "logits")
    check_prompt_logprobs(client, layout, prompt, ids, lm["logits"] if "logits" in lm else lm["logits_tail"], report)
    loss = done.loss if done.HasField("loss") else None
    report.compare(layout, "loss", None if loss is None else numpy.array([loss]), numpy.array([scalars["loss"]]),
                   "logits")
    nll = lm["token_nll"].reshape(-1)
    got = -numpy.array(done.token_logprobs, numpy.float64)
    if len(got) == len(nll) + 1:
        got = got[:len(nll)]
    report.compare(layout, "token_nll", got, nll, "logits")
    _, done = client.forward(prompt, [], labels=[int(x) for x in ids])
    report.compare(layout, "loss_all_labels", numpy.array([done.loss]), numpy.array([scalars["loss_all_labels"]]),
                   "logits")
    embeds = pb.Prompt(tokens=pb.TokenPrompt(inputs_embeds=tensor(lm["inputs_embeds"][0])))
    given, done = client.forward(embeds, ["logits", "inputs_embeds"], labels=[int(x) for x in lm["labels"].reshape(-1)])
    report.compare(layout, "inputs_embeds given back", given.get("inputs_embeds"), lm["inputs_embeds"][0], "hidden")
    tail = lm["logits"] if "logits" in lm else lm["logits_tail"]
    report.compare(layout, "logits of inputs_embeds", given.get("logits")[-tail.shape[1]:], tail, "logits")
    report.compare(layout, "loss of inputs_embeds", numpy.array([done.loss]), numpy.array([scalars["loss"]]), "logits")
    again = pb.Prompt(tokens=pb.TokenPrompt(inputs_embeds=tensor(tensors["inputs_embeds"])))
    given, done = client.forward(again, ["logits"])  # its own embeddings given back: its own bits
    ids_of = [client.generate(p, temperature=0, max_tokens=8, repetition_penalty=1.0).ids for p in (prompt, again)]
    if given["logits"].tobytes() != tensors["logits"].tobytes() or ids_of[0] != ids_of[1] or done.token_ids:
        report.failures.append(f"{layout}: inputs_embeds: not the answer of the ids that they come from")
    for keep, fields in (("1", dict(logits_to_keep=1)), ("3", dict(logits_to_keep=3)),
                         ("index", dict(logits_positions=[0, 5, len(ids) - 1]))):
        if f"logits_to_keep.{keep}" not in lm:
            continue
        tensors, _ = client.forward(prompt, ["logits"], **fields)
        report.compare(layout, f"logits_to_keep.{keep}", tensors.get("logits"), lm[f"logits_to_keep.{keep}"], "logits")


def depends_on_batch(config, record, row):
    """Dynamic rope past the original length takes the length of the batch's longest row in Transformers; ours is the
    row's own, so that an answer does not depend on its neighbours."""
    text = config["text_config"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    longest = max(sum(x) for x in record["attention_mask"])
    return (rope.get("rope_type", rope.get("type")) == "dynamic" and sum(record["attention_mask"][row]) < longest and
            longest + len(record["fp32"][row]["ids"]) > text["max_position_embeddings"])


def rows_alone(model):
    """{record name: rows}, each generated without the others (make_rows.py); none for other weights than those."""
    path = daemon.ROOT / "tests/data/reference/goldens" / model.name / "rows.json"
    rows, weights = json.loads(path.read_text()) if path.is_file() else {}, model / "model.safetensors"
    known = rows and weights.is_file() and rows["model_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    return rows if known else {}


def generations(goldens, scenarios, folder, config, report, alone):
    """(name, prompt, record) of every recorded greedy generation."""
    pixels = goldens["vision"]["pixel_values"]
    for name, record in goldens["generate"].items():
        if name == "batch_stop" or not isinstance(record, dict) or "input_ids" not in record:
            continue
        first_tile = 0
        for row, ids in enumerate(record["input_ids"]):
            ids = [x for x, keep in zip(ids, record["attention_mask"][row]) if keep]
            n_tiles = ids.count(config["image_token_id"]) // config["image_seq_length"]
            own = pixels[first_tile:first_tile + n_tiles] if n_tiles else None
            first_tile += n_tiles
            expected = record["fp32"][row]
            if depends_on_batch(config, record, row):
                if name not in alone:
                    report.skip(f"{name}[{row}]: dynamic rope past the original length sees the batch's longest row")
                    continue
                expected = alone[name][row]
            if own is not None and len(own) < n_tiles:
                raise AssertionError(f"{name}: more tiles than recorded")
            yield f"generate.{name}[{row}]", token_prompt(ids, own), expected
    for scenario in scenarios:
        for row, messages in enumerate(scenario["conversations"]):
            prompt = pb.ChatPrompt(messages=[message(m, folder, scenario["processor_kwargs"]) for m in messages])
            yield f"{scenario['name']}[{row}]", pb.Prompt(chat=prompt), scenario["fp32"][row]


def message(m, folder, settings):
    """A chat message with its media; `settings` are the processor's keyword arguments."""
    tiling = {k: v for k, v in settings.items() if k in ("crop_to_patches", "min_patches", "max_patches",
                                                         "use_thumbnail")}
    video = {k: v for k, v in settings.items() if k in ("num_frames", "fps", "do_sample_frames")}
    if "do_sample_frames" in video:
        video["sample_frames"] = video.pop("do_sample_frames")
    if "initial_shift" in settings:  # True and False are the reference's words for half a step and none
        shift = settings["initial_shift"]
        if shift is False:
            video["initial_shift"] = 0.0
        elif shift is not True:
            video["initial_shift"] = float(shift)
    parts = []
    content = m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"]}]
    for x in content:
        if x["type"] == "text":
            parts.append(part(x["text"]))
            continue
        data = (folder / "scenarios" / x["path"]).read_bytes()
        if x["type"] == "image":
            parts.append(part(Picture(data), tiling=pb.TilingOptions(**tiling) if tiling else None))
        else:
            parts.append(part(Video(data), video=video))
    return pb.Message(role=m["role"], parts=parts)


def check_generations(client, layout, cases, report, end_ids):
    """All of them at once: the batch changes with every step, the answers must not."""
    def run(case):
        name, prompt, record = case
        return name, client.generate(prompt, temperature=0, max_tokens=len(record["ids"])).ids, record

    for start in range(0, len(cases), 16):
        for name, ids, record in at_once([lambda c=c: run(c) for c in cases[start:start + 16]]):
            report.generation(layout, name, ids, record, end_ids)


def check_checkpoint(folder, name, layouts):
    """One checkpoint at every layout that its heads and layers take; its report."""
    listed = folder / "checkpoints/index.json"
    index = json.loads(listed.read_text()) if listed.is_file() else {}
    golden_name = index.get(name, {"goldens": name})["goldens"]
    model, at = folder / "checkpoints" / name, folder / "goldens" / golden_name
    config = json.loads((folder / "checkpoints" / golden_name / "config.json").read_text())
    generation = json.loads((folder / "checkpoints" / golden_name / "generation_config.json").read_text())
    end = generation["eos_token_id"]
    end_ids = set(end if isinstance(end, list) else [end])
    goldens = {x: read_safetensors(at / f"{x}.safetensors") for x in ("vision", "projector", "lm")}
    goldens |= {x: json.loads((at / f"{x}.json").read_text()) for x in ("scalars", "generate")}
    recorded = folder / "scenarios" / f"{name}.json"
    scenarios = json.loads(recorded.read_text()) if recorded.is_file() else []
    report = Report()
    cases = list(generations(goldens, scenarios, folder, config, report, rows_alone(model)))
    for text in layouts:
        ranks = daemon.layout_of(text)
        refusal = daemon.refusal(model, **ranks)
        if refusal:
            report.skip(f"{text}: {refusal}")
            continue
        with daemon.Daemon(model=model, dtype="float32", **ranks,
                           extra=("--max-model-len", MAX_MODEL_LEN) + (CHUNKED if ranks["pipeline"] > 1 else ())) as d:
            client = Client(d.address)
            check_vision(client, text, goldens, report, config)
            check_other_inputs(client, text, goldens, report, config)
            check_language(client, text, goldens, report, config)
            check_generations(client, text, cases, report, end_ids)
            client.close()
        print(f"  {name} at T x P x V = {text}: done, {len(report.failures)} failures so far", flush=True)
    return report


def main():
    pattern, layouts = sys.argv[1], sys.argv[2:]
    folder = reference_folder(pattern)
    if folder is None:
        print("skipped: no reference data (INTERNVLD_REFERENCE, tests/data/reference, ../shared/reference)")
        sys.exit(SKIPPED)
    sanitized = SANITIZED_LAYOUTS if os.environ.get("INTERNVLD_SANITIZED") else LAYOUTS
    layouts = layouts or (FEW_LAYOUTS if "*" in pattern else sanitized)
    n_failures = 0
    for name in checkpoints_of(folder, pattern):
        report = check_checkpoint(folder, name, layouts)
        if "*" in pattern:
            report.print_worst(name)
        else:
            report.print()
        n_failures += len(report.failures)
    sys.exit(1 if n_failures else 0)


if __name__ == "__main__":
    main()
