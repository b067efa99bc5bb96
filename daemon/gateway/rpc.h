/*
 * The calls: the only header, and rpc.c the only file, that stands for gRPC core.
 *
 * One completion thread runs every callback, so callbacks of one call never overlap. Handlers may
 * write to and finish a call from any thread; the call's mutex orders them. A call is counted:
 * whoever keeps a pointer past a callback holds a reference.
 *
 *   new call -> token, room? -> its message is read -> method->message()
 *   rpc_write() … events->wake() … rpc_write() … rpc_finish() -> events->closed()
 *
 * The body of a call is read only after its token was checked. Knows no model and no engine.
 */
#ifndef INTERNVLD_GATEWAY_RPC_H
#define INTERNVLD_GATEWAY_RPC_H

#include <protobuf-c/protobuf-c.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/gateway/auth.h"
#include "kernels/arena.h"
#include "kernels/error.h"

struct rpc_server;
struct rpc_call;

struct rpc_method {
    const char *path;   // "/package.Service/Method"
    int is_open;        // answered without a token, and before rpc_server_serve()
    int takes_a_stream; // client streams messages: message() is called for each
    /* Completion thread; the message is there to be taken. `arg` is the server's. The handler
     * finishes the call, now or later (a method that takes a stream and has no ended(): rpc.c does
     * when the client has sent all). */
    void (*message)(void *arg, struct rpc_call *c);
    /* Of a method that takes a stream. NULL: each message has one answer, after which the next is
     * read. Else messages are read when rpc_read_next() asks for them, and this is called once, on
     * the completion thread, when the client has sent all. */
    void (*ended)(void *arg, struct rpc_call *c);
};

/* What a handler hears of a call it keeps. Both run on the completion thread. */
struct rpc_events {
    /* The last write is done, or rpc_wake() was called (also after the call has closed). */
    void (*wake)(void *state);
    /* Once; only rpc_wake() is heard after it. ERROR_OK when the status was sent, ERROR_CANCELLED
     * when the client went away, ERROR_DEADLINE_EXCEEDED. */
    void (*closed)(void *state, enum error_code why);
};

struct rpc_options {
    const char *listen; // "HOST:PORT", "[V6]:PORT" or "unix:PATH"; port 0 picks one
    int64_t max_message_bytes;
    int max_connections, max_open_calls;
    const struct auth *auth; // borrowed; NULL: no token is asked
};

/* Binds, starts the completion thread and the listener. `methods` [n_methods] is borrowed. NULL and
 * an error when the address cannot be used. */
struct rpc_server *rpc_server_open(const struct rpc_options *o, const struct rpc_method *methods,
                                   int n_methods, void *arg, struct error *err);
/* Until this is called only open methods are answered; others are UNAVAILABLE. */
void rpc_server_serve(struct rpc_server *s);
const char *rpc_server_address(const struct rpc_server *s); // as bound: "127.0.0.1:50051". Borrowed
int rpc_server_open_calls(const struct rpc_server *s);
/* Ends calls whose client has not taken a message, or has not sent the one that is waited for, for
 * `stall_ms`. Call it now and then. */
void rpc_server_end_stalled(struct rpc_server *s, int stall_ms);
/* Ends calls that wait for a message of their client's stream, now or later: UNAVAILABLE. */
void rpc_server_end_streams(struct rpc_server *s);
/* Refuses new calls, lets the open ones finish for timeout_ms, cancels the rest, frees. */
void rpc_server_close(struct rpc_server *s, int timeout_ms);

struct rpc_call *rpc_call_ref(struct rpc_call *c);
void rpc_call_unref(struct rpc_call *c);
/* From message() only. */
void rpc_call_listen(struct rpc_call *c, const struct rpc_events *e, void *state);
void *rpc_call_state(const struct rpc_call *c); // what it was told to, NULL before. Likewise
uint64_t rpc_call_arrival_ns(const struct rpc_call *c);  // CLOCK_MONOTONIC
uint64_t rpc_call_deadline_ns(const struct rpc_call *c); // CLOCK_MONOTONIC, 0: none
/* 0 while somebody waits for the answer; else -1 and CANCELLED or DEADLINE_EXCEEDED. Any thread. */
int rpc_check_waiting(struct rpc_call *c, struct error *err);

/* Asks for the next message of a method that has ended(), the last one being taken. Any thread. */
void rpc_read_next(struct rpc_call *c);

/* Bytes of the message that was read and not yet taken. */
size_t rpc_message_bytes(const struct rpc_call *c);
/* Takes it: checked (wire_check.h) and unpacked into `a`, which this initialises with a budget made
 * from the message's size. Any thread, once a message. NULL: INVALID_ARGUMENT or
 * RESOURCE_EXHAUSTED. */
ProtobufCMessage *rpc_take_message(struct rpc_call *c, const ProtobufCMessageDescriptor *type,
                                   size_t max_elements, struct arena *a, struct error *err);

int rpc_can_write(
    struct rpc_call *c); // no write is under way, and the call is neither closed nor finished
/* Packs and sends one message. -1 when rpc_can_write() is 0. */
int rpc_write(struct rpc_call *c, const ProtobufCMessage *m);
/* Ends the call: `e` NULL or ERROR_OK is success, with `last` (may be NULL) before the status. The
 * first finish counts; later ones are ignored. */
void rpc_finish(struct rpc_call *c, const struct error *e, const ProtobufCMessage *last);

/* events->wake() of this call runs soon after on the completion thread. Any thread that holds a
 * reference; never blocks. `call` is a struct rpc_call, so that this can be a stream_notify. */
void rpc_wake(void *call);

#endif
