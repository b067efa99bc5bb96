/*
 * Generate: the request is read and prepared on a processor thread, then the engine has it.
 */
#include "daemon/gateway/gateway_state.h"
#include "daemon/gateway/reply.h"

static int generate_read(struct gateway *g, const Internvl__V1__GenerateRequest *wire,
                         struct arena *scratch, struct request *r, struct media_plan **media,
                         int *n_media, struct error *err)
{
    if (convert_request_id(wire->request_id, r->id, err) ||
        prompt_prepare(g, wire->prompt, scratch, r, media, n_media, err) ||
        convert_sampling(&g->convert, wire->sampling, r, err))
        return -1;
    r->priority = wire->priority;
    return convert_cache_salt(wire->cache_salt, r, err);
}

static void generate_prepare(void *arg)
{
    struct reply *reply = arg;
    struct gateway *g = reply_gateway(reply);
    struct arena scratch = {0}; // the message, until the request is made
    struct error err = {0};
    struct request *r = NULL;
    struct media_plan *media;
    int n_media;
    const Internvl__V1__GenerateRequest *wire;

    if (rpc_check_waiting(reply_call(reply), &err)) // nobody waits: do not decode its pictures
        goto refuse;
    wire = (Internvl__V1__GenerateRequest *)rpc_take_message(
        reply_call(reply), &internvl__v1__generate_request__descriptor,
        convert_max_elements(&g->convert), &scratch, &err);
    if (!wire)
        goto refuse;
    r = request_new(convert_request_budget(&g->convert));
    if (generate_read(g, wire, &scratch, r, &media, &n_media, &err))
        goto refuse;
    arena_release(&scratch);
    if (rpc_check_waiting(reply_call(reply), &err))
        goto refuse;
    reply_submit(reply, r, media, n_media, 0);
    return;
refuse:
    arena_release(&scratch);
    request_free(r);
    reply_refuse(reply, &err);
}

void generate_message(void *arg, struct rpc_call *c)
{
    struct gateway *g = arg;
    struct reply *reply = reply_new(g, c, REPLY_GENERATE);
    struct error err;

    if (work_queue_submit(g->work, generate_prepare, reply, rpc_message_bytes(c), &err))
        reply_refuse(reply, &err);
}
