/*
 * NCCL behind the five verbs. See comm_nccl.h.
 *
 * Who is in the group is worked out from everybody's (color, key), exchanged once at launch; the
 * group's first member makes the id and it travels the same way. Communicators are non-blocking:
 * a call that is still being set up is polled, and a watchdog thread asks for asynchronous errors
 * (a peer that vanished, a broken link), aborts the communicator, so that kernels that spin on the
 * device end, and then the job. It includes no MPI: launch.h stands for that. Short sums go another
 * way where the group has one (comm_ipc.h); of that it knows no more than is in its header.
 */
#include "parallel/comm_nccl.h"

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/clock.h"
#include "kernels/cuda_backend.h"
#include "kernels/log.h"
#include "parallel/comm_ipc.h"
#include "parallel/launch.h"

#define OPEN_TIMEOUT_NS ((uint64_t)60 * 1000000000)
#define SPIN_NS 2000000 // longer than a launch takes, shorter than a connection
#define WATCH_INTERVAL_MS 100

struct nccl_state {
    ncclComm_t comm;
    struct comm_ipc *ipc; // NULL: every sum over NCCL
    struct backend *backend;
    cudaStream_t stream;
    int deterministic;
    float *gathered; // device, [size, max_bytes / 4]: the parts of a deterministic all_reduce
    size_t max_bytes;
    pthread_t watchdog;
    atomic_int stop;
    pthread_mutex_t query_lock; // ncclCommGetAsyncError() frees what a call has left: one at a time
};

static void sleep_ms(int ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};

    nanosleep(&t, NULL);
}

static _Noreturn void fail(struct nccl_state *s, const char *what, ncclResult_t r)
{
    const char *detail = s->comm ? ncclGetLastError(s->comm) : "";

    atomic_store(&s->stop, 1);
    comm_ipc_abort(s->ipc); /* a kernel that waits would hold up what follows */
    if (s->comm) {
        pthread_mutex_lock(&s->query_lock); /* nobody asks any more */
        ncclCommAbort(s->comm);
    }
    die("NCCL: %s: %s (%s)", what, ncclGetErrorString(r), detail ? detail : "");
}

/* What the communicator says of itself; as a failure of the query where that fails. */
static ncclResult_t ask(struct nccl_state *s)
{
    ncclResult_t r = ncclSuccess;

    pthread_mutex_lock(&s->query_lock);
    ncclResult_t query = ncclCommGetAsyncError(s->comm, &r);
    pthread_mutex_unlock(&s->query_lock);
    return query == ncclSuccess ? r : query;
}

/* A non-blocking communicator answers ncclInProgress while it connects, and for some microseconds
 * in every call, which another thread of NCCL's launches. */
static void settle(struct nccl_state *s, const char *what, ncclResult_t r)
{
    uint64_t start_ns = clock_now_ns();

    while (r == ncclInProgress) {
        uint64_t ns = clock_now_ns() - start_ns;
        if (ns > OPEN_TIMEOUT_NS)
            fail(s, what, r);
        if (ns < SPIN_NS)
            sched_yield();
        else
            sleep_ms(1);
        r = ask(s);
    }
    if (r != ncclSuccess)
        fail(s, what, r);
}

static struct nccl_state *state_of(struct comm *c)
{
    return c->state;
}

static void *watch(void *arg)
{
    struct nccl_state *s = arg;

    while (!atomic_load(&s->stop)) {
        ncclResult_t r = ask(s);
        if (r != ncclSuccess && r != ncclInProgress)
            fail(s, "the group is broken", r);
        if (comm_ipc_overdue(s->ipc) >= 0)
            die("all-reduce over CUDA IPC: rank %d of the group did not come",
                comm_ipc_overdue(s->ipc));
        sleep_ms(WATCH_INTERVAL_MS);
    }
    return NULL;
}

/* ---- the verbs ---- */

static void all_reduce(struct comm *c, float *x, size_t n)
{
    struct nccl_state *s = state_of(c);

    if (n * sizeof(*x) > s->max_bytes)
        BUG("all_reduce of %zu bytes, opened for %zu", n * sizeof(*x), s->max_bytes);
    if (comm_ipc_takes(s->ipc, n)) {
        comm_ipc_all_reduce(s->ipc, x, n);
        return;
    }
    if (!s->deterministic) {
        settle(s, "all_reduce", ncclAllReduce(x, x, n, ncclFloat32, ncclSum, s->comm, s->stream));
        return;
    }
    settle(s, "all_gather", ncclAllGather(x, s->gathered, n, ncclFloat32, s->comm, s->stream));
    backend_cuda_tree_sum(s->backend, x, s->gathered, c->size, n);
}

static int all_reduce_norm(struct comm *c, struct tensor *y, struct tensor *x,
                           const struct tensor *sum, const float *weight, float eps)
{
    return comm_ipc_all_reduce_norm(state_of(c)->ipc, y, x, sum, weight, eps);
}

static void all_gather(struct comm *c, void *dst, const void *src, size_t n_bytes)
{
    struct nccl_state *s = state_of(c);

    if (c->size > 1)
        settle(s, "all_gather", ncclAllGather(src, dst, n_bytes, ncclUint8, s->comm, s->stream));
    else if (src != dst &&
             cudaMemcpyAsync(dst, src, n_bytes, cudaMemcpyDeviceToDevice, s->stream) != cudaSuccess)
        die("CUDA: copying %zu bytes on the device failed", n_bytes);
}

static void broadcast(struct comm *c, void *x, size_t n_bytes, int root)
{
    struct nccl_state *s = state_of(c);

    settle(s, "broadcast", ncclBroadcast(x, x, n_bytes, ncclUint8, root, s->comm, s->stream));
}

static void send_to(struct comm *c, const void *x, size_t n_bytes, int to)
{
    struct nccl_state *s = state_of(c);

    settle(s, "send", ncclSend(x, n_bytes, ncclUint8, to, s->comm, s->stream));
}

static void recv_from(struct comm *c, void *x, size_t n_bytes, int from)
{
    struct nccl_state *s = state_of(c);

    settle(s, "recv", ncclRecv(x, n_bytes, ncclUint8, from, s->comm, s->stream));
}

/* Lets go of the others' memory and waits until they have let go of this rank's. */
static void close_ipc(struct nccl_state *s)
{
    float *x = op_alloc(s->backend, sizeof(*x));

    comm_ipc_leave(s->ipc);
    settle(s, "leaving", ncclAllReduce(x, x, 1, ncclFloat32, ncclSum, s->comm, s->stream));
    op_sync(s->backend);
    op_free(s->backend, x);
    comm_ipc_close(s->ipc);
}

static void close_comm(struct comm *c)
{
    struct nccl_state *s = state_of(c);

    if (s->comm) {
        atomic_store(&s->stop, 1);
        pthread_join(s->watchdog, NULL);
        op_sync(s->backend);
        if (s->ipc)
            close_ipc(s);
        settle(s, "finalize", ncclCommFinalize(s->comm));
        ncclCommDestroy(s->comm);
    }
    if (s->gathered)
        op_free(s->backend, s->gathered);
    pthread_mutex_destroy(&s->query_lock);
    free(s);
    free(c);
}

static const struct comm_ops nccl_ops = {
    .name = "nccl",
    .all_reduce = all_reduce,
    .all_reduce_norm = all_reduce_norm,
    .all_gather = all_gather,
    .broadcast = broadcast,
    .send = send_to,
    .recv = recv_from,
    .close = close_comm,
};

/* ---- making the group ---- */

struct member {
    int color, key, rank;
};

static int by_key(const void *a, const void *b)
{
    const struct member *x = a, *y = b;

    return x->key != y->key ? (x->key > y->key) - (x->key < y->key)
                            : (x->rank > y->rank) - (x->rank < y->rank);
}

/* This rank's place in its group; members [world] <- its group's ranks of the job, in order. */
static void find_group(struct comm *c, int rank, int world, int color, int key, int *members)
{
    struct member mine = {color, key, rank}, *all = xcalloc((size_t)world, sizeof(*all));
    int n = 0;

    launch_all_gather(all, &mine, sizeof(mine));
    for (int i = 0; i < world; i++) {
        if (all[i].color == color)
            all[n++] = all[i];
    }
    qsort(all, (size_t)n, sizeof(*all), by_key);
    c->size = n;
    for (int i = 0; i < n; i++) {
        members[i] = all[i].rank;
        if (all[i].rank == rank)
            c->rank = i;
    }
    free(all);
}

/* Every group's leader offers an id; each rank takes its own leader's. */
static void exchange_id(ncclUniqueId *id, int rank, int world, int leader, int size)
{
    ncclUniqueId mine, *all = xcalloc((size_t)world, sizeof(*all));

    memset(&mine, 0, sizeof(mine));
    if (rank == leader && size > 1) {
        ncclResult_t r = ncclGetUniqueId(&mine);
        if (r != ncclSuccess)
            die("NCCL: no id for a group of %d: %s", size, ncclGetErrorString(r));
    }
    launch_all_gather(all, &mine, sizeof(mine));
    *id = all[leader];
    free(all);
}

static void connect_group(struct comm *c, ncclUniqueId id)
{
    struct nccl_state *s = state_of(c);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;

    config.blocking = 0;
    settle(s, "making the group", ncclCommInitRankConfig(&s->comm, c->size, id, c->rank, &config));
    if (pthread_create(&s->watchdog, NULL, watch, s) != 0)
        die("cannot start NCCL's watchdog thread");
}

struct comm *comm_nccl_open(struct backend *b, int rank, int world, int color, int key,
                            const struct comm_nccl_options *o)
{
    struct comm *c = xcalloc(1, sizeof(*c));
    struct nccl_state *s = xcalloc(1, sizeof(*s));
    int *members = xcalloc((size_t)world, sizeof(*members));
    ncclUniqueId id;

    find_group(c, rank, world, color, key, members);
    exchange_id(&id, rank, world, members[0], color < 0 ? 1 : c->size);
    if (o->one_shot && o->max_bytes > 0)
        s->ipc = comm_ipc_open(b, world, members, color < 0 ? 0 : c->size, c->rank);
    free(members);
    if (color < 0) {
        free(s);
        free(c);
        return NULL;
    }
    pthread_mutex_init(&s->query_lock, NULL);
    c->ops = &nccl_ops;
    c->state = s;
    s->backend = b;
    s->deterministic = o->deterministic;
    s->max_bytes = o->max_bytes;
    s->stream = backend_cuda_stream(b);
    if (c->size == 1)
        return c;
    if (o->deterministic)
        s->gathered = op_alloc(b, (size_t)c->size * o->max_bytes);
    connect_group(c, id);
    return c;
}
