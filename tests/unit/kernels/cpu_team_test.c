/*
 * A team's pieces of work of every size, one after the other: each thread that one is given to runs
 * it once, no other does, and barriers hold. And what ranks that share cores take of them.
 */
#include "kernels/cpu_team.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/cpu_cores.h"

#define N_THREADS 5
#define N_PIECES 4000

struct piece {
    struct cpu_team *team;
    _Atomic int n_runs[N_THREADS]; // of each thread
    _Atomic int n_before;          // that came to the barrier
    _Atomic int n_early;           // that passed it before all had come
    int n_threads;
};

static void run_piece(void *arg, int thread, int n_threads)
{
    struct piece *p = arg;

    atomic_fetch_add(&p->n_runs[thread], 1);
    if (n_threads != p->n_threads)
        atomic_fetch_add(&p->n_runs[thread], 100);
    atomic_fetch_add(&p->n_before, 1);
    cpu_team_barrier(p->team);
    if (atomic_load(&p->n_before) != n_threads)
        atomic_fetch_add(&p->n_early, 1);
}

static void test_pieces_of_every_size(void **state)
{
    struct cpu_team *team = cpu_team_open(N_THREADS);
    unsigned seed = 7;

    (void)state;
    for (int i = 0; i < N_PIECES; i++) {
        struct piece p = {.team = team, .n_threads = 1 + rand_r(&seed) % N_THREADS};

        cpu_team_run(team, p.n_threads, run_piece, &p);
        for (int t = 0; t < N_THREADS; t++)
            assert_int_equal(atomic_load(&p.n_runs[t]), t < p.n_threads);
        assert_int_equal(atomic_load(&p.n_early), 0);
        if (i % 512 == 0)
            usleep(1000); /* all fall asleep */
    }
    cpu_team_close(team);
    cpu_team_close(NULL);
}

static void test_shares_of_cores(void **state)
{
    struct core_claim claims[3] = {{0}};
    struct cpu_cores of[3], alone = {.n_cores = 8};

    (void)state;
    for (int i = 0; i < 3; i++)
        of[i] = (struct cpu_cores){.claims = claims, .n_ranks = 3, .mine = i, .n_cores = 8};
    cpu_cores_claim(&alone);
    cpu_cores_release(&alone, 5);
    assert_int_equal(cpu_cores_share(&alone, 5), 8);
    assert_int_equal(cpu_cores_share(&of[0], 5), 8);
    cpu_cores_claim(&of[0]); /* one's own does not count twice */
    assert_int_equal(cpu_cores_share(&of[0], 5), 8);
    assert_int_equal(cpu_cores_share(&of[1], 5), 4);
    cpu_cores_claim(&of[1]);
    assert_int_equal(cpu_cores_share(&of[2], 5), 2); /* 8 by 3 */
    cpu_cores_release(&of[0], 10);
    assert_int_equal(cpu_cores_share(&of[1], 10), 4); /* a pause between two steps */
    assert_int_equal(cpu_cores_share(&of[1], 10 + CPU_CORES_LINGER_NS), 8);
    of[2].n_cores = 2;
    cpu_cores_claim(&of[0]);
    assert_int_equal(cpu_cores_share(&of[2], 5), 1); /* never none */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pieces_of_every_size),
        cmocka_unit_test(test_shares_of_cores),
    };
    return cmocka_run_group_tests_name("cpu_team", tests, NULL, NULL);
}
