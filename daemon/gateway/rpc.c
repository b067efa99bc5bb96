/*
 * gRPC core behind rpc.h. Facts that shaped it (each was reproduced with libgrpc 1.51):
 *
 *   - one SEND_MESSAGE may be outstanding on a call; the status waits for it here
 *   - RECV_CLOSE_ON_SERVER reports client cancel, deadline and a lost connection alike
 *   - unknown methods hang unless a generic call is armed
 *   - gzip is decompressed before the size limit: compression is switched off
 *   - an empty batch posts its tag at once: that wakes the completion thread
 *   - a call that meets a shutdown is ended CANCELLED: connections are ended before it
 *   - every message is a write to its socket, also where others of its connection wait in the
 *     completion queue: the socket is told to gather them. A call's peer is "fd:N" when its
 *     connection was given as a descriptor
 */
#include "daemon/gateway/rpc.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/compression.h>
#include <grpc/grpc.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/gateway/listener.h"
#include "daemon/gateway/wire_check.h"
#include "kernels/clock.h"
#include "kernels/log.h"
#include "kernels/trace.h"

#define ARMED_PER_METHOD 4
#define MAX_STREAMS_PER_CONNECTION 1024
#define MAX_METADATA_BYTES 8192
#define KEEPALIVE_MS                                                                               \
    30000 // an idle peer that does not answer a ping is gone KEEPALIVE_TIMEOUT_MS later
#define KEEPALIVE_TIMEOUT_MS 10000
#define MIN_PING_INTERVAL_MS 5000
#define CANCEL_GRACE_MS 5000
#define HANG_UP_MS 1000           // for connections to close, then for the server
#define DEADLINE_SLACK_NS 2000000 // the library's timer may fire this much early
#define GENERIC (-1)
#define HELD_MAX 16     // connections whose writes are gathered at a time
#define HELD_NS 1000000 // and for how long at most

struct rpc_tag { // what the completion queue hands back; set when the call is made, then only read
    void (*fire)(struct rpc_call *c, int ok);
    struct rpc_call *call;
};

struct rpc_server {
    const struct rpc_method *methods;
    int n_methods, max_open_calls;
    void *arg;
    const struct auth *auth;
    grpc_server *server;
    grpc_completion_queue *queue;
    void **registered; // [n_methods]
    pthread_t thread;
    struct listener *listener;
    grpc_server_credentials *credentials;
    struct rpc_tag down_tag;
    atomic_int is_serving, is_closing, is_ending_streams;
    int held[HELD_MAX], n_held; // the completion thread's: connections that gather writes
    uint64_t held_since_ns;

    pthread_mutex_t mutex; // guards what follows
    pthread_cond_t changed;
    int is_down, n_open;
    struct rpc_call *open_calls; // list
};

struct rpc_call {
    struct rpc_server *server;
    int method; // or GENERIC
    grpc_call *call;
    gpr_timespec deadline;
    grpc_call_details details; // of a generic call
    grpc_metadata_array metadata;
    struct rpc_tag new_tag, close_tag, read_tag, write_tag, status_tag, wake_tag;
    atomic_int n_refs, is_woken;
    uint64_t arrival_ns, deadline_ns;
    int fd;                           // of its connection, -1: not known
    struct rpc_call *next, *previous; // in open_calls, under the server's mutex
    int is_listed;

    /* the completion thread's, until the message is handed to whoever takes it */
    const struct rpc_events *events;
    void *state;
    grpc_byte_buffer *incoming;

    pthread_mutex_t mutex; // guards what follows
    int close_flag;        // written by the library before the close tag
    int is_closed, is_reading, is_writing, is_initial_sent, is_finished, is_status_pending;
    enum error_code closed_why;
    uint64_t read_started_ns, write_started_ns;
    grpc_byte_buffer *outgoing, *last;
    struct error status;
};

/* The library's deadline on our clock; 0: none. */
static uint64_t deadline_ns_of(gpr_timespec deadline)
{
    gpr_timespec now;
    gpr_timespec left;

    if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) == 0)
        return 0;
    now = gpr_now(GPR_CLOCK_REALTIME);
    left = gpr_time_sub(gpr_convert_clock_type(deadline, GPR_CLOCK_REALTIME), now);
    if (left.tv_sec < 0)
        return clock_now_ns();
    if (left.tv_sec > 365 * 24 * 3600)
        return 0;
    return clock_now_ns() + (uint64_t)left.tv_sec * 1000000000u + (uint64_t)left.tv_nsec;
}

/* ---- calls: references, batches ---- */

static void on_new(struct rpc_call *c, int ok);
static void on_close(struct rpc_call *c, int ok);
static void on_read(struct rpc_call *c, int ok);
static void on_write(struct rpc_call *c, int ok);
static void on_status(struct rpc_call *c, int ok);
static void on_wake(struct rpc_call *c, int ok);

static void start_batch(struct rpc_call *c, const grpc_op *ops, size_t n_ops, struct rpc_tag *tag)
{
    grpc_call_error e;

    rpc_call_ref(c); // the tag's
    e = grpc_call_start_batch(c->call, ops, n_ops, tag, NULL);
    if (e != GRPC_CALL_OK)
        BUG("grpc_call_start_batch: %s", grpc_call_error_to_string(e));
}

static struct rpc_call *call_new(struct rpc_server *s, int method)
{
    struct rpc_call *c = xcalloc(1, sizeof(*c));

    c->server = s;
    c->method = method;
    c->new_tag = (struct rpc_tag){on_new, c};
    c->close_tag = (struct rpc_tag){on_close, c};
    c->read_tag = (struct rpc_tag){on_read, c};
    c->write_tag = (struct rpc_tag){on_write, c};
    c->status_tag = (struct rpc_tag){on_status, c};
    c->wake_tag = (struct rpc_tag){on_wake, c};
    atomic_init(&c->n_refs, 1);
    atomic_init(&c->is_woken, 0);
    grpc_metadata_array_init(&c->metadata);
    grpc_call_details_init(&c->details);
    pthread_mutex_init(&c->mutex, NULL);
    return c;
}

static void list_call(struct rpc_call *c)
{
    struct rpc_server *s = c->server;

    pthread_mutex_lock(&s->mutex);
    c->next = s->open_calls;
    if (c->next)
        c->next->previous = c;
    s->open_calls = c;
    c->is_listed = 1;
    s->n_open++;
    pthread_mutex_unlock(&s->mutex);
}

static void unlist_call(struct rpc_call *c)
{
    struct rpc_server *s = c->server;

    pthread_mutex_lock(&s->mutex);
    if (c->next)
        c->next->previous = c->previous;
    if (c->previous)
        c->previous->next = c->next;
    else
        s->open_calls = c->next;
    s->n_open--;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
}

struct rpc_call *rpc_call_ref(struct rpc_call *c)
{
    atomic_fetch_add(&c->n_refs, 1);
    return c;
}

void rpc_call_unref(struct rpc_call *c)
{
    if (atomic_fetch_sub(&c->n_refs, 1) != 1)
        return;
    if (c->incoming)
        grpc_byte_buffer_destroy(c->incoming);
    if (c->outgoing)
        grpc_byte_buffer_destroy(c->outgoing);
    if (c->last)
        grpc_byte_buffer_destroy(c->last);
    grpc_metadata_array_destroy(&c->metadata);
    grpc_call_details_destroy(&c->details);
    if (c->call)
        grpc_call_unref(c->call);
    if (c->is_listed)
        unlist_call(c);
    pthread_mutex_destroy(&c->mutex);
    free(c);
}

void rpc_call_listen(struct rpc_call *c, const struct rpc_events *e, void *state)
{
    c->events = e;
    c->state = state;
}

void *rpc_call_state(const struct rpc_call *c)
{
    return c->state;
}

uint64_t rpc_call_arrival_ns(const struct rpc_call *c)
{
    return c->arrival_ns;
}

uint64_t rpc_call_deadline_ns(const struct rpc_call *c)
{
    return c->deadline_ns;
}

int rpc_check_waiting(struct rpc_call *c, struct error *err)
{
    enum error_code why = ERROR_OK;

    pthread_mutex_lock(&c->mutex);
    if (c->is_closed)
        why = c->closed_why ? c->closed_why : ERROR_CANCELLED;
    else if (c->deadline_ns && clock_now_ns() >= c->deadline_ns)
        why = ERROR_DEADLINE_EXCEEDED;
    pthread_mutex_unlock(&c->mutex);
    if (why == ERROR_OK)
        return 0;
    return error_set(err, why,
                     why == ERROR_CANCELLED ? "the client has cancelled the call"
                                            : "the call's deadline has passed");
}

/* ---- messages ---- */

size_t rpc_message_bytes(const struct rpc_call *c)
{
    return c->incoming ? grpc_byte_buffer_length(c->incoming) : 0;
}

ProtobufCMessage *rpc_take_message(struct rpc_call *c, const ProtobufCMessageDescriptor *type,
                                   size_t max_elements, struct arena *a, struct error *err)
{
    grpc_byte_buffer *buffer = c->incoming;
    grpc_byte_buffer_reader reader;
    grpc_slice bytes;
    ProtobufCMessage *m;

    if (!buffer)
        BUG("no message to take");
    c->incoming = NULL;
    arena_init(a, wire_budget_bytes(grpc_byte_buffer_length(buffer)));
    if (!grpc_byte_buffer_reader_init(&reader, buffer)) {
        grpc_byte_buffer_destroy(buffer);
        error_set(err, ERROR_INVALID_ARGUMENT, "the message cannot be read");
        return NULL;
    }
    bytes = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(buffer);
    m = wire_unpack(type, GRPC_SLICE_START_PTR(bytes), GRPC_SLICE_LENGTH(bytes), max_elements, a,
                    err);
    grpc_slice_unref(bytes);
    return m;
}

static grpc_byte_buffer *pack(const ProtobufCMessage *m)
{
    size_t n = protobuf_c_message_get_packed_size(m);
    grpc_slice slice = grpc_slice_malloc(n);
    grpc_byte_buffer *buffer;

    protobuf_c_message_pack(m, GRPC_SLICE_START_PTR(slice));
    buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

static void on_status(struct rpc_call *c, int ok)
{
    (void)ok;
    (void)c;
}

/* The mutex is held and no write is under way. */
static void send_status(struct rpc_call *c)
{
    grpc_op ops[3] = {0};
    size_t n = 0;
    int has_text = c->status.code != ERROR_OK;
    grpc_slice text = has_text ? grpc_slice_from_copied_string(c->status.msg) : grpc_empty_slice();

    if (!c->is_initial_sent)
        ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
    c->is_initial_sent = 1;
    if (c->last) {
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = c->last;
    }
    ops[n].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
    ops[n].data.send_status_from_server.status = (grpc_status_code)c->status.code;
    ops[n++].data.send_status_from_server.status_details = has_text ? &text : NULL;
    start_batch(c, ops, n, &c->status_tag);
    grpc_slice_unref(text);
}

static void on_write(struct rpc_call *c, int ok)
{
    int is_stream = c->method != GENERIC && c->server->methods[c->method].takes_a_stream;
    int may_go_on;

    pthread_mutex_lock(&c->mutex);
    c->is_writing = 0;
    grpc_byte_buffer_destroy(c->outgoing);
    c->outgoing = NULL;
    if (c->is_status_pending) {
        c->is_status_pending = 0;
        send_status(c);
    }
    may_go_on = ok && !c->is_closed && !c->is_finished;
    pthread_mutex_unlock(&c->mutex);
    if (may_go_on && is_stream)
        rpc_read_next(c);
    else if (may_go_on && c->events)
        c->events->wake(c->state);
}

static int may_write(const struct rpc_call *c)
{
    return !c->is_writing && !c->is_closed && !c->is_finished;
}

int rpc_can_write(struct rpc_call *c)
{
    int result;

    pthread_mutex_lock(&c->mutex);
    result = may_write(c);
    pthread_mutex_unlock(&c->mutex);
    return result;
}

int rpc_write(struct rpc_call *c, const ProtobufCMessage *m)
{
    grpc_byte_buffer *buffer = pack(m);
    grpc_op ops[2] = {0};
    size_t n = 0;
    int result = -1;

    pthread_mutex_lock(&c->mutex);
    if (may_write(c)) {
        if (!c->is_initial_sent)
            ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
        c->is_initial_sent = 1;
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = buffer;
        c->outgoing = buffer;
        c->is_writing = 1;
        c->write_started_ns = clock_now_ns();
        start_batch(c, ops, n, &c->write_tag);
        buffer = NULL;
        result = 0;
    }
    pthread_mutex_unlock(&c->mutex);
    if (buffer)
        grpc_byte_buffer_destroy(buffer);
    return result;
}

void rpc_finish(struct rpc_call *c, const struct error *e, const ProtobufCMessage *last)
{
    grpc_byte_buffer *buffer = last ? pack(last) : NULL;

    pthread_mutex_lock(&c->mutex);
    if (!c->is_finished) {
        c->is_finished = 1;
        if (e)
            c->status = *e;
        c->last = buffer;
        buffer = NULL;
        if (c->is_writing)
            c->is_status_pending = 1;
        else
            send_status(c);
    }
    pthread_mutex_unlock(&c->mutex);
    if (buffer)
        grpc_byte_buffer_destroy(buffer);
}

static void refuse(struct rpc_call *c, enum error_code code, const char *sentence)
{
    struct error e;

    error_set(&e, code, "%s", sentence);
    rpc_finish(c, &e, NULL);
}

/* ---- wake-ups ---- */

static void on_wake(struct rpc_call *c, int ok)
{
    (void)ok;
    atomic_store(&c->is_woken, 0);
    if (c->events)
        c->events->wake(c->state);
}

void rpc_wake(void *call)
{
    struct rpc_call *c = call;

    if (!atomic_exchange(&c->is_woken, 1))
        start_batch(c, NULL, 0, &c->wake_tag);
}

/* ---- the life of a call, on the completion thread ---- */

static void on_close(struct rpc_call *c, int ok)
{
    (void)ok;
    pthread_mutex_lock(&c->mutex);
    c->is_closed = 1;
    if (c->close_flag)
        c->closed_why = c->deadline_ns && clock_now_ns() + DEADLINE_SLACK_NS >= c->deadline_ns
                            ? ERROR_DEADLINE_EXCEEDED
                            : ERROR_CANCELLED;
    pthread_mutex_unlock(&c->mutex);
    if (c->events)
        c->events->closed(c->state, c->closed_why);
}

/* A read that fails, or finds no message in a call that is over, says nothing: on_close() does. */
static void on_read(struct rpc_call *c, int ok)
{
    const struct rpc_method *m = &c->server->methods[c->method];
    int is_over;

    pthread_mutex_lock(&c->mutex);
    c->is_reading = 0;
    is_over = c->is_closed || c->is_finished;
    pthread_mutex_unlock(&c->mutex);
    if (ok && c->incoming && !is_over)
        m->message(c->server->arg, c);
    else if (m->ended && ok && !is_over)
        m->ended(c->server->arg, c);
    else if (m->takes_a_stream)
        rpc_finish(c, NULL, NULL);
    else
        refuse(c, ERROR_INVALID_ARGUMENT, "the call carries no message");
}

static void refuse_shutdown(struct rpc_call *c)
{
    refuse(c, ERROR_UNAVAILABLE, "the server is shutting down");
}

void rpc_read_next(struct rpc_call *c)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    int is_over;

    op.data.recv_message.recv_message = &c->incoming;
    pthread_mutex_lock(&c->mutex);
    is_over = c->is_closed || c->is_finished;
    if (!is_over) {
        c->is_reading = 1;
        c->read_started_ns = clock_now_ns();
        start_batch(c, &op, 1, &c->read_tag);
    }
    pthread_mutex_unlock(&c->mutex);
    /* Either this sees the flag, or rpc_server_end_streams() sees a call that is reading. */
    if (!is_over && c->server->methods[c->method].takes_a_stream &&
        atomic_load(&c->server->is_ending_streams))
        refuse_shutdown(c);
}

/* The descriptor of the call's connection, -1 when its peer does not say. */
static int connection_of(const struct rpc_call *c)
{
    char *peer = grpc_call_get_peer(c->call);
    int fd;

    if (!peer || sscanf(peer, "fd:%d", &fd) != 1)
        fd = -1;
    gpr_free(peer);
    return fd;
}

static int has_token(const struct rpc_call *c)
{
    for (size_t i = 0; i < c->metadata.count; i++) {
        const grpc_metadata *m = &c->metadata.metadata[i];

        if (grpc_slice_str_cmp(m->key, "authorization") == 0)
            return auth_accepts(c->server->auth, (const char *)GRPC_SLICE_START_PTR(m->value),
                                GRPC_SLICE_LENGTH(m->value));
    }
    return 0;
}

static void arm(struct rpc_server *s, int method);

static void on_new(struct rpc_call *c, int ok)
{
    struct rpc_server *s = c->server;
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};

    if (!ok) // the server is shut down
        return;
    arm(s, c->method);
    list_call(c);
    c->fd = connection_of(c);
    c->arrival_ns = clock_now_ns();
    c->deadline_ns = deadline_ns_of(c->method == GENERIC ? c->details.deadline : c->deadline);
    op.data.recv_close_on_server.cancelled = &c->close_flag;
    start_batch(c, &op, 1, &c->close_tag);

    if (c->method == GENERIC)
        refuse(c, ERROR_UNIMPLEMENTED, "the server has no such method");
    else if (atomic_load(&s->is_closing))
        refuse_shutdown(c);
    else if (s->auth && !s->methods[c->method].is_open && !has_token(c))
        refuse(c, ERROR_UNAUTHENTICATED, "the call needs a bearer token in \"authorization\"");
    else if (!s->methods[c->method].is_open && !atomic_load(&s->is_serving))
        refuse(c, ERROR_UNAVAILABLE, "the server is not ready: the model is being loaded");
    else if (rpc_server_open_calls(s) > s->max_open_calls)
        refuse(c, ERROR_RESOURCE_EXHAUSTED, "the server has too many open calls");
    else
        rpc_read_next(c);
}

/* Waits for one more call of a method. */
static void arm(struct rpc_server *s, int method)
{
    struct rpc_call *c = call_new(s, method);
    grpc_call_error e;

    if (method == GENERIC)
        e = grpc_server_request_call(s->server, &c->call, &c->details, &c->metadata, s->queue,
                                     s->queue, &c->new_tag);
    else
        e = grpc_server_request_registered_call(s->server, s->registered[method], &c->call,
                                                &c->deadline, &c->metadata, NULL, s->queue,
                                                s->queue, &c->new_tag);
    if (e != GRPC_CALL_OK)
        BUG("grpc_server_request_call: %s", grpc_call_error_to_string(e));
}

/* ---- the completion thread ---- */

static void release_writes(struct rpc_server *s)
{
    for (int i = 0; i < s->n_held; i++)
        listener_hold_writes(s->held[i], 0);
    s->n_held = 0;
}

/* A call that was woken will write, and something else waits in the queue, most likely another
 * call of the same step: their messages leave together. */
static void hold_writes(struct rpc_server *s, int fd)
{
    for (int i = 0; i < s->n_held; i++)
        if (s->held[i] == fd)
            return;
    if (fd < 0 || s->n_held == HELD_MAX)
        return;
    if (s->n_held == 0)
        s->held_since_ns = clock_now_ns();
    s->held[s->n_held++] = fd;
    listener_hold_writes(fd, 1);
}

static void fire(struct rpc_server *s, const grpc_event *ev, int is_last)
{
    struct rpc_tag *tag = ev->tag;

    if (tag == &s->down_tag) {
        pthread_mutex_lock(&s->mutex);
        s->is_down = 1;
        pthread_cond_broadcast(&s->changed);
        pthread_mutex_unlock(&s->mutex);
        return;
    }
    struct rpc_call *c = tag->call;
    if (tag == &c->wake_tag && !is_last)
        hold_writes(s, c->fd);
    tag->fire(c, ev->success);
    rpc_call_unref(c);
}

static void *completion_loop(void *arg)
{
    struct rpc_server *s = arg;
    const gpr_timespec forever = gpr_inf_future(GPR_CLOCK_REALTIME);
    const gpr_timespec at_once = gpr_inf_past(GPR_CLOCK_REALTIME);

    trace_name_thread("calls");
    for (;;) {
        grpc_event ev = grpc_completion_queue_next(s->queue, forever, NULL);

        while (ev.type == GRPC_OP_COMPLETE) {
            grpc_event next = grpc_completion_queue_next(s->queue, at_once, NULL);

            fire(s, &ev, next.type != GRPC_OP_COMPLETE);
            if (next.type != GRPC_OP_COMPLETE || clock_now_ns() - s->held_since_ns > HELD_NS)
                release_writes(s);
            ev = next;
        }
        if (ev.type == GRPC_QUEUE_SHUTDOWN)
            return NULL;
    }
}

/* ---- the server ---- */

static void log_library(gpr_log_func_args *a)
{
    enum log_level level = a->severity == GPR_LOG_SEVERITY_ERROR ? LOG_LEVEL_WARN : LOG_LEVEL_DEBUG;

    if (log_enabled(level, "grpc"))
        log_write(level, "grpc", "%s", a->message);
}

static grpc_arg integer_arg(const char *key, int value)
{
    return (grpc_arg){GRPC_ARG_INTEGER, (char *)(uintptr_t)key, {.integer = value}};
}

static void create_server(struct rpc_server *s, int max_message_bytes)
{
    grpc_arg args[] = {
        integer_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, max_message_bytes),
        integer_arg(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1),
        integer_arg(GRPC_ARG_ALLOW_REUSEPORT, 0),
        integer_arg(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1), // identity only
        integer_arg(GRPC_ARG_MAX_METADATA_SIZE, MAX_METADATA_BYTES),
        integer_arg(GRPC_ARG_MAX_CONCURRENT_STREAMS, MAX_STREAMS_PER_CONNECTION),
        integer_arg(GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_MS),
        integer_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_TIMEOUT_MS),
        integer_arg(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        integer_arg(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, MIN_PING_INTERVAL_MS),
    };
    grpc_channel_args channel_args = {sizeof(args) / sizeof(args[0]), args};

    s->server = grpc_server_create(&channel_args, NULL);
    s->queue = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(s->server, s->queue, NULL);
    s->registered = xcalloc((size_t)s->n_methods, sizeof(*s->registered));
    for (int i = 0; i < s->n_methods; i++) {
        s->registered[i] = grpc_server_register_method(s->server, s->methods[i].path, NULL,
                                                       GRPC_SRM_PAYLOAD_NONE, 0);
        if (!s->registered[i])
            BUG("cannot register %s", s->methods[i].path);
    }
    s->credentials = grpc_insecure_server_credentials_create();
}

static void on_accepted(void *arg, int fd)
{
    struct rpc_server *s = arg;

    grpc_server_add_channel_from_fd(s->server, fd, s->credentials);
}

struct rpc_server *rpc_server_open(const struct rpc_options *o, const struct rpc_method *methods,
                                   int n_methods, void *arg, struct error *err)
{
    struct listener *listener = listener_open(o->listen, o->max_connections, err);
    struct rpc_server *s;

    if (!listener)
        return NULL;
    s = xcalloc(1, sizeof(*s));
    s->listener = listener;
    s->methods = methods;
    s->n_methods = n_methods;
    s->max_open_calls = o->max_open_calls;
    s->arg = arg;
    s->auth = o->auth;
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->changed, NULL);
    gpr_set_log_function(log_library);
    grpc_init();
    create_server(s, (int)o->max_message_bytes);
    grpc_server_start(s->server);
    for (int i = 0; i < n_methods; i++)
        for (int k = 0; k < ARMED_PER_METHOD; k++)
            arm(s, i);
    arm(s, GENERIC);
    if (pthread_create(&s->thread, NULL, completion_loop, s))
        die("cannot start the completion thread");
    listener_start(s->listener, on_accepted, s);
    log_debug("rpc", "gRPC core %s listens on %s", grpc_version_string(),
              listener_address(listener));
    return s;
}

void rpc_server_serve(struct rpc_server *s)
{
    atomic_store(&s->is_serving, 1);
}

const char *rpc_server_address(const struct rpc_server *s)
{
    return listener_address(s->listener);
}

int rpc_server_open_calls(const struct rpc_server *server)
{
    struct rpc_server *s = (struct rpc_server *)(uintptr_t)server;
    int n;

    pthread_mutex_lock(&s->mutex);
    n = s->n_open;
    pthread_mutex_unlock(&s->mutex);
    return n;
}

void rpc_server_end_stalled(struct rpc_server *s, int stall_ms)
{
    uint64_t now = clock_now_ns();
    uint64_t stall_ns = (uint64_t)stall_ms * 1000000u;

    pthread_mutex_lock(&s->mutex);
    for (struct rpc_call *c = s->open_calls; c; c = c->next) {
        pthread_mutex_lock(&c->mutex);
        int is_silent = c->is_reading && now > c->read_started_ns + stall_ns;

        if (c->is_writing && !c->is_closed && now > c->write_started_ns + stall_ns)
            grpc_call_cancel_with_status(c->call, GRPC_STATUS_RESOURCE_EXHAUSTED,
                                         "the client does not read", NULL);
        pthread_mutex_unlock(&c->mutex);
        if (is_silent)
            refuse(c, ERROR_DEADLINE_EXCEEDED, "the client has sent nothing for too long");
    }
    pthread_mutex_unlock(&s->mutex);
}

void rpc_server_end_streams(struct rpc_server *s)
{
    atomic_store(&s->is_ending_streams, 1);
    pthread_mutex_lock(&s->mutex);
    for (struct rpc_call *c = s->open_calls; c; c = c->next) {
        int is_reading;

        pthread_mutex_lock(&c->mutex);
        is_reading = c->is_reading;
        pthread_mutex_unlock(&c->mutex);
        if (is_reading && s->methods[c->method].takes_a_stream)
            refuse_shutdown(c);
    }
    pthread_mutex_unlock(&s->mutex);
}

/* 1 when no call is open, and the library's server as far down as asked, within timeout_ms. */
static int wait_calls(struct rpc_server *s, int is_down, int timeout_ms)
{
    struct timespec until;
    int status = 0;
    int is_reached;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&s->mutex);
    while (!(s->is_down == is_down && s->n_open == 0) && !status)
        status = pthread_cond_timedwait(&s->changed, &s->mutex, &until);
    is_reached = s->is_down == is_down && s->n_open == 0;
    pthread_mutex_unlock(&s->mutex);
    return is_reached;
}

/* New calls are refused in words until the connections are closed: the library's own shutdown ends
 * what arrives during it CANCELLED. A call that was sent and not read is lost with its connection,
 * which its client sees as UNAVAILABLE. */
static void hang_up(struct rpc_server *s)
{
    uint64_t until = clock_now_ns() + (uint64_t)HANG_UP_MS * 1000000u;

    /* Let the answers arrive; a client that takes none of its bytes is not waited for longer. */
    while (listener_n_unsent(s->listener) > 0 && clock_now_ns() < until)
        poll(NULL, 0, 1);
    until = clock_now_ns() + (uint64_t)HANG_UP_MS * 1000000u;
    listener_end_reading(s->listener);
    while (listener_n_connections(s->listener) > 0 && clock_now_ns() < until)
        poll(NULL, 0, 1);
}

void rpc_server_close(struct rpc_server *s, int timeout_ms)
{
    listener_stop(s->listener);
    atomic_store(&s->is_closing, 1);
    wait_calls(s, 0, timeout_ms);
    hang_up(s);
    listener_close(s->listener);
    grpc_server_shutdown_and_notify(s->server, s->queue, &s->down_tag);
    if (!wait_calls(s, 1, HANG_UP_MS)) {
        grpc_server_cancel_all_calls(s->server);
        if (!wait_calls(s, 1, CANCEL_GRACE_MS)) {
            log_error("rpc", "%d calls do not end", rpc_server_open_calls(s));
            return; // their memory is still in use: leave it to the end of the process
        }
    }
    grpc_server_destroy(s->server);
    grpc_completion_queue_shutdown(s->queue);
    pthread_join(s->thread, NULL);
    grpc_completion_queue_destroy(s->queue);
    grpc_server_credentials_release(s->credentials);
    grpc_shutdown();
    free(s->registered);
    pthread_mutex_destroy(&s->mutex);
    pthread_cond_destroy(&s->changed);
    free(s);
}
