/*
 * The questions of an evaluation, from JSONL or from the field's TSV.
 *
 * JSONL, a question a line: {"id", "category", "messages": [{"role", "content"}], "answer": text or
 * [text, …]}, numbers being texts, and where wanted "choices": [text, …] (named A, B, …) and
 * "score": "exact" | "choice" | "number" | "anls".
 *
 * TSV (a name that ends in .tsv), a header line and tabs, fields quoted as in CSV: index, image
 * (base64, a list of such, or the index of the row that has the same picture), question, answer (or
 * a list of such, in quotes), and where there are category, hint, image_path, A, B, C, … (MMBench,
 * MMMU and their kin).
 *
 * Owns what was read. Knows nothing of replies.
 */
#ifndef INTERNVL_CLIENT_EVAL_SET_H
#define INTERNVL_CLIENT_EVAL_SET_H

#include <cjson/cJSON.h>
#include <stddef.h>
#include <stdint.h>

#include "client/conversation.h"
#include "client/eval_score.h"

struct eval_question {
    const char *id, *category; // borrowed, like all texts here, from the set
    struct eval_expected expected;
    uint64_t key;                                     // of everything the file says about it
    cJSON *root;                                      // JSONL
    const char *image, *image_path, *question, *hint; // TSV, "" where there is none
};

struct eval_set { // {0} is empty
    struct eval_question *questions;
    size_t n_questions;
    char *text, *folder; // the file; its folder with the slash, "" for the current one
};

/* At most `limit` questions (0: all). `score` is that of questions that do not say theirs. */
int eval_set_load(struct eval_set *s, const char *path, size_t limit, enum eval_scorer score,
                  struct internvl_error *err);
/* The messages to send, media included. */
int eval_set_conversation(const struct eval_set *s, const struct eval_question *q,
                          struct conversation *c, const struct command_options *o,
                          struct internvl_error *err);
/* The question's text, for people: of the last user message. Freed by the caller. */
char *eval_question_text(const struct eval_question *q);
void eval_set_release(struct eval_set *s);

/* Base64 (white space allowed) -> bytes [*n_bytes], freed by the caller; NULL when it is none. */
uint8_t *base64_decode(const char *text, size_t n, size_t *n_bytes);

#endif
