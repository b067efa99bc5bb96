/*
 * The block of a step's inputs (step_inputs.h).
 */
#include "daemon/model/step_inputs.h"

#include "daemon/model/carve.h"

size_t step_inputs_lay_out(struct step_inputs *in, void *base, const struct step_size *size)
{
    struct carve c = {.base = base};
    int64_t n = size->n_tokens, n_sequences = size->n_sequences;
    in->ids = carve(&c, n, sizeof(*in->ids));
    in->cos = carve(&c, n * size->half, sizeof(*in->cos));
    in->sin = carve(&c, n * size->half, sizeof(*in->sin));
    in->feature_tokens = carve(&c, n, sizeof(*in->feature_tokens));
    in->feature_from = carve(&c, n, sizeof(*in->feature_from));
    in->needed = carve(&c, n, sizeof(*in->needed));
    in->temperature = carve(&c, n, sizeof(*in->temperature));
    in->query_start = carve(&c, n_sequences + 1, sizeof(*in->query_start));
    in->context_len = carve(&c, n_sequences, sizeof(*in->context_len));
    in->page_start = carve(&c, n_sequences + 1, sizeof(*in->page_start));
    in->pages = carve(&c, size->n_pages, sizeof(*in->pages));
    in->draws = carve(&c, size->n_samples, sizeof(*in->draws));
    return c.used_bytes;
}
