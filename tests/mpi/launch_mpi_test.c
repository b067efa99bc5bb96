/*
 * What becomes of a job: started alone, drained, killed, orphaned, a rank lost. Starts launch_probe
 * and watches from outside, under mpirun or, with LAUNCH_PROBE_FORKS, without. Waits are patient,
 * and no time is asserted; how long a lost rank took is printed.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WORLD 3
#define N_LOOKS 3000 // 20 ms apart: a minute

static const char *probe;
static char dir[] = "/tmp/launch_mpi_test.XXXXXX";

static void pause_ms(long ms)
{
    const struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

static void path_of(int rank, char *path, size_t n_bytes)
{
    snprintf(path, n_bytes, "%s/%d", dir, rank);
}

static pid_t start(const char *mode, const char *arg)
{
    for (int r = 0; r < WORLD; r++) {
        char path[64];
        path_of(r, path, sizeof(path));
        unlink(path);
    }
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        setpgid(0, 0);
        execl(probe, probe, mode, arg, (char *)NULL);
        _exit(126);
    }
    return pid;
}

static int wait_status(pid_t pid)
{
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static pid_t rank_pid(int rank)
{
    char path[64];
    int pid = 0;
    path_of(rank, path, sizeof(path));
    for (int i = 0; i < N_LOOKS && pid == 0; i++) {
        FILE *f = fopen(path, "r");
        if (f && fscanf(f, "%d", &pid) != 1)
            pid = 0;
        if (f)
            fclose(f);
        else
            pause_ms(20);
    }
    assert_true(pid > 0);
    return pid;
}

/* A zombie that nobody has waited for yet counts as gone. */
static int is_alive(pid_t pid)
{
    char path[64], state = 'Z';
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    FILE *f = fopen(path, "r");
    if (!f)
        return 0;
    if (fscanf(f, "%*d (%*[^)]) %c", &state) != 1)
        state = 'Z';
    fclose(f);
    return state != 'Z' && state != 'X';
}

static void wait_ranks(pid_t pids[WORLD])
{
    for (int r = 0; r < WORLD; r++)
        pids[r] = rank_pid(r);
}

static void expect_gone(const pid_t pids[WORLD])
{
    for (int r = 0; r < WORLD; r++) {
        int i = 0;
        while (is_alive(pids[r]) && i++ < N_LOOKS)
            pause_ms(20);
        assert_false(is_alive(pids[r]));
    }
}

static void test_exit_status(void **state)
{
    (void)state;
    assert_int_equal(wait_status(start("exit", "0")), 0);
    assert_int_equal(wait_status(start("exit", "3")), 3);
}

static void test_die_ends_the_job(void **state)
{
    (void)state;
    assert_int_equal(wait_status(start("die", dir)), 1);
}

static void test_no_mpirun(void **state)
{
    (void)state;
    char *path = strdup(getenv("PATH"));
    setenv("PATH", dir, 1);
    pid_t pid = start("exit", "0");
    setenv("PATH", path, 1);
    free(path);
    assert_int_equal(wait_status(pid), getenv("LAUNCH_PROBE_FORKS") ? 0 : 1);
}

/* of_all: as a terminal does, to the process group of what was started. */
static void drain_by(int signal_number, int of_all)
{
    pid_t pids[WORLD], parent = start("serve", dir);
    wait_ranks(pids);
    for (int r = 0; r < WORLD; r++)
        assert_int_not_equal(getpgid(pids[r]), parent);
    kill(of_all ? -parent : parent, signal_number);
    assert_int_equal(wait_status(parent), 0);
    expect_gone(pids);
}

static void test_drain(void **state)
{
    (void)state;
    drain_by(SIGTERM, 0);
    drain_by(SIGINT, 1);
    drain_by(SIGUSR1, 0);
}

static void test_second_signal_kills(void **state)
{
    (void)state;
    pid_t pids[WORLD], parent = start("deaf", dir);
    wait_ranks(pids);
    kill(parent, SIGTERM);
    pause_ms(300);
    assert_int_equal(waitpid(parent, NULL, WNOHANG), 0);
    kill(parent, SIGTERM);
    assert_int_not_equal(wait_status(parent), 0);
    expect_gone(pids);
}

static void test_killed_parent_leaves_no_orphans(void **state)
{
    (void)state;
    pid_t pids[WORLD], parent = start("serve", dir);
    wait_ranks(pids);
    kill(parent, SIGKILL);
    assert_int_equal(wait_status(parent), -SIGKILL);
    expect_gone(pids);
}

static void lose_rank(int rank, int signal_number)
{
    pid_t pids[WORLD], parent = start("serve", dir);
    struct timespec start_time, end_time;
    wait_ranks(pids);
    clock_gettime(CLOCK_MONOTONIC, &start_time);
    kill(pids[rank], signal_number);
    int status = wait_status(parent);
    clock_gettime(CLOCK_MONOTONIC, &end_time);
    printf("rank %d got signal %d: the job left with %d after %.2f s\n", rank, signal_number,
           status,
           (double)(end_time.tv_sec - start_time.tv_sec) +
               1e-9 * (double)(end_time.tv_nsec - start_time.tv_nsec));
    assert_true(status > 0);
    expect_gone(pids);
}

static void test_killed_rank_ends_the_job(void **state)
{
    (void)state;
    lose_rank(2, SIGKILL);
    lose_rank(0, SIGKILL);
}

static void test_hung_rank_ends_the_job(void **state)
{
    (void)state;
    lose_rank(1, SIGSTOP);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exit_status),
        cmocka_unit_test(test_die_ends_the_job),
        cmocka_unit_test(test_no_mpirun),
        cmocka_unit_test(test_drain),
        cmocka_unit_test(test_second_signal_kills),
        cmocka_unit_test(test_killed_parent_leaves_no_orphans),
        cmocka_unit_test(test_killed_rank_ends_the_job),
        cmocka_unit_test(test_hung_rank_ends_the_job),
    };
    if (argc != 2 || !mkdtemp(dir))
        return 2;
    probe = argv[1];
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    for (int r = 0; r < WORLD; r++) {
        char path[64];
        path_of(r, path, sizeof(path));
        unlink(path);
    }
    rmdir(dir);
    return rc;
}
