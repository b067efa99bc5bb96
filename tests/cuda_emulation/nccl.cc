/*
 * NCCL over MPI: a communicator is an MPI one made by its members alone; a call runs the stream's
 * queue up to itself, because a device would get there without the host. The program has called
 * MPI_Init; work is done by its main thread.
 *
 * Non-blocking as the real one can be: every call on a communicator opened so answers
 * ncclInProgress, and ncclCommGetAsyncError() says success at its second question.
 * INTERNVLD_EMULATION_NCCL_FAIL=n: the n-th collective of this rank breaks the communicator, as a
 * vanished peer would: an asynchronous error a little later, and no more data.
 */
#include "nccl.h"

#include <atomic>
#include <chrono>
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

#include "execution.h"

static const int TAG = 30000, ID_KINDS = 1000, NOTICE_MS = 50;

struct emulated_nccl {
    MPI_Comm comm;
    int size, rank, blocking;
    std::atomic<int> questions;     // until a call counts as done
    std::atomic<int64_t> broken_ms; // when it broke, 0: it did not
};

struct id_content {
    int leader, number; // rank of the job that made the id, and which of its ids this is
};

static int n_ids, n_collectives;

static int64_t now_ms(void)
{
    using namespace std::chrono;

    return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count() + 1;
}

static ncclResult_t started(ncclComm_t comm)
{
    if (comm->blocking)
        return ncclSuccess;
    comm->questions = 1;
    return ncclInProgress;
}

static size_t size_of(ncclDataType_t type)
{
    return type == ncclFloat32 ? 4 : 1;
}

/* Queues one piece of communication; on a broken communicator nothing moves any more. */
static ncclResult_t enqueue(ncclComm_t comm, cudaStream_t stream, std::function<void()> work)
{
    emulated_submit(stream, [=] {
        const char *e = getenv("INTERNVLD_EMULATION_NCCL_FAIL");

        if (e && ++n_collectives >= atoi(e))
            comm->broken_ms = now_ms();
        if (!comm->broken_ms)
            work();
    });
    emulated_flush(stream);
    return started(comm);
}

extern "C" {

const char *ncclGetErrorString(ncclResult_t r)
{
    switch (r) {
    case ncclSuccess:
        return "no error";
    case ncclSystemError:
        return "unhandled system error";
    case ncclInvalidArgument:
        return "invalid argument";
    case ncclRemoteError:
        return "remote process exited or there was a network error";
    case ncclInProgress:
        return "NCCL operation in progress";
    }
    return "unknown result";
}

const char *ncclGetLastError(ncclComm_t comm)
{
    return comm->broken_ms ? "emulated failure" : "";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    id_content content = {0, n_ids++};

    MPI_Comm_rank(MPI_COMM_WORLD, &content.leader);
    memset(id, 0, sizeof(*id));
    memcpy(id->internal, &content, sizeof(content));
    return ncclSuccess;
}

/* The members tell the id's maker who they are, it tells them all, and they make the group. */
ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int n_ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t *config)
{
    std::vector<int> ranks((size_t)n_ranks, -1);
    id_content content;
    MPI_Group world, group;
    int me, tag;

    memcpy(&content, id.internal, sizeof(content));
    MPI_Comm_rank(MPI_COMM_WORLD, &me);
    tag = TAG + content.number % ID_KINDS;
    if (n_ranks < 1 || rank < 0 || rank >= n_ranks || content.number >= ID_KINDS)
        return ncclInvalidArgument;
    if (me == content.leader) {
        ranks[(size_t)rank] = me;
        for (int i = 1; i < n_ranks; i++) {
            MPI_Status status;
            int its_rank;
            MPI_Recv(&its_rank, 1, MPI_INT, MPI_ANY_SOURCE, tag, MPI_COMM_WORLD, &status);
            if (its_rank < 0 || its_rank >= n_ranks || ranks[(size_t)its_rank] >= 0)
                emulated_die("NCCL: two members of one group claim one rank");
            ranks[(size_t)its_rank] = status.MPI_SOURCE;
        }
        for (int peer : ranks)
            if (peer != me)
                MPI_Send(ranks.data(), n_ranks, MPI_INT, peer, tag, MPI_COMM_WORLD);
    } else {
        MPI_Send(&rank, 1, MPI_INT, content.leader, tag, MPI_COMM_WORLD);
        MPI_Recv(ranks.data(), n_ranks, MPI_INT, content.leader, tag, MPI_COMM_WORLD,
                 MPI_STATUS_IGNORE);
    }
    emulated_nccl *c = new emulated_nccl();
    MPI_Comm_group(MPI_COMM_WORLD, &world);
    MPI_Group_incl(world, n_ranks, ranks.data(), &group);
    MPI_Comm_create_group(MPI_COMM_WORLD, group, tag, &c->comm);
    MPI_Group_free(&group);
    MPI_Group_free(&world);
    c->size = n_ranks;
    c->rank = rank;
    c->blocking = config ? config->blocking : 1;
    *comm = c;
    return started(c);
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *async_error)
{
    int left = comm->questions;

    if (left > 0)
        comm->questions = left - 1;
    int noticed = comm->broken_ms && now_ms() - comm->broken_ms >= NOTICE_MS;
    *async_error = noticed ? ncclRemoteError : left > 0 ? ncclInProgress : ncclSuccess;
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    return started(comm);
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    MPI_Comm_free(&comm->comm);
    delete comm;
    return ncclSuccess;
}

/* Not collective: the MPI communicator is left to the end of the process. */
ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    comm->broken_ms = now_ms();
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void *src, void *dst, size_t n, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
{
    if (type != ncclFloat32 || op != ncclSum || src != dst)
        return ncclInvalidArgument;
    return enqueue(comm, stream, [=] {
        MPI_Allreduce(MPI_IN_PLACE, dst, (int)n, MPI_FLOAT, MPI_SUM, comm->comm);
    });
}

ncclResult_t ncclAllGather(const void *src, void *dst, size_t n, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream)
{
    size_t n_bytes = n * size_of(type);
    char *mine = (char *)dst + (size_t)comm->rank * n_bytes;

    return enqueue(comm, stream, [=] {
        if (src != mine)
            memcpy(mine, src, n_bytes);
        MPI_Allgather(MPI_IN_PLACE, 0, MPI_BYTE, dst, (int)n_bytes, MPI_BYTE, comm->comm);
    });
}

ncclResult_t ncclBroadcast(const void *src, void *dst, size_t n, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream)
{
    if (src != dst || root < 0 || root >= comm->size)
        return ncclInvalidArgument;
    return enqueue(comm, stream,
                   [=] { MPI_Bcast(dst, (int)(n * size_of(type)), MPI_BYTE, root, comm->comm); });
}

ncclResult_t ncclSend(const void *src, size_t n, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream)
{
    if (peer < 0 || peer >= comm->size || peer == comm->rank)
        return ncclInvalidArgument;
    return enqueue(comm, stream,
                   [=] { MPI_Send(src, (int)(n * size_of(type)), MPI_BYTE, peer, 0, comm->comm); });
}

ncclResult_t ncclRecv(void *dst, size_t n, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream)
{
    if (peer < 0 || peer >= comm->size || peer == comm->rank)
        return ncclInvalidArgument;
    return enqueue(comm, stream, [=] {
        MPI_Recv(dst, (int)(n * size_of(type)), MPI_BYTE, peer, 0, comm->comm, MPI_STATUS_IGNORE);
    });
}

} // extern "C"
