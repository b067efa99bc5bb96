"""The demo evaluation through `internvl evaluate`, 16 in flight, at every layout.

    demo_evaluation.py [--full]        --full: all questions at all layouts

float32: every answer equals Transformers' and so does every category's accuracy. bfloat16: accuracy equal within its
noise. Layouts: all answers are the same. All questions at 1 x 1 and 2 x 1, a fixed subset at the others.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import daemon

DATA = daemon.ROOT / "tests/data/demo-eval"
SKIPPED = 77
MARGIN = 2e-3  # a hair: the reference's own answer could have gone the other way
BF16_NOISE = 0.02  # overall accuracy; a category may move by two questions
LAYOUTS = [  # tensor, pipeline, vision, dtype, all questions
    (1, 1, 1, "float32", True), (2, 1, 1, "float32", True), (4, 1, 1, "float32", False),
    (1, 2, 1, "float32", False), (2, 2, 1, "float32", False), (1, 1, 2, "float32", False),
    (1, 1, 1, "bfloat16", True), (2, 1, 1, "bfloat16", False),
]
SANITIZED_LAYOUTS = [(2, 2, 2, "float32", False)]


def evaluate(layout, questions):
    """(results by id, summary) of one run of the command."""
    tensor, pipeline, vision, dtype, _ = layout
    with tempfile.TemporaryDirectory() as folder, daemon.Daemon(tensor=tensor, pipeline=pipeline, vision=vision,
                                                                dtype=dtype) as d:
        file, out = pathlib.Path(folder) / "questions.jsonl", pathlib.Path(folder) / "results.jsonl"
        file.write_text("".join(json.dumps(q) + "\n" for q in questions))
        done = subprocess.run([daemon.program("INTERNVLD_COMMAND"), "--address", d.address, "evaluate", str(file),
                               "--concurrency", "16", "--max-tokens", "64", "--output", str(out), "--json"],
                              stdout=subprocess.PIPE, text=True, check=True)
        results = [json.loads(x) for x in out.read_text().splitlines()]
        return {r["id"]: r for r in results}, json.loads(done.stdout)


def load():
    """The questions, media paths made absolute so that a subset can lie elsewhere."""
    questions = [json.loads(x) for x in (DATA / "eval.jsonl").read_text().splitlines()]
    for q in questions:
        for m in q["messages"]:
            for x in m["content"] if isinstance(m["content"], list) else []:
                if "path" in x:
                    x["path"] = str(DATA / x["path"])
    return questions


def check_float32(name, questions, results, recorded, is_full):
    failures = []
    for q in questions:
        r = results[q["id"]]
        if r.get("reply") != q["hf_answer"] and q["hf_min_margin"] >= MARGIN:
            failures.append(f"{name}: {q['id']}: {r.get('reply')!r}, Transformers said {q['hf_answer']!r} "
                            f"(margin {q['hf_min_margin']})")
    if is_full:
        for category, accuracy in accuracies(questions, results).items():
            if abs(accuracy - recorded[category]["float32"]) > 5e-5:
                failures.append(f"{name}: {category}: accuracy {accuracy:.4f}, Transformers has "
                                f"{recorded[category]['float32']}")
    return failures


def check_bfloat16(name, questions, results, recorded, is_full):
    failures = []
    if not is_full:
        return failures
    for category, accuracy in accuracies(questions, results).items():
        noise = BF16_NOISE if category == "overall" else 2.01 / recorded[category]["questions"]
        if abs(accuracy - recorded[category]["bfloat16"]) > noise:
            failures.append(f"{name}: {category}: accuracy {accuracy:.4f}, Transformers has "
                            f"{recorded[category]['bfloat16']}")
    return failures


def accuracies(questions, results):
    by = {"overall": []}
    for q in questions:
        correct = results[q["id"]]["correct"]
        by["overall"].append(correct)
        by.setdefault(q["category"], []).append(correct)
    return {name: sum(x) / len(x) for name, x in by.items()}


def main():
    if not (DATA / "eval.jsonl").exists():
        print("skipped: tests/data/demo-eval is not there")
        sys.exit(SKIPPED)
    questions, recorded = load(), json.loads((DATA / "hf_accuracy.json").read_text())
    is_full_run = "--full" in sys.argv
    layouts = SANITIZED_LAYOUTS if os.environ.get("INTERNVLD_SANITIZED") and not is_full_run else LAYOUTS
    step = 20 if layouts is SANITIZED_LAYOUTS else 5  # every 5th: 162 questions of all categories
    failures, first = [], {}
    for layout in layouts:
        tensor, pipeline, vision, dtype, all_questions = layout
        is_full = all_questions or is_full_run
        asked = questions if is_full else questions[::step]
        name = f"T={tensor} P={pipeline} V={vision} {dtype}"
        results, summary = evaluate(layout, asked)
        check = check_float32 if dtype == "float32" else check_bfloat16
        found = check(name, asked, results, recorded, is_full)
        same = first.setdefault(dtype, results)
        for q in asked:
            if q["id"] in same and same[q["id"]]["token_ids"] != results[q["id"]]["token_ids"]:
                found.append(f"{name}: {q['id']}: {results[q['id']]['reply']!r}, another layout said "
                             f"{same[q['id']]['reply']!r}")
        equal = sum(results[q["id"]].get("reply") == q["hf_answer"] for q in asked)
        print(f"  {name}: {len(asked)} questions, accuracy {summary['overall']['accuracy']:.4f} (Transformers, all "
              f"questions: {recorded['overall'][dtype]}), {equal} answers equal Transformers', "
              f"{summary['seconds']:.1f} s, {len(found)} failures", flush=True)
        failures += found
    for failure in failures:
        print(f"FAILED {failure}")
    sys.exit(1 if failures else 0)


main()
