/*
 * What /proc tells of processes made here: running, stopped, ended, gone.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "parallel/process.h"

static pid_t start_child(void)
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    while (pid == 0)
        pause();
    return pid;
}

/* Waits for the end, and leaves the zombie. */
static void end_child(pid_t pid)
{
    siginfo_t info;
    kill(pid, SIGKILL);
    assert_int_equal(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT), 0);
}

static void test_state(void **state)
{
    int status;
    (void)state;
    assert_int_equal(process_state(getpid()), 'R');
    pid_t child = start_child();
    kill(child, SIGSTOP);
    assert_int_equal(waitpid(child, &status, WUNTRACED), child);
    assert_int_equal(process_state(child), 'T');
    end_child(child);
    assert_int_equal(process_state(child), 'Z');
    waitpid(child, &status, 0);
    assert_int_equal(process_state(child), '\0');
}

static void test_children(void **state)
{
    pid_t first = start_child(), second = start_child();
    (void)state;
    struct process_children c = process_children(getpid());
    if (c.n_living == 0) {
        print_message("skipped: this kernel does not list children\n");
        end_child(first);
        end_child(second);
        return;
    }
    assert_int_equal(c.n_living, 2);
    assert_int_equal(c.n_ended, 0);
    end_child(first);
    c = process_children(getpid());
    assert_int_equal(c.n_living, 1);
    assert_int_equal(c.n_ended, 1);
    end_child(second);
    waitpid(first, NULL, 0);
    waitpid(second, NULL, 0);
    c = process_children(getpid());
    assert_int_equal(c.n_living + c.n_ended, 0);
    c = process_children(first);
    assert_int_equal(c.n_living + c.n_ended, 0);
}

static void test_read(void **state)
{
    char text[8];
    (void)state;
    memset(text, 'x', sizeof(text));
    assert_int_equal(process_read("/proc/self/nothing", text, sizeof(text)), 0);
    assert_string_equal(text, "");
    assert_int_equal(process_read("/proc/self/status", text, sizeof(text)), sizeof(text) - 1);
    assert_memory_equal(text, "Name:\tp", sizeof(text)); // cut, and ended
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_state),
        cmocka_unit_test(test_children),
        cmocka_unit_test(test_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
