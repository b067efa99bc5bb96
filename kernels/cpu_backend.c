/*
 * The CPU back end's door: which instruction set, how many threads, where memory comes from, and
 * the table of ops.
 *
 * Owns struct cpu_state. The ops themselves are in cpu_matmul.c, cpu_quantized.c, cpu_paged.c,
 * cpu_attention.c, cpu_rows.c and cpu_move.c; it knows nothing of models or ranks.
 */
#include "kernels/cpu_backend.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/log.h"

struct isa {
    const char *name, *title;
    const struct cpu_tile_ops *tile;
    const struct cpu_expand_ops *expand;
    const struct cpu_multiply_ops *multiply; // NULL: it gains nothing
    const struct cpu_integer_ops *integer;
    const struct cpu_vector_ops *vector;
};

/* Best first, where dots_pay(). */
static const struct isa isas[] = {
#if INTERNVLD_CPU_X86
    {"avx512bf16", "AVX-512 BF16", &cpu_tile_avx512bf16, &cpu_expand_avx512bf16,
     &cpu_multiply_avx512bf16, &cpu_integer_avx512vnni, &cpu_vector_avx512bf16},
    {"avx512bf16fma", "AVX-512 BF16 (FMA tiles)", &cpu_tile_avx512bf16fma, &cpu_expand_avx512bf16,
     &cpu_multiply_avx512bf16fma, &cpu_integer_avx512vnni, &cpu_vector_avx512bf16},
    {"avx512vnni", "AVX-512 VNNI", &cpu_tile_avx512, &cpu_expand_avx512, &cpu_multiply_avx512,
     &cpu_integer_avx512vnni, &cpu_vector_avx512},
    {"avx512", "AVX-512", &cpu_tile_avx512, &cpu_expand_avx512, &cpu_multiply_avx512,
     &cpu_integer_avx512, &cpu_vector_avx512},
    {"avx2", "AVX2", &cpu_tile_avx2, &cpu_expand_avx2, &cpu_multiply_avx2, &cpu_integer_avx2,
     &cpu_vector_avx2},
#endif
    {"scalar", "portable C", &cpu_tile_scalar, &cpu_expand_scalar, NULL, &cpu_integer_scalar,
     &cpu_vector_scalar},
};
#define N_ISAS ((int)(sizeof(isas) / sizeof(isas[0])))

int backend_cpu_has(const char *isa)
{
#if INTERNVLD_CPU_X86
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (strcmp(isa, "avx2") == 0)
        return avx2;
    if (strcmp(isa, "avx512") == 0)
        return avx512;
    if (strcmp(isa, "avx512vnni") == 0)
        return avx512 && __builtin_cpu_supports("avx512vnni");
    /* Of the processors that have vdpbf16ps only Cooper Lake lacks VBMI. */
    if (strcmp(isa, "avx512bf16") == 0 || strcmp(isa, "avx512bf16fma") == 0)
        return avx512 && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
#endif
    return strcmp(isa, "scalar") == 0;
}

#if INTERNVLD_CPU_X86
#define TRIAL_STEPS 256 // of k pairs: some 5 us
#define TRIALS 5

/* The least time of a tile of operands in the cache. */
static uint64_t tile_time_ns(const struct cpu_tile_ops *tile, const struct tile *t, uint64_t least)
{
    uint64_t begun = clock_now_ns();
    tile->run(t, TILE_ROWS_MAX, 2, TILE_BF16_PAIRS);
    uint64_t time = clock_now_ns() - begun;
    return time < least ? time : least;
}

/* 1 where vdpbf16ps is no slower than two multiply-adds, which no flag of CPUID says. Both give the
 * same bits, so that a wrong answer, of a machine that is busy elsewhere, costs only time. */
static int dots_pay(void)
{
    float *memory = xcalloc(TRIAL_STEPS * (TILE_ROWS_MAX * 2 + 2 * 16) + TILE_FLOATS_MAX, 4);
    const struct tile t = {.a = memory,
                           .a_step = TILE_ROWS_MAX,
                           .a_row = 1,
                           .b = memory + TRIAL_STEPS * TILE_ROWS_MAX * 2,
                           .b_step = 32,
                           .b_block = TRIAL_STEPS * 32,
                           .c = memory + TRIAL_STEPS * (TILE_ROWS_MAX * 2 + 2 * 16),
                           .c_row = 32,
                           .n_k = TRIAL_STEPS};
    uint64_t dots = UINT64_MAX, fma = UINT64_MAX;
    for (int i = 0; i < TRIALS; i++) {
        dots = tile_time_ns(&cpu_tile_avx512bf16, &t, dots);
        fma = tile_time_ns(&cpu_tile_avx512bf16fma, &t, fma);
    }
    free(memory);
    return dots <= fma;
}
#endif

/* The same at every call. */
static const struct isa *isa_best(void)
{
    static const struct isa *best;
    if (best)
        return best;
    best = isas;
    while (!backend_cpu_has(best->name))
        best++;
#if INTERNVLD_CPU_X86
    if (best->tile == &cpu_tile_avx512bf16 && !dots_pay())
        best++;
#endif
    return best;
}

static const struct isa *isa_choose(const char *name)
{
    if (name == NULL || strcmp(name, "auto") == 0)
        return isa_best();
    for (int i = 0; i < N_ISAS; i++) {
        if (strcmp(isas[i].name, name) == 0) {
            if (!backend_cpu_has(name))
                die("this processor lacks the instruction set \"%s\"", name);
            return &isas[i];
        }
    }
    die("unknown instruction set \"%s\": auto, avx512bf16, avx512bf16fma, avx512vnni, avx512, avx2 "
        "or scalar",
        name);
}

const char *backend_cpu_best(void)
{
    return isa_best()->name;
}

/* A team wakes in a microsecond while its threads still spin, in tens when they sleep, and later
 * where other processes have the cores: less than about 5 us of work stays with one thread. */
#define PARALLEL_MIN_COST 80000

/* What the next op has to share is seen when this one has ended. */
static void run(struct backend *b, int n_threads, void (*work)(void *, int, int), void *arg)
{
    struct cpu_state *s = cpu_state(b);
    if (b->n_threads == 1) {
        work(arg, 0, 1);
        return;
    }
    cpu_cores_claim(&s->cores);
    if (n_threads == 1)
        work(arg, 0, 1);
    else
        cpu_team_run(s->team, n_threads, work, arg);
    uint64_t now = clock_now_ns();
    int share = cpu_cores_share(&s->cores, now);
    cpu_cores_release(&s->cores, now);
    s->n_threads = share < b->n_threads ? share : b->n_threads;
}

void cpu_parallel(struct backend *b, int64_t cost, void (*work)(void *, int, int), void *arg)
{
    run(b, cost < PARALLEL_MIN_COST ? 1 : cpu_state(b)->n_threads, work, arg);
}

void cpu_parts_init(struct cpu_state *s, int64_t n)
{
    for (int i = 0; i < s->n_threads; i++) {
        int64_t first;
        cpu_share(n, i, s->n_threads, &first, &s->parts[i].end);
        atomic_store_explicit(&s->parts[i].next, first, memory_order_relaxed);
    }
}

void cpu_parts_init_in_order(struct cpu_state *s, int64_t n)
{
    for (int i = 0; i < s->n_threads; i++) {
        atomic_store_explicit(&s->parts[i].next, 0, memory_order_relaxed);
        s->parts[i].end = i == 0 ? n : 0;
    }
}

int cpu_parts_take(struct cpu_state *s, int thread, int64_t most, int64_t *first, int64_t *end)
{
    for (int i = 0; i < s->n_threads; i++) {
        struct cpu_part *part = &s->parts[(thread + i) % s->n_threads];
        *first = atomic_fetch_add_explicit(&part->next, most, memory_order_relaxed);
        *end = part->end - *first < most ? part->end : *first + most;
        if (*first < *end)
            return 1;
    }
    return 0;
}

static const char *cpu_describe(const struct backend *b)
{
    return cpu_state(b)->description;
}

/*
 * Weights are read from end to end, and a page of 4 KiB after another takes a quarter longer than
 * huge ones. So large blocks (KV pages, weights) are mapped for themselves: zero without being
 * touched, so that pages fall on the node of the thread that fills them, aligned to and advised for
 * huge pages. Smaller ones lie one after another in regions of such pages, which live as long as
 * any of their blocks and never take a block twice. What is smaller still lies on the heap. The
 * bytes before a block tell which.
 */
#define HUGE_PAGE ((size_t)2 << 20)
#define REGION_BYTES ((size_t)64 << 20)
#define MAPPED_MIN ((size_t)16 << 20) // of what is mapped for itself
#define REGION_MIN ((size_t)64 << 10) // of what lies in regions

struct cpu_region {
    void *base; // of the mapping
    size_t used;
    int64_t n_blocks; // that are not freed
};

struct block {
    size_t n_bytes;            // of the block
    void *base;                // of its mapping, or on the heap; NULL in regions
    struct cpu_region *region; // or NULL
};
#define BLOCK_HEADER 64

static void *map_pages(size_t n_bytes)
{
    void *p = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        die("out of memory: %zu bytes asked: %s", n_bytes, strerror(errno));
    return p;
}

static char *huge_page_after(void *p, size_t n_bytes)
{
    return (char *)(((uintptr_t)p + n_bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
}

static size_t mapped_bytes(size_t n_bytes)
{
    return n_bytes + 2 * HUGE_PAGE;
}

static char *alloc_mapped(struct block *block)
{
    block->base = map_pages(mapped_bytes(block->n_bytes));
    char *p = huge_page_after(block->base, BLOCK_HEADER);
    size_t whole = block->n_bytes / HUGE_PAGE * HUGE_PAGE;
    madvise(p, whole, MADV_HUGEPAGE);               // advice: without it, only slower
    madvise(p + whole, HUGE_PAGE, MADV_NOHUGEPAGE); // what is left takes no more than it needs
    return p;
}

/* Of a small block, whole lines of the cache. */
static size_t headed_bytes(const struct block *block)
{
    return BLOCK_HEADER + (block->n_bytes + 63) / 64 * 64;
}

static char *alloc_in_region(struct cpu_state *s, struct block *block)
{
    const size_t n_bytes = headed_bytes(block);
    if (!s->region || s->region->used + n_bytes > REGION_BYTES) {
        void *base = map_pages(REGION_BYTES + HUGE_PAGE);
        s->region = (struct cpu_region *)(void *)huge_page_after(base, 0);
        madvise(s->region, REGION_BYTES, MADV_HUGEPAGE);
        *s->region = (struct cpu_region){.base = base, .used = 64};
    }
    char *p = (char *)s->region + s->region->used + BLOCK_HEADER;
    s->region->used += n_bytes;
    s->region->n_blocks++;
    block->region = s->region;
    return p;
}

static char *alloc_on_heap(struct block *block)
{
    const size_t n_bytes = headed_bytes(block);
    block->base = aligned_alloc(64, n_bytes);
    if (!block->base)
        die("out of memory: %zu bytes asked", n_bytes);
    memset(block->base, 0, n_bytes);
    return (char *)block->base + BLOCK_HEADER;
}

static void *cpu_alloc(struct backend *b, size_t n_bytes)
{
    struct block block = {.n_bytes = n_bytes};
    char *p;
    if (n_bytes > SIZE_MAX / 2)
        die("out of memory: %zu bytes asked", n_bytes);
    if (n_bytes >= MAPPED_MIN)
        p = alloc_mapped(&block);
    else if (n_bytes >= REGION_MIN)
        p = alloc_in_region(cpu_state(b), &block);
    else
        p = alloc_on_heap(&block);
    memcpy(p - BLOCK_HEADER, &block, sizeof(block));
    return p;
}

static void cpu_touch(struct backend *b, void *p, size_t n_bytes)
{
    (void)b;
    memset(p, 0, n_bytes);
}

/* Its whole pages go back at once, the region with its last block. */
static void free_in_region(struct cpu_state *s, struct cpu_region *region, char *p, size_t n_bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *first = (char *)(((uintptr_t)p + page - 1) / page * page);
    madvise(first, (size_t)(p + n_bytes - first) / page * page, MADV_DONTNEED);
    if (--region->n_blocks > 0)
        return;
    if (s->region == region)
        s->region = NULL;
    munmap(region->base, REGION_BYTES + HUGE_PAGE);
}

static void cpu_free(struct backend *b, void *p)
{
    if (!p)
        return;
    struct block block;
    memcpy(&block, (char *)p - BLOCK_HEADER, sizeof(block));
    if (block.region)
        free_in_region(cpu_state(b), block.region, p, block.n_bytes);
    else if (block.n_bytes >= MAPPED_MIN)
        munmap(block.base, mapped_bytes(block.n_bytes));
    else
        free(block.base);
}

/* Packed input is read as often as weights are, and lies in huge pages too where it fills some. */
void *cpu_scratch_reserve(struct cpu_scratch *s, size_t n_bytes)
{
    if (n_bytes > s->n_bytes) {
        const size_t whole = n_bytes / HUGE_PAGE * HUGE_PAGE,
                     alignment = whole > 0 ? HUGE_PAGE : 64;
        free(s->memory); // what is asked for beyond n_bytes is never touched
        s->memory = aligned_alloc(alignment, (n_bytes + alignment - 1) / alignment * alignment);
        if (!s->memory)
            die("out of memory: %zu bytes of scratch", n_bytes);
        madvise(s->memory, whole, MADV_HUGEPAGE);
        s->n_bytes = n_bytes;
    }
    return s->memory;
}

static void *cpu_alloc_host(struct backend *b, size_t n_bytes)
{
    (void)b;
    return xcalloc(n_bytes, 1);
}

static void cpu_free_host(struct backend *b, void *p)
{
    (void)b;
    free(p);
}

static void cpu_transfer(struct backend *b, void *dst, const void *src, size_t n_bytes)
{
    (void)b;
    memmove(dst, src, n_bytes);
}

static void cpu_sync(struct backend *b)
{
    (void)b;
}

static void cpu_run(struct backend *b, void (*work)(void *, int, int), void *arg)
{
    run(b, cpu_state(b)->n_threads, work, arg);
}

static void cpu_close(struct backend *b)
{
    struct cpu_state *s = cpu_state(b);
    cpu_team_close(s->team);
    free(s->shared.memory);
    for (int i = 0; i < b->n_threads; i++) {
        free(s->thread[i].memory);
        free(s->expanded[i].memory);
    }
    free(s->thread);
    free(s->expanded);
    free(s->parts);
    free(s);
    free(b);
}

static const struct backend_ops cpu_ops = {
    .name = "cpu",
    .describe = cpu_describe,
    .close = cpu_close,
    .alloc = cpu_alloc,
    .touch = cpu_touch,
    .free = cpu_free,
    .alloc_host = cpu_alloc_host,
    .free_host = cpu_free_host,
    .upload = cpu_transfer,
    .download = cpu_transfer,
    .sync = cpu_sync,
    .parallel = cpu_run,
    .linear_pack = cpu_linear_pack,
    .linear_pack_quantized = cpu_linear_pack_quantized,
    .linear_free = cpu_linear_free,
    .matmul = cpu_matmul,
    .matmul_gated = cpu_matmul_gated,
    .embed = cpu_embed,
    .embed_quantized = cpu_embed_quantized,
    .scatter_rows = cpu_scatter_rows,
    .gather_rows = cpu_gather_rows,
    .rms_norm = cpu_rms_norm,
    .add_rms_norm = cpu_add_rms_norm,
    .layer_norm = cpu_layer_norm,
    .add = cpu_add,
    .add_bias = cpu_add_bias,
    .gated_activation = cpu_gated_activation,
    .kv_write = cpu_kv_write,
    .paged_attention = cpu_paged_attention,
    .attention = cpu_attention,
    .patchify = cpu_patchify,
    .pixel_shuffle = cpu_pixel_shuffle,
    .copy = cpu_copy,
    .copy_pages = cpu_copy_pages,
};

size_t backend_cpu_matmul_bytes(const char *isa, int64_t n_rows, int64_t in_dim, enum dtype dtype)
{
    return cpu_matmul_bytes(isa_choose(isa)->tile, n_rows, in_dim, dtype);
}

size_t backend_cpu_expanded_bytes(const char *isa, int64_t out_dim, int64_t in_dim, int n_parts,
                                  enum dtype dtype)
{
    return cpu_expanded_bytes(isa_choose(isa)->tile, out_dim, in_dim, n_parts, dtype);
}

struct backend *backend_cpu_open(int n_threads, const char *isa)
{
    if (n_threads < 1)
        BUG("%d threads", n_threads);
    const struct isa *chosen = isa_choose(isa);
    struct cpu_state *s = xcalloc(1, sizeof(*s));
    s->tile = chosen->tile;
    s->expand = chosen->expand;
    s->multiply = chosen->multiply;
    s->integer = chosen->integer;
    s->vector = chosen->vector;
    s->thread = xcalloc((size_t)n_threads, sizeof(*s->thread));
    s->expanded = xcalloc((size_t)n_threads, sizeof(*s->expanded));
    s->parts = aligned_alloc(64, (size_t)n_threads * sizeof(*s->parts));
    if (!s->parts)
        die("out of memory");
    s->n_threads = n_threads;
    s->cores = (struct cpu_cores){.n_cores = n_threads};
    s->team = n_threads > 1 ? cpu_team_open(n_threads) : NULL;
    snprintf(s->description, sizeof(s->description), "cpu %s, %d thread%s", chosen->title,
             n_threads, n_threads == 1 ? "" : "s");
    struct backend *b = xcalloc(1, sizeof(*b));
    b->ops = &cpu_ops;
    b->activation_dtype = DTYPE_F32;
    b->kv_in_pairs = 1;
    b->is_host = 1;
    b->has_int8 = 1;
    b->n_threads = n_threads;
    b->state = s;
    return b;
}

void backend_cpu_share(struct backend *b, const struct cpu_cores *cores)
{
    cpu_state(b)->cores = *cores;
}
