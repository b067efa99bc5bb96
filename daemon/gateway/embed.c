/*
 * Embed: a Forward whose tensors are features, whole or pooled. The answer is Forward's.
 */
#include "daemon/gateway/gateway_state.h"
#include "daemon/gateway/reply.h"

static int embed_read(struct gateway *g, const Internvl__V1__EmbedRequest *wire,
                      struct arena *scratch, struct request *r, struct media_plan **media,
                      int *n_media, uint32_t *outputs, struct error *err)
{
    if (convert_request_id(wire->request_id, r->id, err) ||
        prompt_prepare(g, wire->prompt, scratch, r, media, n_media, err) ||
        convert_embed(&g->convert, wire, r, outputs, err))
        return -1;
    return 0;
}

static void embed_prepare(void *arg)
{
    struct reply *reply = arg;
    struct gateway *g = reply_gateway(reply);
    struct arena scratch = {0};
    struct error err = {0};
    struct request *r = NULL;
    struct media_plan *media;
    int n_media;
    uint32_t outputs;
    const Internvl__V1__EmbedRequest *wire;

    if (rpc_check_waiting(reply_call(reply), &err))
        goto refuse;
    wire = (Internvl__V1__EmbedRequest *)rpc_take_message(
        reply_call(reply), &internvl__v1__embed_request__descriptor,
        convert_max_elements(&g->convert), &scratch, &err);
    if (!wire)
        goto refuse;
    r = request_new(convert_request_budget(&g->convert));
    if (embed_read(g, wire, &scratch, r, &media, &n_media, &outputs, &err))
        goto refuse;
    arena_release(&scratch);
    if (rpc_check_waiting(reply_call(reply), &err))
        goto refuse;
    reply_submit(reply, r, media, n_media, outputs);
    return;
refuse:
    arena_release(&scratch);
    request_free(r);
    reply_refuse(reply, &err);
}

void embed_message(void *arg, struct rpc_call *c)
{
    struct gateway *g = arg;
    struct reply *reply = reply_new(g, c, REPLY_FORWARD);
    struct error err;

    if (work_queue_submit(g->work, embed_prepare, reply, rpc_message_bytes(c), &err))
        reply_refuse(reply, &err);
}
