/*
 * The fibres of execution.h. Owns stacks, the schedule of a block, shared memory, and what the
 * sanitizers are told. Knows neither streams nor device memory (runtime.cc).
 *
 * EMULATION_TSAN / EMULATION_ASAN (1 or 0): which sanitizer the program is linked with.
 */
#include "execution.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <utility>
#include <vector>

extern "C" {
void *__tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void *__tsan_get_current_fiber(void);
void __tsan_acquire(void *address);
void __tsan_release(void *address);
void __asan_unpoison_memory_region(void const volatile *p, size_t n_bytes);
void __sanitizer_start_switch_fiber(void **fake_stack, const void *bottom, size_t n_bytes);
void __sanitizer_finish_switch_fiber(void *fake_stack, const void **bottom, size_t *n_bytes);
/* Saves the callee's registers and stack in *from, goes on at `to`. */
void emulation_switch(void **from, void *to);
void emulation_entry(void);
}

#if !defined(__x86_64__)
#error "the emulation's fibre switch is written for x86-64"
#endif
asm(R"(
    .text
    .globl emulation_switch
    .type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_switch, .-emulation_switch
)");

#if EMULATION_TSAN
#define TSAN(x) x
#else
#define TSAN(x)
#endif
#if EMULATION_ASAN
#define ASAN(x) x
#else
#define ASAN(x)
#endif

enum {
    COPIES_MAX = 512,
    THREADS_MAX = 1024,
    TSAN_FIBRES = 4096,
    SITES_MAX = 64,             // of one block, and
    BLOCK_MEMORY_MAX = 1 << 20, // pieces of one launch that cost no growing in a fibre
    N_STACKS = EMULATION_TSAN ? TSAN_FIBRES : THREADS_MAX
};
/* Whole pages and five lines more: what all threads of a warp touch lies not in the same lines of
 * the cache. */
static const size_t STACK_BYTES = 256 * 1024 + 4096 + 5 * 64;
static const long PAUSE_NS = 20000;

enum state { READY, AT_BARRIER, IN_COLLECTIVE, DONE };

struct fibre {
    emulated_context context;
    char *stack;
    void *sp;
    state st;
    const char *barrier_file;
    int barrier_line;
    unsigned mask;
    emulated_operation op;
    const void *in;
    void *out;
    emulated_complete complete;
    unsigned first_copy, n_copies; // in its ring of copies[]
    int group;
    void *tsan, *fake_stack;
    unsigned n_barriers, n_syncwarps; // so far
};

struct shared_site {
    const void *site;
    void *memory;
    size_t n_bytes;
};

static fibre fibres[THREADS_MAX];
/* A ring each; apart, that fibres lie close; no container: a race detector sees their memory. */
static emulated_copy copies[THREADS_MAX][COPIES_MAX];
static char *stacks;
static fibre *current;
static unsigned n_threads;
static void *main_sp;
static const std::function<void()> *body;
static uint64_t random_state;
static std::vector<shared_site> sites;
static void *dynamic_shared;
static std::vector<void *>
    block_memory; // of the whole launch: a race detector needs fresh addresses
static size_t block_memory_bytes;
[[maybe_unused]] static char launch_token, end_token;
[[maybe_unused]] static char
    *block_tokens; // of the running block: a pair for its barrier, then a pair a warp
[[maybe_unused]] static void *main_fake_stack;
[[maybe_unused]] static const void *main_bottom;
[[maybe_unused]] static size_t main_bytes;
TSAN(static void *main_fibre; static void *tsan_fibres[TSAN_FIBRES]; static unsigned tsan_next;)

emulated_context *emulated_now;

void emulated_die(const char *what)
{
    if (current)
        fprintf(stderr, "cuda emulation: block (%u,%u,%u) thread %u: %s\n",
                current->context.block.x, current->context.block.y, current->context.block.z,
                current->context.linear, what);
    else
        fprintf(stderr, "cuda emulation: %s\n", what);
    _Exit(3); // not a signal: a test expects the sentence
}

/* ---- switching ---- */

static void yield_to_scheduler(void)
{
    fibre *me = current;

    ASAN(__sanitizer_start_switch_fiber(me->st == DONE ? nullptr : &me->fake_stack, main_bottom,
                                        main_bytes));
    TSAN(__tsan_switch_to_fiber(main_fibre, 1));
    emulation_switch(&me->sp, main_sp);
    ASAN(__sanitizer_finish_switch_fiber(me->fake_stack, nullptr, nullptr));
}

extern "C" void emulation_entry(void)
{
    ASAN(__sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_bytes));
    TSAN(__tsan_acquire(&launch_token));
    (*body)();
    TSAN(__tsan_release(&end_token));
    if (current->n_copies)
        emulated_die("a thread left with cp.async copies that nothing waited for");
    current->st = DONE;
    yield_to_scheduler();
    abort(); // a finished fibre is never resumed
}

static void resume(fibre *f)
{
    current = f;
    emulated_now = &f->context;
    ASAN(__sanitizer_start_switch_fiber(&main_fake_stack, f->stack, STACK_BYTES));
    TSAN(__tsan_switch_to_fiber(f->tsan, 1));
    emulation_switch(&main_sp, f->sp);
    ASAN(__sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr));
    current = nullptr;
}

static void fibre_start(fibre *f, unsigned i, dim3 block, dim3 block_dim, dim3 grid_dim)
{
    unsigned slot = i;

    TSAN(slot = tsan_next++ % TSAN_FIBRES;
         if (!tsan_fibres[slot]) tsan_fibres[slot] = __tsan_create_fiber(0);
         f->tsan = tsan_fibres[slot];)
    f->stack = stacks + STACK_BYTES * slot; // one fibre's alone: two blocks' are no race
    void **top = (void **)(f->stack + STACK_BYTES);
    f->context.linear = i;
    f->context.thread = {i % block_dim.x, i / block_dim.x % block_dim.y,
                         i / (block_dim.x * block_dim.y)};
    f->context.block = block;
    f->context.block_dim = block_dim;
    f->context.grid_dim = grid_dim;
    f->st = READY;
    f->group = 0;
    f->n_barriers = f->n_syncwarps = 0;
    ASAN(__asan_unpoison_memory_region((char *)top - 4096, 4096));
    *--top = nullptr; // where emulation_entry would return to; keeps the ABI's alignment
    *--top = (void *)emulation_entry;
    f->sp = top - 6;
    memset(f->sp, 0, 6 * sizeof(void *));
}

/* ---- one block ---- */

static unsigned random_below(unsigned n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)((random_state >> 32) % n);
}

static std::vector<unsigned> schedule(unsigned n, unsigned seed)
{
    std::vector<unsigned> order(n);

    for (unsigned i = 0; i < n; i++)
        order[i] = seed == 1 ? n - 1 - i : i;
    if (seed > 1)
        for (unsigned i = n; i > 1; i--)
            std::swap(order[i - 1], order[random_below(i)]);
    return order;
}

/* Completes the collectives of a warp whose lanes have all arrived; 1 when it did one. */
static int complete_collectives(unsigned first)
{
    int done = 0;

    for (unsigned i = first; i < first + 32 && i < n_threads; i++) {
        fibre *f = &fibres[i];

        if (f->st != IN_COLLECTIVE)
            continue;
        const void *in[32] = {};
        void *out[32] = {};
        int all = 1;

        current = f; // whom a message names
        for (unsigned k = 0; k < 32; k++) {
            if (!(f->mask >> k & 1))
                continue;
            fibre *g = &fibres[first + k];
            if (first + k >= n_threads || g->st == DONE)
                emulated_die("a warp collective names a lane that has exited");
            if (g->st != IN_COLLECTIVE || g->mask != f->mask) {
                all = 0;
                break;
            }
            if (g->op != f->op)
                emulated_die("lanes of one mask meet in different collectives");
            in[k] = g->in;
            out[k] = g->out;
        }
        if (!all)
            continue;
        if (f->complete)
            f->complete(f->mask, in, out);
        unsigned mask = f->mask;
        for (unsigned k = 0; k < 32; k++)
            if (mask >> k & 1)
                fibres[first + k].st = READY;
        done = 1;
    }
    current = nullptr;
    return done;
}

static int run_warp(unsigned first, unsigned seed)
{
    unsigned n = n_threads - first < 32 ? n_threads - first : 32;
    int moved = 0;

    if (seed < 2) {
        for (unsigned i = 0; i < n; i++) {
            fibre *f = &fibres[first + (seed ? n - 1 - i : i)];
            if (f->st == READY) {
                resume(f);
                moved = 1;
            }
        }
    } else {
        for (unsigned i : schedule(n, seed))
            if (fibres[first + i].st == READY) {
                resume(&fibres[first + i]);
                moved = 1;
            }
    }
    return complete_collectives(first) | moved;
}

/* All live threads wait at one barrier: lets them go. 0: not yet. */
static int release_barrier(void)
{
    unsigned waiting = 0, done = 0;

    for (unsigned i = 0; i < n_threads; i++) {
        waiting += fibres[i].st == AT_BARRIER;
        done += fibres[i].st == DONE;
    }
    if (!waiting || waiting + done != n_threads)
        return 0;
    for (unsigned i = 0; i < n_threads; i++) {
        fibre *f = &fibres[i];
        current = f;
        if (done && f->st == DONE)
            emulated_die("__syncthreads() by others after this thread has exited");
        if (f->barrier_line != fibres[0].barrier_line ||
            strcmp(f->barrier_file, fibres[0].barrier_file))
            emulated_die("threads of one block wait at different __syncthreads()");
    }
    current = nullptr;
    for (unsigned i = 0; i < n_threads; i++)
        fibres[i].st = READY;
    return 1;
}

static void run_block(unsigned seed)
{
    for (;;) {
        unsigned n_warps = (n_threads + 31) / 32;
        int moved = 0;

        for (unsigned w : schedule(n_warps, seed)) {
            if (seed < 2)
                while (run_warp(32 * w, seed))
                    moved = 1;
            else
                moved |= run_warp(32 * w, seed);
        }
        unsigned done = 0;
        for (unsigned i = 0; i < n_threads; i++)
            done += fibres[i].st == DONE;
        if (done == n_threads)
            return;
        if (!release_barrier() && !moved)
            emulated_die("deadlock: some threads at a barrier, others in a warp collective");
    }
}

static void *poisoned(size_t n_bytes)
{
    void *p;

    if (posix_memalign(&p, 64, n_bytes ? n_bytes : 1))
        emulated_die("out of host memory");
    memset(p, 0xff, n_bytes);
    block_memory.push_back(p);
    block_memory_bytes += n_bytes;
    return p;
}

static void free_block_memory(void)
{
    for (void *p : block_memory)
        free(p);
    block_memory.clear();
    block_memory_bytes = 0;
}

void emulated_run(dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                  const std::function<void()> &kernel)
{
    const char *e = getenv("INTERNVLD_EMULATION_SEED");
    unsigned seed = e ? (unsigned)atoi(e) : 0;
    size_t n_blocks = (size_t)grid.x * grid.y * grid.z;

    if (!stacks) {
        stacks = (char *)mmap(nullptr, STACK_BYTES * N_STACKS, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED)
            emulated_die("no memory for the threads' stacks");
        random_state = 0x9E3779B97F4A7C15ull ^ seed;
        sites.reserve(SITES_MAX);
        block_memory.reserve(BLOCK_MEMORY_MAX);
    }
    n_threads = block.x * block.y * block.z;
    body = &kernel;
    TSAN(main_fibre = __tsan_get_current_fiber());
    for (size_t q = 0; q < n_blocks; q++) {
        size_t p = seed & 1 ? n_blocks - 1 - q : q;
        dim3 index((unsigned)(p % grid.x), (unsigned)(p / grid.x % grid.y),
                   (unsigned)(p / grid.x / grid.y));

        sites.clear();
        dynamic_shared = poisoned(dynamic_shared_bytes);
        block_tokens = (char *)poisoned(2 + 2 * (THREADS_MAX / 32));
        TSAN(__tsan_release(&launch_token));
        for (unsigned i = 0; i < n_threads; i++)
            fibre_start(&fibres[i], i, index, block, grid);
        run_block(seed);
        if (block_memory_bytes > 256u << 20 || block_memory.size() + SITES_MAX > BLOCK_MEMORY_MAX) {
            TSAN(__tsan_acquire(&end_token));
            free_block_memory();
        }
    }
    TSAN(__tsan_acquire(&end_token));
    free_block_memory();
}

/* ---- what a running thread calls ---- */

/* Where threads meet they release one token and acquire it as they go on. A thread that goes on
 * first may be at the next meeting before another has gone on from this one, and must not tell it
 * what it did between: tokens alternate. */
void emulated_barrier(const char *file, int line)
{
    TSAN(char *token = block_tokens + current->n_barriers++ % 2; __tsan_release(token));
    current->st = AT_BARRIER;
    current->barrier_file = file;
    current->barrier_line = line;
    yield_to_scheduler();
    TSAN(__tsan_acquire(token));
}

void emulated_collective(unsigned mask, emulated_operation op, const void *in, void *out,
                         emulated_complete complete)
{
    fibre *me = current;

    if (!(mask >> (me->context.linear & 31) & 1))
        emulated_die("the calling lane is not in its own mask");
    me->mask = mask;
    me->op = op;
    me->in = in;
    me->out = out;
    me->complete = complete;
    me->st = IN_COLLECTIVE;
    TSAN(char *token = block_tokens + 2 + 2 * (me->context.linear >> 5);
         if (op == EMULATED_SYNCWARP) __tsan_release(token += me->n_syncwarps++ % 2));
    yield_to_scheduler();
    TSAN(if (op == EMULATED_SYNCWARP) __tsan_acquire(token));
}

void emulated_pause(void)
{
    struct timespec t = {0, PAUSE_NS};

    yield_to_scheduler(); // still READY
    nanosleep(&t, nullptr);
}

void *emulated_shared(const void *site, size_t n_bytes)
{
    for (shared_site &s : sites)
        if (s.site == site) {
            TSAN(__tsan_acquire(s.memory));
            return s.memory;
        }
    sites.push_back({site, poisoned(n_bytes), n_bytes});
    TSAN(__tsan_release(sites.back().memory)); // the poison races with nobody
    return sites.back().memory;
}

void *emulated_dynamic_shared(void)
{
    return dynamic_shared;
}

void emulated_copy_push(void *dst, const void *src)
{
    fibre *me = current;

    if (me->n_copies == COPIES_MAX)
        emulated_die("more cp.async copies under way than the emulation holds");
    emulated_copy *c = &copies[me - fibres][(me->first_copy + me->n_copies++) % COPIES_MAX];
    c->dst = dst;
    c->src = src;
    c->group = me->group;
}

void emulated_copy_commit(void)
{
    current->group++;
}

int emulated_copy_pop(int n_pending, emulated_copy *c)
{
    fibre *me = current;
    const emulated_copy *oldest = &copies[me - fibres][me->first_copy];

    if (!me->n_copies || oldest->group >= me->group - n_pending)
        return 0;
    *c = *oldest;
    me->first_copy = (me->first_copy + 1) % COPIES_MAX;
    me->n_copies--;
    return 1;
}
