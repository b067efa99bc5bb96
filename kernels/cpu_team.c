/*
 * Spin a little, then sleep (cpu_team.h). Every wait is for a 32-bit word to change; a sleeper is
 * in futex(2), and whoever changes the word wakes only when the word's sleeper count is not 0.
 */
#include "kernels/cpu_team.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/log.h"

#define SPIN_NS 20000

struct word {
    _Alignas(64) _Atomic uint32_t value;
    _Atomic uint32_t n_sleepers;
};

struct member {
    struct cpu_team *team;
    int index;
    pthread_t thread;
};

/* The latest piece of work: its number, and how many threads it is given to, in one word, so that a
 * member that comes late reads both of the same piece. */
#define PIECE(number, n_threads) ((uint64_t)(number) << 12 | (uint64_t)(n_threads))
#define PIECE_THREADS(piece) ((int)((piece)&0xfff))

struct cpu_team {
    _Atomic uint64_t piece;
    struct word started;  // pieces of work given out
    struct word grown;    // of these, the ones with more threads than the one before
    struct word finished; // members that have finished, of all pieces
    struct word passed;   // barriers that all have come to
    _Atomic uint32_t n_at_barrier;
    int n_threads, stop;
    /* Of the latest piece; read by those who take part, without whom it does not end. */
    uint64_t number;
    int n_now;
    void (*work)(void *, int, int);
    void *arg;
    struct member *members; // [n_threads - 1]
};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    atomic_signal_fence(memory_order_seq_cst);
#endif
}

static void futex(_Atomic uint32_t *word, int op, uint32_t value)
{
    syscall(SYS_futex, word, op | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

/* Until the word is no longer `old`; what was written before it changed is visible then. */
static void word_wait(struct word *w, uint32_t old)
{
    uint64_t until = clock_now_ns() + SPIN_NS;

    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&w->value, memory_order_acquire) != old)
                return;
            relax();
        }
    } while (clock_now_ns() < until);
    atomic_fetch_add(&w->n_sleepers, 1);
    while (atomic_load(&w->value) == old)
        futex(&w->value, FUTEX_WAIT, old);
    atomic_fetch_sub(&w->n_sleepers, 1);
}

static void word_add(struct word *w)
{
    atomic_fetch_add(&w->value, 1);
    if (atomic_load(&w->n_sleepers) != 0)
        futex(&w->value, FUTEX_WAKE, INT_MAX);
}

/* The next piece after `done` that this member takes part in. */
static uint64_t piece_wait(struct cpu_team *t, int index, uint64_t done)
{
    for (;;) {
        uint32_t started = atomic_load(&t->started.value), grown = atomic_load(&t->grown.value);
        uint64_t piece = atomic_load(&t->piece);

        if (index >= PIECE_THREADS(piece))
            word_wait(&t->grown, grown);
        else if (piece == done)
            word_wait(&t->started, started);
        else
            return piece;
    }
}

static void *serve(void *arg)
{
    const struct member *m = arg;
    struct cpu_team *t = m->team;

    for (uint64_t piece = 0;;) {
        piece = piece_wait(t, m->index, piece);
        if (t->stop)
            return NULL;
        t->work(t->arg, m->index, PIECE_THREADS(piece));
        word_add(&t->finished);
    }
}

static void give_out(struct cpu_team *t, int n_threads)
{
    int grows = n_threads > t->n_now;

    t->n_now = n_threads;
    atomic_store(&t->piece, PIECE(++t->number, n_threads));
    word_add(&t->started);
    if (grows)
        word_add(&t->grown);
}

struct cpu_team *cpu_team_open(int n_threads)
{
    struct cpu_team *t = aligned_alloc(64, (sizeof(*t) + 63) / 64 * 64);

    if (n_threads > CPU_TEAM_MAX)
        BUG("a team of %d threads", n_threads);
    if (!t)
        die("out of memory");
    memset(t, 0, sizeof(*t));
    t->n_threads = n_threads;
    t->members = xcalloc((size_t)n_threads, sizeof(*t->members));
    for (int i = 0; i < n_threads - 1; i++) {
        t->members[i] = (struct member){.team = t, .index = i + 1};
        int status = pthread_create(&t->members[i].thread, NULL, serve, &t->members[i]);

        if (status)
            die("thread %d of %d cannot be had: %s; ask for fewer", i + 2, n_threads,
                strerror(status));
    }
    return t;
}

void cpu_team_run(struct cpu_team *t, int n_threads, void (*work)(void *, int, int), void *arg)
{
    uint32_t finished = atomic_load(&t->finished.value);
    uint32_t all = finished + (uint32_t)n_threads - 1;

    t->work = work;
    t->arg = arg;
    give_out(t, n_threads);
    work(arg, 0, n_threads);
    while ((finished = atomic_load(&t->finished.value)) != all)
        word_wait(&t->finished, finished);
}

void cpu_team_barrier(struct cpu_team *t)
{
    uint32_t passed = atomic_load(&t->passed.value);

    if (atomic_fetch_add(&t->n_at_barrier, 1) + 1 == (uint32_t)t->n_now) {
        atomic_store(&t->n_at_barrier, 0);
        word_add(&t->passed);
    } else {
        word_wait(&t->passed, passed);
    }
}

void cpu_team_close(struct cpu_team *t)
{
    if (!t)
        return;
    t->stop = 1;
    give_out(t, t->n_threads);
    for (int i = 0; i < t->n_threads - 1; i++)
        pthread_join(t->members[i].thread, NULL);
    free(t->members);
    free(t);
}
