/*
 * What both ends of control share: the frame on the wire, the address that launch exchanges, and
 * the two kinds of end behind one handle. Included by control*.c and their tests only.
 *
 *   rank 0  control_listen()  control_accept()   gateway_end_*()  control_gateway.c
 *   others                    control_connect()  worker_end_*()   control_worker.c
 */
#ifndef INTERNVLD_PARALLEL_CONTROL_WIRE_H
#define INTERNVLD_PARALLEL_CONTROL_WIRE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include "parallel/control.h"

#define CONTROL_MAGIC 0x4c564e49u // "INVL"
#define CONTROL_SECRET_BYTES 32
#define CONTROL_VERSION_BYTES 32
#define CONTROL_N_ADDRESSES_MAX 8
#define CONTROL_CLOSE_MS 2000 // at most, for both ends to empty their queues

#define FRAME_HEADER_BYTES 16
struct frame_header {
    uint32_t type; // enum control_type
    uint64_t n_bytes;
};
/* magic u32, type u32, n_bytes u64; little endian. */
void frame_header_encode(uint8_t bytes[FRAME_HEADER_BYTES], uint32_t type, uint64_t n_bytes);
/* -1 on a bad magic, a type that is never sent, or more than CONTROL_MAX_BYTES. */
int frame_header_decode(struct frame_header *h, const uint8_t bytes[FRAME_HEADER_BYTES]);

/* Payload of CONTROL_HELLO: secret, then version padded with zeros, then rank i32. */
#define HELLO_BYTES (CONTROL_SECRET_BYTES + CONTROL_VERSION_BYTES + 4)

/* Where rank 0 listens and what proves that a connection is of this job; broadcast at launch. */
struct control_address {
    uint8_t secret[CONTROL_SECRET_BYTES];
    int32_t n;
    socklen_t n_bytes[CONTROL_N_ADDRESSES_MAX];
    struct sockaddr_storage at[CONTROL_N_ADDRESSES_MAX]; // tried in this order
};

/* The listening socket; fills a->n, n_bytes and at. `host` as in control_open(). */
int control_listen(struct control_address *a, const char *host, int all_on_this_host);
/* Accepts until ranks 1 … world - 1 have presented the secret: fds[rank], non-blocking. A
 * connection that stays silent or presents anything else is closed and logged; dies after
 * timeout_ms naming the missing ranks. */
void control_accept(int listen_fd, const uint8_t *secret, int world, int *fds, int timeout_ms);
/* A connected socket, blocking, that the gateway has accepted as `rank`; dies after timeout_ms. */
int control_connect(const struct control_address *a, int rank, int timeout_ms);

int64_t control_now_ms(void); // monotonic
/* No delay of small frames; a host or link that is gone shows as an error within about 15 s. */
void control_socket_options(int fd);

struct gateway_end;
/* Takes over fds[1 … world - 1]. */
struct gateway_end *gateway_end_open(const struct topology *t, const int *fds);
void gateway_end_close(struct gateway_end *g);

struct worker_end;
struct worker_end *worker_end_open(int fd); // takes over fd
void worker_end_close(struct worker_end *w);

struct control {
    struct gateway_end *gateway; // rank 0, else NULL
    struct worker_end *worker;   // the others, else NULL
};

#endif
