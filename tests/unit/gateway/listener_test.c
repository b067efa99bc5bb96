/* listener: addresses, the cap on connections, and life after the file descriptors ran out. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "daemon/gateway/listener.h"

static atomic_int n_accepted, last_fd;

static void accepted(void *arg, int fd)
{
    (void)arg;
    atomic_store(&last_fd, fd);
    atomic_fetch_add(&n_accepted, 1);
}

static int connect_to(const struct listener *l)
{
    struct sockaddr_in a = {.sin_family = AF_INET};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    a.sin_port = htons((uint16_t)atoi(strrchr(listener_address(l), ':') + 1));
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    return fd;
}

static void wait_accepted(int n)
{
    for (int i = 0; i < 5000 && atomic_load(&n_accepted) < n; i++)
        poll(NULL, 0, 1);
    assert_int_equal(atomic_load(&n_accepted), n);
}

static void wait_closed(int fd)
{
    char byte;

    assert_int_equal(read(fd, &byte, 1), 0);
    close(fd);
}

static void test_addresses(void **state)
{
    (void)state;
    struct error err = {0};

    assert_int_equal(listener_is_local("127.0.0.1:0", &err), 1);
    assert_int_equal(listener_is_local("[::1]:50051", &err), 1);
    assert_int_equal(listener_is_local("localhost:1", &err), 1);
    assert_int_equal(listener_is_local("unix:/tmp/x", &err), 1);
    assert_int_equal(listener_is_local("0.0.0.0:50051", &err), 0);
    assert_int_equal(listener_is_local("[::]:50051", &err), 0);
    assert_int_equal(listener_is_local("127.0.0.1", &err), -1);
    assert_int_equal(listener_is_local(":50051", &err), -1);
    assert_int_equal(listener_is_local("127.0.0.1:http", &err), -1);
    assert_int_equal(listener_is_local("", &err), -1);
}

static void test_taken_port(void **state)
{
    (void)state;
    struct error err = {0};
    struct listener *l = listener_open("127.0.0.1:0", 8, &err);

    assert_non_null(l);
    assert_null(listener_open(listener_address(l), 8, &err));
    assert_int_equal(err.code, ERROR_UNAVAILABLE);
    listener_close(l);
}

static void test_unix(void **state)
{
    (void)state;
    struct error err = {0};
    char directory[] = "/tmp/internvld_unix_XXXXXX";
    char address[64], *path;

    assert_non_null(mkdtemp(directory));
    snprintf(address, sizeof(address), "unix:%s/s", directory);
    path = address + 5;
    struct listener *l = listener_open(address, 8, &err);
    assert_non_null(l);
    assert_null(listener_open(address, 8, &err)); // somebody answers there
    assert_int_equal(access(path, F_OK), 0);
    listener_close(l);
    assert_int_equal(access(path, F_OK), -1);
    rmdir(directory);
}

static void test_cap(void **state)
{
    (void)state;
    struct error err = {0};
    struct listener *l = listener_open("127.0.0.1:0", 2, &err);
    int fds[2];

    atomic_store(&n_accepted, 0);
    listener_start(l, accepted, NULL);
    for (int i = 0; i < 2; i++) {
        fds[i] = connect_to(l);
        wait_accepted(i + 1);
    }
    wait_closed(connect_to(l));   // the third is turned away
    close(atomic_load(&last_fd)); // the server's side of one ends
    int again = connect_to(l);
    wait_accepted(3);
    close(again);
    close(fds[0]);
    close(fds[1]);
    listener_close(l);
}

static void test_no_descriptors(void **state)
{
    (void)state;
    struct error err = {0};
    struct listener *l = listener_open("127.0.0.1:0", 1000, &err);
    struct rlimit old, low;
    int held[64], n_held = 0;

    atomic_store(&n_accepted, 0);
    listener_start(l, accepted, NULL);
    int first = connect_to(l);
    wait_accepted(1);
    int waiting = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0); // made while there is room
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
    low = old;
    low.rlim_cur = 64;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
    while (n_held < 64 && (held[n_held] = dup(0)) >= 0)
        n_held++;
    struct sockaddr_in a = {.sin_family = AF_INET};
    a.sin_port = htons((uint16_t)atoi(strrchr(listener_address(l), ':') + 1));
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert_int_equal(connect(waiting, (struct sockaddr *)&a, sizeof(a)), 0);
    wait_closed(waiting); // refused, not left hanging
    while (n_held > 0)
        close(held[--n_held]);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
    int after = connect_to(l);
    wait_accepted(2); // and the listener still accepts
    close(after);
    close(first);
    listener_close(l);
}

/* What has arrived is still read; then the stream ends, and its owner may still write. */
static void test_end_reading(void **state)
{
    (void)state;
    struct error err = {0};
    struct listener *l = listener_open("127.0.0.1:0", 8, &err);
    char bytes[2];

    atomic_store(&n_accepted, 0);
    listener_start(l, accepted, NULL);
    int client = connect_to(l);
    wait_accepted(1);
    int served = atomic_load(&last_fd);
    assert_int_equal(write(client, "a", 1), 1);
    for (int i = 0; i < 5000 && recv(served, bytes, 1, MSG_PEEK) != 1; i++)
        poll(NULL, 0, 1);
    listener_stop(l);
    assert_int_equal(listener_n_connections(l), 1);
    listener_end_reading(l);
    assert_int_equal(read(served, bytes, 2), 1);
    assert_int_equal(read(served, bytes, 2), 0);
    assert_int_equal(write(served, "b", 1), 1);
    assert_int_equal(read(client, bytes, 2), 1);
    close(served);
    assert_int_equal(listener_n_connections(l), 0);
    close(client);
    listener_close(l);
}

/* What the peer's buffer does not take counts as unsent until the peer reads. */
static void test_unsent(void **state)
{
    (void)state;
    struct error err = {0};
    struct listener *l = listener_open("127.0.0.1:0", 8, &err);
    static char bytes[1 << 16];
    ssize_t n;

    atomic_store(&n_accepted, 0);
    listener_start(l, accepted, NULL);
    int client = connect_to(l);
    wait_accepted(1);
    int served = atomic_load(&last_fd);
    listener_stop(l);
    assert_int_equal(listener_n_unsent(l), 0);
    while (write(served, bytes, sizeof(bytes)) > 0) // non-blocking
        ;
    assert_int_equal(listener_n_unsent(l), 1);
    for (int i = 0; i < 5000 && listener_n_unsent(l) > 0; i++) {
        while ((n = recv(client, bytes, sizeof(bytes), MSG_DONTWAIT)) > 0)
            ;
        poll(NULL, 0, 1);
    }
    assert_int_equal(listener_n_unsent(l), 0);
    close(served);
    close(client);
    listener_close(l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_addresses),      cmocka_unit_test(test_taken_port),
        cmocka_unit_test(test_unix),           cmocka_unit_test(test_cap),
        cmocka_unit_test(test_no_descriptors), cmocka_unit_test(test_end_reading),
        cmocka_unit_test(test_unsent),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
