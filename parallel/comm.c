/*
 * The front doors of the five verbs: a group of one, arguments, and the clock.
 *
 * Knows no transport: what a verb does is the table's.
 */
#include "parallel/comm.h"

#include <stdint.h>

#include "kernels/clock.h"
#include "kernels/log.h"
#include "kernels/trace.h"

#define TRACE_FROM_NS 20000 // a shorter verb is no span of the timeline

static void count_wait(struct comm *c, const char *verb, uint64_t start_ns)
{
    uint64_t ns = clock_now_ns() - start_ns;
    c->wait_ns += ns;
    if (ns >= TRACE_FROM_NS)
        trace_end(verb, start_ns, "", 0);
}

static void check_peer(const struct comm *c, int peer)
{
    if (peer < 0 || peer >= c->size)
        BUG("peer %d in a group of %d", peer, c->size);
}

void comm_all_reduce(struct comm *c, float *x, size_t n)
{
    if (c->size & (c->size - 1))
        BUG("all_reduce in a group of %d: not a power of two", c->size);
    if (c->size == 1 || n == 0)
        return;
    uint64_t start_ns = clock_now_ns();
    c->ops->all_reduce(c, x, n);
    count_wait(c, "all_reduce", start_ns);
}

int comm_all_reduce_norm(struct comm *c, struct tensor *y, struct tensor *x,
                         const struct tensor *sum, const float *weight, float eps)
{
    if (c->size == 1 || !c->ops->all_reduce_norm)
        return 0;
    uint64_t start_ns = clock_now_ns();
    int done = c->ops->all_reduce_norm(c, y, x, sum, weight, eps);
    count_wait(c, "all_reduce", start_ns);
    return done;
}

void comm_all_gather(struct comm *c, void *dst, const void *src, size_t n_bytes)
{
    if (n_bytes == 0)
        return;
    uint64_t start_ns = clock_now_ns();
    c->ops->all_gather(c, dst, src, n_bytes); // a group of one too: it knows whose memory this is
    if (c->size > 1)
        count_wait(c, "all_gather", start_ns);
}

void comm_broadcast(struct comm *c, void *x, size_t n_bytes, int root)
{
    check_peer(c, root);
    if (c->size == 1 || n_bytes == 0)
        return;
    uint64_t start_ns = clock_now_ns();
    c->ops->broadcast(c, x, n_bytes, root);
    count_wait(c, "broadcast", start_ns);
}

void comm_send(struct comm *c, const void *x, size_t n_bytes, int to)
{
    check_peer(c, to);
    if (to == c->rank)
        BUG("rank %d sends to itself", to);
    uint64_t start_ns = clock_now_ns();
    c->ops->send(c, x, n_bytes, to);
    count_wait(c, "send", start_ns);
}

void comm_recv(struct comm *c, void *x, size_t n_bytes, int from)
{
    check_peer(c, from);
    if (from == c->rank)
        BUG("rank %d receives from itself", from);
    uint64_t start_ns = clock_now_ns();
    c->ops->recv(c, x, n_bytes, from);
    count_wait(c, "recv", start_ns);
}

void comm_close(struct comm *c)
{
    if (c)
        c->ops->close(c);
}
