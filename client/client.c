/*
 * The public functions: each builds a message (wire.h), runs or starts a call (rpc.h) and reads the
 * answer. Owns struct internvl_client and the state of calls on a queue; must not know gRPC.
 */
#include <stdlib.h>
#include <string.h>

#include "client/internvl_client.h"
#include "client/rpc.h"
#include "client/wire.h"
#include "grpc/health/v1/health.pb-c.h"

#define SERVICE "/internvl.v1.InferenceService/"

struct internvl_client {
    struct rpc_channel *channel;
};

struct internvl_queue {
    struct rpc_channel *channel;
    struct rpc_queue *rpc;
};

static void *client_alloc(size_t size)
{
    void *p = calloc(1, size);
    if (!p)
        abort();
    return p;
}

const char *internvl_version(void)
{
    return INTERNVLD_VERSION;
}

const char *internvl_finish_name(enum internvl_finish_reason r)
{
    switch (r) {
    case INTERNVL_FINISH_STOP:
        return "stop";
    case INTERNVL_FINISH_LENGTH:
        return "length";
    default:
        return "";
    }
}

struct internvl_client *internvl_connect(const struct internvl_options *o,
                                         struct internvl_error *err)
{
    struct rpc_channel *channel = rpc_channel_open(o->address, o->token, o->max_message_bytes, err);
    if (!channel)
        return NULL;
    struct internvl_client *c = client_alloc(sizeof(*c));
    c->channel = channel;
    return c;
}

void internvl_close(struct internvl_client *c)
{
    if (!c)
        return;
    rpc_channel_close(c->channel);
    free(c);
}

/* Unpacks or fails as INTERNAL: the bytes came from the server. */
static void *unpack(const ProtobufCMessageDescriptor *type, const uint8_t *bytes, size_t n_bytes,
                    struct internvl_error *err)
{
    void *m = protobuf_c_message_unpack(type, NULL, n_bytes, bytes);
    if (!m)
        rpc_error(err, INTERNVL_INTERNAL, "the server's answer is not a %s", type->name);
    return m;
}

static void discard(void *message)
{
    protobuf_c_message_free_unpacked(message, NULL);
}

/* ---- generate ---- */

struct generate_state {
    internvl_on_event on_event;
    internvl_on_end on_end;
    void *arg;
};

static int generate_message(void *arg, const uint8_t *bytes, size_t n_bytes,
                            struct internvl_error *err)
{
    struct generate_state *s = arg;
    Internvl__V1__GenerateResponse *m =
        unpack(&internvl__v1__generate_response__descriptor, bytes, n_bytes, err);
    if (!m)
        return -1;
    struct wire_pool pool = {0};
    struct internvl_event e;
    int rc = wire_read_event(&pool, m, &e, err);
    if (rc == 0)
        rc = s->on_event(s->arg, &e);
    wire_pool_release(&pool);
    discard(m);
    return rc;
}

static void generate_end(void *arg, const struct internvl_error *status)
{
    struct generate_state *s = arg;
    s->on_end(s->arg, status);
    free(s);
}

int internvl_generate(struct internvl_client *c, const struct internvl_generate_request *r,
                      const struct internvl_call_options *o, internvl_on_event on_event, void *arg,
                      struct internvl_error *err)
{
    struct wire_pool pool = {0};
    struct generate_state state = {.on_event = on_event, .arg = arg};
    int rc = rpc_run(c->channel, SERVICE "Generate", &wire_generate(&pool, r)->base, o,
                     generate_message, &state, err);
    wire_pool_release(&pool);
    return rc;
}

struct internvl_queue *internvl_queue_open(struct internvl_client *c)
{
    struct internvl_queue *q = client_alloc(sizeof(*q));
    q->channel = c->channel;
    q->rpc = rpc_queue_open();
    return q;
}

void internvl_queue_close(struct internvl_queue *q)
{
    if (!q)
        return;
    rpc_queue_close(q->rpc);
    free(q);
}

int internvl_queue_poll(struct internvl_queue *q, int timeout_ms)
{
    return rpc_queue_poll(q->rpc, timeout_ms);
}

int internvl_generate_start(struct internvl_queue *q, const struct internvl_generate_request *r,
                            const struct internvl_call_options *o, internvl_on_event on_event,
                            internvl_on_end on_end, void *arg, struct internvl_error *err)
{
    struct wire_pool pool = {0};
    struct generate_state *state = client_alloc(sizeof(*state));
    state->on_event = on_event;
    state->on_end = on_end;
    state->arg = arg;
    struct rpc_handlers h = {generate_message, generate_end, NULL, state};
    int rc = rpc_start(q->channel, q->rpc, SERVICE "Generate", &wire_generate(&pool, r)->base, o,
                       &h, err);
    wire_pool_release(&pool);
    if (rc)
        free(state);
    return rc;
}

/* ---- forward ---- */

static int forward_message(void *arg, const uint8_t *bytes, size_t n_bytes,
                           struct internvl_error *err)
{
    Internvl__V1__ForwardResponse *m =
        unpack(&internvl__v1__forward_response__descriptor, bytes, n_bytes, err);
    if (!m)
        return -1;
    int rc = wire_read_forward(arg, m, err);
    discard(m);
    return rc;
}

/* A call that is answered with tensors: Forward, Embed. */
static int run_forward(struct internvl_client *c, const char *method,
                       const ProtobufCMessage *request, const struct internvl_call_options *o,
                       struct internvl_forward_result *out, struct internvl_error *err)
{
    memset(out, 0, sizeof(*out));
    struct wire_forward_reader reader = {.out = out};
    int rc = rpc_run(c->channel, method, request, o, forward_message, &reader, err);
    if (rc == 0)
        rc = wire_forward_complete(&reader, err);
    if (rc)
        internvl_forward_result_release(out);
    return rc;
}

int internvl_forward(struct internvl_client *c, const struct internvl_forward_request *r,
                     const struct internvl_call_options *o, struct internvl_forward_result *out,
                     struct internvl_error *err)
{
    struct wire_pool pool = {0};
    int rc = run_forward(c, SERVICE "Forward", &wire_forward(&pool, r)->base, o, out, err);
    wire_pool_release(&pool);
    return rc;
}

int internvl_embed(struct internvl_client *c, const struct internvl_embed_request *r,
                   const struct internvl_call_options *o, struct internvl_forward_result *out,
                   struct internvl_error *err)
{
    struct wire_pool pool = {0};
    int rc = run_forward(c, SERVICE "Embed", &wire_embed(&pool, r)->base, o, out, err);
    wire_pool_release(&pool);
    return rc;
}

void internvl_forward_result_release(struct internvl_forward_result *r)
{
    for (size_t i = 0; i < r->n_tensors; i++) {
        free(r->tensors[i].name);
        free(r->tensors[i].data);
    }
    free(r->tensors);
    free(r->token_logprobs);
    free(r->token_ids);
    memset(r, 0, sizeof(*r));
}

/* ---- unary calls ---- */

struct unary_state {
    const ProtobufCMessageDescriptor *type;
    void *answer;        // unpacked, or NULL
    rpc_on_next on_next; // of a request that is a stream, with its `arg`
    void *arg;
};

static int unary_message(void *arg, const uint8_t *bytes, size_t n_bytes,
                         struct internvl_error *err)
{
    struct unary_state *s = arg;
    if (s->answer)
        return rpc_error(err, INTERNVL_INTERNAL, "the server sent two answers");
    s->answer = unpack(s->type, bytes, n_bytes, err);
    return s->answer ? 0 : -1;
}

static const ProtobufCMessage *unary_next(void *arg)
{
    struct unary_state *s = arg;
    return s->on_next(s->arg);
}

/* A request of several messages, or of one (on_next NULL), that has one answer: the unpacked answer
 * (caller discards), or NULL and `err`. */
static void *run_stream(struct internvl_client *c, const char *method,
                        const ProtobufCMessage *first, rpc_on_next on_next, void *arg,
                        const ProtobufCMessageDescriptor *type,
                        const struct internvl_call_options *o, struct internvl_error *err)
{
    struct unary_state s = {.type = type, .on_next = on_next, .arg = arg};
    int rc = rpc_run_stream(c->channel, method, first, on_next ? unary_next : NULL, o,
                            unary_message, &s, err);
    if (rc == 0 && !s.answer)
        rc = rpc_error(err, INTERNVL_INTERNAL, "the server sent no answer");
    if (rc && s.answer) {
        discard(s.answer);
        s.answer = NULL;
    }
    return s.answer;
}

static void *run_unary(struct internvl_client *c, const char *method,
                       const ProtobufCMessage *request, const ProtobufCMessageDescriptor *type,
                       const struct internvl_call_options *o, struct internvl_error *err)
{
    return run_stream(c, method, request, NULL, NULL, type, o, err);
}

int internvl_score(struct internvl_client *c, const struct internvl_score_request *r,
                   const struct internvl_call_options *o, struct internvl_score_result *out,
                   struct internvl_error *err)
{
    memset(out, 0, sizeof(*out));
    struct wire_pool pool = {0};
    Internvl__V1__ScoreResponse *m = run_unary(c, SERVICE "Score", &wire_score(&pool, r)->base,
                                               &internvl__v1__score_response__descriptor, o, err);
    wire_pool_release(&pool);
    if (!m)
        return -1;
    wire_read_score(m, out);
    discard(m);
    return 0;
}

void internvl_score_result_release(struct internvl_score_result *r)
{
    for (size_t i = 0; i < r->n_scores; i++) {
        free(r->scores[i].token_ids);
        free(r->scores[i].token_logprobs);
        free(r->scores[i].token_ranks);
    }
    free(r->scores);
    memset(r, 0, sizeof(*r));
}

int internvl_tokenize(struct internvl_client *c, const struct internvl_tokenize_request *r,
                      const struct internvl_call_options *o, struct internvl_tokenize_result *out,
                      struct internvl_error *err)
{
    memset(out, 0, sizeof(*out));
    struct wire_pool pool = {0};
    Internvl__V1__TokenizeResponse *m =
        run_unary(c, SERVICE "Tokenize", &wire_tokenize(&pool, r)->base,
                  &internvl__v1__tokenize_response__descriptor, o, err);
    wire_pool_release(&pool);
    if (!m)
        return -1;
    wire_read_tokenize(m, out);
    discard(m);
    return 0;
}

void internvl_tokenize_result_release(struct internvl_tokenize_result *r)
{
    for (size_t i = 0; i < r->n_tokens; i++)
        free(r->tokens[i].data);
    free(r->tokens);
    free(r->token_ids);
    free(r->text);
    free(r->media);
    memset(r, 0, sizeof(*r));
}

int internvl_upload_media(struct internvl_client *c, const struct internvl_upload *r,
                          const struct internvl_call_options *o, struct internvl_upload_result *out,
                          struct internvl_error *err)
{
    memset(out, 0, sizeof(*out));
    if (r->kind != INTERNVL_IMAGE && r->kind != INTERNVL_VIDEO)
        return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "only a picture or video is uploaded");
    struct wire_upload u;
    Internvl__V1__UploadMediaResponse *m =
        run_stream(c, SERVICE "UploadMedia", wire_upload_first(&u, r), wire_upload_next, &u,
                   &internvl__v1__upload_media_response__descriptor, o, err);
    if (!m)
        return -1;
    int rc = wire_read_upload(m, out, err);
    discard(m);
    return rc;
}

int internvl_get_model(struct internvl_client *c, const struct internvl_call_options *o,
                       struct internvl_model *out, struct internvl_error *err)
{
    memset(out, 0, sizeof(*out));
    Internvl__V1__GetModelRequest request;
    internvl__v1__get_model_request__init(&request);
    Internvl__V1__GetModelResponse *m =
        run_unary(c, SERVICE "GetModel", &request.base,
                  &internvl__v1__get_model_response__descriptor, o, err);
    if (!m)
        return -1;
    wire_read_model(m, out);
    discard(m);
    return 0;
}

void internvl_model_release(struct internvl_model *m)
{
    for (size_t i = 0; i < m->n_ranks; i++) {
        free(m->ranks[i].role);
        free(m->ranks[i].host);
        free(m->ranks[i].device);
    }
    free(m->ranks);
    free(m->name);
    free(m->version);
    free(m->architecture);
    free(m->dtype);
    free(m->kv_cache_dtype);
    free(m->quantization);
    memset(m, 0, sizeof(*m));
}

int internvl_check_health(struct internvl_client *c, const char *service,
                          const struct internvl_call_options *o, enum internvl_health *out,
                          struct internvl_error *err)
{
    *out = INTERNVL_HEALTH_UNKNOWN;
    Grpc__Health__V1__HealthCheckRequest request;
    grpc__health__v1__health_check_request__init(&request);
    request.service = (char *)(service ? service : "");
    Grpc__Health__V1__HealthCheckResponse *m =
        run_unary(c, "/grpc.health.v1.Health/Check", &request.base,
                  &grpc__health__v1__health_check_response__descriptor, o, err);
    if (!m)
        return -1;
    *out = (enum internvl_health)m->status;
    discard(m);
    return 0;
}
