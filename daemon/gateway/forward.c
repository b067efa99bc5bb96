/*
 * Forward and Embed: like Generate, but tensors are taken on the way and nothing is drawn. Embed is
 * a Forward whose tensors are features, whole or pooled; its answer is Forward's.
 */
#include "daemon/gateway/gateway_state.h"
#include "daemon/gateway/reply.h"

/* A request of one of the two kinds, being read from the wire. */
struct forward {
    struct gateway *g;
    struct arena scratch;
    struct request *r;
    struct media_plan *media;
    int n_media;
    uint32_t outputs;
};

static int read_prompt(struct forward *f, const char *request_id,
                       const Internvl__V1__Prompt *prompt, struct error *err)
{
    if (convert_request_id(request_id, f->r->id, err))
        return -1;
    return prompt_prepare(f->g, prompt, &f->scratch, f->r, &f->media, &f->n_media, err);
}

static int read_forward(struct forward *f, const ProtobufCMessage *message, struct error *err)
{
    const Internvl__V1__ForwardRequest *wire = (const Internvl__V1__ForwardRequest *)message;

    if (read_prompt(f, wire->request_id, wire->prompt, err))
        return -1;
    return convert_forward(&f->g->convert, wire, f->r, &f->outputs, err);
}

static int read_embed(struct forward *f, const ProtobufCMessage *message, struct error *err)
{
    const Internvl__V1__EmbedRequest *wire = (const Internvl__V1__EmbedRequest *)message;

    if (read_prompt(f, wire->request_id, wire->prompt, err))
        return -1;
    return convert_embed(&f->g->convert, wire, f->r, &f->outputs, err);
}

static void prepare(struct reply *reply, const ProtobufCMessageDescriptor *type,
                    int (*read)(struct forward *f, const ProtobufCMessage *message,
                                struct error *err))
{
    struct forward f = {.g = reply_gateway(reply)};
    struct error err = {0};
    const ProtobufCMessage *message;

    if (rpc_check_waiting(reply_call(reply), &err))
        goto refuse;
    message = rpc_take_message(reply_call(reply), type, convert_max_elements(&f.g->convert),
                               &f.scratch, &err);
    if (!message)
        goto refuse;
    f.r = request_new(convert_request_budget(&f.g->convert));
    if (read(&f, message, &err))
        goto refuse;
    arena_release(&f.scratch);
    if (rpc_check_waiting(reply_call(reply), &err))
        goto refuse;
    reply_submit(reply, f.r, f.media, f.n_media, f.outputs);
    return;
refuse:
    arena_release(&f.scratch);
    request_free(f.r);
    reply_refuse(reply, &err);
}

static void forward_prepare(void *arg)
{
    prepare(arg, &internvl__v1__forward_request__descriptor, read_forward);
}

static void embed_prepare(void *arg)
{
    prepare(arg, &internvl__v1__embed_request__descriptor, read_embed);
}

static void submit(struct gateway *g, struct rpc_call *c, void (*run)(void *arg))
{
    struct reply *reply = reply_new(g, c, REPLY_FORWARD);
    struct error err;

    if (work_queue_submit(g->work, run, reply, rpc_message_bytes(c), &err))
        reply_refuse(reply, &err);
}

void forward_message(void *arg, struct rpc_call *c)
{
    submit(arg, c, forward_prepare);
}

void embed_message(void *arg, struct rpc_call *c)
{
    submit(arg, c, embed_prepare);
}
