/*
 * What workers send back: results of a step, features of tiles, and a rank's introduction.
 *
 * Owns the order of their arrays on the wire. Captured tensors are a table of names and sizes and
 * then their data, one section each. Must not know models.
 */
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"
#include "parallel/batch.h"
#include "parallel/batch_wire.h"

#define N_CAPTURED_MAX 65536

/* struct captured without its pointer */
struct captured_head {
    char name[CAPTURE_NAME_MAX];
    int32_t owner, first_row, n_rows, n_cols;
};

static struct section data_section(struct captured *c)
{
    return (struct section){&c->data, (int64_t)c->n_rows * c->n_cols, sizeof(float)};
}

static const char *wrong_captured(const struct captured *c)
{
    if (!memchr(c->name, '\0', sizeof(c->name)))
        return "a captured tensor's name does not end";
    if (c->owner < 0 || c->first_row < 0 || c->n_rows < 0 || c->n_cols < 0)
        return "a captured tensor's owner or size is negative";
    return NULL;
}

/* Packs `fixed` sections, the table of n captured tensors, and their data. */
static struct message *pack_with_captured(enum control_type type, const void *head, size_t n_head,
                                          const struct section *fixed, int n_fixed,
                                          const struct captured *captured, int32_t n)
{
    if (n < 0 || n > N_CAPTURED_MAX)
        BUG("%d captured tensors", n);
    struct captured_head *table = xcalloc((size_t)n, sizeof(*table));
    struct captured *copies = xcalloc((size_t)n, sizeof(*copies));
    struct section *s = xcalloc((size_t)(n_fixed + 1 + n), sizeof(*s));
    for (int i = 0; i < n_fixed; i++)
        s[i] = fixed[i];
    s[n_fixed] = (struct section){&table, n, sizeof(*table)};
    for (int32_t i = 0; i < n; i++) {
        const char *wrong = wrong_captured(&captured[i]);
        if (wrong)
            BUG("%s", wrong);
        copies[i] = captured[i];
        memcpy(table[i].name, copies[i].name, sizeof(table[i].name));
        table[i].owner = copies[i].owner;
        table[i].first_row = copies[i].first_row;
        table[i].n_rows = copies[i].n_rows;
        table[i].n_cols = copies[i].n_cols;
        s[n_fixed + 1 + i] = data_section(&copies[i]);
    }
    struct message *m = sections_pack(type, head, n_head, s, n_fixed + 1 + n);
    free(s);
    free(copies);
    free(table);
    return m;
}

/* The reverse; the caller frees the returned table (NULL for none), whose data is in the message.
 */
static struct captured *unpack_with_captured(const struct message *m, size_t n_head,
                                             const struct section *fixed, int n_fixed, int32_t n)
{
    if (n < 0 || n > N_CAPTURED_MAX)
        message_garbled(m, "an absurd number of captured tensors");
    const struct captured_head *table = NULL;
    struct captured *captured = n ? xcalloc((size_t)n, sizeof(*captured)) : NULL;
    struct section *s = xcalloc((size_t)(n_fixed + 1 + n), sizeof(*s));
    for (int i = 0; i < n_fixed; i++)
        s[i] = fixed[i];
    s[n_fixed] = (struct section){&table, n, sizeof(*table)};
    sections_unpack_front(m, n_head, s, n_fixed + 1);
    for (int32_t i = 0; i < n; i++) {
        struct captured *c = &captured[i];
        memcpy(c->name, table[i].name, sizeof(c->name));
        c->owner = table[i].owner;
        c->first_row = table[i].first_row;
        c->n_rows = table[i].n_rows;
        c->n_cols = table[i].n_cols;
        const char *wrong = wrong_captured(c);
        if (wrong)
            message_garbled(m, wrong);
        s[n_fixed + 1 + i] = data_section(c);
    }
    sections_unpack(m, n_head, s, n_fixed + 1 + n);
    free(s);
    return captured;
}

/* ---- the result of a step ---- */

struct step_result_head {
    uint64_t step_id, compute_ns, wait_ns;
    int32_t stage, n_samples, n_targets, n_captured;
};

static int step_result_sections(struct step_result *r, struct section s[2])
{
    s[0] = (struct section){&r->samples, r->n_samples, sizeof(struct sample_result)};
    s[1] = (struct section){&r->targets, r->n_targets, sizeof(struct token_logprob)};
    return 2;
}

struct message *step_result_pack(const struct step_result *r)
{
    struct step_result view = *r;
    struct section s[2];
    const struct step_result_head h = {
        .step_id = r->step_id,
        .compute_ns = r->compute_ns,
        .wait_ns = r->wait_ns,
        .stage = r->stage,
        .n_samples = r->n_samples,
        .n_targets = r->n_targets,
        .n_captured = r->n_captured,
    };
    int n = step_result_sections(&view, s);
    return pack_with_captured(CONTROL_RESULT, &h, sizeof(h), s, n, r->captured, r->n_captured);
}

void step_result_unpack(struct step_result *r, const struct message *m)
{
    struct step_result_head h;
    struct section s[2];
    sections_unpack_head(m, CONTROL_RESULT, &h, sizeof(h));
    *r = (struct step_result){
        .step_id = h.step_id,
        .compute_ns = h.compute_ns,
        .wait_ns = h.wait_ns,
        .stage = h.stage,
        .n_samples = h.n_samples,
        .n_targets = h.n_targets,
        .n_captured = h.n_captured,
    };
    int n = step_result_sections(r, s);
    r->captured = unpack_with_captured(m, sizeof(h), s, n, h.n_captured);
    if (r->stage < 0)
        message_garbled(m, "a negative stage");
    for (int32_t i = 0; i < r->n_samples; i++)
        if (r->samples[i].sequence < 0 || r->samples[i].token.id < 0 || r->samples[i].n_top < 0 ||
            r->samples[i].n_top > TOP_LOGPROBS_MAX)
            message_garbled(m, "a sample's sequence, token or n_top out of range");
}

void step_result_release(struct step_result *r)
{
    free((void *)r->captured);
    *r = (struct step_result){0};
}

/* ---- features ---- */

struct feature_result_head {
    uint64_t job_id, compute_ns;
    int32_t n_tiles, n_tokens_per_tile, dim, n_captured;
};

/* -1: a count is negative or the product passes an int64. */
static int64_t n_feature_values(const struct feature_result *r)
{
    int64_t n = (int64_t)r->n_tiles * r->n_tokens_per_tile;
    if (r->n_tiles < 0 || r->n_tokens_per_tile < 0 || r->dim < 0 ||
        __builtin_mul_overflow(n, (int64_t)r->dim, &n))
        return -1;
    return n;
}

static int feature_sections(struct feature_result *r, struct section s[2])
{
    s[0] = (struct section){&r->features, n_feature_values(r), sizeof(float)};
    s[1] = (struct section){&r->not_finite, r->n_tiles, sizeof(uint8_t)};
    return 2;
}

struct message *feature_result_pack(const struct feature_result *r)
{
    struct feature_result view = *r;
    const struct feature_result_head h = {
        .job_id = r->job_id,
        .compute_ns = r->compute_ns,
        .n_tiles = r->n_tiles,
        .n_tokens_per_tile = r->n_tokens_per_tile,
        .dim = r->dim,
        .n_captured = r->n_captured,
    };
    struct section s[2];
    int n = feature_sections(&view, s);
    return pack_with_captured(CONTROL_FEATURES, &h, sizeof(h), s, n, r->captured, r->n_captured);
}

void feature_result_unpack(struct feature_result *r, const struct message *m)
{
    struct feature_result_head h;
    sections_unpack_head(m, CONTROL_FEATURES, &h, sizeof(h));
    *r = (struct feature_result){
        .job_id = h.job_id,
        .n_tiles = h.n_tiles,
        .n_tokens_per_tile = h.n_tokens_per_tile,
        .dim = h.dim,
        .n_captured = h.n_captured,
        .compute_ns = h.compute_ns,
    };
    struct section s[2];
    int n = feature_sections(r, s);
    r->captured = unpack_with_captured(m, sizeof(h), s, n, h.n_captured);
}

void feature_result_release(struct feature_result *r)
{
    free((void *)r->captured);
    *r = (struct feature_result){0};
}

/* ---- a rank's introduction ---- */

struct message *rank_info_pack(const struct rank_info *r)
{
    return sections_pack(CONTROL_READY, r, sizeof(*r), NULL, 0);
}

void rank_info_unpack(struct rank_info *r, const struct message *m)
{
    sections_unpack_head(m, CONTROL_READY, r, sizeof(*r));
    sections_unpack(m, sizeof(*r), NULL, 0);
    if (!memchr(r->host, '\0', sizeof(r->host)) || !memchr(r->device, '\0', sizeof(r->device)))
        message_garbled(m, "a name does not end");
}
