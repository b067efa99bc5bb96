/*
 * A checkpoint opened in one process, and batches for it: what the parity tests run.
 */
#ifndef INTERNVLD_TESTS_PARITY_MODEL_MODEL_RUN_H
#define INTERNVLD_TESTS_PARITY_MODEL_MODEL_RUN_H

#include "daemon/model/language.h"
#include "daemon/model/vision.h"

#define RUN_MAX_TOKENS 512
#define RUN_MAX_SEQUENCES 32
#define RUN_MAX_MODEL_LEN 256
#define RUN_PAGE_SIZE 16
#define RUN_N_PAGES 512

struct model_run {
    struct model_config config;
    struct backend *backend;
    struct weights weights;
    struct vision_model vision;
    struct language_model language; // alone: one stage, one shard
};

/* *r is zeroed but for config.quantization. On `b`, which is borrowed. Dies on failure. */
void model_run_open(struct model_run *r, const char *dir, enum dtype dtype, struct backend *b);
void model_run_close(struct model_run *r);
struct language_limits model_run_limits(void);

/* One batch under construction, with memory for the largest. */
struct batch_builder {
    struct batch batch;
    int32_t token_ids[RUN_MAX_TOKENS], feature_rows[RUN_MAX_TOKENS], targets[RUN_MAX_TOKENS];
    uint8_t target_tops[RUN_MAX_TOKENS];
    float positions[RUN_MAX_TOKENS];
    uint8_t want_logits[RUN_MAX_TOKENS];
    int32_t query_start[RUN_MAX_SEQUENCES + 1], context_len[RUN_MAX_SEQUENCES],
        rope_len[RUN_MAX_SEQUENCES], page_start[RUN_MAX_SEQUENCES + 1];
    uint32_t captures[RUN_MAX_SEQUENCES];
    int32_t pages[RUN_MAX_SEQUENCES * RUN_MAX_MODEL_LEN / RUN_PAGE_SIZE];
    struct sample_row samples[RUN_MAX_SEQUENCES];
};

/* A sequence's tokens [first, first + n) of ids, whose image tokens take features in order. */
struct sequence_part {
    const int32_t *ids; // the whole sequence [first + n] at least
    int32_t first, n;
    int32_t first_page; // its pages are first_page, first_page + 1, …
    int32_t rope_len;
    int32_t image_token_id; // -1: no features
    int32_t first_feature;  // of the whole sequence in `features`
    uint32_t captures;      // with CAPTURE_LOGITS: every row
    int sample;             // greedy, with log-probabilities, from the last row
};

void batch_begin(struct batch_builder *b, const float *features, int32_t n_features, int32_t dim);
void batch_add(struct batch_builder *b, const struct sequence_part *p);

/* The first capture of that name and owner, or NULL. */
const struct captured *find_capture(const struct capture_list *l, const char *name, int32_t owner);
/* All captures of that name and owner, which must follow each other from row 0: [*n_rows, *n_cols].
 * NULL when there is none. The caller frees. */
float *join_captures(const struct capture_list *l, const char *name, int32_t owner, int32_t *n_rows,
                     int32_t *n_cols);

#endif
