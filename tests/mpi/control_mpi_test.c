/*
 * Control on real ranks: control_open() through MPI, messages both ways at once, and figures for
 * the eye (how fast a message wakes a worker, what an idle rank costs).
 *
 * Run by mpirun on 1, 2 and 6 ranks. A failed check dies, which ends the job.
 */
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "kernels/log.h"
#include "parallel/control.h"
#include "parallel/launch.h"

#define BIG ((uint64_t)24 << 20)
#define N_PINGS 100
#define IDLE_S 2

#define check(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            die("check failed: %s", #condition);                                                   \
    } while (0)

static double seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static struct message *wait_next(struct control *c)
{
    for (;;) {
        struct message *m = control_next(c);
        if (m)
            return m;
        struct pollfd p = {.fd = control_fd(c), .events = POLLIN};
        poll(&p, 1, 500);
    }
}

static void fill(struct message *m, int rank)
{
    for (uint64_t i = 0; i < m->n_bytes; i++)
        m->payload[i] = (uint8_t)(i + (uint64_t)rank);
}

static void check_filled(const struct message *m, int rank)
{
    for (uint64_t i = 0; i < m->n_bytes; i++)
        check(m->payload[i] == (uint8_t)(i + (uint64_t)rank));
}

/* Every worker gets a tile-sized message and sends it back, all at once, twice in flight each. */
static void test_big(struct control *c, int world)
{
    for (int round = 0; round < 2; round++)
        for (int r = 1; r < world; r++) {
            struct message *m = message_new(CONTROL_TILES, BIG / (uint64_t)(world - 1));
            fill(m, r);
            control_send(c, r, m);
        }
    for (int i = 0; i < 2 * (world - 1); i++) {
        struct message *m = wait_next(c);
        check(m->type == CONTROL_TILES);
        check_filled(m, m->rank);
        message_unref(m);
    }
}

static void test_small(struct control *c, int world)
{
    double sum_s = 0, max_s = 0;
    for (int i = 0; i < N_PINGS; i++) {
        const struct timespec pause = {.tv_nsec = 3000000};
        int r = 1 + i % (world - 1);
        nanosleep(&pause, NULL);
        double start_s = seconds(CLOCK_MONOTONIC);
        control_send(c, r, message_new(CONTROL_BATCH, 4096));
        struct message *m = wait_next(c);
        double took_s = seconds(CLOCK_MONOTONIC) - start_s;
        check(m->rank == r && m->n_bytes == 4096);
        message_unref(m);
        sum_s += took_s;
        max_s = took_s > max_s ? took_s : max_s;
    }
    printf("4 kB there and back: mean %.0f us, max %.0f us\n", sum_s / N_PINGS * 1e6, max_s * 1e6);
}

/* Each rank's processor time while nothing happens but pings. */
static void print_idle(struct control *c, int rank, int world, struct message *wake)
{
    double cpu_s = seconds(CLOCK_PROCESS_CPUTIME_ID), start_s = seconds(CLOCK_MONOTONIC);
    if (rank == 0)
        while (seconds(CLOCK_MONOTONIC) - start_s < IDLE_S) {
            struct pollfd p = {.fd = control_fd(c), .events = POLLIN};
            poll(&p, 1, 500);
            check(control_next(c) == NULL);
        }
    if (rank == 0)
        for (int r = 1; r < world; r++)
            control_send(c, r, message_ref(wake));
    else
        message_unref(control_recv(c));
    printf("rank %d idle: %.3f %% of a core\n", rank,
           100 * (seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu_s) /
               (seconds(CLOCK_MONOTONIC) - start_s));
}

static void gateway(struct control *c, int world)
{
    struct message *wake = message_new(CONTROL_READY, 0);
    test_big(c, world);
    test_small(c, world);
    for (int r = 1; r < world; r++)
        control_send(c, r, message_ref(wake));
    print_idle(c, 0, world, wake);
    message_unref(wake);
    for (int r = 1; r < world; r++)
        control_send(c, r, message_new(CONTROL_STOP, 0));
}

static void worker(struct control *c, int rank, int world)
{
    for (;;) {
        struct message *m = control_recv(c);
        if (m->type == CONTROL_STOP) {
            message_unref(m);
            return;
        }
        if (m->type == CONTROL_READY) {
            message_unref(m);
            print_idle(c, rank, world, NULL);
            continue;
        }
        control_reply(c, m);
    }
}

int main(void)
{
    struct topology t = {.layout = {1, 1, 1}};
    log_init();
    launch_init(&t.rank, &t.world);
    struct control *c = control_open(&t, NULL);
    if (t.rank > 0)
        worker(c, t.rank, t.world);
    else if (t.world > 1)
        gateway(c, t.world);
    control_close(c);
    launch_finalize();
    return 0;
}
