/*
 * One call over gRPC's C core: bytes out, messages in, a status at the end.
 *
 * The only part of the client that includes gRPC's headers is rpc.c. A queue is a completion queue
 * with the calls that are in flight on it; one thread owns it. Nothing here knows what the messages
 * mean.
 */
#ifndef INTERNVL_CLIENT_RPC_H
#define INTERNVL_CLIENT_RPC_H

#include <protobuf-c/protobuf-c.h>
#include <stddef.h>
#include <stdint.h>

#include "client/internvl_client.h"

struct rpc_channel;
struct rpc_queue;

/* Fills `err` (which may be NULL), cut on a UTF-8 boundary; returns -1. */
int rpc_error(struct internvl_error *err, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

struct rpc_channel *rpc_channel_open(const char *address, const char *token,
                                     size_t max_message_bytes, struct internvl_error *err);
void rpc_channel_close(struct rpc_channel *c);

/* One message of the answer, [n_bytes], borrowed. Non-zero ends the call: with `err`'s code where
 * that was set, else CANCELLED. */
typedef int (*rpc_on_message)(void *arg, const uint8_t *bytes, size_t n_bytes,
                              struct internvl_error *err);
/* Once, after the last message; then `arg` is the caller's again. */
typedef void (*rpc_on_end)(void *arg, const struct internvl_error *status);

/* The next message of a request that is a stream, borrowed until the next call; NULL: no more. */
typedef const ProtobufCMessage *(*rpc_on_next)(void *arg);

struct rpc_handlers {
    rpc_on_message on_message;
    rpc_on_end on_end;
    rpc_on_next on_next; // NULL: the request is one message
    void *arg;
};

struct rpc_queue *rpc_queue_open(void);
/* Cancels what is in flight, waits for its end (calling on_end, not on_message), frees. */
void rpc_queue_close(struct rpc_queue *q);
/* As internvl_queue_poll(). */
int rpc_queue_poll(struct rpc_queue *q, int timeout_ms);

/* Serialises `request` and starts the call. 0, or -1 and `err`; then no handler is called. */
int rpc_start(struct rpc_channel *c, struct rpc_queue *q, const char *method,
              const ProtobufCMessage *request, const struct internvl_call_options *o,
              const struct rpc_handlers *h, struct internvl_error *err);
/* The same, to its end, on a queue of its own. */
int rpc_run(struct rpc_channel *c, const char *method, const ProtobufCMessage *request,
            const struct internvl_call_options *o, rpc_on_message on_message, void *arg,
            struct internvl_error *err);
/* The same with a request of several messages, `first` and what on_next gives. It is asked for as
 * fast as the server takes them, and no more once the server has ended the call. */
int rpc_run_stream(struct rpc_channel *c, const char *method, const ProtobufCMessage *first,
                   rpc_on_next on_next, const struct internvl_call_options *o,
                   rpc_on_message on_message, void *arg, struct internvl_error *err);

#endif
