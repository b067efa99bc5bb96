/*
 * Control: small framed messages over TCP between the gateway and each worker. Batches, results,
 * tiles, features, pings. The gateway (rank 0) is one end of every connection.
 *
 * A blocked socket wakes in tens of microseconds and costs nothing idle, where an MPI wait spins.
 * Addresses and a random job secret are exchanged through MPI at launch; a connection that does not
 * present the secret is closed. A frame is {magic u32, type u32, n_bytes u64} and n_bytes of
 * payload, little endian; both ends run the same build (the version is in the handshake). A frame
 * past CONTROL_MAX_BYTES, or a bad magic, is die(): peers are ours.
 *
 * Liveness: the gateway pings every worker each 200 ms; a worker's receiving thread answers at
 * once, also while its main thread computes. A closed connection, or 1 s without an answer, makes
 * control_next() return CONTROL_LOST with that rank: the caller fails its streams and ends the job.
 * A worker whose gateway has gone, or has said nothing for 1.5 s, dies.
 *
 * Threads: the gateway end belongs to the engine thread. A worker's end is used by its main thread
 * (and, inside, by the receiving thread).
 */
#ifndef INTERNVLD_PARALLEL_CONTROL_H
#define INTERNVLD_PARALLEL_CONTROL_H

#include <stddef.h>
#include <stdint.h>

#include "parallel/topology.h"

#define CONTROL_MAX_BYTES ((uint64_t)8 << 30)

enum control_type {
    CONTROL_NONE,
    CONTROL_HELLO,    // worker -> gateway: secret, version, rank (inside control.c)
    CONTROL_PING,     // inside control.c
    CONTROL_PONG,     // inside control.c
    CONTROL_READY,    // worker -> gateway: struct rank_info (batch.h); weights are loaded
    CONTROL_TILES,    // gateway -> vision: struct tile_batch
    CONTROL_FEATURES, // vision -> gateway: struct feature_result
    CONTROL_BATCH,    // gateway -> language: struct batch
    CONTROL_RESULT,   // language (shard 0 of a stage) -> gateway: struct step_result
    CONTROL_TRACE,    // worker -> gateway: struct trace_span [n] (kernels/trace.h)
    CONTROL_STOP,     // gateway -> all: leave the loop, finalize, exit 0
    CONTROL_LOST,     // from control_next() only: the rank is gone
};

/* A message with its payload; counted, because one batch goes to many ranks without being copied.
 */
struct message {
    enum control_type type;
    int rank; // sender, on received ones
    uint64_t n_bytes;
    uint8_t *payload; // [n_bytes]
    int n_refs;       // atomic
};
struct message *message_new(enum control_type type,
                            uint64_t n_bytes); // payload zeroed; one reference
struct message *message_ref(struct message *m);
void message_unref(struct message *m); // NULL allowed

struct control;
/* Collective: every rank calls it once after launch_init(). Rank 0 listens on `host` (NULL:
 * loopback when all ranks share this host, else the address that others reach this host by), the
 * others connect. Dies on failure. */
struct control *control_open(const struct topology *t, const char *host);
/* Both ends send what is queued, then wait for the other to close too: at most 2 s. */
void control_close(struct control *c);

/* Gateway. control_fd() is an epoll descriptor, readable when control_next() has something to do.
 * control_send() takes over one reference, never blocks, and queues what the socket does not take.
 */
int control_fd(const struct control *c);
void control_send(struct control *c, int rank, struct message *m);
/* The next received message (the caller unrefs it), or NULL when there is none now: call it until
 * then. Also does the pending writes and the pings; call it whenever control_fd() is readable (a
 * timer in it fires each 100 ms). A rank that was sent CONTROL_STOP may close without being lost;
 * what is sent to a lost one is dropped. */
struct message *control_next(struct control *c);
/* How long a rank may leave a ping unanswered (default 1000 ms); a debugging session wants more. */
void control_set_timeout_ms(struct control *c, int timeout_ms);
uint64_t control_queued_bytes(const struct control *c, int rank); // not yet taken by the socket

/* Worker. Both block; control_recv() never returns NULL (the gateway's disappearance is die()).
 * control_reply() takes over one reference. */
struct message *control_recv(struct control *c);
void control_reply(struct control *c, struct message *m);

#endif
