/*
 * Memory offered by one process and mapped by another: what one writes the other reads; an offer
 * that is not what it says is refused.
 */
#include "parallel/host_memory.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define N_BYTES 65536

static void test_shared(void **state)
{
    struct host_memory offer;
    int status;

    (void)state;
    host_memory_offer(&offer, N_BYTES);
    assert_int_equal(offer.n_bytes, N_BYTES);
    volatile char *mine = host_memory_map(&offer);
    assert_non_null(mine);
    assert_int_equal(mine[0], 0);
    assert_int_equal(mine[N_BYTES - 1], 0);
    mine[1] = 3;
    pid_t child = fork();
    if (child == 0) {
        volatile char *theirs;

        close(offer.fd); /* it has the parent's, as any other process */
        theirs = host_memory_map(&offer);
        if (theirs && theirs[1] == 3)
            theirs[N_BYTES - 1] = 7;
        _exit(theirs ? 0 : 1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_int_equal(mine[N_BYTES - 1], 7);
}

static void test_refused(void **state)
{
    struct host_memory offer, other, nothing = {0};

    (void)state;
    host_memory_offer(&offer, N_BYTES);
    host_memory_offer(&other, N_BYTES);
    assert_null(host_memory_map(&nothing));
    other.fd = offer.fd; /* another file by that number */
    assert_null(host_memory_map(&other));
    other.fd = 1 << 20;
    assert_null(host_memory_map(&other));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shared),
        cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests_name("host_memory", tests, NULL, NULL);
}
