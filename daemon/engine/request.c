/* Birth and end of a request; everything in between only reads it. See request.h. */
#include "daemon/engine/request.h"

#include <stdlib.h>

#include "daemon/engine/stream.h"
#include "kernels/log.h"

struct request *request_new(size_t arena_budget_bytes)
{
    struct request *r = xcalloc(1, sizeof(*r));
    arena_init(&r->arena, arena_budget_bytes);
    r->n = r->n_beams = 1;
    r->n_features_per_tile = -1;
    r->length_penalty = 1;
    r->image_token_id = -1;
    r->skip_special_tokens = 1;
    r->sampling = (struct sampling){
        .temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f, .n_logprobs = -1};
    return r;
}

int request_out_of_memory(struct error *err)
{
    return error_set(err, ERROR_RESOURCE_EXHAUSTED, "the request needs more memory than the limit");
}

void request_free(struct request *r)
{
    if (!r)
        return;
    if (r->stream) {
        stream_detach(r->stream);
        stream_unref(r->stream);
    }
    arena_release(&r->arena);
    free(r);
}
