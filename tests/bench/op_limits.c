/*
 * The loops of op_limits.h. Independent sums, each in its register, hide the latency of a
 * multiply-add; the compiler neither knows the factors nor may drop the sums.
 */
#include "tests/bench/op_limits.h"

#include <string.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/cpu_backend.h"

#define N_SUMS 16
#define PEAK_STEPS 300000 // about a millisecond
/* Bytes read a round; the buffer is at least four times the last-level cache. */
#define READ_BYTES ((int64_t)64 << 20)
#define N_STREAMS 4 // of a thread, where it has several
#define BUFFER_BYTES_MIN ((int64_t)512 << 20)

/* ---- arithmetic ---- */

/* A value the compiler neither knows nor drops, in a register. */
#if defined(__x86_64__)
#define KEEP(x) __asm__ volatile("" : "+x"(x))
#else
#define KEEP(x) __asm__ volatile("" : "+m"(x))
#endif

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx512f"))) static void peak_avx512(int64_t n_steps)
{
    __m512 sums[N_SUMS], a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
#pragma GCC unroll 16
    for (int i = 0; i < N_SUMS; i++)
        sums[i] = _mm512_set1_ps((float)i);
    for (int64_t k = 0; k < n_steps; k++) {
#pragma GCC unroll 16
        for (int i = 0; i < N_SUMS; i++)
            sums[i] = _mm512_fmadd_ps(a, b, sums[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N_SUMS; i++)
        KEEP(sums[i]);
}

__attribute__((target("avx512f,avx512bf16"))) static void peak_avx512bf16(int64_t n_steps)
{
    __m512 sums[N_SUMS], a = _mm512_set1_ps(0.5f);
    __m512bh x = (__m512bh)a, y = (__m512bh)_mm512_set1_ps(0.25f);
#pragma GCC unroll 16
    for (int i = 0; i < N_SUMS; i++)
        sums[i] = _mm512_set1_ps((float)i);
    for (int64_t k = 0; k < n_steps; k++) {
#pragma GCC unroll 16
        for (int i = 0; i < N_SUMS; i++)
            sums[i] = _mm512_dpbf16_ps(sums[i], x, y);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N_SUMS; i++)
        KEEP(sums[i]);
}

__attribute__((target("avx2,fma"))) static void peak_avx2(int64_t n_steps)
{
    __m256 sums[12], a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
#pragma GCC unroll 16
    for (int i = 0; i < 12; i++)
        sums[i] = _mm256_set1_ps((float)i);
    for (int64_t k = 0; k < n_steps; k++) {
#pragma GCC unroll 16
        for (int i = 0; i < 12; i++)
            sums[i] = _mm256_fmadd_ps(a, b, sums[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 12; i++)
        KEEP(sums[i]);
}
#endif

/* Sums of four neighbouring products, vpdpbusd. */
__attribute__((target("avx512f,avx512vnni"))) static void peak_avx512vnni(int64_t n_steps)
{
    __m512i sums[N_SUMS], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(-1);
#pragma GCC unroll 16
    for (int i = 0; i < N_SUMS; i++)
        sums[i] = _mm512_set1_epi32(i);
    for (int64_t k = 0; k < n_steps; k++) {
#pragma GCC unroll 16
        for (int i = 0; i < N_SUMS; i++)
            sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N_SUMS; i++)
        KEEP(sums[i]);
}

/* Where there is none: of two, of 16 bits, and an add. */
__attribute__((target("avx512f,avx512bw"))) static void peak_avx512madd(int64_t n_steps)
{
    __m512i sums[N_SUMS], a = _mm512_set1_epi16(1), b = _mm512_set1_epi16(-1);
#pragma GCC unroll 16
    for (int i = 0; i < N_SUMS; i++)
        sums[i] = _mm512_set1_epi32(i);
    for (int64_t k = 0; k < n_steps; k++) {
#pragma GCC unroll 16
        for (int i = 0; i < N_SUMS; i++) {
            sums[i] = _mm512_add_epi32(sums[i], _mm512_madd_epi16(a, b));
            KEEP(a); // or one product would serve all sums
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < N_SUMS; i++)
        KEEP(sums[i]);
}

__attribute__((target("avx2"))) static void peak_avx2madd(int64_t n_steps)
{
    __m256i sums[12], a = _mm256_set1_epi16(1), b = _mm256_set1_epi16(-1);
#pragma GCC unroll 16
    for (int i = 0; i < 12; i++)
        sums[i] = _mm256_set1_epi32(i);
    for (int64_t k = 0; k < n_steps; k++) {
#pragma GCC unroll 16
        for (int i = 0; i < 12; i++) {
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(a, b));
            KEEP(a);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 12; i++)
        KEEP(sums[i]);
}

/* A multiply and an add on four floats: what C without flags of its own is compiled to. */
static void peak_scalar(int64_t n_steps)
{
    typedef float v4 __attribute__((vector_size(16)));
    v4 sums[12], a = {0.5f, 0.5f, 0.5f, 0.5f};
#pragma GCC unroll 16
    for (int i = 0; i < 12; i++)
        sums[i] = a * (float)i;
    for (int64_t k = 0; k < n_steps; k++) {
#pragma GCC unroll 16
        for (int i = 0; i < 12; i++)
            sums[i] = sums[i] * a + a;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 12; i++)
        KEEP(sums[i]);
}

struct peak {
    void (*run)(int64_t n_steps);
    double ops_a_step;
};

static const struct peak scalar_peak = {peak_scalar, 12 * 4 * 2};
#if defined(__x86_64__)
static const struct peak avx512_peak = {peak_avx512, N_SUMS * 16 * 2};
static const struct peak avx512bf16_peak = {peak_avx512bf16, N_SUMS * 32 * 2};
static const struct peak avx512vnni_peak = {peak_avx512vnni, N_SUMS * 64 * 2};
static const struct peak avx512madd_peak = {peak_avx512madd, N_SUMS * 32 * 2};
static const struct peak avx2_peak = {peak_avx2, 12 * 8 * 2};
static const struct peak avx2madd_peak = {peak_avx2madd, 12 * 16 * 2};
#endif

/* Of an instruction set, by enum arithmetic; NULL: none is faster than float32's. */
static const struct {
    const char *isa;
    const struct peak *of[ARITHMETIC_COUNT];
} peaks[] = {
#if defined(__x86_64__)
    {"avx512bf16", {&avx512_peak, &avx512bf16_peak, &avx512vnni_peak}},
    {"avx512bf16fma", {&avx512_peak, &avx512bf16_peak, &avx512vnni_peak}},
    {"avx512vnni", {&avx512_peak, NULL, &avx512vnni_peak}},
    {"avx512", {&avx512_peak, NULL, &avx512madd_peak}},
    {"avx2", {&avx2_peak, NULL, &avx2madd_peak}},
#endif
    {"scalar", {&scalar_peak, NULL, NULL}},
};
#define N_PEAKS ((int)(sizeof(peaks) / sizeof(peaks[0])))

static void peak_work(void *arg, int thread, int n_threads)
{
    (void)thread;
    (void)n_threads;
    ((const struct peak *)arg)->run(PEAK_STEPS);
}

static void run_on_team(struct backend *b, void (*work)(void *, int, int), const void *arg)
{
    cpu_parallel(b, INT64_MAX, work, (void *)arg);
}

static double peak_rate(struct backend *b, const struct peak *p)
{
    uint64_t begun = clock_now_ns();
    run_on_team(b, peak_work, p);
    return p->ops_a_step * PEAK_STEPS * b->n_threads * 1e9 / (double)(clock_now_ns() - begun);
}

/* ---- memory ---- */

struct read_job {
    const char *memory;
    int64_t n_bytes;
    int n_streams;
};

/* Every line is loaded once, in order, with a prefetch across pages; the values are not used. A
 * thread's part is one stream or several at once: which is faster depends on the processor. */
static void read_work(void *arg, int thread, int n_threads)
{
    const struct read_job *job = arg;
    const int64_t n_lines = job->n_bytes / 64 / (n_threads * job->n_streams);
    const char *p = job->memory + thread * job->n_streams * n_lines * 64;
    for (int64_t i = 0; i < n_lines; i++, p += 64) {
        for (int j = 0; j < job->n_streams; j++) {
            const char *line = p + j * n_lines * 64;
            __builtin_prefetch(line + 4096);
            uint64_t value = *(const volatile uint64_t *)(const void *)line;
            (void)value;
        }
    }
}

static double read_rate(struct limits *l, int n_streams)
{
    struct read_job job = {(const char *)l->memory + l->at, READ_BYTES, n_streams};
    uint64_t begun = clock_now_ns();
    run_on_team(l->b, read_work, &job);
    l->at = (l->at + READ_BYTES) % (l->n_bytes - READ_BYTES + 1) / 4096 * 4096;
    return (double)READ_BYTES * 1e9 / (double)(clock_now_ns() - begun);
}

void limits_open(struct limits *l, struct backend *b, const char *isa)
{
    int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    *l = (struct limits){.b = b, .isa = isa, .n_bytes = BUFFER_BYTES_MIN};
    if (cache * 4 > l->n_bytes)
        l->n_bytes = cache * 4;
    l->memory = op_alloc(b, (size_t)l->n_bytes);
    memset(l->memory, 1, (size_t)l->n_bytes);
}

struct limits_rates limits_measure(struct limits *l)
{
    struct limits_rates r = {0};
    uint64_t begun = clock_now_ns();
    for (int i = 0; i < N_PEAKS; i++) {
        for (int j = 0; j < ARITHMETIC_COUNT && strcmp(peaks[i].isa, l->isa) == 0; j++) {
            const struct peak *p = peaks[i].of[j];
            const double rate = p ? peak_rate(l->b, p) : 0, f32 = r.ops_per_s[ARITHMETIC_F32];
            r.ops_per_s[j] = rate > f32 ? rate : f32;
        }
    }
    double one = read_rate(l, 1), several = read_rate(l, N_STREAMS);
    r.bytes_per_s = several > one ? several : one;
    r.duration_ns = clock_now_ns() - begun;
    return r;
}

void limits_close(struct limits *l)
{
    op_free(l->b, l->memory);
}
