/*
 * Generate, Forward and Embed: the request is read and prepared on a processor thread, then the
 * engine has it. Forward takes tensors on the way and draws nothing; Embed is a Forward whose
 * tensors are features, whole or pooled, and its answer is Forward's.
 */
#include "daemon/gateway/gateway_state.h"
#include "daemon/gateway/reply.h"

/* A request being read from the wire. */
struct reading {
    struct gateway *g;
    struct arena scratch; // the message, until the request is made
    struct request *r;
    struct media_plan *media;
    int n_media;
    uint32_t outputs; // 0 for Generate
};

static int read_prompt(struct reading *reading, const char *request_id,
                       const Internvl__V1__Prompt *prompt, struct error *err)
{
    if (convert_request_id(request_id, reading->r->id, err))
        return -1;
    return prompt_prepare(reading->g, prompt, &reading->scratch, reading->r, &reading->media,
                          &reading->n_media, err);
}

static int read_generate(struct reading *reading, const ProtobufCMessage *message,
                         struct error *err)
{
    const Internvl__V1__GenerateRequest *wire = (const Internvl__V1__GenerateRequest *)message;

    if (read_prompt(reading, wire->request_id, wire->prompt, err) ||
        convert_sampling(&reading->g->convert, wire->sampling, reading->r, err))
        return -1;
    reading->r->priority = wire->priority;
    return convert_cache_salt(wire->cache_salt, reading->r, err);
}

static int read_forward(struct reading *reading, const ProtobufCMessage *message, struct error *err)
{
    const Internvl__V1__ForwardRequest *wire = (const Internvl__V1__ForwardRequest *)message;

    if (read_prompt(reading, wire->request_id, wire->prompt, err))
        return -1;
    return convert_forward(&reading->g->convert, wire, reading->r, &reading->outputs, err);
}

static int read_embed(struct reading *reading, const ProtobufCMessage *message, struct error *err)
{
    const Internvl__V1__EmbedRequest *wire = (const Internvl__V1__EmbedRequest *)message;

    if (read_prompt(reading, wire->request_id, wire->prompt, err))
        return -1;
    return convert_embed(&reading->g->convert, wire, reading->r, &reading->outputs, err);
}

static void prepare(struct reply *reply, const ProtobufCMessageDescriptor *type,
                    int (*read)(struct reading *reading, const ProtobufCMessage *message,
                                struct error *err))
{
    struct reading reading = {.g = reply_gateway(reply)};
    struct error err = {0};
    const ProtobufCMessage *message;

    if (rpc_check_waiting(reply_call(reply), &err)) // nobody waits: do not decode its pictures
        goto refuse;
    message = rpc_take_message(reply_call(reply), type, convert_max_elements(&reading.g->convert),
                               &reading.scratch, &err);
    if (!message)
        goto refuse;
    reading.r = request_new(convert_request_budget(&reading.g->convert));
    if (read(&reading, message, &err))
        goto refuse;
    arena_release(&reading.scratch);
    if (rpc_check_waiting(reply_call(reply), &err))
        goto refuse;
    reply_submit(reply, reading.r, reading.media, reading.n_media, reading.outputs);
    return;
refuse:
    arena_release(&reading.scratch);
    request_free(reading.r);
    reply_refuse(reply, &err);
}

static void generate_prepare(void *arg)
{
    prepare(arg, &internvl__v1__generate_request__descriptor, read_generate);
}

static void forward_prepare(void *arg)
{
    prepare(arg, &internvl__v1__forward_request__descriptor, read_forward);
}

static void embed_prepare(void *arg)
{
    prepare(arg, &internvl__v1__embed_request__descriptor, read_embed);
}

static void submit(struct gateway *g, struct rpc_call *c, enum reply_kind kind,
                   void (*run)(void *arg))
{
    struct reply *reply = reply_new(g, c, kind);
    struct error err;

    if (work_queue_submit(g->work, run, reply, rpc_message_bytes(c), &err))
        reply_refuse(reply, &err);
}

void generate_message(void *arg, struct rpc_call *c)
{
    submit(arg, c, REPLY_GENERATE, generate_prepare);
}

void forward_message(void *arg, struct rpc_call *c)
{
    submit(arg, c, REPLY_FORWARD, forward_prepare);
}

void embed_message(void *arg, struct rpc_call *c)
{
    submit(arg, c, REPLY_FORWARD, embed_prepare);
}
