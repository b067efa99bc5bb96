/*
 * The five verbs over MPI on host memory.
 *
 * Owns one communicator a group and the scratch of its all-reduce. Every verb is non-blocking
 * point-to-point messages and one wait, because the wait is ours: MPI's own spins until the
 * message comes, and would take the core from a rank that is still computing. Must not know what
 * is reduced or sent.
 *
 *   all_reduce, 4 ranks, values a b c d:     a      b      c      d
 *     step 0, partner = rank ^ 1            a+b    a+b    c+d    c+d
 *     step 1, partner = rank ^ 2            (a+b)+(c+d) on every rank
 *
 * The lower rank's value is the left operand on both sides, so all ranks hold the same bits.
 */
#include <mpi.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/clock.h"
#include "kernels/log.h"
#include "parallel/comm.h"

#define REDUCE_CHUNK_BYTES ((size_t)512 << 10) // fits the cache beside its scratch
#define SEND_CHUNK_BYTES ((size_t)8 << 20)     // an MPI count is an int
#define SPIN_NS 200000                         // then NAP_NS between looks
#define NAP_NS 20000

enum tag { TAG_REDUCE = 1, TAG_GATHER, TAG_BROADCAST, TAG_SEND };

struct mpi_state {
    MPI_Comm group;
    float *scratch;        // [scratch_n], one chunk of the partner
    size_t scratch_n;      // floats
    size_t max_n;          // floats of one all_reduce
    MPI_Request *requests; // [2 * size]
    int n_requests;        // begun and not yet waited for
};

static void check(int rc, const char *verb)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int n;
    if (rc == MPI_SUCCESS)
        return;
    MPI_Error_string(rc, text, &n);
    die("%s: %s", verb, text);
}

static size_t size_min(size_t a, size_t b)
{
    return a < b ? a : b;
}

static void begin_send(struct mpi_state *s, const void *x, size_t n_bytes, int to, enum tag tag)
{
    check(MPI_Isend(x, (int)n_bytes, MPI_BYTE, to, tag, s->group, &s->requests[s->n_requests++]),
          "MPI_Isend");
}

static void begin_recv(struct mpi_state *s, void *x, size_t n_bytes, int from, enum tag tag)
{
    check(MPI_Irecv(x, (int)n_bytes, MPI_BYTE, from, tag, s->group, &s->requests[s->n_requests++]),
          "MPI_Irecv");
}

/* Until everything begun is done: looks without pause for a moment (a peer that computes the same
 * is rarely later than that), then gives the core away between looks. */
static void wait_all(struct mpi_state *s)
{
    const struct timespec nap = {.tv_nsec = NAP_NS};
    int done = 0;
    uint64_t start_ns = clock_now_ns();
    for (;;) {
        check(MPI_Testall(s->n_requests, s->requests, &done, MPI_STATUSES_IGNORE), "MPI_Testall");
        if (done)
            break;
        if (clock_now_ns() - start_ns < SPIN_NS)
            sched_yield();
        else
            nanosleep(&nap, NULL);
    }
    s->n_requests = 0;
}

static void add_partner(float *x, const float *partner, size_t n, int partner_is_left)
{
    if (partner_is_left)
        for (size_t i = 0; i < n; i++)
            x[i] = partner[i] + x[i];
    else
        for (size_t i = 0; i < n; i++)
            x[i] = x[i] + partner[i];
}

static void mpi_all_reduce(struct comm *c, float *x, size_t n)
{
    struct mpi_state *s = c->state;
    if (n > s->max_n)
        BUG("all_reduce of %zu floats in a group opened for %zu", n, s->max_n);
    for (size_t done = 0; done < n; done += s->scratch_n) {
        size_t n_chunk = size_min(n - done, s->scratch_n);
        for (int distance = 1; distance < c->size; distance *= 2) {
            int partner = c->rank ^ distance;
            begin_recv(s, s->scratch, n_chunk * sizeof(float), partner, TAG_REDUCE);
            begin_send(s, x + done, n_chunk * sizeof(float), partner, TAG_REDUCE);
            wait_all(s);
            add_partner(x + done, s->scratch, n_chunk, partner < c->rank);
        }
    }
}

static void mpi_all_gather(struct comm *c, void *dst, const void *src, size_t n_bytes)
{
    struct mpi_state *s = c->state;
    uint8_t *mine = (uint8_t *)dst + (size_t)c->rank * n_bytes;
    if (src != mine)
        memcpy(mine, src, n_bytes);
    for (size_t done = 0; done < n_bytes; done += SEND_CHUNK_BYTES) {
        size_t n_chunk = size_min(n_bytes - done, SEND_CHUNK_BYTES);
        for (int r = 0; r < c->size; r++) {
            if (r == c->rank)
                continue;
            begin_recv(s, (uint8_t *)dst + (size_t)r * n_bytes + done, n_chunk, r, TAG_GATHER);
            begin_send(s, (const uint8_t *)src + done, n_chunk, r, TAG_GATHER);
        }
        wait_all(s);
    }
}

static void mpi_broadcast(struct comm *c, void *x, size_t n_bytes, int root)
{
    struct mpi_state *s = c->state;
    for (size_t done = 0; done < n_bytes; done += SEND_CHUNK_BYTES) {
        uint8_t *chunk = (uint8_t *)x + done;
        size_t n_chunk = size_min(n_bytes - done, SEND_CHUNK_BYTES);
        if (c->rank != root)
            begin_recv(s, chunk, n_chunk, root, TAG_BROADCAST);
        else
            for (int r = 0; r < c->size; r++)
                if (r != root)
                    begin_send(s, chunk, n_chunk, r, TAG_BROADCAST);
        wait_all(s);
    }
}

static void mpi_send(struct comm *c, const void *x, size_t n_bytes, int to)
{
    struct mpi_state *s = c->state;
    for (size_t done = 0; done < n_bytes; done += SEND_CHUNK_BYTES) {
        begin_send(s, (const uint8_t *)x + done, size_min(n_bytes - done, SEND_CHUNK_BYTES), to,
                   TAG_SEND);
        wait_all(s);
    }
}

static void mpi_recv(struct comm *c, void *x, size_t n_bytes, int from)
{
    struct mpi_state *s = c->state;
    for (size_t done = 0; done < n_bytes; done += SEND_CHUNK_BYTES) {
        begin_recv(s, (uint8_t *)x + done, size_min(n_bytes - done, SEND_CHUNK_BYTES), from,
                   TAG_SEND);
        wait_all(s);
    }
}

static void mpi_close(struct comm *c)
{
    struct mpi_state *s = c->state;
    check(MPI_Comm_free(&s->group), "MPI_Comm_free");
    free(s->scratch);
    free(s->requests);
    free(s);
    free(c);
}

static const struct comm_ops mpi_ops = {
    .name = "mpi",
    .all_reduce = mpi_all_reduce,
    .all_gather = mpi_all_gather,
    .broadcast = mpi_broadcast,
    .send = mpi_send,
    .recv = mpi_recv,
    .close = mpi_close,
};

struct comm *comm_mpi_open(int color, int key, size_t max_bytes)
{
    MPI_Comm group;
    check(MPI_Comm_split(MPI_COMM_WORLD, color < 0 ? MPI_UNDEFINED : color, key, &group),
          "MPI_Comm_split");
    if (group == MPI_COMM_NULL)
        return NULL;
    struct comm *c = xcalloc(1, sizeof(*c));
    struct mpi_state *s = xcalloc(1, sizeof(*s));
    c->ops = &mpi_ops;
    c->state = s;
    check(MPI_Comm_set_errhandler(group, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check(MPI_Comm_rank(group, &c->rank), "MPI_Comm_rank");
    check(MPI_Comm_size(group, &c->size), "MPI_Comm_size");
    s->group = group;
    s->max_n = max_bytes / sizeof(float);
    s->scratch_n = size_min(s->max_n, REDUCE_CHUNK_BYTES / sizeof(float));
    s->scratch = xcalloc(s->scratch_n + 1, sizeof(float));
    s->requests = xcalloc(2 * (size_t)c->size, sizeof(*s->requests));
    return c;
}
