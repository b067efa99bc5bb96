/*
 * Short sums over CUDA IPC under `mpirun -n 2`, 4 or 8, one device a rank: bit for bit the tree
 * over what an all-gather brings, on every rank; odd lengths, both sides of the limit, hundreds of
 * calls in a row with ranks that come late, recorded and replayed, groups of all orders, what NCCL
 * alone does meanwhile. With the emulation also the refusals: each must leave NCCL and say why.
 */
#include "parallel/comm_ipc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/cuda_all_reduce.h"
#include "kernels/cuda_backend.h"
#include "kernels/log.h"
#include "parallel/comm_nccl.h"
#include "parallel/launch.h"
#include "tests/cuda_emulation/comm_check.h"

#define N_MAX 150000 // beyond the limit of every group
#define N_ROW 150

static int rank, world;

/* What rank r of a group contributes to call number `call`: of many exponents, so that the order of
 * a sum shows. */
static float value(int r, int call, size_t i)
{
    uint32_t h = (uint32_t)i * 2654435761u ^ (uint32_t)(r * 7919 + call * 104729 + 1);

    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    return ((float)(h & 0xffff) - 32768.0f) * (float)(1 << (h >> 28));
}

static float tree(int first, int n, int call, size_t i)
{
    return n == 1 ? value(first, call, i)
                  : tree(first, n / 2, call, i) + tree(first + n / 2, n / 2, call, i);
}

/* Buffers of one comm under test: x and host [N_MAX]. */
struct case_sums {
    struct backend *b;
    struct comm *c;
    float *x, *host;
};

static void put(struct case_sums *s, int call, size_t n)
{
    for (size_t i = 0; i < n; i++)
        s->host[i] = value(s->c->rank, call, i);
    op_upload(s->b, s->x, s->host, n * sizeof(float));
}

static void check(struct case_sums *s, int call, size_t n)
{
    op_download(s->b, s->host, s->x, n * sizeof(float));
    for (size_t i = 0; i < n; i++)
        CHECK(s->host[i] == tree(0, s->c->size, call, i));
}

/* The same sequence of lengths on every rank. */
static size_t length_of(int call)
{
    static const size_t lengths[] = {1, 3, 64, 127, 896, 2047, 2048, 2049, 3584, 5001, 20000};

    return lengths[(size_t)(call * 7) % (sizeof(lengths) / sizeof(lengths[0]))];
}

static void check_rows(struct case_sums *s)
{
    struct graph *g;
    size_t limit = cuda_all_reduce_max(s->c->size);

    for (int call = 0; call < N_ROW; call++) {
        if (call % 9 == s->c->rank)
            usleep(2000); // one comes late
        put(s, call, length_of(call));
        comm_all_reduce(s->c, s->x, length_of(call));
        check(s, call, length_of(call));
    }
    for (size_t n = limit - 1; n <= limit + 1; n++) {
        put(s, (int)n, n);
        comm_all_reduce(s->c, s->x, n);
        check(s, (int)n, n);
    }
    op_graph_begin(s->b); // a sum of sums: 2 calls a replay
    comm_all_reduce(s->c, s->x, 5001);
    comm_all_reduce(s->c, s->x, 300);
    g = op_graph_end(s->b);
    for (int call = 0; call < 5; call++) {
        put(s, call, 5001);
        op_graph_launch(s->b, g);
        comm_all_reduce(s->c, s->x, 100); // and a third between replays
        op_download(s->b, s->host, s->x, 5001 * sizeof(float));
        for (size_t i = 0; i < 5001; i++) {
            float want = tree(0, s->c->size, call, i);
            for (int again = 0; again < (i < 300) + (i < 100); again++)
                want *= (float)s->c->size; // equal parts: exact in any order
            CHECK(s->host[i] == want);
        }
    }
    op_graph_free(s->b, g);
}

/* n_rows rows of n_cols as one verb, against the two that it stands for; recorded too. */
static void check_norm(struct case_sums *s, enum dtype type, int n_rows, int n_cols, int call)
{
    struct backend *b = s->b;
    size_t n = (size_t)n_rows * (size_t)n_cols;
    float *memory = op_alloc(b, 5 * n * sizeof(float)), *weight = op_alloc(b, n * sizeof(float));
    struct tensor sum = tensor_2d(s->x, DTYPE_F32, n_rows, n_cols);
    struct tensor x = tensor_2d(memory, DTYPE_F32, n_rows, n_cols);
    struct tensor want_x = tensor_2d(memory + n, DTYPE_F32, n_rows, n_cols);
    struct tensor y = tensor_2d(memory + 2 * n, type, n_rows, n_cols);
    struct tensor want = tensor_2d(memory + 3 * n, type, n_rows, n_cols);
    float *got = xcalloc(5 * n, sizeof(float));

    for (size_t i = 0; i < n; i++)
        got[i] = value(9, call, i); // the same on every rank
    op_upload(b, weight, got, n * sizeof(float));
    op_upload(b, x.data, got, n * sizeof(float));
    op_upload(b, want_x.data, got, n * sizeof(float));
    for (int again = 0; again < 3; again++) {
        if (again == s->c->rank)
            usleep(2000);
        put(s, call + again, n);
        if (again == 2) { // recorded, and run when launched
            op_graph_begin(b);
            CHECK(comm_all_reduce_norm(s->c, &y, &x, &sum, weight, 1e-6f));
            struct graph *g = op_graph_end(b);
            op_graph_launch(b, g);
            op_sync(b);
            op_graph_free(b, g);
        } else {
            CHECK(comm_all_reduce_norm(s->c, &y, &x, &sum, weight, 1e-6f));
        }
        put(s, call + again, n);
        comm_all_reduce(s->c, s->x, n);
        op_add_rms_norm(b, &want, &want_x, &sum, weight, 1e-6f);
        op_download(b, got, memory, 5 * n * sizeof(float));
        CHECK(memcmp(got, got + n, n * sizeof(float)) == 0);
        CHECK(memcmp(got + 2 * n, got + 3 * n, n * dtype_size(type)) == 0);
    }
    free(got);
    op_free(b, weight);
    op_free(b, memory);
}

static void check_norms(struct case_sums *s)
{
    struct tensor many = tensor_2d(s->x, DTYPE_F32, 65, 64), long_rows = many;

    for (int call = 0; call < 4; call++) {
        check_norm(s, DTYPE_F32, 1 + 3 * call, 200, call);
        check_norm(s, DTYPE_BF16, 1 + call, 200, 40 + call);
    }
    check_norm(s, DTYPE_BF16, 64, 200, 80);
    CHECK(!comm_all_reduce_norm(s->c, &many, &many, &many, s->x, 0)); // left to the two verbs
    long_rows.shape[0] = 2;
    long_rows.shape[1] = long_rows.row_stride = 40000;
    CHECK(!comm_all_reduce_norm(s->c, &long_rows, &long_rows, &long_rows, s->x, 0));
}

static void check_comm(struct backend *b, int color, int key, int size)
{
    struct comm_nccl_options o = {N_MAX * sizeof(float), 1, 1};
    struct case_sums s = {b, comm_nccl_open(b, rank, world, color, key, &o), NULL, NULL};

    CHECK(s.c->size == size);
    if (size > 1) {
        s.x = op_alloc(b, N_MAX * sizeof(float));
        s.host = xcalloc(N_MAX, sizeof(float));
        check_rows(&s);
        check_norms(&s);
        free(s.host);
        op_free(b, s.x);
    }
    comm_close(s.c);
}

/* Opens the group of all with this mistake planted on the ranks below n_planted; the sums of what
 * then opens are right all the same. */
static void check_refusal(struct backend *b, const char *planted, int n_planted, const char *why)
{
    int members[64], log = dup(2);
    FILE *lines = tmpfile();
    char text[2048] = "";

    for (int i = 0; i < world; i++)
        members[i] = i;
    if (!lines || log < 0)
        die("no temporary file");
    if (rank < n_planted)
        setenv("INTERNVLD_EMULATION_IPC", planted, 1);
    dup2(fileno(lines), 2);
    struct comm_ipc *s = comm_ipc_open(b, world, members, world, rank);
    dup2(log, 2);
    close(log);
    unsetenv("INTERNVLD_EMULATION_IPC");
    rewind(lines);
    size_t n = fread(text, 1, sizeof(text) - 1, lines);
    fclose(lines);
    CHECK((s == NULL) == (why != NULL));
    CHECK(comm_ipc_takes(s, 1) == (why == NULL));
    CHECK((n > 0) == (rank == 0)); // one line, by the first
    if (rank == 0) {
        CHECK(strchr(text, '\n') == text + n - 1);
        CHECK(strstr(text, why ? "over NCCL alone" : "over CUDA IPC") != NULL);
        CHECK(strstr(text, why ? why : "") != NULL);
    }
    comm_ipc_leave(s);
    launch_barrier();
    comm_ipc_close(s);
}

int main(void)
{
    struct cuda_options o = {.activation_dtype = DTYPE_BF16, .scratch_bytes = 1 << 20};
    char name[256];

    log_init();
    launch_init(&rank, &world);
    if (world > backend_cuda_count()) {
        printf("skipped: %d ranks and %d GPUs\n", world, backend_cuda_count());
        launch_finalize();
        return 0;
    }
    o.device = rank;
    struct backend *b = backend_cuda_open(&o);
    check_comm(b, 0, rank, world);
    check_comm(b, 0, -rank, world);           // the order turned round
    check_comm(b, rank % 2, rank, world / 2); // every other; of 2 ranks: alone
    backend_cuda_name(name, sizeof(name));
    if (strstr(name, "emulated")) {
        check_refusal(b, "none", 0, NULL);
        check_refusal(b, "no-peer", world, "rank 0: no access from GPU");
        check_refusal(b, "no-peer", 1, "rank 0: no access from GPU");
        check_refusal(b, "pcie", world, world > 2 ? "rank 0: no NVLink from GPU" : NULL);
        if (world == 4) // it takes the test's limit, 5 s, twice
            check_refusal(b, "stale", 1, "the test's sum");
        check_refusal(b, "none", 0, NULL);
    } else if (rank == 0) {
        printf("skipped: refusals of the driver (they are planted in the emulation)\n");
    }
    backend_close(b);
    launch_barrier();
    if (rank == 0)
        printf("%d ranks, %ld checks on rank 0: all passed\n", world, n_checks);
    launch_finalize();
    return 0;
}
