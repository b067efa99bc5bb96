/*
 * The model's ranks on the emulated CUDA back end: what main.c and the workers ask of the CPU back
 * end and of comm_mpi is answered here by CUDA and NCCL. Sources that call them are compiled once
 * more with their names replaced (CMakeLists.txt, emulated_rank.h); nothing else of them differs.
 *
 * One back end a process: groups are opened on it first, and it outlives them.
 */
#include "tests/cuda_emulation/emulated_rank.h"

#include <mpi.h>

#include "kernels/cuda_backend.h"
#include "parallel/comm_nccl.h"

static struct backend *device;

struct backend *emulated_backend_open(int n_threads, const char *isa)
{
    struct cuda_options o = {.activation_dtype = DTYPE_F32, .deterministic = 1};

    (void)n_threads;
    (void)isa;
    o.scratch_bytes = (size_t)16 << 20;
    if (!device)
        device = backend_cuda_open(&o);
    return device;
}

/* The groups that a worker used close after it: the end of the process releases the device. */
void emulated_backend_close(struct backend *b)
{
    op_sync(b);
}

struct comm *emulated_comm_open(int color, int key, size_t max_bytes)
{
    struct backend *b = color < 0 ? NULL : emulated_backend_open(1, NULL);
    int rank, world;

    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    return comm_nccl_open(b, rank, world, color, key, max_bytes, 1);
}
