/*
 * Messages, frames, and the opening and closing of control.
 *
 * Owns the job secret and the exchange of addresses. The gateway's end is control_gateway.c, a
 * worker's is control_worker.c, how they find each other is control_handshake.c. Must not know what
 * a payload means.
 */
#include "parallel/control.h"

#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/log.h"
#include "parallel/control_wire.h"
#include "parallel/launch.h"

#define HANDSHAKES_MS 30000
#define DEAD_LINK_MS 15000
#define MESSAGE_HEAD_BYTES ((sizeof(struct message) + 15) / 16 * 16) // keeps the payload aligned

struct message *message_new(enum control_type type, uint64_t n_bytes)
{
    if (n_bytes > CONTROL_MAX_BYTES)
        BUG("message of %llu bytes", (unsigned long long)n_bytes);
    uint8_t *block = xcalloc(1, MESSAGE_HEAD_BYTES + n_bytes);
    struct message *m = (struct message *)block;
    m->type = type;
    m->n_bytes = n_bytes;
    m->payload = block + MESSAGE_HEAD_BYTES;
    m->n_refs = 1;
    return m;
}

struct message *message_ref(struct message *m)
{
    __atomic_add_fetch(&m->n_refs, 1, __ATOMIC_RELAXED);
    return m;
}

void message_unref(struct message *m)
{
    if (m && __atomic_sub_fetch(&m->n_refs, 1, __ATOMIC_ACQ_REL) == 0)
        free(m);
}

void frame_header_encode(uint8_t bytes[FRAME_HEADER_BYTES], uint32_t type, uint64_t n_bytes)
{
    uint32_t words[2] = {htole32(CONTROL_MAGIC), htole32(type)};
    uint64_t n = htole64(n_bytes);
    memcpy(bytes, words, sizeof(words));
    memcpy(bytes + sizeof(words), &n, sizeof(n));
}

int frame_header_decode(struct frame_header *h, const uint8_t bytes[FRAME_HEADER_BYTES])
{
    uint32_t words[2];
    uint64_t n;
    memcpy(words, bytes, sizeof(words));
    memcpy(&n, bytes + sizeof(words), sizeof(n));
    h->type = le32toh(words[1]);
    h->n_bytes = le64toh(n);
    if (le32toh(words[0]) != CONTROL_MAGIC || h->type == CONTROL_NONE || h->type >= CONTROL_LOST ||
        h->n_bytes > CONTROL_MAX_BYTES)
        return -1;
    return 0;
}

int64_t control_now_ms(void)
{
    return (int64_t)(clock_now_ns() / 1000000u);
}

void control_socket_options(int fd)
{
    static const struct {
        int level, name, value;
    } options[] = {
        {IPPROTO_TCP, TCP_NODELAY, 1},   {SOL_SOCKET, SO_KEEPALIVE, 1},
        {IPPROTO_TCP, TCP_KEEPIDLE, 5}, // seconds
        {IPPROTO_TCP, TCP_KEEPINTVL, 2}, {IPPROTO_TCP, TCP_USER_TIMEOUT, DEAD_LINK_MS},
    };
    for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++)
        if (setsockopt(fd, options[i].level, options[i].name, &options[i].value, sizeof(int)))
            die("setsockopt: %s", strerror(errno));
}

static void make_secret(uint8_t *secret)
{
    if (getrandom(secret, CONTROL_SECRET_BYTES, 0) != CONTROL_SECRET_BYTES)
        die("getrandom: %s", strerror(errno));
}

static struct gateway_end *open_gateway(const struct topology *t, const char *host)
{
    struct control_address address = {0};
    int n_on_host, index_on_host;
    int *fds = xcalloc((size_t)t->world, sizeof(*fds));
    launch_host_ranks(&n_on_host, &index_on_host);
    make_secret(address.secret);
    int listen_fd = control_listen(&address, host, n_on_host == t->world);
    launch_broadcast(&address, sizeof(address));
    control_accept(listen_fd, address.secret, t->world, fds, HANDSHAKES_MS);
    close(listen_fd);
    struct gateway_end *g = gateway_end_open(t, fds);
    free(fds);
    return g;
}

static struct worker_end *open_worker(const struct topology *t)
{
    struct control_address address;
    launch_broadcast(&address, sizeof(address));
    return worker_end_open(control_connect(&address, t->rank, HANDSHAKES_MS));
}

struct control *control_open(const struct topology *t, const char *host)
{
    struct control *c = xcalloc(1, sizeof(*c));
    if (t->rank == 0)
        c->gateway = open_gateway(t, host);
    else
        c->worker = open_worker(t);
    return c;
}

void control_close(struct control *c)
{
    if (c->gateway)
        gateway_end_close(c->gateway);
    if (c->worker)
        worker_end_close(c->worker);
    free(c);
}
