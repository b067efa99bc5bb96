/*
 * The listening socket, its accept loop, and the cap on connections.
 *
 * Our own loop because gRPC core's listener never accepts again once the process has run out of
 * file descriptors (CVE-2023-4785); here a spare descriptor is given up to turn the caller away and
 * the loop goes on. Accepted sockets are handed over with a callback. Knows no RPC.
 */
#ifndef INTERNVLD_GATEWAY_LISTENER_H
#define INTERNVLD_GATEWAY_LISTENER_H

#include "kernels/error.h"

struct listener;

/* 1 when `address` ("HOST:PORT", "[V6]:PORT", "unix:PATH") can only be reached from this machine, 0
 * when others can reach it, -1 and an error when it is not an address. */
int listener_is_local(const char *address, struct error *err);
/* Binds and listens. A stale unix socket (nobody answers) is replaced. */
struct listener *listener_open(const char *address, int max_connections, struct error *err);
const char *listener_address(const struct listener *l); // as bound, with the real port. Borrowed
/* Starts the thread; `accepted` runs on it and owns fd (non-blocking) from then on. */
void listener_start(struct listener *l, void (*accepted)(void *arg, int fd), void *arg);
void listener_stop(struct listener *l); // accepts no more: joins the thread, closes the socket
/* After listener_stop(): connections whose peer has not acknowledged all that was written to them.
 * Such a one must not be closed yet: with bytes that nobody has read in its own buffer the close
 * would be a reset, which drops what is under way. */
int listener_n_unsent(struct listener *l);
/* After listener_stop(): nothing more is read from the accepted connections than what has arrived;
 * their owners see the end of the stream, and can still write. */
void listener_end_reading(struct listener *l);
int listener_n_connections(struct listener *l); // accepted and not closed; after listener_stop()
/* While `is_held` is 1 the system gathers what is written to a TCP connection (TCP_CORK, 200 ms at
 * most), so that many small messages leave as one. Any thread; of a descriptor that is no longer a
 * connection it does nothing that lasts. */
void listener_hold_writes(int fd, int is_held);
void listener_close(struct listener *l); // stops first; NULL allowed

#endif
