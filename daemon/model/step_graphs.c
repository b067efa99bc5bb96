/*
 * The sizes of recorded decode steps (step_graphs.h).
 */
#include "daemon/model/step_graphs.h"

#define FIRST_CONTEXT 1024 // tokens; each further size is four times the last

static int32_t next_rows(int32_t n)
{
    return n < 8 ? 2 * n : n + 8;
}

void step_graphs_init(struct step_graphs *g, int32_t max_rows, int32_t max_context_len)
{
    int64_t context = FIRST_CONTEXT;
    *g = (struct step_graphs){0};
    if (max_rows > STEP_GRAPHS_MAX_ROWS)
        max_rows = STEP_GRAPHS_MAX_ROWS;
    for (int32_t n = 1; n < max_rows; n = next_rows(n))
        g->rows[g->n_row_sizes++] = n;
    g->rows[g->n_row_sizes++] = max_rows;
    for (; context < max_context_len && g->n_context_sizes < STEP_GRAPHS_CONTEXT_SIZES - 1;
         context *= 4)
        g->contexts[g->n_context_sizes++] = (int32_t)context;
    g->contexts[g->n_context_sizes++] = max_context_len;
}

/* The place of the first of sizes [n] that is at least `size`, or n. */
static int place(const int32_t *sizes, int n, int32_t size)
{
    int i = 0;
    while (i < n && sizes[i] < size)
        i++;
    return i;
}

struct graph *step_graphs_find(const struct step_graphs *g, int32_t n_rows, int32_t context_len,
                               int32_t *padded_rows)
{
    int i = place(g->rows, g->n_row_sizes, n_rows);
    int j = place(g->contexts, g->n_context_sizes, context_len);
    if (i == g->n_row_sizes || j == g->n_context_sizes)
        return NULL;
    *padded_rows = g->rows[i];
    return g->graphs[i][j];
}

void step_graphs_release(struct step_graphs *g, struct backend *b)
{
    for (int i = 0; i < g->n_row_sizes; i++)
        for (int j = 0; j < g->n_context_sizes; j++)
            op_graph_free(b, g->graphs[i][j]);
    *g = (struct step_graphs){0};
}
