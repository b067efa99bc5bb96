/*
 * Calls over gRPC's C core (libgrpc 1.51). A call is three batches: what goes out (of a stream, one
 * message after the other), one RECV_MESSAGE after the other, and RECV_STATUS_ON_CLIENT; it is over
 * when all three have completed. Owns channels, completion queues and calls; must not know the
 * messages.
 */
#include "client/rpc.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct rpc_channel {
    grpc_channel *channel;
    char *authorization; // "Bearer …" or NULL
};

struct rpc_queue {
    grpc_completion_queue *cq;
    struct rpc_call *calls; // in flight
    int n_calls;
    int closing; // messages are no longer shown
};

enum rpc_what { RPC_SENT, RPC_RECEIVED, RPC_STATUS };
struct rpc_tag {
    enum rpc_what what;
    struct rpc_call *call;
};

struct rpc_call {
    struct rpc_queue *queue;
    struct rpc_call *next, **at;               // in queue->calls
    struct rpc_call *cancel_next, **cancel_at; // in cancel->calls
    struct internvl_cancel *cancel;            // or NULL
    struct rpc_handlers handlers;
    struct internvl_error error; // ours, which goes before the server's; code 0: none
    grpc_call *call;
    grpc_byte_buffer *request, *message;
    grpc_metadata_array initial, trailing;
    grpc_status_code status;
    grpc_slice details;
    struct rpc_tag tags[3];
    int n_pending; // batches
    int refused;   // a handler said no: the rest is dropped
};

struct internvl_cancel {
    pthread_mutex_t lock;
    int cancelled;
    struct rpc_call *calls;
};

/* ---- errors ---- */

/* Bytes of `s` [n] that are whole UTF-8 characters when it was cut at n. */
static size_t utf8_cut(const char *s, size_t n)
{
    size_t start = n;
    while (start > 0 && n - start < 4 && ((uint8_t)s[start - 1] & 0xc0) == 0x80)
        start--;
    if (start == 0)
        return n;
    uint8_t lead = (uint8_t)s[start - 1];
    size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
    return n - start + 1 < length ? start - 1 : n;
}

int rpc_error(struct internvl_error *err, int code, const char *fmt, ...)
{
    if (!err)
        return -1;
    err->code = code;
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(err->msg, sizeof(err->msg), fmt, ap);
    va_end(ap);
    if (n >= (int)sizeof(err->msg))
        err->msg[utf8_cut(err->msg, sizeof(err->msg) - 1)] = '\0';
    return -1;
}

const char *internvl_code_name(int code)
{
    static const char *const names[] = {
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    };
    return code >= 0 && code < (int)(sizeof(names) / sizeof(names[0])) ? names[code] : "UNKNOWN";
}

static void *rpc_alloc(size_t n, size_t size)
{
    void *p = calloc(n, size);
    if (!p) {
        fprintf(stderr, "libinternvl: out of memory\n");
        abort();
    }
    return p;
}

/* ---- channel ---- */

static grpc_arg integer_arg(const char *key, int value)
{
    grpc_arg a = {.type = GRPC_ARG_INTEGER, .key = (char *)key, .value.integer = value};
    return a;
}

struct rpc_channel *rpc_channel_open(const char *address, const char *token,
                                     size_t max_message_bytes, struct internvl_error *err)
{
    if (!address || !*address) {
        rpc_error(err, INTERNVL_INVALID_ARGUMENT, "the server's address is empty");
        return NULL;
    }
    for (const char *p = token; p && *p; p++)
        if (*p <= ' ' || *p > '~') {
            rpc_error(err, INTERNVL_INVALID_ARGUMENT,
                      "the bearer token holds a byte that is not printable ASCII");
            return NULL;
        }
    grpc_init();
    struct rpc_channel *c = rpc_alloc(1, sizeof(*c));
    int max_bytes = max_message_bytes == 0                  ? 64 << 20
                    : max_message_bytes > (size_t)INT32_MAX ? INT32_MAX
                                                            : (int)max_message_bytes;
    /* No compression (a small message must not become a large one), no proxy from the environment
     * (the daemon is near), no retries (a generation is not repeated behind the caller's back). */
    grpc_arg args[] = {
        integer_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, max_bytes),
        integer_arg(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1),
        integer_arg(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1),
        integer_arg(GRPC_ARG_ENABLE_HTTP_PROXY, 0),
        integer_arg(GRPC_ARG_ENABLE_RETRIES, 0),
        integer_arg(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1),
        /* A daemon that is started again is found soon. */
        integer_arg(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100),
        integer_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000),
    };
    grpc_channel_args channel_args = {sizeof(args) / sizeof(args[0]), args};
    grpc_channel_credentials *plain = grpc_insecure_credentials_create();
    c->channel = grpc_channel_create(address, plain, &channel_args);
    grpc_channel_credentials_release(plain);
    if (token) {
        size_t n_bytes = strlen(token) + sizeof("Bearer ");
        c->authorization = rpc_alloc(1, n_bytes);
        snprintf(c->authorization, n_bytes, "Bearer %s", token);
    }
    return c;
}

void rpc_channel_close(struct rpc_channel *c)
{
    if (!c)
        return;
    grpc_channel_destroy(c->channel);
    if (c->authorization)
        explicit_bzero(c->authorization, strlen(c->authorization));
    free(c->authorization);
    free(c);
    grpc_shutdown_blocking();
}

/* ---- cancel handles ---- */

struct internvl_cancel *internvl_cancel_new(void)
{
    struct internvl_cancel *c = rpc_alloc(1, sizeof(*c));
    pthread_mutex_init(&c->lock, NULL);
    return c;
}

void internvl_cancel_free(struct internvl_cancel *c)
{
    if (!c)
        return;
    pthread_mutex_destroy(&c->lock);
    free(c);
}

void internvl_cancel(struct internvl_cancel *c)
{
    pthread_mutex_lock(&c->lock);
    c->cancelled = 1;
    for (struct rpc_call *call = c->calls; call; call = call->cancel_next)
        grpc_call_cancel(call->call, NULL);
    pthread_mutex_unlock(&c->lock);
}

static void cancel_attach(struct internvl_cancel *c, struct rpc_call *call)
{
    if (!c)
        return;
    pthread_mutex_lock(&c->lock);
    call->cancel = c;
    call->cancel_next = c->calls;
    call->cancel_at = &c->calls;
    if (c->calls)
        c->calls->cancel_at = &call->cancel_next;
    c->calls = call;
    if (c->cancelled)
        grpc_call_cancel(call->call, NULL);
    pthread_mutex_unlock(&c->lock);
}

static void cancel_detach(struct rpc_call *call)
{
    struct internvl_cancel *c = call->cancel;
    if (!c)
        return;
    pthread_mutex_lock(&c->lock);
    *call->cancel_at = call->cancel_next;
    if (call->cancel_next)
        call->cancel_next->cancel_at = call->cancel_at;
    pthread_mutex_unlock(&c->lock);
    call->cancel = NULL;
}

/* ---- calls ---- */

static void start_batch(struct rpc_call *call, const grpc_op *ops, size_t n_ops, enum rpc_what what)
{
    call->tags[what].what = what;
    call->tags[what].call = call;
    call->n_pending++;
    grpc_call_error e = grpc_call_start_batch(call->call, ops, n_ops, &call->tags[what], NULL);
    if (e != GRPC_CALL_OK) { // a mistake of this file, whatever the server does
        fprintf(stderr, "libinternvl: grpc_call_start_batch: %s\n", grpc_call_error_to_string(e));
        abort();
    }
}

static void receive_next(struct rpc_call *call)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    op.data.recv_message.recv_message = &call->message;
    start_batch(call, &op, 1, RPC_RECEIVED);
}

static grpc_byte_buffer *pack(const ProtobufCMessage *request)
{
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(request));
    protobuf_c_message_pack(request, GRPC_SLICE_START_PTR(slice));
    grpc_byte_buffer *b = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return b;
}

static void start_batches(struct rpc_call *call, const char *authorization)
{
    grpc_metadata header = {0};
    if (authorization) {
        header.key = grpc_slice_from_static_string("authorization");
        header.value = grpc_slice_from_copied_string(authorization);
    }
    grpc_op out[3] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},
                      {.op = GRPC_OP_SEND_MESSAGE},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}};
    out[0].data.send_initial_metadata.count = authorization ? 1 : 0;
    out[0].data.send_initial_metadata.metadata = &header;
    out[1].data.send_message.send_message = call->request;
    start_batch(call, out, call->handlers.on_next ? 2 : 3, RPC_SENT);
    receive_next(call);
    grpc_op end[2] = {{.op = GRPC_OP_RECV_INITIAL_METADATA}, {.op = GRPC_OP_RECV_STATUS_ON_CLIENT}};
    end[0].data.recv_initial_metadata.recv_initial_metadata = &call->initial;
    end[1].data.recv_status_on_client.trailing_metadata = &call->trailing;
    end[1].data.recv_status_on_client.status = &call->status;
    end[1].data.recv_status_on_client.status_details = &call->details;
    start_batch(call, end, 2, RPC_STATUS);
    if (authorization)
        grpc_slice_unref(header.value);
}

/* The next message of a stream, or its end. */
static void send_next(struct rpc_call *call)
{
    const ProtobufCMessage *m =
        call->queue->closing ? NULL : call->handlers.on_next(call->handlers.arg);
    grpc_op op = {.op = m ? GRPC_OP_SEND_MESSAGE : GRPC_OP_SEND_CLOSE_FROM_CLIENT};
    grpc_byte_buffer_destroy(call->request);
    call->request = m ? pack(m) : NULL;
    op.data.send_message.send_message = call->request;
    if (!m)
        call->handlers.on_next = NULL;
    start_batch(call, &op, 1, RPC_SENT);
}

int rpc_start(struct rpc_channel *c, struct rpc_queue *q, const char *method,
              const ProtobufCMessage *request, const struct internvl_call_options *o,
              const struct rpc_handlers *h, struct internvl_error *err)
{
    gpr_timespec deadline = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    if (q->closing)
        return rpc_error(err, INTERNVL_CANCELLED, "the queue is being closed");
    if (o && o->timeout_ms < 0)
        return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "the timeout is negative");
    if (o && o->timeout_ms > 0)
        deadline = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                                gpr_time_from_millis(o->timeout_ms, GPR_TIMESPAN));
    struct rpc_call *call = rpc_alloc(1, sizeof(*call));
    call->queue = q;
    call->handlers = *h;
    call->details = grpc_empty_slice();
    grpc_metadata_array_init(&call->initial);
    grpc_metadata_array_init(&call->trailing);
    call->request = pack(request);
    grpc_slice path = grpc_slice_from_copied_string(method);
    call->call = grpc_channel_create_call(c->channel, NULL, GRPC_PROPAGATE_DEFAULTS, q->cq, path,
                                          NULL, deadline, NULL);
    grpc_slice_unref(path);
    call->next = q->calls;
    call->at = &q->calls;
    if (q->calls)
        q->calls->at = &call->next;
    q->calls = call;
    q->n_calls++;
    start_batches(call, c->authorization);
    cancel_attach(o ? o->cancel : NULL, call);
    return 0;
}

static void finish_call(struct rpc_call *call)
{
    struct rpc_queue *q = call->queue;
    cancel_detach(call);
    struct internvl_error status = call->error;
    if (status.code == INTERNVL_OK && call->status != GRPC_STATUS_OK)
        rpc_error(&status, call->status, "%.*s", (int)GRPC_SLICE_LENGTH(call->details),
                  (const char *)GRPC_SLICE_START_PTR(call->details));
    else if (status.code == INTERNVL_OK && call->refused)
        rpc_error(&status, INTERNVL_CANCELLED, "cancelled by the caller");
    call->handlers.on_end(call->handlers.arg, &status);
    *call->at = call->next;
    if (call->next)
        call->next->at = call->at;
    q->n_calls--;
    if (call->request)
        grpc_byte_buffer_destroy(call->request);
    grpc_metadata_array_destroy(&call->initial);
    grpc_metadata_array_destroy(&call->trailing);
    grpc_slice_unref(call->details);
    grpc_call_unref(call->call);
    free(call);
}

/* The message has arrived whole; shows it and asks for the next one. */
static void show_message(struct rpc_call *call)
{
    grpc_byte_buffer *message = call->message;
    call->message = NULL;
    if (!call->refused && !call->queue->closing) {
        grpc_byte_buffer_reader reader;
        grpc_byte_buffer_reader_init(&reader, message);
        grpc_slice all = grpc_byte_buffer_reader_readall(&reader);
        if (call->handlers.on_message(call->handlers.arg, GRPC_SLICE_START_PTR(all),
                                      GRPC_SLICE_LENGTH(all), &call->error)) {
            call->refused = 1;
            grpc_call_cancel(call->call, NULL);
        }
        grpc_slice_unref(all);
        grpc_byte_buffer_reader_destroy(&reader);
    }
    grpc_byte_buffer_destroy(message);
    receive_next(call);
}

struct rpc_queue *rpc_queue_open(void)
{
    grpc_init();
    struct rpc_queue *q = rpc_alloc(1, sizeof(*q));
    q->cq = grpc_completion_queue_create_for_next(NULL);
    return q;
}

int rpc_queue_poll(struct rpc_queue *q, int timeout_ms)
{
    gpr_timespec until = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    if (timeout_ms >= 0)
        until = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                             gpr_time_from_millis(timeout_ms, GPR_TIMESPAN));
    while (q->n_calls > 0) {
        grpc_event e = grpc_completion_queue_next(q->cq, until, NULL);
        if (e.type != GRPC_OP_COMPLETE)
            break;
        struct rpc_tag *tag = e.tag;
        struct rpc_call *call = tag->call;
        call->n_pending--;
        if (tag->what == RPC_RECEIVED && call->message)
            show_message(call);
        if (tag->what == RPC_SENT && e.success && call->handlers.on_next)
            send_next(call);
        if (call->n_pending == 0)
            finish_call(call);
        until = gpr_inf_past(GPR_CLOCK_MONOTONIC); // the rest of what has already happened
    }
    return q->n_calls;
}

void rpc_queue_close(struct rpc_queue *q)
{
    if (!q)
        return;
    q->closing = 1;
    for (struct rpc_call *call = q->calls; call; call = call->next)
        grpc_call_cancel(call->call, NULL);
    while (rpc_queue_poll(q, -1) > 0)
        ;
    grpc_completion_queue_shutdown(q->cq);
    while (grpc_completion_queue_next(q->cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type !=
           GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_completion_queue_destroy(q->cq);
    free(q);
    grpc_shutdown();
}

/* ---- one call to its end ---- */

struct rpc_run_state {
    rpc_on_message on_message;
    rpc_on_next on_next;
    void *arg;
    struct internvl_error status;
};

static int run_message(void *arg, const uint8_t *bytes, size_t n_bytes, struct internvl_error *err)
{
    struct rpc_run_state *s = arg;
    return s->on_message(s->arg, bytes, n_bytes, err);
}

static const ProtobufCMessage *run_next(void *arg)
{
    struct rpc_run_state *s = arg;
    return s->on_next(s->arg);
}

static void run_end(void *arg, const struct internvl_error *status)
{
    struct rpc_run_state *s = arg;
    s->status = *status;
}

int rpc_run_stream(struct rpc_channel *c, const char *method, const ProtobufCMessage *first,
                   rpc_on_next on_next, const struct internvl_call_options *o,
                   rpc_on_message on_message, void *arg, struct internvl_error *err)
{
    struct rpc_run_state state = {.on_message = on_message, .on_next = on_next, .arg = arg};
    struct rpc_handlers handlers = {run_message, run_end, on_next ? run_next : NULL, &state};
    struct rpc_queue *q = rpc_queue_open();
    int rc = rpc_start(c, q, method, first, o, &handlers, err);
    if (rc == 0) {
        while (rpc_queue_poll(q, -1) > 0)
            ;
        if (err)
            *err = state.status;
        rc = state.status.code == INTERNVL_OK ? 0 : -1;
    }
    rpc_queue_close(q);
    return rc;
}

int rpc_run(struct rpc_channel *c, const char *method, const ProtobufCMessage *request,
            const struct internvl_call_options *o, rpc_on_message on_message, void *arg,
            struct internvl_error *err)
{
    return rpc_run_stream(c, method, request, NULL, o, on_message, arg, err);
}
