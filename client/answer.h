/*
 * Everything that one Generate call says, gathered: what --json prints, what chat remembers, what
 * evaluate scores.
 */
#ifndef INTERNVL_CLIENT_ANSWER_H
#define INTERNVL_CLIENT_ANSWER_H

#include "client/internvl_client.h"
#include "client/json_out.h"

struct answer_logprob {
    uint32_t token_id, rank;
    float logprob;
    uint8_t *token; // [n_token_bytes]
    size_t n_token_bytes;
    struct answer_logprob *top; // [n_top]
    size_t n_top;
};
struct answer_candidate {
    char *text; // NUL-terminated, never NULL once the candidate was seen
    size_t n_text, text_capacity;
    uint32_t *ids;
    size_t n_ids;
    struct answer_logprob *logprobs; // [n_logprobs]
    size_t n_logprobs;
    enum internvl_finish_reason finish;
    char *stop_string; // or NULL
    int64_t stop_token_id;
    float score; // of a sequence of beam search, where has_score
    int has_score;
};
struct answer { // {0} is empty
    char *request_id;
    uint64_t seed;
    uint32_t prompt_tokens, image_tokens;
    struct internvl_media_plan *media; // [n_media]
    size_t n_media;
    struct answer_logprob *prompt_logprobs; // [n_prompt_logprobs] from the second token on
    size_t n_prompt_logprobs;
    struct answer_candidate *candidates; // [n_candidates]
    size_t n_candidates;
    struct internvl_usage usage;
    struct internvl_timing timing;
};

/* Adds one event. A candidate index over 1024 is ignored (no server of ours sends it). */
void answer_add(struct answer *a, const struct internvl_event *e);
/* The first candidate's text, "" when there is none. Borrowed. */
const char *answer_text(const struct answer *a);
void answer_write_json(const struct answer *a, struct json_out *j);
/* Tables for people: the prompt's, if asked for, then the candidates'. */
void answer_write_logprobs(const struct answer *a, FILE *f);
void answer_release(struct answer *a);

#endif
