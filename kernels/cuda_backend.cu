/*
 * Opening a CUDA device as a back end: memory, the one stream, graphs, and the op table.
 *
 * Owns struct cuda_state. Knows no op's arithmetic: each lives in its own cuda_*.cu. All device
 * memory beyond the weights, pages and activations that callers allocate is taken here, at open.
 */
#include <stdio.h>

#include "kernels/cuda_internal.h"

/* Smaller blocks are copied before other threads are awake. */
static const size_t PARALLEL_COPY_BYTES_MIN = (size_t)1 << 20;

static const char *describe(const struct backend *b)
{
    return ((const struct cuda_state *)b->state)->description;
}

static void *alloc(struct backend *b, size_t n_bytes)
{
    struct cuda_state *s = cuda_state_of(b);
    void *p = NULL;
    cudaError_t e;

    if (!n_bytes)
        n_bytes = 1;
    e = cudaMalloc(&p, n_bytes);
    if (e != cudaSuccess)
        die("device %d: cannot allocate %zu bytes: %s", s->device, n_bytes, cudaGetErrorString(e));
    CUDA_CHECK(cudaMemsetAsync(p, 0, n_bytes, s->stream));
    return p;
}

static void release(struct backend *b, void *p)
{
    (void)b;
    CUDA_CHECK(cudaFree(p));
}

static void *alloc_host(struct backend *b, size_t n_bytes)
{
    struct cuda_state *s = cuda_state_of(b);
    void *p = NULL;
    cudaError_t e = cudaMallocHost(&p, n_bytes ? n_bytes : 1);

    if (e != cudaSuccess)
        die("device %d: cannot pin %zu bytes of host memory: %s", s->device, n_bytes,
            cudaGetErrorString(e));
    memset(p, 0, n_bytes);
    return p;
}

static void release_host(struct backend *b, void *p)
{
    (void)b;
    CUDA_CHECK(cudaFreeHost(p));
}

struct host_copy {
    char *to;
    const char *from;
    size_t n_bytes;
};

static void copy_part(void *arg, int thread, int n_threads)
{
    const struct host_copy *c = (const struct host_copy *)arg;
    size_t first = c->n_bytes * (size_t)thread / (size_t)n_threads;
    size_t end = c->n_bytes * ((size_t)thread + 1) / (size_t)n_threads;

    memcpy(c->to + first, c->from + first, end - first);
}

/* Everything passes through the pinned halves: one is filled while the other is on its way, and
 * nobody waits for the last. The run time may read memory of any other kind after it returned, for
 * how long depends on the kind, the size and the machine. */
static void upload(struct backend *b, void *dst, const void *host_src, size_t n_bytes)
{
    struct cuda_state *s = cuda_state_of(b);

    for (size_t at = 0, n; at < n_bytes; at += n) {
        n = n_bytes - at < s->staging_bytes ? n_bytes - at : s->staging_bytes;
        struct host_copy c = {cuda_staging_take(s, n), (const char *)host_src + at, n};
        if (n < PARALLEL_COPY_BYTES_MIN)
            copy_part(&c, 0, 1);
        else
            op_parallel(b, copy_part, &c);
        cuda_staging_upload(b, (char *)dst + at, c.to, n);
    }
}

static void download(struct backend *b, void *host_dst, const void *src, size_t n_bytes)
{
    struct cuda_state *s = cuda_state_of(b);

    if (n_bytes)
        CUDA_CHECK(cudaMemcpyAsync(host_dst, src, n_bytes, cudaMemcpyDeviceToHost, s->stream));
    CUDA_CHECK(cudaStreamSynchronize(s->stream));
}

char *cuda_staging_take(struct cuda_state *s, size_t n_bytes)
{
    if (s->staging_used + n_bytes > s->staging_bytes) {
        s->staging_half = (s->staging_half + 1) % STAGING_HALVES;
        s->staging_used = 0;
        CUDA_CHECK(cudaEventSynchronize(s->staged[s->staging_half]));
    }
    char *p = s->staging + (size_t)s->staging_half * s->staging_bytes + s->staging_used;
    s->staging_used += rounded(n_bytes);
    return p;
}

void cuda_staging_upload(struct backend *b, void *dst, const char *taken, size_t n_bytes)
{
    struct cuda_state *s = cuda_state_of(b);

    CUDA_CHECK(cudaMemcpyAsync(dst, taken, n_bytes, cudaMemcpyHostToDevice, s->stream));
    CUDA_CHECK(cudaEventRecord(s->staged[s->staging_half], s->stream));
}

static void sync_stream(struct backend *b)
{
    CUDA_CHECK(cudaStreamSynchronize(cuda_state_of(b)->stream));
}

static void run_team(struct backend *b, void (*work)(void *, int, int), void *arg)
{
    cpu_team_run(cuda_state_of(b)->team, b->n_threads, work, arg);
}

static void close_backend(struct backend *b)
{
    struct cuda_state *s = cuda_state_of(b);

    CUDA_CHECK(cudaStreamSynchronize(s->stream));
    CUBLAS_CHECK(cublasLtDestroy(s->blas));
    CUDA_CHECK(cudaFree(s->workspace));
    CUDA_CHECK(cudaFree(s->dense));
    CUDA_CHECK(cudaFree(s->scratch));
    for (int i = 0; i < STAGING_HALVES; i++)
        CUDA_CHECK(cudaEventDestroy(s->staged[i]));
    CUDA_CHECK(cudaFreeHost(s->staging));
    CUDA_CHECK(cudaStreamDestroy(s->stream));
    cpu_team_close(s->team);
    free(s);
    free(b);
}

extern "C" int backend_cuda_count(void)
{
    int n = 0;

    if (cudaGetDeviceCount(&n) != cudaSuccess) {
        (void)cudaGetLastError(); // no driver: no device, and the error is not sticky
        return 0;
    }
    return n;
}

extern "C" void backend_cuda_name(char *name, size_t n_bytes)
{
    struct cudaDeviceProp p;

    name[0] = '\0';
    if (backend_cuda_count() == 0)
        return;
    CUDA_CHECK(cudaGetDeviceProperties(&p, 0));
    snprintf(name, n_bytes, "%s", p.name);
}

extern "C" void backend_cuda_pci_address(int device, char *address, size_t n_bytes)
{
    CUDA_CHECK(cudaDeviceGetPCIBusId(address, (int)n_bytes, device));
}

extern "C" void *backend_cuda_stream(struct backend *b)
{
    return cuda_state_of(b)->stream;
}

extern "C" void backend_cuda_memory(struct backend *b, size_t *free_bytes, size_t *total_bytes)
{
    (void)b;
    CUDA_CHECK(cudaMemGetInfo(free_bytes, total_bytes));
}

/* ---- graphs ---- */

struct graph {
    cudaGraphExec_t exec;
};

static void graph_begin(struct backend *b)
{
    CUDA_CHECK(cudaStreamBeginCapture(cuda_state_of(b)->stream, cudaStreamCaptureModeThreadLocal));
}

static struct graph *graph_end(struct backend *b)
{
    struct graph *g = (struct graph *)xcalloc(1, sizeof(*g));
    cudaGraph_t graph;

    CUDA_CHECK(cudaStreamEndCapture(cuda_state_of(b)->stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&g->exec, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
    return g;
}

static void graph_launch(struct backend *b, struct graph *g)
{
    CUDA_CHECK(cudaGraphLaunch(g->exec, cuda_state_of(b)->stream));
}

static void graph_free(struct backend *b, struct graph *g)
{
    (void)b;
    CUDA_CHECK(cudaGraphExecDestroy(g->exec));
    free(g);
}

/* ---- the table ---- */

static struct backend_ops make_ops(void)
{
    struct backend_ops ops = {};

    ops.name = "cuda";
    ops.describe = describe;
    ops.alloc = alloc;
    ops.free = release;
    ops.alloc_host = alloc_host;
    ops.free_host = release_host;
    ops.upload = upload;
    ops.download = download;
    ops.sync = sync_stream;
    ops.parallel = run_team;
    ops.linear_pack = cuda_linear_pack;
    ops.linear_pack_quantized = cuda_linear_pack_quantized;
    ops.linear_free = cuda_linear_free;
    ops.matmul = cuda_matmul;
    ops.embed = cuda_embed;
    ops.embed_quantized = cuda_embed_quantized;
    ops.scatter_rows = cuda_scatter_rows;
    ops.gather_rows = cuda_gather_rows;
    ops.rms_norm = cuda_rms_norm;
    ops.add_rms_norm = cuda_add_rms_norm;
    ops.layer_norm = cuda_layer_norm;
    ops.add = cuda_add;
    ops.add_bias = cuda_add_bias;
    ops.gated_activation = cuda_gated_activation;
    ops.kv_write = cuda_kv_write;
    ops.paged_attention = cuda_paged_attention;
    ops.attention = cuda_attention;
    ops.patchify = cuda_patchify;
    ops.pixel_shuffle = cuda_pixel_shuffle;
    ops.copy = cuda_copy;
    ops.copy_pages = cuda_copy_pages;
    ops.top_k = cuda_top_k;
    ops.draw = cuda_draw;
    ops.graph_begin = graph_begin;
    ops.graph_end = graph_end;
    ops.graph_launch = graph_launch;
    ops.graph_free = graph_free;
    ops.close = close_backend;
    return ops;
}

static const struct backend_ops cuda_ops = make_ops();

extern "C" struct backend *backend_cuda_open(const struct cuda_options *o)
{
    struct backend *b = (struct backend *)xcalloc(1, sizeof(*b));
    struct cuda_state *s = (struct cuda_state *)xcalloc(1, sizeof(*s));
    struct cudaDeviceProp p;
    int n = backend_cuda_count();

    if (o->device < 0 || o->device >= n)
        die("CUDA device %d does not exist: this host has %d", o->device, n);
    if (o->activation_dtype != DTYPE_F32 && o->activation_dtype != DTYPE_BF16)
        BUG("activations in %s", dtype_name(o->activation_dtype));
    CUDA_CHECK(cudaSetDevice(o->device));
    CUDA_CHECK(cudaGetDeviceProperties(&p, o->device));
    if (p.major < 8)
        die("CUDA device %d (%s) is sm_%d%d: sm_80 or newer is needed", o->device, p.name, p.major,
            p.minor);
    s->device = o->device;
    s->deterministic = o->deterministic;
    snprintf(s->description, sizeof(s->description), "%s, sm_%d%d, %.1f GiB%s", p.name, p.major,
             p.minor, (double)p.totalGlobalMem / (double)(1 << 30),
             o->deterministic ? ", deterministic" : "");
    CUDA_CHECK(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    CUBLAS_CHECK(cublasLtCreate(&s->blas));
    s->workspace_bytes = CUDA_WORKSPACE_BYTES;
    s->scratch_bytes = o->scratch_bytes ? o->scratch_bytes : CUDA_SCRATCH_BYTES;
    s->staging_bytes = CUDA_STAGING_BYTES / STAGING_HALVES;
    s->dense_bytes_max = o->dense_bytes ? o->dense_bytes : CUDA_DENSE_BYTES;
    CUDA_CHECK(cudaMalloc(&s->workspace, s->workspace_bytes));
    CUDA_CHECK(cudaMalloc((void **)&s->scratch, s->scratch_bytes));
    CUDA_CHECK(cudaMallocHost((void **)&s->staging, STAGING_HALVES * s->staging_bytes));
    for (int i = 0; i < STAGING_HALVES; i++)
        CUDA_CHECK(cudaEventCreateWithFlags(&s->staged[i], cudaEventDisableTiming));
    b->ops = &cuda_ops;
    b->activation_dtype = o->activation_dtype;
    b->replays = !o->enforce_eager;
    b->has_fp8 = p.major > 8 || p.minor >= 9;
    b->n_threads = o->n_threads > 0 ? o->n_threads : 1;
    s->team = b->n_threads > 1 ? cpu_team_open(b->n_threads) : NULL;
    b->state = s;
    return b;
}
