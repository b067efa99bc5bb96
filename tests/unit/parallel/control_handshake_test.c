/*
 * Who gets in: the job's ranks, whoever else connects. Runs without MPI: a thread accepts, this one
 * plays workers and strangers.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <arpa/inet.h>
#include <cmocka.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/log.h"
#include "parallel/control_wire.h"

#define WORLD 3
#define PATIENCE_MS 60000 // longer than any machine is slow; nothing waits for it to pass
#define N_STRANGERS 200   // more than the pending table holds

struct gateway {
    pthread_t thread;
    struct control_address address;
    int listen_fd;
    int fds[WORLD];
};

static void *accept_all(void *arg)
{
    struct gateway *g = arg;
    control_accept(g->listen_fd, g->address.secret, WORLD, g->fds, PATIENCE_MS);
    return NULL;
}

static void start(struct gateway *g)
{
    memset(g, 0, sizeof(*g));
    memset(g->address.secret, 0x5a, sizeof(g->address.secret));
    g->listen_fd = control_listen(&g->address, NULL, 1);
    assert_int_equal(g->address.n, 1);
    assert_int_equal(pthread_create(&g->thread, NULL, accept_all, g), 0);
}

/* Every rank got a connection of its own, and it is the one that the worker holds. */
static void finish(struct gateway *g, const int worker_fds[WORLD])
{
    assert_int_equal(pthread_join(g->thread, NULL), 0);
    close(g->listen_fd);
    for (int r = 1; r < WORLD; r++) {
        char sent = (char)('a' + r), got = 0;
        assert_int_equal(write(g->fds[r], &sent, 1), 1);
        assert_int_equal(read(worker_fds[r], &got, 1), 1);
        assert_int_equal(got, sent);
        close(g->fds[r]);
        close(worker_fds[r]);
    }
}

static int stranger_connect(const struct gateway *g)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (const struct sockaddr *)&g->address.at[0], g->address.n_bytes[0]),
                     0);
    return fd;
}

/* The gateway closes on this one: end of file, or a reset when it left bytes unread. */
static void expect_closed(int fd)
{
    char byte;
    assert_true(recv(fd, &byte, 1, 0) <= 0);
    close(fd);
}

static void connect_workers(struct gateway *g, int worker_fds[WORLD])
{
    for (int r = WORLD - 1; r >= 1; r--)
        worker_fds[r] = control_connect(&g->address, r, PATIENCE_MS);
}

static void test_listens_on_loopback(void **state)
{
    (void)state;
    struct control_address a = {0};
    int fd = control_listen(&a, NULL, 1);
    const struct sockaddr_in *at = (const struct sockaddr_in *)&a.at[0];
    assert_int_equal(at->sin_family, AF_INET);
    assert_int_equal(ntohl(at->sin_addr.s_addr), INADDR_LOOPBACK);
    close(fd);
}

static void test_workers_get_in(void **state)
{
    (void)state;
    struct gateway g;
    int worker_fds[WORLD];
    start(&g);
    connect_workers(&g, worker_fds);
    finish(&g, worker_fds);
}

static void test_strangers_do_not(void **state)
{
    (void)state;
    struct gateway g;
    int worker_fds[WORLD], fds[3];
    char noise[4096], hello[FRAME_HEADER_BYTES + HELLO_BYTES] = {0};
    start(&g);

    memset(noise, 'x', sizeof(noise)); /* a browser, say */
    fds[0] = stranger_connect(&g);
    assert_true(send(fds[0], noise, sizeof(noise), MSG_NOSIGNAL) > 0);
    expect_closed(fds[0]);

    frame_header_encode((uint8_t *)hello, CONTROL_HELLO, HELLO_BYTES); /* all but the secret */
    strcpy(hello + FRAME_HEADER_BYTES + CONTROL_SECRET_BYTES, INTERNVLD_VERSION);
    hello[FRAME_HEADER_BYTES + CONTROL_SECRET_BYTES + CONTROL_VERSION_BYTES] = 1;
    fds[1] = stranger_connect(&g);
    assert_true(send(fds[1], hello, sizeof(hello), MSG_NOSIGNAL) > 0);
    expect_closed(fds[1]);

    fds[2] = stranger_connect(&g); /* gives up half-way */
    assert_true(send(fds[2], hello, 20, MSG_NOSIGNAL) > 0);
    close(fds[2]);

    connect_workers(&g, worker_fds);
    finish(&g, worker_fds);
}

static void test_silent_strangers_do_not_keep_workers_out(void **state)
{
    (void)state;
    struct gateway g;
    int worker_fds[WORLD], fds[N_STRANGERS];
    start(&g);
    for (int i = 0; i < N_STRANGERS; i++)
        fds[i] = stranger_connect(&g);
    connect_workers(&g, worker_fds);
    finish(&g, worker_fds);
    for (int i = 0; i < N_STRANGERS; i++)
        expect_closed(fds[i]);
}

static void test_missing_rank_dies(void **state)
{
    (void)state;
    int status;
    pid_t child = fork();
    if (child == 0) {
        struct control_address a = {0};
        int fds[WORLD], fd = control_listen(&a, NULL, 1);
        control_accept(fd, a.secret, WORLD, fds, 200);
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
}

static void test_frame_header(void **state)
{
    (void)state;
    uint8_t bytes[FRAME_HEADER_BYTES];
    struct frame_header h;
    frame_header_encode(bytes, CONTROL_BATCH, 0x123456789);
    assert_memory_equal(bytes, "INVL\x07\0\0\0\x89\x67\x45\x23\x01\0\0\0", sizeof(bytes));
    assert_int_equal(frame_header_decode(&h, bytes), 0);
    assert_int_equal(h.type, CONTROL_BATCH);
    assert_int_equal(h.n_bytes, 0x123456789);
    frame_header_encode(bytes, CONTROL_LOST, 0);
    assert_int_equal(frame_header_decode(&h, bytes), -1);
    frame_header_encode(bytes, CONTROL_NONE, 0);
    assert_int_equal(frame_header_decode(&h, bytes), -1);
    frame_header_encode(bytes, CONTROL_BATCH, CONTROL_MAX_BYTES + 1);
    assert_int_equal(frame_header_decode(&h, bytes), -1);
    frame_header_encode(bytes, CONTROL_BATCH, 1);
    bytes[0] ^= 1;
    assert_int_equal(frame_header_decode(&h, bytes), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_frame_header),
        cmocka_unit_test(test_listens_on_loopback),
        cmocka_unit_test(test_workers_get_in),
        cmocka_unit_test(test_strangers_do_not),
        cmocka_unit_test(test_silent_strangers_do_not_keep_workers_out),
        cmocka_unit_test(test_missing_rank_dies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
