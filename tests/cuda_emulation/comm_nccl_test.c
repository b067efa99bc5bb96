/*
 * comm_nccl under `mpirun -n 4`: the five verbs on device memory in groups of 4, 2 and 1, the
 * deterministic sum bit for bit, a captured all_reduce, all by NCCL alone (comm_ipc_test.c has the
 * other way). With INTERNVLD_EMULATION_NCCL_FAIL set the
 * watchdog must end the job instead.
 */
#include "parallel/comm_nccl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/cuda_backend.h"
#include "kernels/log.h"
#include "parallel/launch.h"
#include "tests/cuda_emulation/comm_check.h"

#define N 1000

static int rank, world;

/* What rank r of a group contributes. */
static float value(int r, int i)
{
    return (float)((r + 1) * 1000003 % 9973) * 0.37f + (float)i * 0.001f * (float)(r - 1);
}

static float tree(const float *p, int n)
{
    return n == 1 ? p[0] : tree(p, n / 2) + tree(p + n / 2, n / 2);
}

static void check_sum(struct backend *b, struct comm *c, int deterministic, int captured)
{
    float *x = op_alloc(b, N * sizeof(float)), mine[N], got[N], parts[8];
    struct graph *g = NULL;

    for (int i = 0; i < N; i++)
        mine[i] = value(c->rank, i);
    if (captured) {
        comm_all_reduce(c, x, N);
        op_graph_begin(b);
        comm_all_reduce(c, x, N);
        g = op_graph_end(b);
    }
    op_upload(b, x, mine, sizeof(mine));
    if (captured)
        op_graph_launch(b, g);
    else
        comm_all_reduce(c, x, N);
    op_download(b, got, x, sizeof(got));
    for (int i = 0; i < N; i++) {
        for (int r = 0; r < c->size; r++)
            parts[r] = value(r, i);
        float want = tree(parts, c->size), error = got[i] - want;
        CHECK(deterministic ? error == 0 : error < 1e-3f && error > -1e-3f);
    }
    op_graph_free(b, g);
    op_free(b, x);
}

static void check_moves(struct backend *b, struct comm *c)
{
    int32_t *x = op_alloc(b, 8 * 64 * sizeof(*x)), got[8 * 64], mine[64];
    int next = (c->rank + 1) % c->size, previous = (c->rank + c->size - 1) % c->size;

    for (int i = 0; i < 64; i++)
        mine[i] = c->rank * 64 + i;
    op_upload(b, x + c->rank * 64, mine, sizeof(mine));
    comm_all_gather(c, x, x + c->rank * 64, sizeof(mine));
    op_download(b, got, x, (size_t)c->size * sizeof(mine));
    for (int i = 0; i < c->size * 64; i++)
        CHECK(got[i] == i);
    op_upload(b, x + 7 * 64, mine, sizeof(mine)); // from elsewhere
    comm_all_gather(c, x, x + 7 * 64, sizeof(mine));
    op_download(b, got, x, (size_t)c->size * sizeof(mine));
    for (int i = 0; i < c->size * 64; i++)
        CHECK(got[i] == i);
    op_upload(b, x, mine, sizeof(mine));
    comm_broadcast(c, x, sizeof(mine), c->size - 1);
    op_download(b, got, x, sizeof(mine));
    for (int i = 0; i < 64; i++)
        CHECK(got[i] == (c->size - 1) * 64 + i);
    if (c->size == 1)
        return op_free(b, x);
    op_upload(b, x, mine, sizeof(mine));
    if (c->rank % 2 == 0)
        comm_send(c, x, sizeof(mine), next);
    comm_recv(c, x + 64, sizeof(mine), previous);
    if (c->rank % 2 == 1)
        comm_send(c, x, sizeof(mine), next);
    op_download(b, got, x + 64, sizeof(mine));
    for (int i = 0; i < 64; i++)
        CHECK(got[i] == previous * 64 + i);
    op_free(b, x);
}

static void check_group(struct backend *b, int color, int key, int size, int deterministic)
{
    struct comm_nccl_options o = {.max_bytes = N * sizeof(float), .deterministic = deterministic};
    struct comm *c = comm_nccl_open(b, rank, world, color, key, &o);

    if (color < 0) {
        CHECK(c == NULL);
        return;
    }
    CHECK(c->size == size);
    if (size & (size - 1)) {
        check_moves(b, c);
    } else {
        check_sum(b, c, deterministic, 0);
        check_sum(b, c, deterministic, 1);
        check_moves(b, c);
    }
    comm_close(c);
}

/* The first collective breaks the group; this thread only waits, so the watchdog must see it. */
static void wait_for_watchdog(struct backend *b)
{
    struct comm_nccl_options o = {.max_bytes = N * sizeof(float)};
    struct comm *c = comm_nccl_open(b, rank, world, 0, rank, &o);
    float *x = op_alloc(b, N * sizeof(float));

    comm_all_reduce(c, x, N);
    op_sync(b);
    sleep(60);
    printf("nobody noticed the broken group\n");
}

int main(void)
{
    struct cuda_options o = {.activation_dtype = DTYPE_BF16, .scratch_bytes = 1 << 20};

    log_init();
    launch_init(&rank, &world);
    o.device = rank;
    struct backend *b = backend_cuda_open(&o);
    if (getenv("INTERNVLD_EMULATION_NCCL_FAIL"))
        wait_for_watchdog(b);
    for (int deterministic = 0; deterministic < 2; deterministic++) {
        check_group(b, 0, rank, world, deterministic);
        check_group(b, 0, -rank, world, deterministic);           // the order turned round
        check_group(b, rank / 2, rank, world / 2, deterministic); // pairs
        check_group(b, rank % 2, rank, world / 2, deterministic); // pairs across
        check_group(b, rank, 0, 1, deterministic);                // alone
        check_group(b, rank ? -1 : 0, 0, 1, deterministic);       // outside
    }
    backend_close(b);
    launch_barrier();
    if (rank == 0)
        printf("%d ranks, %ld checks on rank 0: all passed\n", world, n_checks);
    launch_finalize();
    return 0;
}
