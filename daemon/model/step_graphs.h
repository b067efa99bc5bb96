/*
 * Which decode steps are recorded once and replayed (backend.h, struct graph): a few numbers of
 * rows, 1, 2, 4, 8, 16, 24, … 256 as in vLLM, times a few context lengths, 1024, 4096, 16384, ….
 *
 * A step of other numbers is padded to the next: rows that no sequence owns, keys that none has.
 * Neither changes a bit of the rows that there are. Owns the graphs; knows nothing of a model.
 */
#ifndef INTERNVLD_MODEL_STEP_GRAPHS_H
#define INTERNVLD_MODEL_STEP_GRAPHS_H

#include "kernels/backend.h"

#define STEP_GRAPHS_MAX_ROWS 256
#define STEP_GRAPHS_ROW_SIZES 35 // 1, 2, 4, then every eighth
#define STEP_GRAPHS_CONTEXT_SIZES 8

struct step_graphs {
    int n_row_sizes, n_context_sizes;            // 0: nothing is recorded
    int32_t rows[STEP_GRAPHS_ROW_SIZES];         // ascending
    int32_t contexts[STEP_GRAPHS_CONTEXT_SIZES]; // ascending, tokens
    struct graph *graphs[STEP_GRAPHS_ROW_SIZES][STEP_GRAPHS_CONTEXT_SIZES];
};

/* The sizes for steps of up to max_rows sequences, 256 at most, of up to max_context_len tokens;
 * no graphs yet. */
void step_graphs_init(struct step_graphs *g, int32_t max_rows, int32_t max_context_len);
/* The smallest graph that holds a step of n_rows sequences, each with one new token, of up to
 * context_len tokens; *padded_rows <- its rows. NULL: none. */
struct graph *step_graphs_find(const struct step_graphs *g, int32_t n_rows, int32_t context_len,
                               int32_t *padded_rows);
void step_graphs_release(struct step_graphs *g, struct backend *b); // accepts a zeroed struct

#endif
