/*
 * The collectives on real ranks: every result is computed here too, bit for bit.
 *
 * Run by mpirun on 1, 2, 4 and 8 ranks. A failed check dies, which ends the job.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/log.h"
#include "parallel/comm.h"
#include "parallel/launch.h"

#define BIG_N ((size_t)300001) // floats: several chunks and a ragged end
#define BIG_BYTES ((size_t)(20 << 20) + 5)

#define check(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            die("check failed: %s", #condition);                                                   \
    } while (0)

/* A float with all its mantissa in use, so that another order of sums shows. */
static float value(int rank, size_t i)
{
    uint64_t x = ((uint64_t)rank << 40) + i + 1;
    x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9u;
    return ((float)(x >> 40) / 16777216.0f - 0.5f) * (float)(1 << (x % 13));
}

/* The binary tree over ranks [first, first + n). */
static float tree(int first, int n, size_t i)
{
    if (n == 1)
        return value(first, i);
    return tree(first, n / 2, i) + tree(first + n / 2, n / 2, i);
}

static void test_all_reduce(struct comm *c)
{
    static const size_t sizes[] = {0, 1, 3, 896, 131072, 131073, BIG_N};
    float *x = xcalloc(BIG_N, sizeof(*x));
    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
        size_t n = sizes[s];
        for (size_t i = 0; i < n; i++)
            x[i] = value(c->rank, i);
        comm_all_reduce(c, x, n);
        for (size_t i = 0; i < n; i++) {
            float expected = tree(0, c->size, i);
            check(memcmp(&expected, &x[i], sizeof(float)) == 0);
        }
    }
    free(x);
}

static uint8_t byte(int rank, size_t i)
{
    return (uint8_t)(rank * 31 + (int)(i % 251) + (int)(i >> 16));
}

static void fill(uint8_t *x, size_t n_bytes, int rank)
{
    for (size_t i = 0; i < n_bytes; i++)
        x[i] = byte(rank, i);
}

static void check_bytes(const uint8_t *x, size_t n_bytes, int rank)
{
    for (size_t i = 0; i < n_bytes; i++)
        check(x[i] == byte(rank, i));
}

static void test_all_gather(struct comm *c, size_t n_bytes, int in_place)
{
    uint8_t *src = xcalloc(n_bytes, 1), *dst = xcalloc(n_bytes, (size_t)c->size);
    uint8_t *mine = in_place ? dst + (size_t)c->rank * n_bytes : src;
    fill(mine, n_bytes, c->rank);
    comm_all_gather(c, dst, mine, n_bytes);
    for (int r = 0; r < c->size; r++)
        check_bytes(dst + (size_t)r * n_bytes, n_bytes, r);
    free(src);
    free(dst);
}

static void test_broadcast(struct comm *c, size_t n_bytes)
{
    uint8_t *x = xcalloc(n_bytes, 1);
    for (int root = 0; root < c->size; root++) {
        fill(x, n_bytes, c->rank == root ? root : 99);
        comm_broadcast(c, x, n_bytes, root);
        check_bytes(x, n_bytes, root);
    }
    free(x);
}

/* Along the line, as hidden states go down a pipeline; two messages in flight keep their order. */
static void test_send_recv(struct comm *c, size_t n_bytes)
{
    uint8_t *x = xcalloc(n_bytes, 1);
    for (int round = 0; round < 2; round++) {
        if (c->rank > 0)
            comm_recv(c, x, n_bytes, c->rank - 1);
        else
            fill(x, n_bytes, round);
        check_bytes(x, n_bytes, round);
        if (c->rank + 1 < c->size)
            comm_send(c, x, n_bytes, c->rank + 1);
    }
    free(x);
}

/* Halves of the job, ordered backwards by key; the last rank of an odd job is in neither. */
static void test_groups(int rank, int world)
{
    int half = world / 2;
    int color = half == 0 || rank >= 2 * half ? -1 : rank / half;
    struct comm *c = comm_mpi_open(color, world - rank, 4096);
    check((c == NULL) == (color < 0));
    if (c) {
        float x = (float)(1 + color);
        check(c->size == half);
        check(c->rank == half - 1 - rank % half);
        comm_all_reduce(c, &x, (half & (half - 1)) == 0 ? 1 : 0);
        check((half & (half - 1)) != 0 || x == (float)(half * (1 + color)));
    }
    comm_close(c);
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* For the eye: the messages of a decode step and of a prefill chunk. */
static void print_speed(struct comm *c)
{
    static const size_t sizes[] = {896, 8192, (size_t)896 * 512};
    float *x = xcalloc(sizes[2], sizeof(*x));
    for (int s = 0; s < 3; s++) {
        int n_rounds = s == 2 ? 20 : 200;
        launch_barrier();
        double start_s = now_s();
        for (int i = 0; i < n_rounds; i++)
            comm_all_reduce(c, x, sizes[s]);
        if (c->rank == 0)
            printf("all_reduce of %zu floats over %d ranks: %.1f us\n", sizes[s], c->size,
                   (now_s() - start_s) / n_rounds * 1e6);
    }
    free(x);
}

/* All ranks here have one clock: the measured offset is wrong by no more than it says. */
static void test_clock(int rank, int world)
{
    int64_t error_ns, offset_ns = launch_clock_offset(rank, world, &error_ns);
    check(launch_shares_clock());
    check(offset_ns <= error_ns && -offset_ns <= error_ns);
    check((error_ns > 0) == (rank > 0));
}

int main(void)
{
    int rank, world;
    log_init();
    launch_init(&rank, &world);
    struct comm *c = comm_mpi_open(0, rank, BIG_N * sizeof(float));
    check(c->rank == rank && c->size == world);
    test_all_reduce(c);
    test_all_gather(c, 1, 0);
    test_all_gather(c, 4097, 1);
    test_all_gather(c, BIG_BYTES / 4, 0);
    test_broadcast(c, 3);
    test_broadcast(c, BIG_BYTES);
    test_send_recv(c, 12);
    test_send_recv(c, BIG_BYTES);
    check((c->wait_ns > 0) == (world > 1));
    test_groups(rank, world);
    test_clock(rank, world);
    struct comm *fast = comm_mpi_open(0, rank, (size_t)896 * 512 * sizeof(float));
    print_speed(fast);
    comm_close(fast);
    comm_close(c);
    launch_finalize();
    return 0;
}
