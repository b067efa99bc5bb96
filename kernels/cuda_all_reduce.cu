/*
 * The one-shot all-reduce: a block of every rank puts its piece of x into its own mailbox, tells
 * the blocks of the same number of all ranks, waits for their word, and sums what it reads from all
 * mailboxes.
 *
 *     rank 0, block b    piece ─▶ mailbox 0, half g ─┐ flag g ─▶ mailboxes 0 1   wait   read 0 1,
 * sum rank 1, block b    piece ─▶ mailbox 1, half g ─┘ flag g ─▶ mailboxes 0 1   wait   read 0 1,
 * sum
 *
 * Blocks of different numbers share nothing, so they may run in any order, and every block counts
 * its own calls (generation g; the flag it gave itself last). Halves alternate, and that is all the
 * protection a half needs: who writes generation g + 2 has seen the others' flags of g + 1, which
 * they gave after their kernels of generation g, reads included, had ended.
 *
 * Flags are stored with release and loaded with acquire at system scope; the barrier of the block
 * carries that to its other threads. They lie in the memory of whoever waits for them, so that
 * waiting goes over no link. Bound by latency; not timed on a device yet.
 */
#include "kernels/cuda_internal.h"
extern "C" {
#include "kernels/cuda_all_reduce.h"
}

#define THREADS 512 // of a block, each with four elements
#define BLOCKS 64   // each rank reads size - 1 parts over its links: longer calls win by two steps
#define PIECE (4 * THREADS)
#define ROWS 64
#define ROW_FLOATS (64 << 10) // of all rows of a call that norms them
#define POLLS 100             // between two looks at the clock

struct mailbox {
    uint32_t flags[BLOCKS][ALL_REDUCE_RANKS_MAX]; // by block and the rank that gave it
    uint32_t row_flags[ROWS][ALL_REDUCE_RANKS_MAX];
    alignas(128) float4 parts[2][BLOCKS][THREADS];
    alignas(128) float rows[2][ROW_FLOATS];
};
static_assert(sizeof(struct mailbox) <= ALL_REDUCE_MAILBOX_BYTES,
              "the mailbox is larger than said");

struct mailboxes {
    struct mailbox *of[ALL_REDUCE_RANKS_MAX];
};

struct patience {
    uint64_t limit_ns;
    uint32_t *overdue;
    int fatal;
};

static __device__ void wait_for(const uint32_t *flag, uint32_t generation, int rank,
                                const struct patience &p)
{
    uint64_t start_ns = 0; // a short wait does not read the clock

    for (unsigned polls = 1; (int32_t)(load_acquire_system(flag) - generation) < 0; polls++) {
        spin_pause();
        if (polls % POLLS)
            continue;
        if (load_acquire_system(p.overdue)) {
            if (p.fatal) // nothing may be made of what is summed then
                device_trap();
            break;
        }
        if (!start_ns)
            start_ns = device_clock_ns();
        if (device_clock_ns() - start_ns > p.limit_ns) {
            store_release_system(p.overdue, (uint32_t)rank + 1);
            if (p.fatal)
                device_trap();
            break;
        }
    }
}

/* Elements [0, 4) of x, zeros from n on. */
static __device__ float4 load_four(const float *x, size_t n)
{
    if (n >= 4 && (uintptr_t)x % sizeof(float4) == 0)
        return *(const float4 *)x;
    return {x[0], n > 1 ? x[1] : 0.0f, n > 2 ? x[2] : 0.0f, n > 3 ? x[3] : 0.0f};
}

static __device__ void store_four(float *x, size_t n, float4 v)
{
    if (n >= 4 && (uintptr_t)x % sizeof(float4) == 0) {
        *(float4 *)x = v;
        return;
    }
    x[0] = v.x;
    if (n > 1)
        x[1] = v.y;
    if (n > 2)
        x[2] = v.z;
    if (n > 3)
        x[3] = v.w;
}

template <int N>
__global__ void all_reduce_kernel(float *x, size_t n,
                                  const __grid_constant__ struct mailboxes boxes, int rank,
                                  struct patience patience)
{
    int block = (int)blockIdx.x, thread = (int)threadIdx.x;
    size_t i = (size_t)block * PIECE + 4 * (size_t)thread;
    uint32_t generation = boxes.of[rank]->flags[block][rank] + 1;
    float v[4][N];

    if (i < n)
        boxes.of[rank]->parts[generation & 1][block][thread] = load_four(x + i, n - i);
    __syncthreads();
    if (thread < N) {
        store_release_system(&boxes.of[thread]->flags[block][rank], generation);
        wait_for(&boxes.of[rank]->flags[block][thread], generation, thread, patience);
    }
    __syncthreads();
    if (i >= n)
        return;
#pragma unroll
    for (int r = 0; r < N; r++) {
        float4 part = boxes.of[r]->parts[generation & 1][block][thread];
        v[0][r] = part.x;
        v[1][r] = part.y;
        v[2][r] = part.z;
        v[3][r] = part.w;
    }
    store_four(
        x + i, n - i,
        {tree_of<N>(v[0], 1), tree_of<N>(v[1], 1), tree_of<N>(v[2], 1), tree_of<N>(v[3], 1)});
}

/* x [n_rows, n_cols] with the stride of its rows. */
struct strided {
    float *data;
    int64_t stride;
};

/* One block a row, with the threads and the order of add_rms_norm_kernel; its words and halves as
 * above, a row in place of a piece. */
template <int N, class T>
__global__ void all_reduce_norm_kernel(T *y, int64_t y_stride, struct strided x, struct strided sum,
                                       const float *weight, float eps, int64_t n_cols,
                                       const __grid_constant__ struct mailboxes boxes, int rank,
                                       struct patience patience)
{
    int row = (int)blockIdx.x, thread = (int)threadIdx.x;
    int64_t at = row * n_cols;
    uint32_t generation = boxes.of[rank]->row_flags[row][rank] + 1;
    float *xr = x.data + row * x.stride, squares = 0;
    float *mine = boxes.of[rank]->rows[generation & 1] + at;

    for (int64_t c = thread; c < n_cols; c += blockDim.x)
        mine[c] = sum.data[row * sum.stride + c];
    __syncthreads();
    if (thread < N) {
        store_release_system(&boxes.of[thread]->row_flags[row][rank], generation);
        wait_for(&boxes.of[rank]->row_flags[row][thread], generation, thread, patience);
    }
    __syncthreads();
    for (int64_t c = thread; c < n_cols; c += blockDim.x) {
        float v[N];
#pragma unroll
        for (int r = 0; r < N; r++)
            v[r] = boxes.of[r]->rows[generation & 1][at + c];
        float added = xr[c] + tree_of<N>(v, 1);
        xr[c] = added;
        squares = fmaf(added, added, squares);
    }
    store_rms_norm(y + row * y_stride, xr, squares, weight, eps, n_cols);
}

extern "C" void cuda_all_reduce_open(struct cuda_all_reduce *r, struct backend *b, int rank,
                                     int size)
{
    /* The driver lends whole pages to other processes: nothing else may lie on ours. */
    *r = {};
    r->rank = rank;
    r->size = size;
    r->mailboxes[rank] = b->ops->alloc(b, ALL_REDUCE_MAILBOX_BYTES);
    CUDA_CHECK(cudaMallocHost((void **)&r->overdue, sizeof(*r->overdue)));
    *r->overdue = 0;
    b->ops->sync(b);
}

extern "C" void cuda_all_reduce_close(struct cuda_all_reduce *r, struct backend *b)
{
    if (!r->overdue)
        return;
    b->ops->sync(b);
    CUDA_CHECK(cudaFreeHost(r->overdue));
    b->ops->free(b, r->mailboxes[r->rank]);
    *r = {};
}

/* 512 KiB, of eight ranks half of it: up to there vLLM's custom_all_reduce.cuh reads all parts too.
 */
extern "C" size_t cuda_all_reduce_max(int size)
{
    return (size_t)BLOCKS * PIECE / (size <= 4 ? 1 : 2);
}

static struct mailboxes mailboxes_of(const struct cuda_all_reduce *r)
{
    struct mailboxes boxes = {};

    for (int i = 0; i < r->size; i++)
        boxes.of[i] = (struct mailbox *)r->mailboxes[i];
    return boxes;
}

extern "C" void backend_cuda_all_reduce(struct backend *b, const struct cuda_all_reduce *r,
                                        float *x, size_t n, uint64_t limit_ns, int fatal)
{
    void (*kernel)(float *, size_t, struct mailboxes, int, struct patience) =
        r->size == 2   ? all_reduce_kernel<2>
        : r->size == 4 ? all_reduce_kernel<4>
        : r->size == 8 ? all_reduce_kernel<8>
                       : NULL;
    struct mailboxes boxes = mailboxes_of(r);
    struct patience patience = {limit_ns, r->overdue, fatal};

    if (!kernel || n > cuda_all_reduce_max(r->size))
        BUG("one-shot all-reduce of %zu elements among %d", n, r->size);
    if (!n)
        return;
    /* Whole warps; the same number on every rank, since n is. */
    unsigned n_threads = n > PIECE ? THREADS : (unsigned)(n + 127) / 128 * 32;
    LAUNCH(kernel, dim3(blocks_for((int64_t)n, PIECE)), dim3(n_threads), 0,
           cuda_state_of(b)->stream, x, n, boxes, r->rank, patience);
}

extern "C" int cuda_all_reduce_norm_takes(int64_t n_rows, int64_t n_cols)
{
    return n_rows <= ROWS && n_rows * n_cols <= ROW_FLOATS;
}

template <int N>
static void launch_norm(struct cuda_state *s, struct tensor *y, struct tensor *x,
                        const struct tensor *sum, const float *weight, float eps,
                        const struct mailboxes &boxes, int rank, const struct patience &patience)
{
    int64_t n_cols = tensor_n_cols(x);
    struct strided from = {(float *)x->data, x->row_stride};
    struct strided parts = {(float *)sum->data, sum->row_stride};

    WITH_TYPE(y->dtype, T,
              LAUNCH((all_reduce_norm_kernel<N, T>), dim3((unsigned)tensor_n_rows(x)),
                     dim3(row_threads(n_cols)), 0, s->stream, (T *)y->data, y->row_stride, from,
                     parts, weight, eps, n_cols, boxes, rank, patience));
}

extern "C" void backend_cuda_all_reduce_norm(struct backend *b, const struct cuda_all_reduce *r,
                                             struct tensor *y, struct tensor *x,
                                             const struct tensor *sum, const float *weight,
                                             float eps, uint64_t limit_ns, int fatal)
{
    struct cuda_state *s = cuda_state_of(b);
    struct mailboxes boxes = mailboxes_of(r);
    struct patience patience = {limit_ns, r->overdue, fatal};

    if (!cuda_all_reduce_norm_takes(tensor_n_rows(x), tensor_n_cols(x)) || x->dtype != DTYPE_F32 ||
        sum->dtype != DTYPE_F32)
        BUG("one-shot all-reduce and norm of %lld rows", (long long)tensor_n_rows(x));
    if (tensor_n_elements(x) == 0)
        return;
    if (r->size == 2)
        launch_norm<2>(s, y, x, sum, weight, eps, boxes, r->rank, patience);
    else if (r->size == 4)
        launch_norm<4>(s, y, x, sum, weight, eps, boxes, r->rank, patience);
    else if (r->size == 8)
        launch_norm<8>(s, y, x, sum, weight, eps, boxes, r->rank, patience);
    else
        BUG("one-shot all-reduce among %d", r->size);
}
