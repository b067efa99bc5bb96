/*
 * Who can sum through each other's memory, and the memory. See comm_ipc.h.
 *
 * Owns the mailboxes of kernels/cuda_all_reduce.h, this rank's and its view of the others'. Handles
 * travel through launch.h, and so does every verdict, because a group goes this way as a whole or
 * not at all. A refusal of CUDA here is no failure of the job: NCCL is there.
 */
#include "parallel/comm_ipc.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda_all_reduce.h"
#include "kernels/cuda_backend.h"
#include "kernels/log.h"
#include "parallel/launch.h"

#define WAIT_LIMIT_NS ((uint64_t)60 * 1000000000)
#define TEST_LIMIT_S 5
#define TEST_ROUNDS 3 // both halves of the mailboxes, and the first again
#define WHY_BYTES 128
#define ABORTED UINT32_MAX // in place of who did not come: nobody waits any more

struct comm_ipc {
    struct backend *backend;
    struct cuda_all_reduce reduce;
    int64_t n_cols; // of rows that are normed; 0: none yet
};

/* What a rank lets the others know. */
struct offer {
    char kernel_id[64], bus_id[32];
    cudaIpcMemHandle_t memory;
};

struct verdict {
    char why[WHY_BYTES]; // "": nothing against it
    int agreed;          // 1: why is the group's, no longer this rank's alone
};

/* 1 when CUDA refused: the reason is in v, and no later call answers for it. */
static int refused(struct verdict *v, const char *what, cudaError_t e)
{
    if (e == cudaSuccess)
        return 0;
    (void)cudaGetLastError();
    snprintf(v->why, sizeof(v->why), "%s: %s", what, cudaGetErrorString(e));
    return 1;
}

/* Every rank of the job calls it. v <- what the first member with an objection says. */
static void agree(struct verdict *v, int world, const int *members, int size)
{
    struct verdict *all = xcalloc((size_t)world, sizeof(*all));

    launch_all_gather(all, v, sizeof(*v));
    for (int i = size - 1; i >= 0; i--) {
        const char *why = all[members[i]].why;
        if (why[0] && !v->agreed)
            snprintf(v->why, sizeof(v->why), "rank %d: %.*s", members[i], WHY_BYTES - 32, why);
    }
    v->agreed = v->why[0] != 0;
    free(all);
}

static void make_offer(const struct comm_ipc *s, struct offer *o, struct verdict *v)
{
    int device;

    launch_kernel_id(o->kernel_id, sizeof(o->kernel_id));
    if (refused(v, "the device", cudaGetDevice(&device)))
        return;
    backend_cuda_pci_address(device, o->bus_id, sizeof(o->bus_id));
    refused(v, "lending memory",
            cudaIpcGetMemHandle(&o->memory, s->reduce.mailboxes[s->reduce.rank]));
}

/* 1 when this rank's kernels can use the other's memory. */
static int can_reach(const struct offer *mine, const struct offer *other, int size,
                     struct verdict *v)
{
    int device, peer, access = 0, atomics = 1;

    if (!mine->kernel_id[0] || strcmp(mine->kernel_id, other->kernel_id) != 0) {
        snprintf(v->why, sizeof(v->why), "the group is on several hosts");
        return 0;
    }
    if (refused(v, "the device", cudaGetDevice(&device)) ||
        refused(v, other->bus_id, cudaDeviceGetByPCIBusId(&peer, other->bus_id)) ||
        refused(v, "access to a peer", cudaDeviceCanAccessPeer(&access, device, peer)))
        return 0;
    if (!access) {
        snprintf(v->why, sizeof(v->why), "no access from GPU %s to %s", mine->bus_id,
                 other->bus_id);
        return 0;
    }
    if (size > 2 && /* NVLink has atomics: reading all parts wants links of their own */
        refused(
            v, "the link to a peer",
            cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, device, peer)))
        return 0;
    if (!atomics)
        snprintf(v->why, sizeof(v->why), "no NVLink from GPU %s to %s", mine->bus_id,
                 other->bus_id);
    return atomics;
}

static void open_peers(struct comm_ipc *s, const struct offer *all, const int *members,
                       struct verdict *v)
{
    int place = s->reduce.rank, size = s->reduce.size;

    for (int i = 0; i < size && !v->why[0]; i++) {
        const struct offer *other = &all[members[i]];
        if (i == place || !can_reach(&all[members[place]], other, size, v))
            continue;
        void *p;
        if (!refused(v, "opening a peer's memory",
                     cudaIpcOpenMemHandle(&p, other->memory, cudaIpcMemLazyEnablePeerAccess)))
            s->reduce.mailboxes[i] = p;
    }
}

/* Sums of small integers, exact in any order, over the longest call. */
static void test_sums(struct comm_ipc *s, struct verdict *v)
{
    int place = s->reduce.rank, size = s->reduce.size, n_wrong = 0;
    size_t n = cuda_all_reduce_max(size);
    float *x = op_alloc(s->backend, n * sizeof(*x)), *host = xcalloc(n, sizeof(*host));

    for (int round = 0; round < TEST_ROUNDS && !v->why[0]; round++) {
        for (size_t i = 0; i < n; i++)
            host[i] = (float)((place + 1) * ((int)(i % 1000) + round));
        op_upload(s->backend, x, host, n * sizeof(*x));
        backend_cuda_all_reduce(s->backend, &s->reduce, x, n, TEST_LIMIT_S * (uint64_t)1000000000,
                                0);
        op_download(s->backend, host, x, n * sizeof(*x));
        for (size_t i = 0; i < n; i++)
            n_wrong += host[i] != (float)(size * (size + 1) / 2 * ((int)(i % 1000) + round));
        if (comm_ipc_overdue(s) >= 0)
            snprintf(v->why, sizeof(v->why), "the test's sum did not come within %d s",
                     TEST_LIMIT_S);
        else if (n_wrong > 0)
            snprintf(v->why, sizeof(v->why), "%d of %zu elements of the test's sum are wrong",
                     n_wrong, n);
    }
    free(host);
    op_free(s->backend, x);
}

struct comm_ipc *comm_ipc_open(struct backend *b, int world, const int *members, int size,
                               int place)
{
    struct offer mine = {0}, *all = xcalloc((size_t)world, sizeof(*all));
    struct verdict v = {0};
    struct comm_ipc *s = NULL;

    if (size != 2 && size != 4 && size != ALL_REDUCE_RANKS_MAX)
        size = 0;
    if (size > 0) {
        s = xcalloc(1, sizeof(*s));
        s->backend = b;
        cuda_all_reduce_open(&s->reduce, b, place, size);
        make_offer(s, &mine, &v);
    }
    agree(&v, world, members, size);
    launch_all_gather(all, &mine, sizeof(mine));
    if (s && !v.why[0])
        open_peers(s, all, members, &v);
    agree(&v, world, members, size);
    if (s && !v.why[0])
        test_sums(s, &v);
    agree(&v, world, members, size);
    free(all);
    if (s && place == 0 && !v.why[0])
        log_info("comm", "all-reduce among %d ranks: up to %zu KiB over CUDA IPC, more over NCCL",
                 size, cuda_all_reduce_max(size) * sizeof(float) / 1024);
    else if (s && place == 0)
        log_info("comm", "all-reduce among %d ranks: over NCCL alone (%s)", size, v.why);
    if (v.why[0])
        comm_ipc_leave(s);
    launch_barrier(); /* whoever refuses frees what others may have opened */
    if (v.why[0]) {
        comm_ipc_close(s);
        return NULL;
    }
    return s;
}

int comm_ipc_takes(const struct comm_ipc *s, size_t n)
{
    return s && n <= cuda_all_reduce_max(s->reduce.size);
}

void comm_ipc_all_reduce(struct comm_ipc *s, float *x, size_t n)
{
    backend_cuda_all_reduce(s->backend, &s->reduce, x, n, WAIT_LIMIT_NS, 1);
}

int comm_ipc_all_reduce_norm(struct comm_ipc *s, struct tensor *y, struct tensor *x,
                             const struct tensor *sum, const float *weight, float eps)
{
    if (!s || !cuda_all_reduce_norm_takes(tensor_n_rows(x), tensor_n_cols(x)))
        return 0;
    if (s->n_cols && s->n_cols != tensor_n_cols(x))
        BUG("rows of %lld columns after rows of %lld", (long long)tensor_n_cols(x),
            (long long)s->n_cols);
    s->n_cols = tensor_n_cols(x);
    backend_cuda_all_reduce_norm(s->backend, &s->reduce, y, x, sum, weight, eps, WAIT_LIMIT_NS, 1);
    return 1;
}

int comm_ipc_overdue(const struct comm_ipc *s)
{
    uint32_t word = s ? __atomic_load_n(s->reduce.overdue, __ATOMIC_ACQUIRE) : 0;

    return word == ABORTED ? -1 : (int)word - 1;
}

void comm_ipc_abort(struct comm_ipc *s)
{
    if (s)
        __atomic_store_n(s->reduce.overdue, ABORTED, __ATOMIC_RELEASE);
}

void comm_ipc_leave(struct comm_ipc *s)
{
    if (!s)
        return;
    op_sync(s->backend);
    for (int i = 0; i < s->reduce.size; i++) {
        void *p = s->reduce.mailboxes[i];
        if (i == s->reduce.rank || !p)
            continue;
        cudaError_t e = cudaIpcCloseMemHandle(p);
        if (e != cudaSuccess)
            die("CUDA: letting go of a peer's memory: %s", cudaGetErrorString(e));
        s->reduce.mailboxes[i] = NULL;
    }
}

void comm_ipc_close(struct comm_ipc *s)
{
    if (!s)
        return;
    cuda_all_reduce_close(&s->reduce, s->backend);
    free(s);
}
